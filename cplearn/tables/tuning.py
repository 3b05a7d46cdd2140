"""The same tuning budget for every method (--tune N): N trials each, and the best one's settings for all its cells.

A trial is a cell in output_dir/tuning that trains on a part of the training images and is scored by 20-NN on the rest
(`split`), so that no trial reads what the table is evaluated on. `trial_rule` draws them.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cplearn.errors import CollapseError, NonFiniteError, UserError
from cplearn.files import check_output_dir, read_json, read_json_lines, write_text
from cplearn.slurm.checks import parse_flags
from cplearn.tables.grid import Cell, Grid, without_folders
from cplearn.tables.measures import read_measures
from cplearn.tables.rows import NAMES, OF_SIZES, rows
from cplearn.tables.run import run_here
from cplearn.tables.status import CellState, refuse_unfinished, snapshot
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
    epochs = given.tune_epochs or given.epochs
    settings = replace(given, data_path=str(folder / "data"), dataset=None, epochs=epochs)
    knn = settings.evaluation_flags()["knn"]
    cells = []
    for trial in range(settings.tune):
        for row in rows(settings.table, settings.scale, methods, [settings.tune_out_dim], "cifar10"):
            key = f"{row.method}_t{trial}"
            flags = [*row.flags, *tuned({row.method: trial})(row)]
            train = [*flags, *settings.common_flags(), "--seed", str(SEED)]
            train += ["--epochs", str(epochs)] if epochs else []
            evaluate = {"knn": knn} | ({} if cells else {"random knn": knn})  # one untrained network for all
            label = f"trial {trial}"
            trial_row = replace(row, key=key, label=label, x=float(trial), flags=flags, paper={})
            cells.append(Cell(trial_row, SEED, key, train, evaluate, folder / key))
    return Grid(folder, settings, cells)


def trial_of(cell: Cell) -> int:
    """Return the number of a trial."""
    return int(cell.row.x)


def timings(trials: Grid, by_line: dict[str, dict]) -> dict[str, dict]:
    """Return what plan.time_steps returns for trials, from the timed steps of their methods as they stand.

    They train on a part of the images.
    """
    of_method = {
        key.rpartition("_c")[0]: timing | {"train_images": (n := timing.get("train_images", 0)) - n // HELD_OUT}
        for key, timing in by_line.items()
    }
    return {cell.row.key: of_method[cell.row.method] for cell in trials.cells}


@dataclass(frozen=True)
class Outcome:
    """What is known of a trial."""

    cell: Cell
    complete: bool
    knn: float | None  # percent, on the images held out; None without a number
    failure: str  # why it counts as the worst, "" otherwise
    verdict: str  # the collapse monitor's, after the last epoch
    minutes: float  # of training, by the run's own clock, over its processes

    @property
    def score(self) -> float:
        return -math.inf if self.knn is None else self.knn

    @property
    def over(self) -> bool:
        """Whether it has a number, or will get none."""
        return self.complete or bool(self.failure)

    def record(self) -> dict:
        """Return what tuning.json has of it; settings: the effective values of what its method's trials draw."""
        parsed = vars(parse_flags("main_cplearn", self.cell.train))
        return {
            "trial": trial_of(self.cell),
            "settings": {flag: f"{parsed[flag[2:]]}" for flag in ("--lr", *RULE[self.cell.row.method])},
            "knn": self.knn,
            "verdict": self.verdict,
            "failure": self.failure,
            "minutes": round(self.minutes, 2),
        }


def failed_for_good(state: CellState) -> str:
    """Return why a trial will get no number, "" if it has one or may still get one.

    Its loss became infinite, or it collapsed with --on_collapse stop (both happen again), or it failed twice.
    """
    if state.complete or (state.job and state.job.live):
        return ""
    code, line, times = (state.failure.get(x) for x in ("code", "line", "times"))
    if not state.failure and state.job and state.job.state != "COMPLETED":  # a job that could not even say so
        line, times = state.job.state, state.job.submitted
    if code in (NonFiniteError.exit_code, CollapseError.exit_code):
        return str(line)
    return f"{line} ({times} times)" if times and times >= TRIES else ""


def outcomes(trials: Grid, states: dict[str, CellState]) -> list[Outcome]:
    """Return what is known of every trial."""
    found = []
    for cell in trials.cells:
        state, log = states[cell.name], read_json_lines(cell.folder / "log.txt")
        knn = read_measures(cell.results()).get("knn") if state.complete else None
        minutes = trials.settings.ngpus * sum(line.get("seconds", 0) for line in log) / 60
        verdict = str(log[-1].get("verdict", "")) if log else ""
        found.append(Outcome(cell, state.complete, knn, failed_for_good(state), verdict, minutes))
    return found


