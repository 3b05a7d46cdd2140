"""Trials: how they are drawn, which is the best, and what happens to the table's cells."""

import json
import math
import shutil

import numpy as np
import pytest
from grids import finish, grid_of
from helpers import write_images
from scipy.stats import qmc

import main_cplearn
import reproduce_table3
from cplearn.errors import UserError
from cplearn.tables import trial_rule, tuning
from cplearn.tables.grid import Grid
from cplearn.tables.rows import rows
from cplearn.tables.run import Share
from cplearn.tables.status import State, snapshot


def drawn(method: str, trial: int, out_dim: int = 1024) -> dict:
    """Return the parsed flags of a trial at small scale."""
    (row,) = rows(3, "small", [method], [out_dim], "cifar10")
    return vars(main_cplearn.parse_args([*trial_rule.tuned(row, trial).flags, "--data_path", "."]))


# --- the rule ---------------------------------------------------------------------------------------------


RANGES = {  # the ends of an interval, or all values
    "cplearn": {"beta": (0.05, 1), "n_ref": {1, 4, 16, 64}},
    "barlow_twins": {"lambd": (0.0005, 0.052), "projector_width": {512, 1024, 2048}},
    "dino": {"teacher_temp": (0.02, 0.07), "momentum_teacher": (0.9, 0.999)},
    "swav": {"epsilon": (0.02, 0.1), "queue_length": {0, 960, 3840}},
    "gedi": {"beta": (0.0999, 1.005), "gedi_prior_reduction": {"mean", "sum"}},  # beta times log c
}


@pytest.mark.parametrize("method", trial_rule.RULE)
def test_every_draw_is_in_its_range(method):
    """Trials differ from each other, and from the recipe, in every setting; nothing else differs."""
    lr = drawn(method, 0)["lr"]
    ranges = {"lr": (lr / 4, 4 * lr)} | RANGES[method]
    draws = []
    for out_dim in (16, 1024, 131072):
        as_it_stands = drawn(method, 0, out_dim)
        for x in (drawn(method, trial, out_dim) for trial in range(1, 9)):
            assert {k for k, v in x.items() if v != as_it_stands[k]} <= ranges.keys()
            draws.append(x | {"beta": x["beta"] * math.log(out_dim)} if method == "gedi" else x)
    for name, values in ranges.items():
        own = [x[name] for x in draws]
        assert len(set(own[:8])) > 1, name
        assert all(x in values if isinstance(values, set) else values[0] <= x <= values[1] for x in own), (name, own)


def test_trial_0_is_the_recipe_and_draws_are_repeatable():
    assert trial_rule.trial_flags("dino", 0, 1024, 0.004) == []
    drawn_before = "--lr 0.008 --teacher_temp 0.023 --momentum_teacher 0.98415"  # what has been measured
    assert trial_rule.trial_flags("dino", 3, 1024, 0.004) == drawn_before.split()
    assert trial_rule.trial_flags("gedi", 1, 1024, 0.0004)[:2] == ["--lr", "0.0004"]  # the middle


def test_places_leave_no_large_gaps():
    for axis in range(3):
        for n in (4, 6, 8, 16):
            places = [trial_rule.point(k)[axis] for k in range(1, n + 1)]
            assert places == pytest.approx(qmc.Halton(3, scramble=False).random(n + 1)[1:, axis].tolist())
            assert max(np.diff([0, *sorted(places), 1])) < 2 / n + 0.2 * (n < 5), (axis, n)


# --- the trials -------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            write_images(tmp_path / "data" / part / name, 5, (8, 8))
    return tmp_path


def grid_in(folder, more: str = "--tune 3") -> Grid:
    """Return the table's cells as they stand, for --tune 3."""
    (folder / "grid").mkdir(exist_ok=True)
    flags = f"--data_path {folder / 'data'} --methods cplearn dino --out_dims 16 64 --epochs 1 {more}"
    return grid_of(folder / "grid", flags)


def find_best(grid: Grid, submit=None) -> dict[str, int] | None:
    return tuning.find_best(grid, reproduce_table3.tuning_images(grid), Share(1, 1), submit)


def tuned_grid(grid: Grid, best: dict[str, int]) -> Grid:
    lines = grid.settings.rows(grid.methods, [16, 64])
    return Grid.build(grid.folder, grid.settings, [trial_rule.tuned(row, best[row.method]) for row in lines])


def finish_trial(cell, knn) -> None:
    knn20 = {"eval_knn": {"knn20_top1": knn}}
    finish(cell, knn20, {"eval_knn": {"knn20_top1": 0.3}}, seconds=60.0, verdict="learning")


