"""Which process reads which image when: batches of views for training, fixed views for evaluations."""

import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from cplearn.data.augmentations import COLOR, View, color_params, cut_views, draw, empty_views, eval_pixels
from cplearn.data.datasets import printable
from cplearn.distributed import collectives
from cplearn.errors import LocalError, UserError, WorkerError
from cplearn.host import allow_open_files, available_memory, free_shared_memory, leave_signals_to_parent
from cplearn.random_streams import FOR_ORDER, FOR_REPLACEMENT, random_stream

if TYPE_CHECKING:
    from cplearn.data.pixels import Pixels  # which itself reads with workers

# --- loading ---------------------------------------------------------------------------------------


class BatchSampler:
    """Which samples each rank sees at each step: a pure function of (seed, epoch).

    The global batch at a step is one run of a seeded permutation, and rank r takes its r-th slice, so two
    processes of 32 see the images of one process of 64. The last incomplete batch is dropped. Yields lists
    of (epoch, sample): workers learn the epoch with each sample and never go stale. Begins at step `first`.
    """

    def __init__(self, size: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1):
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = self.first = 0

    def __len__(self) -> int:
        return self.size // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = random_stream(FOR_ORDER, self.seed, self.epoch).permutation(self.size)
        for step in range(self.first, len(self)):
            start = (step * self.world_size + self.rank) * self.batch_size
            yield [(self.epoch, int(i)) for i in order[start : start + self.batch_size]]


class Batch(NamedTuple):
    """Views of n images of this rank, before their colors."""

    crops: list[Tensor]  # uint8 (n, V_g, 3, size, size), one for each size of views
    params: Tensor  # of the color half, float64 (n, V, len(augmentations.COLOR))
    labels: Tensor  # int64 (n,)
    samples: Tensor  # int64 (n,): which images they are, after replacements
    failures: list[tuple[int, str]]  # sample and reason of each image that could not be read


class ViewDataset(Dataset):
    """Geometry half of the views of a batch: items (epoch, i) -> `Batch`.

    Where an image cannot be read, another one takes its place, drawn from (seed, epoch, i).
    """

    TRIES = 20
    AT_ONCE = 8  # images that are held decoded at once

    def __init__(self, pixels: "Pixels", views: list[View], seed: int, num_workers: int = 0):
        self.pixels, self.views, self.seed = pixels, views, seed
        self.names, self.labels = pixels.dataset.names, np.asarray(pixels.dataset.labels)
        self.reading = reading_table(num_workers)

    def __getitems__(self, items: list[tuple[int, int]]) -> Batch:
        (epoch, *_), samples = zip(*items, strict=True)
        u = draw(self.seed, epoch, samples, len(self.views))
        crops = empty_views(self.views, len(items))
        read, failures = [], []
        at_once = self.AT_ONCE if self.pixels.kind == "none" else len(items)
        for start in range(0, len(items), at_once):
            part = slice(start, start + at_once)
            images = []
            for i in samples[part]:
                image, j = self._read(epoch, i, failures)
                images.append(image)
                read.append(j)
            cut_views(images, u[part], self.views, [x[part] for x in crops])
        note(self.reading, -1)
        labels = torch.from_numpy(self.labels[read].astype(np.int64))
        return Batch(crops, color_params(self.views, u), labels, torch.tensor(read), failures)

    def _read(self, epoch: int, i: int, failures: list[tuple[int, str]]) -> tuple[Tensor, int]:
        j, others = i, None
        for _ in range(self.TRIES):
            note(self.reading, j)
            try:
                return self.pixels[j], j
            except LocalError as error:
                failures.append((j, str(error).partition("; repair it")[0]))
            others = others or random_stream(FOR_REPLACEMENT, self.seed, epoch, i)
            j = int(others.integers(len(self.pixels)))
        raise LocalError(f"{self.TRIES} images in a row cannot be read; the last: {failures[-1][1]}")


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


class EvalDataset(Dataset):
    """The fixed evaluation view: uint8 pixels, label, index."""

    def __init__(self, dataset: Dataset, image_size: int, num_workers: int = 0):
        self.dataset, self.image_size, self.names = dataset, image_size, dataset.names
        self.reading = reading_table(num_workers)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> tuple[Tensor, int, int]:
        note(self.reading, i)
        image, label = self.dataset[i]
        note(self.reading, -1)
        return eval_pixels(image, self.image_size), label, i


