"""Logs of runs as they are found: half written, resumed, old, of runs that train now, and of no run at all."""

import json

import pytest

from cplearn.errors import UserError
from cplearn.pictures import runs
from cplearn.pictures.panels import CURVES, LEVELS, PANELS


def write(folder, records, rest=""):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.txt").write_text("".join(json.dumps(r) + "\n" for r in records) + rest)
    return str(folder)


def record(epoch, **more):
    return {"epoch": epoch, "step": 10 * (epoch + 1), "train_loss": 5.0 - epoch, "seconds": 1800.0, **more}


def test_curves_over_finished_epochs_steps_and_hours(tmp_path):
    (run,) = runs.read_runs([write(tmp_path / "a", [record(0), record(1, monitor_seconds=900.0)])])
    assert run.name == "a" and run.axes == {"epochs": [1, 2], "steps": [10, 20], "hours": [0.5, 1.25]}
    assert run.points("hours", "train_loss") == [(0.5, 5.0), (1.25, 4.0)] and run.last("train_loss") == 4
    assert run.last("probe_knn20") is None and run.verdicts == ["", ""] and not run.start


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    folder = write(tmp_path / "a", [record(0)], '{"epoch": 1, "train_lo')
    (run,) = runs.read_runs([folder])
    assert run.axes["epochs"] == [1] and runs.read_runs([f"{folder}/log.txt"]) == [run]


def test_of_epochs_that_repeat_the_last_count(tmp_path):
    """Also those after them are of the past: a run that goes on from epoch 1 has not reached epoch 2 yet."""
    again = [record(e, train_loss=float(loss)) for e, loss in ((0, 9), (1, 8), (2, 7), (0, 6), (1, 5))]
    (run,) = runs.read_runs([write(tmp_path / "a", again)])
    assert run.points("epochs", "train_loss") == [(1, 6), (2, 5)]


def test_the_numbers_before_the_first_step_are_the_first_point(tmp_path):
    later = [record(e, probe_view_nearness=1.0 + e, start_view_nearness=0.5, start_knn20=0.3) for e in (0, 1)]
    (run,) = runs.read_runs([write(tmp_path / "a", later)])
    assert run.start and run.points("epochs", "probe_view_nearness") == [(0, 0.5), (1, 1), (2, 2)]
    assert run.points("steps", "probe_view_nearness") == [(0, 0.5), (10, 1), (20, 2)]
    assert run.axes["hours"] == [0, 0.5, 1]
    assert run.points("epochs", "probe_knn20") == [(0, 0.3)] and run.points("epochs", "train_loss")[0][0] == 1
    (run,) = runs.read_runs([write(tmp_path / "b", [record(0, probe_view_nearness=1.0)])])  # an older log
    assert not run.start and run.points("epochs", "probe_view_nearness") == [(1, 1)]


def test_what_is_no_number_is_no_point(tmp_path):
    odd = [None, "5", True, float("nan"), float("inf"), 10**400, [1], {}, 3]
    (run,) = runs.read_runs([write(tmp_path / "a", [record(e, lr=x) for e, x in enumerate(odd)])])
    assert run.points("epochs", "lr") == [(9, 3)]
    lines = ['{"epoch": "0"}', '{"epoch": 0.5}', '{"epoch": null}', "[]", "7", '"x"', "{}", '{"epoch": true}', ""]
    (run,) = runs.read_runs([write(tmp_path / "b", [record(0)], "\n".join(lines) + "\n")])
    assert run.axes["epochs"] == [1]


def test_a_logarithmic_axis_has_no_place_for_zero(tmp_path):
    (run,) = runs.read_runs([write(tmp_path / "a", [record(0, usage_perplexity=0), record(1, usage_perplexity=4)])])
    assert run.points("epochs", "usage_perplexity", positive=True) == [(2, 4)]
    assert run.points("epochs", "usage_perplexity") == [(1, 0), (2, 4)]


def test_an_old_log(tmp_path):
    (run,) = runs.read_runs([write(tmp_path / "a", [{"epoch": 0, "train_loss": 2.0}])])
    assert run.points("epochs", "train_loss") == [(1, 2)]
    assert run.points("steps", "train_loss") == [] and run.points("hours", "train_loss") == []


def test_names(tmp_path):
    paths = [write(tmp_path / x, [record(0)]) for x in ("a/run", "b/run")]
    assert [run.name for run in runs.read_runs(paths)] == ["a/run", "b/run"]
    assert [run.name for run in runs.read_runs(paths, ["x", "y"])] == ["x", "y"]


@pytest.mark.parametrize(("name", "content"), [("log.txt", ""), ("args.json", "{}"), ("log.txt", '{"epoch": 0, "tr')])
def test_a_run_in_its_first_epoch(tmp_path, capsys, name, content):
    done, early = write(tmp_path / "done", [record(0)]), tmp_path / "early"
    early.mkdir()
    (early / name).write_text(content)
    with pytest.raises(UserError, match="early/log.txt"):
        runs.read_runs([str(early)])
    assert [run.name for run in runs.read_runs([str(early), done])] == ["done"]
    assert "early/log.txt" in capsys.readouterr().err


def test_what_is_no_run(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "notes.txt").write_text("loss\t1\n")
    good = write(tmp_path / "good", [record(0)])
    other = write(tmp_path / "other", [record(0)])
    for given, labels, named in (
        ([""], None, "RUN ''"),
        ([str(tmp_path / "no")], None, "RUN .*/no"),
        ([str(tmp_path / "folder")], None, "RUN .*/folder"),
        ([str(tmp_path / "notes.txt")], None, "RUN .*/notes.txt"),
        ([good, f"{good}/log.txt"], None, "/good/log.txt .*twice"),
        ([good], ["a", "b"], "--labels .*2 .* 1"),
        ([good, other], ["a", "a"], "--labels a a"),
    ):
        with pytest.raises(UserError, match=named):
            runs.read_runs(given, labels)


def test_rows_of_numbers(tmp_path):
    paths = [
        write(tmp_path / "a", [record(0, out_dim=40, verdict="learning")]),
        write(tmp_path / "b", [record(0), record(1)]),
    ]
    header, rows = runs.csv_table(runs.read_runs(paths))
    assert header[:4] == ["run", "epochs", "steps", "hours"] and header[-1] == "verdict" and len(rows) == 3
    first = dict(zip(header, rows[0], strict=True))
    assert (
        first["train_loss"] == 5 and first["out_dim"] == 40 and first["verdict"] == "learning" and first["lr"] is None
    )
    assert [row[0] for row in rows] == ["a", "b", "b"] and {len(row) for row in rows} == {len(header)}


def test_every_field_of_a_panel_is_logged(run):
    """By a real run, so that no panel waits for a name that does not exist."""
    (found,) = runs.read_runs([str(run)])
    later = {name for name in (*CURVES, *LEVELS) if name.startswith("probe_")}  # after step 30, or with --knn_freq
    assert [name for name in (*CURVES, *LEVELS) if found.last(name) is None and name not in later] == []
    assert found.last("out_dim") == 40 and len({panel.title for panel in PANELS}) == len(PANELS)
