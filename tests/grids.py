"""Grids as `reproduce_table3.py` builds them, cells that are finished without having run, and commands to be killed."""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from helpers import result

import reproduce_table3
from cplearn.tables.grid import Cell, Grid


def grid_of(folder: Path, flags: str) -> Grid:
    """Return the cells of a small grid with these flags."""
    args, _ = reproduce_table3.parse_args(["--output_dir", str(folder), "--scale", "small", *shlex.split(flags)])
    return reproduce_table3.build_grid(args, reproduce_table3.choose_settings(args))


def finish(cell: Cell, metrics: dict[str, dict], untrained: dict[str, dict] | None = None, **log) -> None:
    """Put metrics (by the evaluation's script) where the command of the cell would; `log`: its last line."""
    for place, found in (("trained", metrics), ("random_init", untrained or {})):
        (cell.folder / place).mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(result(name, x, random=place != "trained")) for name, x in found.items()]
        (cell.folder / place / "results.jsonl").write_text("".join(line + "\n" for line in lines))
    (cell.folder / "log.txt").write_text(json.dumps(log) + "\n")
    (cell.folder / "trained.json").write_text("{}")


def start(out: Path, *command: str) -> subprocess.Popen:
    """Start a command of Python, which prints into the file `out`."""
    with open(out, "ab") as file:
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen([sys.executable, *command], stdout=file, stderr=subprocess.STDOUT, env=env)


def wait_for(condition, process: subprocess.Popen, seconds: float = 240) -> None:
    """Wait until something is so, while a process runs."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end and process.poll() is None, process.args
        time.sleep(0.02)
