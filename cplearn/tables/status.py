"""TODO cplearn.tables.status."""

import contextlib
import functools
import os
import time
from pathlib import Path

from cplearn.files import read_json
from cplearn.host import process_start
from cplearn.slurm.status import AT_WORK, FOLDER, job_state, last_error, progress, show_job, submissions
from cplearn.tables.cells import Cell
from cplearn.tables.launch import live_jobs
from cplearn.text import format_table

# --- status -----------------------------------------------------------------------------------------------


def status_lines(cells: list[Cell]) -> list[str]:
    """A line a cell: state, progress, error; and how many there are of each."""
    table, counts = [], {}
    for cell in cells:
        state, more = state_of(cell)
        counts[state] = counts.get(state, 0) + 1
        table.append((cell.name, state, more))
    return [
        format_table(table, ("cell", "state", "")),
        f"{len(cells)} cells: " + ", ".join(f"{n} {state}" for state, n in counts.items()),
    ]


def state_of(cell: Cell) -> tuple[str, str]:
    """done, training, evaluating, queued, failed, stopped (goes on with the same command) or waiting; and more."""
    left = [stage for stage, _, _ in cell.stages() if not cell.done(stage)]
    if not left:
        return "done", ""
    jobs = live_jobs(cell)
    for x in jobs:
        if show_job(x["job"]).get("JobState") in AT_WORK:
            if x["script"] != "main_cplearn":
                return "evaluating", x["script"]
            return "training", progress(cell.folder / FOLDER, x["job"], running=True)
    if jobs:
        return "queued", f"job {jobs[0]['job']}"
    how_far = functools.partial(progress, cell.folder / FOLDER, "")
    if in_use(cell.folder):
        return "training", how_far(running=True)
    failed = read_json(cell.folder / "failed.json")
    if failed:
        return "failed", f"{failed['stage']}, exit code {failed['code']}: {failed['line']}"
    if left[0] != "train" and in_use(cell.folder.parent):
        return "evaluating", f"{left[0]} is next"
    for place in dict.fromkeys(cell.place(stage) for stage in left):
        folder = place / FOLDER
        for x in {x["script"]: x for x in submissions(folder)}.values():
            now = job_state(folder, x)
            if now["JobState"] != "COMPLETED":
                return "failed", f"{x['script']}: {last_error(folder, x, now)}"
    if left[0] != "train":
        return "stopped", f"before {left[0]}"
    return ("stopped", how_far(running=False)) if (cell.folder / "log.txt").exists() else ("waiting", "")


def in_use(folder: Path) -> bool:
    """Whether the lock of a run (`run_control.FolderLock`) is a living one's: seen here, or by its beat elsewhere."""
    lock = read_json(folder / ".lock")
    if not lock:
        return False
    if lock.get("host") == os.uname().nodename:
        return lock.get("started") == process_start(lock.get("pid", 0))
    with contextlib.suppress(OSError):
        return time.time() - (folder / ".lock").stat().st_mtime < 60
    return False