def finish_all(grid, numbers) -> Grid:
    """Finish the trials with these numbers by method."""
    trials = tuning.trial_grid(grid)
    for cell in trials.cells:
        finish_trial(cell, numbers[cell.row.method][tuning.trial_of(cell)])
    return trials


def fail(cell, code, times=1, line="out of memory") -> None:
    shutil.rmtree(cell.folder, ignore_errors=True)
    cell.folder.mkdir()
    content = {"stage": "train", "code": code, "line": line, "times": times}
    (cell.folder / "failed.json").write_text(json.dumps(content))


NUMBERS = {"cplearn": [0.40, 0.42, 0.42], "dino": [0.41, 0.40, 0.30]}


def test_trials_are_alike_but_for_what_is_drawn(folder):
    grid = grid_in(folder)
    trials = tuning.trial_grid(grid)
    assert [x.name for x in trials.cells] == ["cplearn_t0", "dino_t0", "cplearn_t1", "dino_t1", "cplearn_t2", "dino_t2"]
    parsed = [main_cplearn.parse_args(x.train) for x in trials.cells]
    assert {(x.out_dim, x.epochs, x.seed, x.data_path) for x in parsed} == {
        (1024, 1, 0, str(folder / "grid" / "tuning" / "data"))
    }
    assert [list(x.evaluate) for x in trials.cells] == [["knn", "random knn"]] + [["knn"]] * 5
    more = grid_in(folder, "--tune 5 --tune_epochs 4")
    larger = tuning.trial_grid(more)
    assert len(larger.cells) == 10 and {main_cplearn.parse_args(x.train).epochs for x in larger.cells} == {4}
    assert {main_cplearn.parse_args(x.train).epochs for x in more.cells} == {1}
    assert [x.row.flags for x in larger.cells[:6]] == [x.row.flags for x in trials.cells]


def test_the_best_trial_trains_the_cells(folder, capsys):
    grid = grid_in(folder)
    finish_all(grid, NUMBERS)
    best = find_best(grid)
    assert best == {"cplearn": 1, "dino": 0}  # of equal ones the first
    kept = json.loads((folder / "grid" / "tuning.json").read_text())
    assert kept["budget"] == {
        "trials": 3, "out_dim": 1024, "epochs": 1, "seed": 0, "others": 0, "train_images": 8, "held_out_images": 2,
    }  # fmt: skip
    assert kept["random_init_knn"] == pytest.approx(30) and kept["methods"]["cplearn"]["minutes"] == 3
    assert [x["knn"] for x in kept["methods"]["dino"]["trials"]] == pytest.approx([41, 40, 30])
    page = (folder / "grid" / "tuning.md").read_text()
    assert "3 trials of every method at c = 1024, 1 epochs" in page and "untrained network's: **30.0**" in page
    assert "--lr 0.004 --beta 0.136 --n_ref 1" in page
    tuned = tuned_grid(grid, best)
    for cell in tuned.cells:
        trained = main_cplearn.parse_args(cell.train)
        assert trained.out_dim == cell.row.out_dim and trained.data_path == str(folder / "data")
        if cell.row.method == "cplearn":
            assert (trained.lr, trained.beta, trained.n_ref) == (0.004, 0.136, 1)
        else:
            assert (trained.lr, trained.momentum_teacher) == (0.004, 0.99)
    tuned.save()
    assert "CPLearn trial 1 (--lr 0.004 --beta 0.136 --n_ref 1.0); DINO as it stands" in tuning.sentence(tuned.folder)
    reproduce_table3.print_status(tuned.folder)
    said = capsys.readouterr().out
    assert "6 cells: 6 done" in said and "4 cells: 4 waiting" in said and "tuning budget" in said


def test_failed_trials_count_as_the_worst_or_are_tried_again(folder):
    grid = grid_in(folder)
    trials = finish_all(grid, NUMBERS)
    by_name = {x.name: x for x in trials.cells}
    fail(by_name["cplearn_t1"], 3, line="the loss is not finite")  # happens again: once is enough
    fail(by_name["dino_t0"], 4, times=2)  # a full disk, twice
    finish_trial(by_name["cplearn_t2"], None)  # features that are not finite: no number
    assert find_best(grid) == {"cplearn": 0, "dino": 1}
    page = (folder / "grid" / "tuning.md").read_text()
    assert "the loss is not finite" in page and "out of memory (2 times)" in page

    fail(by_name["dino_t0"], 4)  # once: again
    assert [x.cell.name for x in tuning.unfinished(snapshot(trials))] == ["dino_t0"]
    for trial in range(3):
        fail(by_name[f"dino_t{trial}"], 3)
    with pytest.raises(UserError, match="all trials of dino failed, the first with: out of memory"):
        find_best(grid)


