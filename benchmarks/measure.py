"""What the benchmarks share: time and memory of a piece of work, tables, and a cell of one in a process of its own."""

import ctypes
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cplearn.host import git_commit

CPU = torch.device("cpu")


class Outcome(NamedTuple):
    """What a part of `gpu.py` comes to."""

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


def median_seconds(function: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Return the median time of a call, after one that does not count."""
    function()
    return statistics.median(seconds(function, device) for _ in range(repeats))


def compare(ours: dict[str, Callable], peer: Callable, repeats: int) -> tuple[float, dict[str, tuple[float, float]]]:
    """Call peer and ours in turn, on the CPU. Return the peer's median seconds; for each of ours the median, and that
    of the ratio peer / ours within a round."""
    for function in (peer, *ours.values()):
        function()
    rounds = [(seconds(peer, CPU), [seconds(f, CPU) for f in ours.values()]) for _ in range(repeats)]
    medians = {
        name: (statistics.median(t[k] for _, t in rounds), statistics.median(p / t[k] for p, t in rounds))
        for k, name in enumerate(ours)
    }
    return statistics.median(p for p, _ in rounds), medians


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


def run_cell(script: str, *arguments: object, limit: float | None = None) -> tuple[dict, str]:
    """Run a script that prints JSON last, in a process of its own, for `limit` seconds at most.

    Return the result, or {} and why there is none.
    """
    command = [sys.executable, script, *map(str, arguments)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {}, f"no end after {limit:.0f} s"
    if done.returncode:
        print(done.stderr[-3000:], file=sys.stderr)
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {}, f"ended with code {done.returncode}: {last[:200]}"
    return json.loads(done.stdout.strip().splitlines()[-1]), ""


def rows_of(cells: Iterable[dict], columns: dict[str, tuple[str, str]]) -> list[tuple[str, ...]]:
    """Return cells as the rows of a table. `columns`: by their titles the key in a cell and the format of its value."""
    return [
        tuple("" if cell.get(key) is None else format(cell[key], form) for key, form in columns.values())
        for cell in cells
    ]


def machine(device: torch.device = CPU) -> str:
    """Return what a table was measured with: torch, device or threads, commit."""
    threads = f"cpu, {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else threads
    return f"torch {torch.__version__}, {name}, commit {git_commit()}"
