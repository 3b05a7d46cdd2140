"""The state of every cell at one moment (`snapshot`), and the lines of --status. Nothing here changes anything."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from cplearn.errors import UserError
from cplearn.files import read_json, read_json_lines
from cplearn.lock import in_use
from cplearn.slurm.status import AT_WORK, FOLDER, LIVE, job_state, last_error, progress, submissions
from cplearn.tables.grid import Cell, Grid
from cplearn.tables.measures import read_measures
from cplearn.text import format_table


class Job:
    """The newest job of a folder, as it is now."""

    def __init__(self, folder: Path, entries: list[dict]):
        self.folder = folder  # of its logs
        self.entry, self.submitted = entries[-1], len(entries)  # its line in jobs.jsonl, of so many
        self.now = job_state(folder, self.entry)  # JobState, Reason, ...
        self.number, self.state = self.entry["job"], self.now["JobState"]
        self.live = self.state in LIVE  # it waits or runs


class State:
    """What is known of a cell (a trial of --tune is one too) at one moment, from its files and from Slurm."""

    def __init__(self, cell: Cell):
        self.cell = cell
        self.differs = cell.differs()  # where the checkpoint is not of this cell: then nothing in its folder counts
        self.missing = ["train", *cell.evaluate] if self.differs else cell.missing()  # in the order in which it runs
        self.complete = not self.missing
        self.results, untrained = (cell.results(random=x) if self.complete else [] for x in (False, True))
        self.measures, self.untrained = read_measures(self.results), read_measures(untrained)  # of both networks
        self.log = read_json_lines(cell.folder / "log.txt")
        self.verdict = str(self.log[-1].get("verdict", "")) if self.log else ""  # the monitor's, after the last epoch
        self.failure = read_json(cell.folder / "failed.json")
        self.training, self.evaluating = in_use(cell.folder), in_use(cell.results_folder(random=False))  # by a process
        self.job = None if self.complete else _newest_job(cell)
        self.live_job = self.job.number if self.job and self.job.live else None


def snapshot(grid: Grid) -> list[State]:
    """Return the states of a grid's cells, in their order."""
    return [State(cell) for cell in grid.cells]


def _newest_job(cell: Cell) -> Job | None:
    """Return a job of the cell that waits or runs, or else the newest.

    Earlier versions had a job for every evaluation, beside its results.
    """
    places = [x / FOLDER for x in (cell.folder, *(cell.results_folder(random=x) for x in (False, True)))]
    jobs = [Job(place, entries) for place in places if (entries := submissions(place))]
    return next((job for job in jobs if job.live), jobs[0] if jobs else None)


def refuse_unfinished(what: str, left: Sequence[State], total: int) -> None:
    """Raise `UserError` with the names of what is not finished, if anything is."""
    if left:
        raise UserError(
            f"{len(left)} of {total} {what} are not finished ({', '.join(x.cell.name for x in left[:3])}): see "
            "--status; the same command tries them again"
        )


# --- the lines of --status --------------------------------------------------------------------------------


def status_lines(states: Sequence[State]) -> list[str]:
    """Return a table with a line per cell (state, progress, error), and how many there are of each state."""
    table = [(state.cell.name, *describe(state)) for state in states]
    counts = Counter(word for _, word, _ in table)
    return [
        format_table(table, ("cell", "state", "")),
        f"{len(states)} cells: " + ", ".join(f"{n} {word}" for word, n in counts.items()),
    ]


def describe(state: State) -> tuple[str, str]:
    """Return a word (done, training, evaluating, queued, failed, stopped, waiting) and details.

    The same command resumes what is stopped.
    """
    folder, job, live = state.cell.folder, state.job, state.live_job
    if state.differs:
        return "failed", f"its checkpoint has {state.differs}: move {folder} away"
    if state.complete:
        return "done", ""
    following = state.missing[0]
    at_work = job is not None and job.state in AT_WORK
    if state.training or (at_work and following == "train"):
        return "training", progress(job.folder if live else folder / FOLDER, live or "", running=True)
    if state.evaluating or at_work:
        return "evaluating", following
    if live:
        return "queued", f"job {live}"
    if state.failure:
        return "failed", "{}, exit code {}: {}".format(*(state.failure.get(x, "?") for x in ("stage", "code", "line")))
    if job and job.state != "COMPLETED":
        return "failed", last_error(job.folder, job.entry, job.now)
    if following != "train":
        return "stopped", f"before {following}"
    if (folder / "log.txt").exists():
        return "stopped", progress(folder / FOLDER, "", running=False)
    return "waiting", ""
