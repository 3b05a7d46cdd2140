"""The same tuning budget for every method (--tune N): N trials each, and the best one's settings for all its cells.

A trial is a cell in output_dir/tuning that trains on a part of the training images and is scored by 20-NN on the rest
(`split`), so that no trial reads what the table is evaluated on. `trial_rule` draws them.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from cplearn.errors import CollapseError, NonFiniteError, UserError
from cplearn.files import check_output_dir, read_json, write_text
from cplearn.slurm.checks import parse_flags
from cplearn.tables.grid import Cell, Grid, Settings, without_folders
from cplearn.tables.rows import NAMES, OF_SIZES
from cplearn.tables.run import Share, run_here
from cplearn.tables.status import State, refuse_unfinished, snapshot
from cplearn.tables.trial_rule import HELD_OUT, RULE, SEED, tuned
from cplearn.text import format_table

TRIES = 2  # a trial that fails so often counts as the worst

# --- the trials -------------------------------------------------------------------------------------------


def trial_grid(grid: Grid) -> Grid:
    """Return the trials of a table's methods, as cells in its folder `tuning`. Raises `UserError` without a rule.

    They come trial after trial, each of all methods, also of those that earlier commands put into the folder: more
    trials are more for all.
    """
    given = grid.settings
    methods = list(dict.fromkeys(cell.row.method for cell in [*grid.cells, *grid.kept()]))
    without = [method for method in methods if method not in RULE]
    if given.table not in OF_SIZES or without:
        what = f"--methods {without[0]}" if without else f"--table {given.table}"
        raise UserError(f"--tune has no rule for {what}: it is for --table 3 and falcon, and for {', '.join(RULE)}")
    folder = grid.folder / "tuning"
    settings = replace(given, data_path=str(folder / "data"), dataset=None, epochs=given.tune_epochs or given.epochs)
    cells = []
    for trial in range(settings.tune):
        for row in settings.rows(methods, [settings.tune_out_dim]):
            name = f"{row.method}_t{trial}"
            row = replace(tuned(row, trial), key=name, label=f"trial {trial}", x=float(trial), paper={})
            evaluations = ["knn"] if cells else ["knn", "random knn"]  # one untrained network for all
            cells.append(settings.cell(folder, row, name, SEED, evaluations))
    return Grid(folder, settings, cells)


def trial_of(cell: Cell) -> int:
    """Return the number of a trial."""
    return int(cell.row.x)


def timings(trials: Grid, of_first: dict[str, dict]) -> dict[str, dict]:
    """Return what plan.time_steps returns for trials, from the timed steps of every method's trial 0 on all images.

    They train on a part of the images.
    """
    on_part = {
        key: x | {"train_images": (n := x.get("train_images", 0)) - n // HELD_OUT} for key, x in of_first.items()
    }
    return {cell.row.key: on_part[f"{cell.row.method}_t0"] for cell in trials.cells}


def failed_for_good(state: State) -> str:
    """Return why a trial will get no number, "" if it has one or may still get one.

    Its loss became infinite, or it collapsed with --on_collapse stop (both happen again), or it failed twice.
    """
    if state.complete or state.live_job:
        return ""
    code, line, times = (state.failure.get(x) for x in ("code", "line", "times"))
    if not state.failure and state.job and state.job.state != "COMPLETED":  # a job that could not even say so
        line, times = state.job.state, state.job.submitted
    if code in (NonFiniteError.exit_code, CollapseError.exit_code):
        return str(line)
    return f"{line} ({times} times)" if times and times >= TRIES else ""


def unfinished(states: Sequence[State]) -> list[State]:
    """Return the trials that have no number, and may still get one."""
    return [x for x in states if not x.complete and not failed_for_good(x)]


def choose(states: Sequence[State]) -> dict[str, int]:
    """Return the best trial of every method: the highest 20-NN on the images held out, of equal ones the first.

    Raises `UserError` if no trial of a method has a number.
    """
    best: dict[str, State] = {}
    for state in sorted(states, key=lambda x: trial_of(x.cell)):
        method = state.cell.row.method
        if method not in best or state.measures.get("knn", -1) > best[method].measures.get("knn", -1):
            best[method] = state
    for method, state in best.items():
        if "knn" not in state.measures:
            raise UserError(
                f"all trials of {method} failed, the first with: {failed_for_good(state) or 'no number'}; more --tune "
                "draws more of them, or leave it out of --methods"
            )
    return {method: trial_of(state.cell) for method, state in best.items()}


def find_best(grid: Grid, images, share: Share, submit: Callable | None) -> dict[str, int] | None:
    """Run the trials that are not over, and return the best one of every method.

    `images`: those that are split (`open_training_images`). With `submit` the trials are submitted instead, and None is
    returned as long as there are any. Raises `UserError` if some failed and must be tried again.
    """
    from cplearn.lock import FolderLock  # loads torch
    from cplearn.tables.split import write_split

    trials = trial_grid(grid)
    check_output_dir(str(trials.folder))
    with FolderLock(trials.folder):
        counts = write_split(images, trials.folder / "data")
        kept = len(trials.save().cells)
        states = snapshot(trials)
        if todo := unfinished(states):
            print(f"Tuning: {len(states) - len(todo)} of {len(states)} trials are over, in {trials.folder}")
            if submit:
                submit(todo)
                print("The table's cells follow: the same command again, when these are finished")
                return None
            run_here(todo, share)
            states = snapshot(trials)
        refuse_unfinished("trials", unfinished(states), len(states))
        best = choose(states)
        write(grid.folder, trials.settings, states, best, counts, kept - len(states))
    shown = ", ".join(f"{NAMES[method]} {trial}" for method, trial in best.items())
    print(f"Tuning: the best trials are {shown} (tuning.md); now the table's cells", flush=True)
    _refuse_other_winners(grid, best)
    return best


def _refuse_other_winners(grid: Grid, best: dict[str, int]) -> None:
    """Raise `UserError` if a cell of the folder was begun with other settings than these trials': results of two
    settings would stand in one line."""
    others = []
    for cell in (x for x in grid.kept() if x.row.method in best and x.folder.exists()):
        (row,) = grid.settings.rows([cell.row.method], [cell.row.out_dim])
        if without_folders(tuned(row, best[row.method]).flags) != without_folders(cell.row.flags):
            others.append(cell)
    if others:
        method, n = others[0].row.method, grid.settings.tune
        raise UserError(
            f"with --tune {n}, trial {best[method]} of {method} is the best, and {others[0].name} was trained with "
            f"another's settings: take the --tune of before, choose another --output_dir, or move the {len(others)} "
            f"cells of {', '.join(dict.fromkeys(x.row.method for x in others))} away"
        )


# --- what is kept of them ---------------------------------------------------------------------------------


def write(
    folder: Path, settings: Settings, states: Sequence[State], best: dict[str, int], images: dict[str, int], others: int
) -> None:
    """Write tuning.json and tuning.md: every trial with its settings and its number, and the best ones.

    `others`: trials in the folder that do not count, because --tune was larger before.
    """
    budget = {
        "trials": settings.tune,
        "out_dim": settings.tune_out_dim,
        "epochs": parse_flags("main_cplearn", states[0].cell.train).epochs,
        "seed": SEED,
        "others": others,
        "train_images": images["train"],
        "held_out_images": images["val"],
    }
    untrained = next((x.untrained["knn"] for x in states if "knn" in x.untrained), None)
    methods = {}
    for method, trial in best.items():
        tried = [x for x in states if x.cell.row.method == method]
        minutes = round(sum(_minutes(x, settings.ngpus) for x in tried), 2)
        trials = [_record(x, settings.ngpus) for x in tried]
        methods[method] = {"best": trial, "minutes": minutes, "trials": trials}
    content = {"budget": budget, "random_init_knn": untrained, "methods": methods}
    write_text(folder / "tuning.json", json.dumps(content, indent=1) + "\n")
    write_text(folder / "tuning.md", _page(budget, untrained, methods))


def _record(state: State, processes: int) -> dict:
    """Return what tuning.json has of a trial; settings: the effective values of what its method's trials draw."""
    parsed = vars(parse_flags("main_cplearn", state.cell.train))
    return {
        "trial": trial_of(state.cell),
        "settings": {flag: f"{parsed[flag[2:]]}" for flag in ("--lr", *RULE[state.cell.row.method])},
        "knn": state.measures.get("knn"),  # percent, on the images held out
        "verdict": state.verdict,
        "failure": failed_for_good(state),
        "minutes": round(_minutes(state, processes), 2),
    }


