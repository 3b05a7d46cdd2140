"""Read the logs of runs: the numbers of every finished epoch, also of runs that are training now."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cplearn.errors import UserError
from cplearn.files import read_json_lines, read_text
from cplearn.flags import check_path
from cplearn.pictures.panels import CURVES, LEVELS
from cplearn.text import names_of

AXES = ("epochs", "steps", "hours")  # of training, finished


@dataclass(frozen=True)
class RunLog:
    """What the log of a run says; all lists have one entry per record, None where it has no such number."""

    name: str
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
    names = list(labels or names_of(logs))
    runs = [_run(name, epochs(read_json_lines(log))) for name, log in zip(names, logs, strict=True)]
    early = [str(log) for log, run in zip(logs, runs, strict=True) if not run.verdicts]
    if len(early) == len(runs):
        raise UserError(f"{early[0]} holds no finished epoch yet: plot it after the first")
    for log in early:
        print(f"WARNING: {log} holds no finished epoch yet: left out", file=sys.stderr)
    return [run for run in runs if run.verdicts]


def _log_of(given: str) -> Path:
    """Return the log of a run. Raises `UserError` if there is none, or if it cannot be read."""
    if not given.strip():
        raise UserError("RUN '' is empty: name the output folder of a run, or its log.txt")
    path = Path(check_path("RUN", given))
    log = path / "log.txt" if path.is_dir() else path
    if not path.exists():
        raise UserError(f"{given} does not exist: name the output folder of a run, or its log.txt")
    if not log.exists() and (path / "args.json").exists():
        return log  # it is in its first epoch
    try:
        text = read_text(log)
    except FileNotFoundError:
        raise UserError(f"{given} has no log.txt: name the output folder of a run") from None
    except OSError as error:
        raise UserError(f"{log} cannot be read: {error.strerror}") from None
    if text.strip() and not epochs(read_json_lines(log)) and "\n" in text:
        raise UserError(f"{given} is no log of main_cplearn.py: name the output folder of a run, or its log.txt")
    return log


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


def _run(name: str, records: list[dict]) -> RunLog:
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