def train_loader(
    pixels: "Pixels",
    views: list[View],
    *,
    batch_size: int,
    seed: int,
    num_workers: int,
    pin_memory: bool,
) -> DataLoader:
    """Build the loader of views for this rank; `batch_sampler.epoch` and `.first` choose epoch and first step.

    Raises `UserError` for a batch that is larger than the data, and for workers that this machine has no room for.
    """
    batches = BatchSampler(len(pixels), batch_size, seed, collectives.rank(), collectives.world_size())
    if len(batches) == 0:
        raise UserError(
            f"a batch of {batch_size * collectives.world_size()} images ({collectives.world_size()} processes x "
            f"--batch_size_per_gpu {batch_size}) is larger than the data set of {len(pixels)}: use a smaller batch"
        )
    check_workers(num_workers, batch_size * sum(3 * view.size**2 + 8 * len(COLOR) for view in views))
    return DataLoader(
        ViewDataset(pixels, views, seed, num_workers),
        batch_sampler=batches,
        collate_fn=_as_it_is,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=start_worker,
        persistent_workers=num_workers > 0,
        generator=torch.Generator(),  # the loader's own, so that it leaves the global one (drop path) alone
    )


def eval_loader(
    dataset: Dataset, image_size: int, *, batch_size: int, num_workers: int, device: torch.device
) -> DataLoader:
    """Load every world_size-th image for this rank, in order; `collectives.gather_rows` puts them together again.

    To be read with `watched`. Raises `UserError` for workers that this machine has no room for.
    """
    check_workers(num_workers, batch_size * 3 * image_size**2)
    mine = range(collectives.rank(), len(dataset), collectives.world_size())
    return DataLoader(
        EvalDataset(dataset, image_size, num_workers),
        batch_size=batch_size,
        sampler=mine,
        num_workers=num_workers,
        worker_init_fn=start_worker,
        persistent_workers=num_workers > 0,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),
    )


def _as_it_is(batch: Batch) -> Batch:
    return batch


def start_worker(_: int) -> None:
    """Begin a worker of a loader whose data set has a `reading_table`."""
    note(get_worker_info().dataset.reading, -1)
    leave_signals_to_parent(_)


# --- loader processes: room for them, their start, and when they fail -------------------------------


WORKER_TIMEOUT = 600.0  # seconds, the default of --worker_timeout
AHEAD = 2  # batches that torch lets each worker make ahead
WORKER_MEMORY = 50_000_000  # bytes that a worker takes for itself, at the least
# Open files: of this process a pipe or two for each worker and one for each tensor of its batches.
FILES_PER_WORKER = 16
MORE_FILES = 40


def default_workers(requested: int | None, *, no_gain: bool = False) -> int:
    """Resolve --num_workers: DINO's 10, or fewer where processes share fewer cores; none where they gain nothing.

    Raises `UserError` for more than could be of use on this machine's cores, or than its memory holds.
    """
    cores, share = os.cpu_count() or 1, collectives.local_world_size()
    if requested is None:
        return 0 if no_gain else min(10, max(1, cores // share - 1))
    useful = max(32, 4 * cores // share)
    if requested > useful:
        raise UserError(
            f"--num_workers {requested}: {cores} cores have no use for so many in {share} processes, {useful} at most"
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

    torch's own timeout waits for the begin of a message only, and does not see a worker that is frozen in one.
    """
    if not seconds or threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(*_) -> None:
        raise _Late

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
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


def read_batches(
    loader: DataLoader, epoch: int, first: int, last: int, *, timeout: float, waiting: AbstractContextManager
) -> Iterator[Batch]:
    """Yield batches `first` .. `last` - 1 of an epoch, each within `timeout` seconds (0 for any time).

    `waiting` is entered while a batch is waited for. Raises RuntimeError for a batch that does not come.
    """
    loader.batch_sampler.epoch, loader.batch_sampler.first = epoch, first
    with deadline(timeout):
        batches = start_workers(loader)
    for _ in range(first, last):
        with waiting:
            batch = next_batch(batches, timeout)
        yield batch


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


def copy_ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """On a GPU: copy the crops of a batch to the device in a stream of their own, while it works on the one before.

    The host asks for a batch as soon as it has queued the step before, whose work this copy does not wait for.
    """
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)
    for batch in batches:
        with torch.cuda.stream(stream):
            crops = [x.to(device, non_blocking=True) for x in batch.crops]
        step = torch.cuda.current_stream()
        step.wait_stream(stream)
        for x in crops:
            x.record_stream(step)  # its memory is not to be reused before the step is done with it
        yield batch._replace(crops=crops)


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