def test_another_winner_is_not_mixed_in(folder):
    grid = grid_in(folder)
    finish_all(grid, NUMBERS)
    old = tuned_grid(grid, find_best(grid)).save()

    grid = grid_in(folder, "--tune 4")  # one more trial, which is DINO's best now
    finish_all(grid, {"cplearn": [*NUMBERS["cplearn"], 0.1], "dino": [*NUMBERS["dino"], 0.5]})
    best = {"cplearn": 1, "dino": 3}
    assert find_best(grid) == best  # no cell was begun
    begun = grid.folder / "dino_c64_s0"
    begun.mkdir()
    with pytest.raises(UserError, match="with --tune 4, trial 3 of dino is the best, and dino_c64_s0 was trained with"):
        find_best(grid)
    with pytest.raises(UserError, match="other flags for dino_c64_s0"):
        tuned_grid(grid, best).save()
    begun.rmdir()
    whole = tuned_grid(grid, best).save()
    assert whole.cells == tuned_grid(grid, best).cells == Grid.load(grid.folder).cells and whole.settings.tune == 4
    changed = [x.name for x, before in zip(whole.cells, old.cells, strict=True) if x != before]
    assert changed == ["dino_c16_s0", "dino_c64_s0"]
    begun.mkdir()
    assert find_best(grid) == best

    grid = grid_in(folder, "--tune 3")  # fewer again: the others are in the folder and do not count
    begun.rmdir()
    assert find_best(grid) == {"cplearn": 1, "dino": 0}
    assert "2 further trials, of a larger --tune" in (folder / "grid" / "tuning.md").read_text()


def test_methods_that_are_added_get_the_budget_of_all(folder):
    grid = grid_in(folder)
    finish_all(grid, NUMBERS)
    tuned_grid(grid, find_best(grid)).save()
    more = grid_in(folder, "--tune 3 --methods swav")
    assert tuning.trial_grid(more).methods == ["swav", "cplearn", "dino"]
    with pytest.raises(UserError, match="--tune 3, now None"):
        grid_in(folder, "--methods swav").save()


def test_on_slurm_the_cells_follow_with_the_second_command(folder, capsys):
    grid, submitted = grid_in(folder, "--tune 2"), []

    def submit(states) -> None:
        submitted.append([x.cell.name for x in states])

    assert find_best(grid, submit) is None
    assert submitted.pop() == ["cplearn_t0", "dino_t0", "cplearn_t1", "dino_t1"]
    assert "the same command again" in capsys.readouterr().out
    trials = finish_all(grid, NUMBERS)
    shutil.rmtree(trials.cells[1].folder)  # dino_t0 has nothing yet
    assert find_best(grid, submit) is None and submitted.pop() == ["dino_t0"]
    finish_trial(trials.cells[1], 0.5)
    assert find_best(grid, submit) == {"cplearn": 1, "dino": 0} and not submitted


def test_a_trial_whose_job_ended_without_a_word(folder):
    """Twice out of requeues, say: its cell could not leave failed.json."""
    cell = tuning.trial_grid(grid_in(folder, "--tune 2")).cells[0]
    place = cell.folder / "slurm"
    place.mkdir(parents=True)

    def failed(jobs, ended, **failure) -> str:
        entries = [{"job": x, "cluster": "local", "script": "x", "processes": 1, "time": 0.0} for x in jobs]
        (place / "jobs.jsonl").write_text("".join(json.dumps(x) + "\n" for x in entries))
        end = {"code": ended, "line": "broken", "rank": 0, "host": "n1", "restarts": 0, "time": 0.0}
        (place / f"{jobs[-1]}_0_end.json").write_text(json.dumps(end))
        (cell.folder / "failed.json").write_text(json.dumps(failure))
        return tuning.failed_for_good(State(cell))

    assert failed("7", 75) == ""
    assert failed("78", 75) == "INTERRUPTED (2 times)"
    assert failed("9", 3, code=3, line="not finite", times=1) == "not finite"
    assert failed("5", 1, code=1, line="broken", times=1) == ""
    assert failed("6", 0) == ""


@pytest.mark.parametrize("flags", ["--methods self_classifier", "--table 9 --methods cplearn --out_dims 16"])
def test_what_has_no_rule(folder, flags):
    with pytest.raises(UserError, match=f"no rule for {' '.join(flags.split()[:2])}"):
        tuning.trial_grid(grid_in(folder, f"--tune 2 {flags}"))
