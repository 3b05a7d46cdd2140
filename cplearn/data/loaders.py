"""Which process reads which image when: batches of views for training, fixed views for evaluations."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from cplearn.data import workers
from cplearn.data.augmentations import COLOR, View, color_params, cut_views, draw, empty_views, eval_view
from cplearn.data.datasets import ImageDataset
from cplearn.data.images import ImageError
from cplearn.data.pixels import Pixels
from cplearn.data.workers import Loader
from cplearn.distributed import collectives
from cplearn.errors import LocalError, UserError
from cplearn.random_streams import FOR_ORDER, FOR_REPLACEMENT, random_stream
from cplearn.text import printable

# --- loading ---------------------------------------------------------------------------------------


class BatchSampler:
    """Which samples each rank sees at each step: a pure function of (seed, epoch).

    The global batch at a step is one run of a seeded permutation, and rank r takes its r-th slice, so two
    processes of 32 see the images of one process of 64. The last incomplete batch is dropped, or with `keep_last`
    shared evenly: where it does not divide, up to world_size - 1 images at the epoch's start come again, as in torch's
    DistributedSampler. Yields lists of (epoch, sample): workers learn the epoch with each sample and never go stale.
    Begins at step `first`.
    """

    def __init__(
        self, size: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, *, keep_last: bool = False
    ):
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.rank, self.world_size, self.keep_last = rank, world_size, keep_last
        self.epoch = self.first = 0

    def __len__(self) -> int:
        whole, rest = divmod(self.size, self.batch_size * self.world_size)
        return whole + (self.keep_last and rest > 0)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = random_stream(FOR_ORDER, self.seed, self.epoch).permutation(self.size)
        for step in range(self.first, len(self)):
            start = step * self.world_size * self.batch_size
            count = min(self.batch_size, -(-(self.size - start) // self.world_size))
            first = start + self.rank * count
            yield [(self.epoch, int(order[i % self.size])) for i in range(first, first + count)]


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

    def __init__(self, pixels: Pixels, views: list[View], seed: int):
        self.pixels, self.views, self.seed = pixels, views, seed
        self.labels = np.asarray(pixels.dataset.labels)

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
        workers.note(-1)
        labels = torch.from_numpy(self.labels[read].astype(np.int64))
        return Batch(crops, color_params(self.views, u), labels, torch.tensor(read), failures)

    def _read(self, epoch: int, i: int, failures: list[tuple[int, str]]) -> tuple[Tensor, int]:
        j, others = i, None
        for _ in range(self.TRIES):
            workers.note(j)
            try:
                return self.pixels[j], j
            except ImageError as error:
                failures.append((j, error.reason))
            others = others or random_stream(FOR_REPLACEMENT, self.seed, epoch, i)
            j = int(others.integers(len(self.pixels)))
        raise LocalError(f"{self.TRIES} images in a row cannot be read; the last: {failures[-1][1]}")


class EvalDataset(Dataset):
    """One fixed view (RGB image -> uint8 pixels) of each image: pixels, label, index."""

    def __init__(self, dataset: ImageDataset, view: Callable[[Image.Image], Tensor]):
        self.dataset, self.view = dataset, view

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> tuple[Tensor, int, int]:
        workers.note(i)
        image, label = self.dataset[i]
        workers.note(-1)
        return self.view(image), label, i


class Group(NamedTuple):
    """Images of equal size out of a batch."""

    samples: list[int]
    pixels: Tensor  # uint8 (k, 3, H, W)


class SkippingDataset(EvalDataset):
    """Batches of samples -> (groups of equal size, reasons by sample for those that cannot be read)."""

    def __getitems__(self, samples: list[int]) -> tuple[list[Group], dict[int, str]]:
        by_size: dict[tuple[int, ...], list[tuple[int, Tensor]]] = {}
        failures = {}
        for i in samples:
            try:
                pixels, _, _ = self[i]
            except ImageError as error:
                failures[i] = error.reason if error.path else f"{printable(self.dataset.names[i])}: {error.reason}"
                continue
            by_size.setdefault(tuple(pixels.shape), []).append((i, pixels))
        workers.note(-1)
        groups = [Group([i for i, _ in rows], torch.stack([x for _, x in rows])) for rows in by_size.values()]
        return groups, failures


def train_loader(
    pixels: Pixels,
    views: list[View],
    *,
    batch_size: int,
    seed: int,
    num_workers: int,
    pin_memory: bool,
    keep_last: bool = False,
) -> Loader:
    """Build the loader of views for this rank; `batch_sampler.epoch` and `.first` choose epoch and first step.

    `keep_last`: as in `BatchSampler`. Raises `UserError` for a batch that is larger than the data (without it).
    """
    rank, world_size = collectives.rank(), collectives.world_size()
    batches = BatchSampler(len(pixels), batch_size, seed, rank, world_size, keep_last=keep_last)
    if len(batches) == 0:
        raise UserError(
            f"a batch of {batch_size * world_size} images ({world_size} processes x "
            f"--batch_size_per_gpu {batch_size}) is larger than the data set of {len(pixels)}: use a smaller batch"
        )
    return Loader(
        ViewDataset(pixels, views, seed),
        pixels.dataset.names,
        num_workers=num_workers,
        batch_bytes=batch_size * sum(3 * view.size**2 + 8 * len(COLOR) for view in views),
        batch_sampler=batches,
        collate_fn=_as_it_is,
        pin_memory=pin_memory,
    )


def eval_loader(
    dataset: ImageDataset, image_size: int, *, batch_size: int, num_workers: int, device: torch.device
) -> Loader:
    """Load every world_size-th image for this rank, in order; `collectives.gather_rows` puts them together again."""
    return Loader(
        EvalDataset(dataset, eval_view(image_size)),
        dataset.names,
        num_workers=num_workers,
        batch_bytes=batch_size * 3 * image_size**2,
        batch_size=batch_size,
        sampler=range(collectives.rank(), len(dataset), collectives.world_size()),
        pin_memory=device.type == "cuda",
    )


def skipping_loader(
    dataset: ImageDataset,
    view: Callable[[Image.Image], Tensor],
    batches: Sequence[Sequence[int]],
    *,
    batch_bytes: int,
    num_workers: int,
    device: torch.device,
) -> Loader:
    """Load these batches of samples as `SkippingDataset` has them: images that cannot be read are named, not raised.

    `batch_bytes`: what a batch usually takes.
    """
    return Loader(
        SkippingDataset(dataset, view),
        dataset.names,
        num_workers=num_workers,
        batch_bytes=batch_bytes,
        batch_sampler=batches,
        collate_fn=_as_it_is,
        pin_memory=device.type == "cuda",
    )


def _as_it_is(batch):
    return batch


def read_batches(
    loader: Loader, epoch: int, first: int, last: int, *, timeout: float, waiting: AbstractContextManager
) -> Iterator[Batch]:
    """Yield batches `first` .. `last` - 1 of an epoch, each within `timeout` seconds of its process (0 for any time).

    `waiting` is entered while a batch is waited for. Raises as `Loader.batches`.
    """
    loader.batch_sampler.epoch, loader.batch_sampler.first = epoch, first
    batches = loader.batches(timeout)
    for _ in range(first, last):
        with waiting:
            batch = next(batches)
        yield batch


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
