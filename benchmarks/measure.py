"""What the benchmarks share: time and memory of a piece of work, and one cell of a table in a process of its own."""

import ctypes
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch


class Outcome(NamedTuple):
    """What a part of `gpu.py` found."""

    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]  # of the table that is printed
    cells: list[dict]  # the same as numbers
    says: str  # the finding in a few words
    misses: list[str]  # what is not as expected, with numbers


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """Return the time of one call, until the device has finished it."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all work."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def start_memory(device: torch.device) -> int:
    """Begin a measurement of memory; return the bytes in use: resident ones, or allocated ones on a GPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed must not be used again unseen
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    return _memory_of_process("VmRSS")


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that were in use since `start_memory`."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else _memory_of_process("VmHWM")


def _memory_of_process(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")


def run_cell(script: str, *arguments: object) -> tuple[dict, str]:
    """Run a script that prints JSON last, in a process of its own; return the result, or {} and the last error line."""
    done = subprocess.run([sys.executable, script, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        return {}, (done.stderr.strip().splitlines() or ["killed"])[-1]
    return json.loads(done.stdout.strip().splitlines()[-1]), ""