def _minutes(state: State, processes: int) -> float:
    """Return minutes of training by the run's own clock, over its processes."""
    return processes * sum(line.get("seconds", 0) for line in state.log) / 60


def _as_typed(settings: dict[str, str]) -> str:
    return " ".join(f"{flag} {value}" for flag, value in settings.items())


def _page(budget: dict, untrained: float | None, methods: dict[str, dict]) -> str:
    table = []
    for method, x in methods.items():
        for t in x["trials"]:
            number = "" if t["knn"] is None else f"{t['knn']:.1f}"
            mark, about = "best" * (t["trial"] == x["best"]), t["failure"] or t["verdict"]
            flags, minutes = _as_typed(t["settings"]), f"{t['minutes']:.1f}"
            table.append((NAMES[method], t["trial"], flags, number, mark, minutes, about))
    header = ("method", "trial", "settings", "20-NN", "", "minutes of training", "verdict, or why it failed")
    start = "" if untrained is None else f"The untrained network's: **{untrained:.1f}**. "
    text = (
        f"{budget['trials']} trials of every method at c = {budget['out_dim']}, {budget['epochs']} epochs, seed "
        f"{budget['seed']}, on {budget['train_images']:,} training images; 20-NN, in percent, of "
        f"{budget['held_out_images']:,} others, held out of the training images. {start}Trial 0 is the method as it "
        "stands in the recipe; the others are drawn by the rule in cplearn/tables/trial_rule.py. The table's images "
        "were not read. A failed trial counts as the worst, of equal ones the first is best."
    )
    minutes = ", ".join(f"{NAMES[method]} {x['minutes']:.1f}" for method, x in methods.items())
    if budget["others"]:
        text += f" {budget['others']} further trials, of a larger --tune, are in tuning/ and do not count."
    spent = f"Minutes of training by method, summed over processes: {minutes}."
    return f"# The same tuning budget for every method\n\n{text}\n\n{format_table(table, header)}\n\n{spent}\n"


def sentence(folder: Path) -> str:
    """Return what the table says of its tuning, from tuning.json."""
    content = read_json(folder / "tuning.json")
    if not content:
        return "Tuned, but tuning.json is gone."
    budget, parts = content["budget"], []
    for method, x in content["methods"].items():
        (best,) = [t for t in x["trials"] if t["trial"] == x["best"]]
        flags = _as_typed(best["settings"])
        parts.append(f"{NAMES[method]} trial {x['best']} ({flags})" if x["best"] else f"{NAMES[method]} as it stands")
    return (
        f"Settings: the best of {budget['trials']} trials of every method, by 20-NN on training images held out, at "
        f"c = {budget['out_dim']} (tuning.md): {'; '.join(parts)}."
    )
