"""Loader processes: what each reads now, room for them before they start, and what is said when they fail."""

import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data._utils import signal_handling

from cplearn.distributed import collectives
from cplearn.errors import LocalError, UserError, WorkerError
from cplearn.host import (
    allow_open_files,
    available_memory,
    cores_of_process,
    free_shared_memory,
    leave_signals_to_parent,
)
from cplearn.text import printable

WORKER_TIMEOUT = 600.0  # seconds, the default of --worker_timeout
TICKS = 10  # in which that time passes
AHEAD = 2  # batches that torch lets each worker make ahead
WORKER_MEMORY = 50_000_000  # bytes that a worker takes for itself, at the least
# Open files: of this process a pipe or two for each worker and one for each tensor of its batches.
FILES_PER_WORKER = 16
MORE_FILES = 40


def default_workers(requested: int | None, *, no_gain: bool = False) -> int:
    """Resolve --num_workers: DINO's 10, or fewer where processes share fewer cores; none where they gain nothing.

    Raises `UserError` for more than could be of use on this machine's cores, or than its memory holds.
    """
    share = collectives.local_world_size()
    cores = cores_of_process(share)
    if requested is None:
        return 0 if no_gain else min(10, max(1, cores - 1))
    useful = max(32, 4 * cores)
    if requested > useful:
        raise UserError(
            f"--num_workers {requested}: the {cores} cores of a process have no use for so many, {useful} at most"
        )
    fit = available_memory() // share // WORKER_MEMORY
    if requested > fit:
        raise UserError(
            f"--num_workers {requested} takes at least {requested * WORKER_MEMORY / 1e9:.1f} GB in each of {share} "
            f"processes here, more than is free: {fit} at most"
        )
    return requested


