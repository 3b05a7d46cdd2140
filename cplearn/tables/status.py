"""The state of every cell at one moment (`snapshot`), and the lines of --status. Nothing here changes anything."""

from dataclasses import dataclass
from pathlib import Path

from cplearn.errors import UserError
from cplearn.files import read_json
from cplearn.lock import in_use
from cplearn.slurm.status import AT_WORK, FOLDER, LIVE, job_state, last_error, progress, submissions
from cplearn.tables.grid import Cell, Grid
from cplearn.text import format_table


@dataclass(frozen=True)
class Job:
    """A job of a cell."""

    folder: Path  # of its logs
    entry: dict  # its line in jobs.jsonl
    now: dict[str, str]  # JobState, Reason, ...: `job_state`
    submitted: int  # jobs of the cell so far

    @property
    def number(self) -> str:
        return self.entry["job"]

    @property
    def state(self) -> str:
        return self.now["JobState"]

    @property
    def live(self) -> bool:
        """Whether it waits or runs."""
        return self.state in LIVE


@dataclass(frozen=True)
class CellState:
    """What is known of a cell at one moment."""

    missing: tuple[str, ...]  # `Cell.missing`, in the order in which it runs
    differs: str  # where the checkpoint is not of this cell: then nothing in its folder counts
    job: Job | None  # of a cell that is not complete: one that waits or runs, or else the newest
    work: str  # "training" or "evaluating" if a process does so now
    failure: dict  # failed.json

    @property
    def complete(self) -> bool:
        return not self.missing


def snapshot(grid: Grid) -> dict[str, CellState]:
    """Read the state of every cell once, from its files and from Slurm. Returns it by the cell's name."""
    return {cell.name: _read_state(cell) for cell in grid.cells}


def _read_state(cell: Cell) -> CellState:
    differs = cell.differs()
    missing = ["train", *cell.evaluate] if differs else cell.missing()
    training, evaluating = in_use(cell.folder), in_use(cell.results_folder(random=False))
    return CellState(
        missing=tuple(missing),
        differs=differs,
        job=newest_job(cell) if missing else None,
        work="training" if training else "evaluating" if evaluating else "",
        failure=read_json(cell.folder / "failed.json"),
    )


def newest_job(cell: Cell) -> Job | None:
    """Return a job of the cell that waits or runs, or else the newest.

    Earlier versions had a job for every evaluation, beside its results.
    """
    places = [cell.folder, *(cell.results_folder(random=random) for random in (False, True))]
    jobs = []
    for place in places:
        entries = submissions(place / FOLDER)
        for entry in entries[-1:]:
            jobs.append(Job(place / FOLDER, entry, job_state(place / FOLDER, entry), len(entries)))
    return next((job for job in jobs if job.live), jobs[0] if jobs else None)


def refuse_unfinished(what: str, left: list[str], total: int) -> None:
    """Raise `UserError` with the names of what is not finished, if anything is."""
    if left:
        raise UserError(
            f"{len(left)} of {total} {what} are not finished ({', '.join(left[:3])}): see --status; "
            "the same command tries them again"
        )


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
    job, following = state.job, state.missing[0]
    logs, number = (job.folder, job.number) if job and job.live else (cell.folder / FOLDER, "")
    at_work = job is not None and job.state in AT_WORK
    if state.work == "training" or (at_work and following == "train"):
        return "training", progress(logs, number, running=True)
    if state.work == "evaluating" or at_work:
        return "evaluating", following
    if job and job.live:
        return "queued", f"job {number}"
    if state.failure:
        return "failed", "{}, exit code {}: {}".format(*(state.failure.get(x, "?") for x in ("stage", "code", "line")))
    if job and job.state != "COMPLETED":
        return "failed", last_error(job.folder, job.entry, job.now)
    if following != "train":
        return "stopped", f"before {following}"
    if (cell.folder / "log.txt").exists():
        return "stopped", progress(logs, "", running=False)
    return "waiting", ""
