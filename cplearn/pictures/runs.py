"""Read the logs of runs: the numbers of every finished epoch, also of runs that are training now."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cplearn.errors import UserError
from cplearn.files import read_json_lines, read_text, reading
from cplearn.flags import check_path
from cplearn.pictures.panels import COLORS, CURVES, LEVELS
from cplearn.text import names_of

AXES = ("epochs", "steps", "hours")  # of training, finished


@dataclass(frozen=True)
class RunLog:
    """What the log of a run says; all lists have one entry per record, None where it has no such number."""

    name: str
    color: str
    axes: dict[str, list[float | None]]  # by AXES
    values: dict[str, list[float | None]]  # by the fields of CURVES and LEVELS
    verdicts: list[str]  # "" for none
    verdict_lines: list[str]
    start: bool  # whether the first record is from before training

    def points(self, axis: str, field: str, *, positive: bool = False) -> list[tuple[float, float]]:
        """Return the curve of a field as (x, y), without what is missing; `positive`: for a logarithmic axis."""
        pairs = zip(self.axes[axis], self.values[field], strict=True)
        return [(x, y) for x, y in pairs if x is not None and y is not None and (y > 0 or not positive)]

    def at_start(self, field: str) -> float | None:
        """Return the value of a field before the first step, None if it is not known."""
        return self.values[field][0] if self.start else None

    def last(self, field: str) -> float | None:
        """Return the last value of a field, None if there is none."""
        return next((x for x in reversed(self.values[field]) if x is not None), None)


def read_runs(paths: Sequence[str], labels: Sequence[str] | None = None) -> list[RunLog]:
    """Read the logs of runs, each named by its folder or its log.

    A run without a finished epoch is left out with a warning. Raises `UserError` for what is no run, and if nothing is
    left.
    """
    logs = [_log_of(path) for path in paths]
    if labels and len(labels) != len(logs):
        raise UserError(f"--labels names {len(labels)} runs, there are {len(logs)}")
    if twice := [path for k, path in enumerate(paths) if os.path.abspath(logs[k]) in map(os.path.abspath, logs[:k])]:
        raise UserError(f"RUN {twice[0]} is given twice: leave one of them out")
    if labels and len(set(labels)) < len(labels):
        raise UserError(f"--labels {' '.join(labels)}: they must differ")
    runs: list[RunLog] = []
    for name, log in zip(labels or names_of(logs), logs, strict=True):
        if records := _records_of(log):
            runs.append(_run(name, COLORS[len(runs) % len(COLORS)], records))
        elif len(paths) > 1:
            print(f"WARNING: {log} holds no finished epoch yet: left out", file=sys.stderr)
    if not runs:
        raise UserError(f"{logs[0]} holds no finished epoch yet: plot it after the first")
    return runs


def _log_of(given: str) -> Path:
    """Return the log of a run, which is not there in its first epoch. Raises `UserError` for what is no run."""
    path = Path(check_path("RUN", given))
    log = path / "log.txt" if path.is_dir() else path
    if not given.strip() or not (log.is_file() or (path / "args.json").exists()):
        raise UserError(f"RUN {given or repr(given)} is no run: name the output folder of a run, or its log.txt")
    return log


def _records_of(log: Path) -> list[dict]:
    """Return the records of a log; none in a first epoch. Raises `UserError` for another file."""
    try:
        with reading(log):
            text = read_text(log)
    except FileNotFoundError:
        return []
    records = epochs(read_json_lines(log))
    if not records and text.strip() and "\n" in text:  # more than a line that is being written
        raise UserError(f"RUN {log} is no log of main_cplearn.py: name the output folder of a run, or its log.txt")
    return records


def epochs(records: list[dict]) -> list[dict]:
    """Return the records of a log in order, without those that a continuation from before them has written again."""
    kept: list[dict] = []
    for record in records:
        epoch = _number(record.get("epoch"))
        if epoch is None or epoch != int(epoch):
            continue
        while kept and kept[-1]["epoch"] >= epoch:
            kept.pop()
        kept.append(record)
    return kept


def _before_training(records: list[dict]) -> list[dict]:
    """Return the probe's numbers from before the first step as a record of their own, if the log has them."""
    found = {k: v for record in records for k, v in record.items() if k.startswith("start_")}
    start = {f"probe_{name.removeprefix('start_')}": value for name, value in found.items()}
    return [{"epoch": -1, "step": 0, "seconds": 0.0, **start}] if start else []


def _run(name: str, color: str, records: list[dict]) -> RunLog:
    start = _before_training(records)
    records = start + records
    hours, seconds = [], 0.0
    for record in records:
        seconds += sum(_number(record.get(field)) or 0.0 for field in ("seconds", "monitor_seconds"))
        hours.append(seconds / 3600 if "seconds" in record else None)
    axes = {
        "epochs": [r["epoch"] + 1.0 for r in records],
        "steps": [_number(r.get("step")) for r in records],
        "hours": hours,
    }
    return RunLog(
        name=name,
        color=color,
        axes=axes,
        values={field: [_number(r.get(field)) for r in records] for field in (*CURVES, *LEVELS)},
        verdicts=[_text(r.get("verdict")) for r in records],
        verdict_lines=[_text(r.get("verdict_line")) for r in records],
        start=bool(start),
    )


def _number(value: object) -> float | None:
    """Return a number that can be drawn, None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < 1e300 else None  # not NaN either


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def csv_table(runs: Sequence[RunLog]) -> tuple[list[str], list[list[object]]]:
    """Return header and rows of everything that is drawn: one row per run and record."""
    header = ["run", *AXES, *CURVES, *LEVELS, "verdict"]
    rows = [
        [run.name, *(run.axes[a][k] for a in AXES), *(x[k] for x in run.values.values()), run.verdicts[k]]
        for run in runs
        for k in range(len(run.verdicts))
    ]
    return header, rows
