"""What a reader needs to read the t-SNE: names of classes and codes, or how many there are."""

import numpy as np
import pytest
import torch
from helpers import randn

from cplearn.features.splits import Features
from cplearn.pictures import collapse
from cplearn.pictures.style import COLORS, pyplot


def points(n_classes: int, codes: list[int] | None = None):
    """Return figure and axis with 200 points drawn, named as in the figure."""
    n = 200
    labels = torch.arange(n) % n_classes if n_classes else torch.full((n,), -1)
    classes = [f"class {k}" for k in range(n_classes)] or None
    data = Features(
        randn(n, 5), labels, None if codes is None else torch.tensor(codes), [""] * n, classes, 9999, "", {}
    )
    figure, axis = pyplot().subplots()
    collapse.draw_points(axis, randn(n, 2).numpy(), data, np.arange(n))
    if classes:
        collapse.name_classes(figure, [axis], classes)
    drawn = sum(len(c.get_offsets()) for c in axis.collections)
    pyplot().close(figure)
    assert drawn == n
    return figure, axis


@pytest.mark.parametrize("n_classes", [2, 10, 20])
def test_up_to_20_classes_have_a_legend_of_different_looks(n_classes):
    figure, axis = points(n_classes)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [f"class {k}" for k in range(n_classes)]
    assert len({(h.get_color(), h.get_marker()) for h in legend.legend_handles}) == n_classes
    assert axis.get_xlabel() == f"200 images of {n_classes} classes"


def test_a_point_looks_like_its_class_in_the_legend():
    from matplotlib.colors import to_hex

    _, axis = pyplot().subplots()
    place, groups = randn(40, 2).numpy(), np.arange(40) % 13
    collapse.draw_groups(axis, place, groups, 8)
    looks = {}
    for marker, drawn in zip("o^", axis.collections, strict=True):
        for at, color in zip(drawn.get_offsets(), drawn.get_facecolors(), strict=True):
            looks[tuple(np.round(at, 6))] = (to_hex(color), marker)
    for at, k in zip(place, groups, strict=True):
        look = collapse.look_of(k)
        assert looks[tuple(np.round(at, 6))] == (look["color"].lower(), look["marker"])
    pyplot().close("all")


def test_many_classes_have_a_color_bar_that_names_some():
    figure, axis = points(100)
    bar = figure.axes[-1]
    assert not figure.legends and bar.get_ylabel() == "100 classes, in their order"
    names = [text.get_text() for text in bar.get_yticklabels()]
    assert names[0] == "class 0" and names[-1] == "class 99" and len(names) == 6


def test_without_classes_the_most_used_codes_are_named():
    _, axis = points(0, [k % 13 for k in range(143)] + [500 + k for k in range(57)])
    names = [text.get_text() for text in axis.get_legend().get_texts()]
    assert names[0] == "60 other codes (90)"  # 3 x 11 images and 57 codes of one
    assert names[1:] == [f"code {k} (11)" for k in range(len(COLORS))]
    _, axis = points(0, list(range(200)))
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["200 codes"]
    _, axis = points(0)
    assert axis.get_xlabel() == "200 images, without classes and codes"