def check_workers(num_workers: int, batch_bytes: int) -> None:
    """Check, before they start, that workers may open enough files and share their batches of so many bytes.

    Raises `UserError`. A worker that runs out of either loses a batch without a word that could be caught, or dies.
    """
    if num_workers == 0:
        return
    most = allow_open_files(MORE_FILES + FILES_PER_WORKER * num_workers)
    if num_workers > (fit := max(0, most - MORE_FILES) // FILES_PER_WORKER):
        raise UserError(
            f"--num_workers {num_workers} needs {MORE_FILES + FILES_PER_WORKER * num_workers} open files, this process "
            f"may have {most}: raise the limit (ulimit -n), or --num_workers {fit}"
        )
    free = free_shared_memory()
    batch = batch_bytes + 2**15  # each tensor and lock takes whole pages
    need = (AHEAD * num_workers + 2) * batch  # one is used, one is copied to the device
    if free is not None and need > (mine := free // collectives.local_world_size()):
        raise UserError(
            f"--num_workers {num_workers} hands over batches in {need / 1e6:.1f} MB of shared memory, {mine / 1e6:.1f} "
            f"MB of /dev/shm are free: enlarge it (docker run --shm-size=8g), --num_workers "
            f"{max(0, (mine // batch - 2) // AHEAD)}, or a smaller --batch_size_per_gpu"
        )


# --- what they read ---------------------------------------------------------------------------------


def reading_table(num_workers: int) -> Tensor:
    """Return what a loader's data set keeps as `reading`, for `note` and `worker_error`.

    Which process reads which sample now (-1: none), a row for each worker, in shared memory. Shape: -> int64 (w, 2).
    """
    table = torch.full((max(1, num_workers), 2), -1)
    return table.share_memory_() if num_workers else table


def note(table: Tensor, sample: int) -> None:
    """Remember what this process reads now; -1 for nothing."""
    worker = get_worker_info()
    table[worker.id if worker else 0].numpy()[:] = os.getpid(), sample


def start_worker(_: int) -> None:
    """Begin a worker of a loader whose data set has a `reading_table`."""
    note(get_worker_info().dataset.reading, -1)
    leave_signals_to_parent(_)


# --- their start, and when they fail ----------------------------------------------------------------


def start_workers(loader: DataLoader) -> Iterator:
    """Begin an epoch. Raises `LocalError` where workers cannot be started; those that were are gone by then."""
    before = multiprocessing.active_children()
    try:
        return iter(loader)
    except BaseException as error:
        for child in multiprocessing.active_children():
            if child not in before:  # it ignores the signal with which Python would end it
                child.kill()
                child.join()
        if not isinstance(error, OSError) and "new thread" not in str(error):
            raise
        raise LocalError(
            f"--num_workers {loader.num_workers}: they cannot be started ({error}): fewer of them, or raise the limits "
            "of open files and processes (ulimit -n, ulimit -u) and the size of /dev/shm"
        ) from None


class _Late(BaseException):
    """What `deadline` raises inside: no Exception, because what reads damaged images catches all of those."""


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raise RuntimeError inside after that time; 0 for never. In the main thread, where the loader is read.

    torch's own timeout waits for the begin of a message only, and does not see a worker that is frozen in one. Time in
    which this process is itself stopped (Ctrl-Z) hardly counts: all its ticks come as one.
    """
    if not seconds or threading.current_thread() is not threading.main_thread():
        yield
        return
    left = TICKS

    def tick(*_) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise _Late

    before = signal.signal(signal.SIGALRM, tick)
    signal.setitimer(signal.ITIMER_REAL, seconds / TICKS, seconds / TICKS)
    try:
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except _Late:
        raise RuntimeError(f"DataLoader timed out after {seconds:g} seconds") from None
    finally:
        signal.signal(signal.SIGALRM, before)


def next_batch(batches: Iterator, timeout: float):
    """Return the next batch. Raises RuntimeError for one that does not come in time, or whose worker is gone."""
    try:
        with deadline(timeout):
            return next(batches)
    except (ConnectionError, EOFError, FileNotFoundError) as error:  # killed while it handed over a tensor
        raise RuntimeError(f"DataLoader worker is gone ({error})") from None


@contextmanager
def watched(loader: DataLoader, timeout: float = WORKER_TIMEOUT) -> Iterator[Iterator]:
    """Give the batches of a loader, once, each within `timeout` seconds (0 for any time).

    The loader keeps its workers. Raises `WorkerError` inside for one that died or hangs; none is left after an error.
    """

    def batches() -> Iterator:
        with deadline(timeout):
            found = start_workers(loader)
        for _ in range(len(loader)):
            yield next_batch(found, timeout)

    try:
        yield batches()
    except BaseException as error:
        told = worker_error(error, loader) if isinstance(error, RuntimeError) else None
        stop_workers(loader)
        raise told or error from None


def worker_error(error: RuntimeError, loader: DataLoader) -> WorkerError | None:
    """Return what to say of a loader's worker that died or hangs, with the file it was at; None for other errors."""
    text = str(error)
    if "DataLoader worker" not in text and "DataLoader timed out" not in text:
        return None
    source = loader.dataset
    named = {int(pid) for pid in re.findall(r"\d+", text.partition("exited")[0].partition("is killed")[0])}
    rows = [(pid, sample) for pid, sample in source.reading.tolist() if pid >= 0]
    files = [printable(source.names[j]) for pid, j in rows if j >= 0 and (pid in named or "timed out" in text)]
    at = f"while reading {', '.join(files[:5])}" if files else "between two files"
    what = " ".join(text.split()).removesuffix(".")[:200]
    more = "a larger /dev/shm" if "Bus error" in text or "shared memory" in text else "more memory"
    return WorkerError(f"{what}, {at}: try that file alone, fewer --num_workers, or {more} (or --worker_timeout)")


def stop_workers(loader: DataLoader) -> None:
    """Kill the workers with signal 9: they handle no other, may hang, and Python waits for its children at its end."""
    iterator = getattr(loader, "_iterator", None)
    children = getattr(iterator, "_workers", [])
    if not children:
        return
    # Its own way of ending waits for locks that a killed worker may hold.
    iterator._shutdown = True
    here = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if here else None  # torch's raises at a worker's death
    for child in children:
        child.kill()
        child.join()
    if handler is not None:
        signal.signal(signal.SIGCHLD, handler)
    if iterator._worker_pids_set:  # torch knows them by the address of their iterator, which a later one may be given
        signal_handling._remove_worker_pids(id(iterator))
        iterator._worker_pids_set = False