def choose(found: Sequence[Outcome]) -> dict[str, int]:
    """Return the best trial of every method: the highest 20-NN on the images held out, of equal ones the first.

    Raises `UserError` if no trial of a method has a number.
    """
    best: dict[str, Outcome] = {}
    for outcome in sorted(found, key=lambda x: trial_of(x.cell)):
        method = outcome.cell.row.method
        if method not in best or outcome.score > best[method].score:
            best[method] = outcome
    lost = [method for method, outcome in best.items() if outcome.knn is None]
    if lost:
        raise UserError(
            f"all trials of {lost[0]} failed, the first with: {best[lost[0]].failure or 'no number'}; more --tune "
            "draws more of them, or leave it out of --methods"
        )
    return {method: trial_of(outcome.cell) for method, outcome in best.items()}


def find_best(grid: Grid, images, jobs: int, submit: Callable | None) -> dict[str, int] | None:
    """Run the trials that are not over, `jobs` at a time, and return the best one of every method.

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
        todo = [x.cell for x in outcomes(trials, states) if not x.over]
        if todo:
            print(f"Tuning: {len(trials.cells) - len(todo)} of {len(trials.cells)} trials are over, in {trials.folder}")
            some = replace(trials, cells=todo)
            if submit:
                submit(some, states)
                print("The table's cells follow: the same command again, when these are finished")
                return None
            run_here(some, states, jobs, lambda: None)
        found = outcomes(trials, snapshot(trials))
        refuse_unfinished("trials", [x.cell.name for x in found if not x.over], len(trials.cells))
        best = choose(found)
        write(grid.folder, trials, found, best, counts, kept - len(trials.cells))
    shown = ", ".join(f"{NAMES[method]} {trial}" for method, trial in best.items())
    print(f"Tuning: the best trials are {shown} (tuning.md); now the table's cells", flush=True)
    return best


# --- what is kept of them ---------------------------------------------------------------------------------


def write(
    folder: Path, trials: Grid, found: Sequence[Outcome], best: dict[str, int], images: dict[str, int], others: int
) -> None:
    """Write tuning.json and tuning.md: every trial with its settings and its number, and the best ones.

    `others`: trials in the folder that do not count, because --tune was larger before.
    """
    settings = trials.settings
    budget = {
        "trials": settings.tune,
        "out_dim": settings.tune_out_dim,
        "epochs": parse_flags("main_cplearn", found[0].cell.train).epochs,
        "seed": SEED,
        "others": others,
        "train_images": images["train"],
        "held_out_images": images["val"],
    }
    of_untrained = (read_measures(cell.results(random=True)).get("knn") for cell in trials.cells)
    untrained = next((knn for knn in of_untrained if knn is not None), None)
    methods = {}
    for method, trial in best.items():
        tried = [x for x in found if x.cell.row.method == method]
        minutes = round(sum(x.minutes for x in tried), 2)
        methods[method] = {"best": trial, "minutes": minutes, "trials": [x.record() for x in tried]}
    content = {"budget": budget, "random_init_knn": untrained, "methods": methods}
    write_text(folder / "tuning.json", json.dumps(content, indent=1) + "\n")
    write_text(folder / "tuning.md", _page(budget, untrained, methods))


def _as_typed(settings: dict[str, str]) -> str:
    return " ".join(f"{flag} {value}" for flag, value in settings.items())


def _page(budget: dict, untrained: float | None, methods: dict[str, dict]) -> str:
    table = []
    for method, x in methods.items():
        for t in x["trials"]:
            flags = _as_typed(t["settings"])
            mark = "best" if t["trial"] == x["best"] else ""
            number = "" if t["knn"] is None else f"{t['knn']:.1f}"
            about = t["failure"] or t["verdict"]
            table.append((NAMES[method], t["trial"], flags, number, mark, f"{t['minutes']:.1f}", about))
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


# --- the table's cells ------------------------------------------------------------------------------------


def outdated(grid: Grid, best: dict[str, int]) -> set[str]:
    """Return the names of the folder's cells that were planned with other settings than these trials', and not begun.

    Raises `UserError` if one was begun: results of two settings would stand in one line.
    """
    names, begun = set(), []
    for cell in grid.kept():
        if cell.row.method not in best:
            continue
        (row,) = rows(grid.settings.table, grid.settings.scale, [cell.row.method], [cell.row.out_dim], "cifar10")
        flags = [*row.flags, *tuned(best)(row)]
        if without_folders(flags) != without_folders(cell.row.flags):
            names.add(cell.name)
            begun += [cell] if cell.folder.exists() else []
    if begun:
        method, n = begun[0].row.method, grid.settings.tune
        raise UserError(
            f"with --tune {n}, trial {best[method]} of {method} is the best, and {begun[0].name} was trained with "
            f"another's settings: take the --tune of before, choose another --output_dir, or move the {len(begun)} "
            f"cells of {', '.join(dict.fromkeys(x.row.method for x in begun))} away"
        )
    return names
