"""What a reader needs to read the t-SNE: names of classes or codes, each with a look of its own."""

import numpy as np
import pytest
import torch
from helpers import randn
from matplotlib.colors import to_hex

from cplearn.features.splits import Features
from cplearn.metrics.analysis import Network
from cplearn.pictures import collapse
from cplearn.pictures.style import pyplot


def points(n_classes: int, codes: list[int] | None = None):
    """Return the axis with 200 points drawn, named as in the figure, and the look of each point."""
    n = 200
    labels = torch.arange(n) % n_classes if n_classes else torch.full((n,), -1)
    classes = [f"class {k}" for k in range(n_classes)] or None
    codes = None if codes is None else torch.tensor(codes)
    data = Features(randn(n, 5), labels, codes, [""] * n, classes, 9999, "", {})
    _, axis = pyplot().subplots()
    place = randn(n, 2).numpy()
    collapse.draw_points(axis, place, Network("", data), np.arange(n))
    looks = {}
    for drawn in axis.collections:
        for at in drawn.get_offsets():
            looks[tuple(at)] = (to_hex(drawn.get_facecolor()[0]), drawn.get_paths()[0].vertices.shape)
    pyplot().close("all")
    return axis, [looks[tuple(at)] for at in place]


def names(axis) -> list[str]:
    return [text.get_text() for text in axis.get_legend().get_texts()]


@pytest.mark.parametrize("n_classes", [2, 10, 20, 30])
def test_up_to_20_classes_have_a_look_of_their_own(n_classes):
    axis, looks = points(n_classes)
    named = min(n_classes, 20)
    assert len(set(looks)) == named + (n_classes > 20)
    assert all(looks[k] == looks[k + n_classes] for k in range(n_classes))
    words = [name.rpartition(" (")[0] for name in names(axis) if name != "all others"]
    assert words == [f"class {k}" for k in range(named)] and ("all others" in names(axis)) == (n_classes > 20)


def test_without_classes_the_most_used_codes_are_named():
    axis, looks = points(0, [k % 22 for k in range(154)] + [500 + k for k in range(46)])
    assert names(axis) == ["all others", *(f"{k} (7)" for k in range(20))]
    assert looks[20] == looks[21] == looks[199] and len(set(looks)) == 21
    axis, looks = points(0)
    assert axis.get_legend() is None and len(set(looks)) == 1
