"""The state of every cell at one moment (`snapshot`), and the lines of --status.

Nothing here starts or changes anything, except `record_trained`.
"""

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

from cplearn.files import read_json
from cplearn.host import process_start
from cplearn.slurm.status import AT_WORK, FOLDER, LIVE, job_state, last_error, progress, submissions
from cplearn.tables.cells import Cell, Grid
from cplearn.text import format_table


@dataclass(frozen=True)
class StageJob:
    """The newest job of a stage."""

    stage: str
    folder: Path  # of its logs
    entry: dict  # its line in jobs.jsonl
    now: dict[str, str]  # JobState, Reason, ...: `job_state`
    submitted: int  # how often the stage was

    @property
    def number(self) -> str:
        return self.entry["job"]

    @property
    def state(self) -> str:
        return self.now["JobState"]


@dataclass(frozen=True)
class CellState:
    """What is known of a cell at one moment."""

    missing: tuple[str, ...]  # names of the stages without a result, in the order in which they run
    jobs: tuple[StageJob, ...]  # of stages that had no result, by the time of submission
    trained_by_job: bool  # training's job ended well, and trained.json does not say so yet
    differs: str  # where the checkpoint is not of this cell: then nothing in its folder counts
    training_here: bool  # a process holds the lock of its folder
    grid_runs: bool  # a process holds the lock of the grid's folder
    failure: dict  # failed.json: the stage that failed on this machine

    @property
    def complete(self) -> bool:
        return not self.missing

    @property
    def live_jobs(self) -> list[StageJob]:
        """Jobs that wait or run, by the time of submission."""
        return [job for job in self.jobs if job.state in LIVE]


def snapshot(grid: Grid) -> dict[str, CellState]:
    """Read the state of every cell once, from its files and from Slurm. Returns it by the cell's name."""
    grid_runs = in_use(grid.folder)
    return {cell.name: _read_state(cell, grid_runs) for cell in grid.cells}


def _read_state(cell: Cell, grid_runs: bool) -> CellState:
    scripts = {random: {x["script"] for x in cell.results(random=random)} for random in (False, True)}
    differs = cell.differs()
    trained = (cell.folder / "trained.json").exists() and not differs
    trained_by_job, missing, jobs = False, [], []
    for stage in cell.stages():  # training comes first: results of what was trained before it do not count
        evaluated = (trained or trained_by_job) and stage.script in scripts[stage.name.startswith("random")]
        if trained if stage.name == "train" else evaluated:
            continue
        folder = stage.place / FOLDER
        entries = [entry for entry in submissions(folder) if entry["script"] == stage.script]
        if entries:  # only the newest may be alive: no stage is submitted twice
            jobs.append(StageJob(stage.name, folder, entries[-1], job_state(folder, entries[-1]), len(entries)))
            trained_by_job |= not differs and stage.name == "train" and jobs[-1].state == "COMPLETED"
        missing.append(stage.name)
    return CellState(
        missing=tuple(name for name in missing if not (name == "train" and trained_by_job)),
        jobs=tuple(sorted(jobs, key=lambda job: job.entry["time"])),
        trained_by_job=trained_by_job,
        differs=differs,
        training_here=in_use(cell.folder),
        grid_runs=grid_runs,
        failure=read_json(cell.folder / "failed.json"),
    )


def record_trained(grid: Grid, states: dict[str, CellState]) -> None:
    """Write trained.json for every training whose job was seen to end well, because Slurm forgets its jobs."""
    for cell in grid.cells:
        if states[cell.name].trained_by_job:
            cell.mark_trained()


def in_use(folder: Path) -> bool:
    """Return whether a living process holds the lock of a run: known on this host, by the lock's beat elsewhere."""
    lock = read_json(folder / ".lock")
    if not lock:
        return False
    if lock.get("host") == os.uname().nodename:
        return lock.get("started") == process_start(lock.get("pid", 0))
    with contextlib.suppress(OSError):
        return time.time() - (folder / ".lock").stat().st_mtime < 60
    return False


# --- the lines of --status --------------------------------------------------------------------------------


def status_lines(grid: Grid, states: dict[str, CellState]) -> list[str]:
    """Return a table with a line per cell (state, progress, error), and how many there are of each state."""
    table, counts = [], {}
    for cell in grid.cells:
        word, details = describe(cell, states[cell.name])
        counts[word] = counts.get(word, 0) + 1
        table.append((cell.name, word, details))
    return [
        format_table(table, ("cell", "state", "")),
        f"{len(grid.cells)} cells: " + ", ".join(f"{n} {word}" for word, n in counts.items()),
    ]


def describe(cell: Cell, state: CellState) -> tuple[str, str]:
    """Return a word (done, training, evaluating, queued, failed, stopped, waiting) and details.

    The same command resumes what is stopped.
    """
    if state.differs:
        return "failed", f"its checkpoint has {state.differs}: move {cell.folder} away"
    if state.complete:
        return "done", ""
    for job in state.live_jobs:
        if job.state in AT_WORK:
            if job.stage != "train":
                return "evaluating", job.entry["script"]
            return "training", progress(job.folder, job.number, running=True)
    if state.live_jobs:
        return "queued", f"job {state.live_jobs[0].number}"
    if state.training_here:
        return "training", progress(cell.folder / FOLDER, "", running=True)
    if state.failure:
        return "failed", "{}, exit code {}: {}".format(*(state.failure.get(x, "?") for x in ("stage", "code", "line")))
    if state.missing[0] != "train" and state.grid_runs:
        return "evaluating", f"{state.missing[0]} is next"
    for job in state.jobs:
        if job.state != "COMPLETED":
            return "failed", f"{job.entry['script']}: {last_error(job.folder, job.entry, job.now)}"
    if state.missing[0] != "train":
        return "stopped", f"before {state.missing[0]}"
    if (cell.folder / "log.txt").exists():
        return "stopped", progress(cell.folder / FOLDER, "", running=False)
    return "waiting", ""
