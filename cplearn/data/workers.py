"""Loader processes: room for them before they start, what each reads, and what is said when one dies or hangs."""

import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

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
GRACE = 0.2  # seconds in which a process may end by itself
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
    if free is not None and need > (share := free // collectives.local_world_size()):
        raise UserError(
            f"--num_workers {num_workers} hands over batches in {need / 1e6:.1f} MB of shared memory, "
            f"{share / 1e6:.1f} MB of /dev/shm are free: enlarge it (docker run --shm-size=8g), --num_workers "
            f"{max(0, (share // batch - 2) // AHEAD)}, or a smaller --batch_size_per_gpu"
        )


# --- in a loader process ----------------------------------------------------------------------------

_reading: np.ndarray | None = None  # its row of `Loader.reading`: its number, and the sample that it reads


def note(sample: int) -> None:
    """Remember, in a loader process, which sample it reads now; -1 for none."""
    if _reading is not None:
        _reading[1] = sample


def start_worker(reading: Tensor, worker: int) -> None:
    """Begin a loader process. Shape: reading int64 (workers, 2)."""
    global _reading
    _reading = reading[worker].numpy()
    _reading[:] = os.getpid(), -1
    leave_signals_to_parent(worker)


# --- in the process that reads from them -------------------------------------------------------------


class Loader:
    """A DataLoader whose processes are known: one that died or hangs is named with its image, all can be ended.

    Raises `UserError` for processes that this machine has no room for. `batch_bytes` is what a batch takes, `names` has
    a name for each sample that the data set tells to `note`, `options` are those of DataLoader.
    """

    def __init__(self, dataset: Dataset, names: Sequence[str], *, num_workers: int, batch_bytes: int = 0, **options):
        check_workers(num_workers, batch_bytes)
        self.names, self.num_workers = names, num_workers
        self.reading = torch.full((max(1, num_workers), 2), -1).share_memory_()
        self.processes: list[BaseProcess] = []
        self.late = 0.0  # seconds in which a batch did not come
        self._batches: Iterator | None = None
        self._awaited: int | None = None  # number of the batch that is waited for
        self._loader = DataLoader(
            dataset,
            num_workers=num_workers,
            worker_init_fn=partial(start_worker, self.reading),
            persistent_workers=num_workers > 0,
            generator=torch.Generator(),  # its own, so that it leaves the global one (drop path) alone
            **options,
        )
        self.batch_sampler = self._loader.batch_sampler

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator:
        return self.batches()

    def batches(self, timeout: float = 0) -> Iterator:
        """Yield the batches of an epoch, each within `timeout` seconds of its process (0 for any time).

        Raises `LocalError` where processes cannot be started, `WorkerError` for one that died or hangs.
        """
        done = threading.Event()
        if timeout and self.num_workers:
            threading.Thread(target=self._watch, args=(timeout, done), daemon=True).start()
        try:
            self._awaited = -1  # a word of each process that an epoch begins, which one that is frozen does not give
            self._start()
            for self._awaited in itertools.count():
                batch = next(self._batches, None)
                self._awaited = None
                if batch is None:
                    return
                yield batch
        except (RuntimeError, OSError, EOFError) as error:  # torch's, or of a connection to a process that is gone
            raise self.failure() or error from None
        finally:
            done.set()

    def _watch(self, seconds: float, done: threading.Event) -> None:
        """Kill the processes when a batch does not come, which ends the wait for it.

        torch's own timeout does not see a process that is frozen while it hands over a batch. Of the time in which this
        process is itself stopped (Ctrl-Z) little counts: all its ticks come as one.
        """
        before, ticks = None, 0
        while not done.wait(seconds / TICKS):
            still = before is not None and self._awaited == before
            ticks = ticks + 1 if still else 0
            before = self._awaited
            if ticks == TICKS and self.processes:
                self.late = seconds
                self._kill()

    def _start(self) -> None:
        before = multiprocessing.active_children()
        try:
            self._batches = iter(self._loader)
            failed = None
        except (OSError, RuntimeError) as error:  # torch gives the error of a thread, too
            failed = error
        self.processes += [child for child in multiprocessing.active_children() if child not in before]
        if failed:
            died = self.failure()
            self.stop()
            raise died or LocalError(
                f"--num_workers {self.num_workers}: they cannot be started ({failed}): fewer of them, or raise the "
                "limits of open files and processes (ulimit -n, ulimit -u) and the size of /dev/shm"
            )

    def failure(self) -> WorkerError | None:
        """Return what to say of processes that died or hang, with their images; None if all are well."""
        sentinels = [process.sentinel for process in self.processes]
        gone = wait(sentinels, timeout=1) if sentinels else []  # connections to a process may end a bit before it
        for process in self.processes:
            if process.sentinel in gone:
                process.join()
        ended = {process.pid: process.exitcode for process in self.processes if process.exitcode is not None}
        if not ended:
            return None
        readers = [(pid, i) for pid, i in self.reading.tolist() if i >= 0 and (self.late or pid in ended)]
        images = [printable(self.names[i]) for _, i in readers]
        at = f"while reading {', '.join(images[:5])}" if images else "between two images"
        what = ", ".join(f"loader process {pid} ended by {_cause(code)}" for pid, code in list(ended.items())[:5])
        if self.late:
            what = f"no loader process gave a batch in {self.late:g} seconds"
        more = "a larger /dev/shm" if -signal.SIGBUS in ended.values() else "more memory"
        return WorkerError(f"{what}, {at}: try that file alone, fewer --num_workers, or {more} (or --worker_timeout)")

    def stop(self) -> None:
        """End the processes, and torch's thread that copies their batches: after `GRACE` seconds by signal 9.

        They handle no other signal, may hang, and Python waits for its children at its end.
        """
        here = threading.current_thread() is threading.main_thread()
        handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if here else None  # torch's raises at their death
        late = threading.Timer(GRACE, self._kill)
        late.start()
        self._batches = self._loader = None  # which torch takes as a request to end them
        late.cancel()
        self._kill()
        for process in self.processes:
            process.join()
        self.processes = []
        if here:
            signal.signal(signal.SIGCHLD, handler)

    def _kill(self) -> None:
        for process in self.processes:
            process.kill()


def _cause(exit_code: int) -> str:
    return signal.Signals(-exit_code).name if exit_code < 0 else f"exit code {exit_code}"


@contextmanager
def watched(loader: Loader, timeout: float = WORKER_TIMEOUT) -> Iterator[Iterator]:
    """Give the batches of a loader, once, each within `timeout` seconds of its process (0 for any time).

    The loader keeps its processes. Raises `WorkerError` inside for one that died or hangs; none is left after an error.
    """
    try:
        yield loader.batches(timeout)
    except BaseException as error:
        # torch raises RuntimeError wherever this process happens to be when one dies.
        failure = loader.failure() if isinstance(error, RuntimeError) else None
        loader.stop()
        raise failure or error from None
