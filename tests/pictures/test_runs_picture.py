"""The picture of runs: dashed lines for values at the start, words in the strip of verdicts, the verdict alone."""

import json

import pytest

from cplearn.pictures import panels, runs, runs_picture
from cplearn.pictures.panels import PANELS
from cplearn.pictures.style import pyplot
from cplearn.probe import verdict

BY_TITLE = {panel.title: panel for panel in PANELS}


def run_of(folder, verdicts, start=True):
    """A run whose participation ratio falls from 9 and 30 at the start, with these verdicts."""
    folder.mkdir()
    known = {"start_features_dimensions": 9.0, "start_embedding_dimensions": 30.0, "start_view_nearness": 0.1}
    at_start = known if start else {}
    lines = [
        {"epoch": e, "step": e + 1, "probe_features_dimensions": 7.0 - e, "probe_embedding_dimensions": 20.0 - e,
         "probe_view_nearness": 0.1 + e / 100, "train_loss": 2.0, "lr": 0.1, "verdict": verdict, **at_start}
        for e, verdict in enumerate(verdicts)
    ]  # fmt: skip
    (folder / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return runs.read_runs([str(folder)])[0]


@pytest.fixture
def axes():
    figure, axes = pyplot().subplots()
    yield axes
    pyplot().close(figure)


def dashed(axes):
    return [line.get_ydata()[0] for line in axes.get_lines() if line.get_linestyle() == "--" and len(line.get_ydata())]


@pytest.mark.parametrize("start, expected", [(True, [9, 30]), (False, [])])
def test_values_at_the_start_are_dashed_lines(tmp_path, axes, start, expected):
    run = run_of(tmp_path / "a", ["learning"] * 3, start)
    runs_picture.draw_panel(axes, BY_TITLE["Participation ratio"], [run], "epochs")
    assert dashed(axes) == expected
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == ["features", "embedding", *["at the start"] * start]
    assert [line.get_linestyle() for line in axes.get_lines() if len(line.get_xdata()) > 2] == ["-", ":"]
    first = axes.get_lines()[0].get_xydata().tolist()
    assert first == [*[[0, 9]] * start, [1, 7], [2, 6], [3, 5]]


def test_what_is_not_known_from_the_start_has_no_line(tmp_path, axes):
    runs_picture.draw_panel(axes, BY_TITLE["Loss"], [run_of(tmp_path / "a", ["learning"] * 3)], "epochs")
    assert dashed(axes) == [] and axes.get_legend() is None


def test_long_spans_of_a_verdict_bear_its_name(tmp_path, axes):
    run = run_of(tmp_path / "a", ["no better than at the start"] + ["learning"] * 18 + ["_odd_one$"])
    runs_picture.draw_verdicts(axes, [run], "epochs")
    assert [text.get_text() for text in axes.texts] == ["learning"]  # the others have no room
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == ["learning", "no better than at the start", r" _odd_one\$"]


def test_every_verdict_has_a_color_of_its_own():
    names = [*verdict.WARNINGS, verdict.LEARNING, verdict.NO_ALARM, verdict.TOO_SHORT]
    assert sorted(names) == sorted(panels.VERDICTS) and set(panels.DARK) < set(names)
    assert len({*panels.VERDICTS.values(), panels.OTHER}) == len(names) + 1


def test_the_verdict_alone_is_a_shorter_picture(tmp_path):
    run = run_of(tmp_path / "a", ["learning"] * 3)
    whole, short = (runs_picture.draw([run], "epochs", only_verdict=x) for x in (False, True))
    assert whole.get_figheight() > short.get_figheight()  # without the loss
    used = {field for panel in PANELS if panel.verdict for field in panel.curves}
    judged = (verdict.SCORE, *verdict.KEPT, "agreement", "codes_used")
    assert {f"probe_{name}" for name in judged} <= used
    pyplot().close("all")
