"""The analysis of collapse on a real run: figures, files, wrong flags."""

import json

import numpy as np
import pytest
from helpers import eval_flags
from PIL import Image

import eval_collapse
from cplearn.errors import UserError
from cplearn.evaluation.collapse_figures import FIGURES, as_text


def test_the_script_draws_and_writes_everything(run, tmp_path, capsys):
    both = [str(run / "checkpoint.pth"), str(run / "checkpoint_previous.pth")]
    common = eval_flags(run, tmp_path)[2:]
    results = eval_collapse.main(
        ["--checkpoints", *both, "--labels", "last", "before", *common, "--components", "2", "20", "--mc_samples", "50"]
    )
    assert list(results) == ["last", "before", "random init"]
    said = capsys.readouterr().out
    assert "mixture of 20: more components than the 12 images" in said
    assert "codes.png, matrices.png, mixture.png, spectrum.png, tsne.png" in said
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [x["metrics"]["label"] for x in lines] == list(results) and lines[-1]["random_init"]
    assert lines[0]["metrics"]["images"] == 12 and lines[0]["metrics"]["mixture20_entropy"] is None
    for name in FIGURES:
        with Image.open(tmp_path / f"{name}.png") as image:
            assert min(image.size) > 300
            assert len(image.convert("L").getcolors()) > 10  # something is drawn
    spectrum = (tmp_path / "spectrum.csv").read_text().splitlines()
    assert spectrum[0] == "network,of,index,singular value" and len(spectrum) == 1 + 3 * (8 + 8)
    cosines = np.loadtxt(tmp_path / "matrices_3_random_init_cosines.csv", delimiter=",")
    assert cosines.shape == (12, 12) and np.allclose(np.diag(cosines), 1)
    assert len((tmp_path / "tsne.csv").read_text().splitlines()) == 1 + 3 * 12


def test_the_baseline_and_slow_parts_can_be_left_out(run, tmp_path):
    results = eval_collapse.main(
        [*eval_flags(run, tmp_path), "--baseline", "false", "--components", "--tsne_images", "0", "--split", "train"]
    )
    ((_, found),) = results.items()
    assert found["images"] == 48 and found["codes_used"] <= 40 and not any("mixture" in k for k in found)
    assert sorted(p.name for p in tmp_path.glob("*.png")) == ["codes.png", "matrices.png", "spectrum.png"]


def test_labels_are_shown_as_they_are(run, tmp_path):
    """Not as formulas of matplotlib or of a spreadsheet, and not as names of files."""
    label = r"_$\bad$/" + "x" * 300
    both = ["--checkpoints", *[str(run / name) for name in ("checkpoint.pth", "checkpoint_previous.pth")]]
    more = ["--labels", label, "=1+1 $", "--baseline", "false", "--components", "2", "--mc_samples", "50"]
    results = eval_collapse.main([*both, *more, *eval_flags(run, tmp_path)[2:]])
    assert list(results) == [label, "=1+1 $"]
    for name in ("spectrum", "mixture", "codes", "tsne"):
        lines = (tmp_path / f"{name}.csv").read_text().splitlines()
        assert lines[1].startswith(label) and lines[-1].startswith("'=1+1 $,")


def test_text_for_figures():
    from matplotlib.cbook import is_math_text

    for words in ("$x$", r"\$x$", "a$b", "$$$", "_hidden"):
        assert not is_math_text(as_text(words)) and not as_text(words).startswith("_")
    assert len(as_text("x" * 300)) == 60


@pytest.mark.parametrize(
    "more, message",
    [
        (("--labels", "a", "b"), "--labels names 2 networks, there are 1"),
        (("--labels", "random init"), "they must differ"),
        (("--components", "0"), "--components 0 must be positive"),
        (("--mc_samples", "1"), "--mc_samples 1 must be at least 2"),
        (("--tsne_images", "-1"), "--tsne_images -1 must be at least 5"),
        (("--checkpoints", "x.pth"), "give one of them"),
        (("--seed", "4294967296"), "--seed 4294967296 must not be negative, and be below"),
        (("--pretrained_weights", ""), "--pretrained_weights is missing"),
        (("--pretrained_weights", "/nowhere.pth"), "--pretrained_weights /nowhere.pth does not exist"),
    ],
)
def test_wrong_flags_are_refused(run, tmp_path, more, message):
    with pytest.raises(UserError, match=message):
        eval_collapse.main([*eval_flags(run, tmp_path), *more])


def test_networks_are_named_by_what_tells_them_apart():
    assert eval_collapse.names_of(["/a/b/checkpoint.pth"]) == ["b"]
    assert eval_collapse.names_of(["/a/x/c.pth", "/b/x/c.pth"]) == ["a/x", "b/x"]
    assert eval_collapse.names_of(["/a/x/1.pth", "/a/x/2.pth"]) == ["1: 1.pth", "2: 2.pth"]
