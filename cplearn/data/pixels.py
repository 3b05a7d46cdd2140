"""Decoded images for the views: from their files each time, or decoded once into one file that all processes map.

A cache changes no pixel: images are reduced when they are decoded (`augmentations.reduction`) with it and without.
"""

import hashlib
import json
import os
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np
import PIL
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cplearn.data import workers
from cplearn.data.augmentations import View, reduction, to_pixels
from cplearn.data.cachefile import HEAD, Filling, make_once, write_head
from cplearn.data.datasets import ImageDataset
from cplearn.data.identity import Identity
from cplearn.data.images import MAX_PIXELS
from cplearn.data.scan import Progress, say
from cplearn.data.workers import Loader
from cplearn.distributed import collectives
from cplearn.errors import LocalError, UserError
from cplearn.host import available_memory, system_id

KINDS = ("none", "ram", "disk")
SMALL = 2 * 2**30  # bytes of pixels up to which they are kept in memory by default
FORMAT = 2
BLOCK = 1024  # images that share a checksum


class Pixels(Dataset):
    """The images of a data set as uint8 (3, H, W), decoded from their files, as large as the views need them."""

    kind = "none"

    def __init__(self, dataset: ImageDataset, views: list[View]):
        self.dataset, self.views = dataset, views

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> Tensor:
        """Raises `LocalError` if the image cannot be read."""
        return to_pixels(self.dataset.read(i, self._reduction)[0])

    def _reduction(self, width: int, height: int) -> int:
        return reduction(self.views, width, height)

    def expected_bytes(self, sample: int = 64) -> int:
        """Estimate the pixels of all images from the sizes of a few, which are read from the headers of their files."""
        step = max(1, len(self) // sample)
        sizes = []
        for i in range(0, len(self), step):
            try:
                width, height = self.dataset.size_of(i)
            except LocalError:
                continue
            factor = self._reduction(width, height)
            sizes.append(3 * -(-width // factor) * -(-height // factor))
        return int(np.mean(sizes or [0]) * len(self))

    def halved_from(self) -> int | None:
        """Return the side in pixels from which on a square image is decoded at half its size or less; None if no image
        that may be read is that large."""
        return next((side for side in range(1, int(MAX_PIXELS**0.5) + 1) if self._reduction(side, side) > 1), None)

    def summary(self) -> str:
        return "images are decoded each time they are read (--cache none)"


class CachedPixels(Pixels):
    """The same images from a file of pixels. What could not be read when it was made is looked for again.

    `file`, if given, is kept open as long as this object: memory that other processes open by `path` meanwhile.
    """

    def __init__(self, dataset: ImageDataset, views: list[View], kind: str, path: str, file: IO | None = None):
        super().__init__(dataset, views)
        self.kind, self.path, self.file = kind, path, file
        data = np.memmap(path, np.uint8, mode="c")  # private but never written, so it stays shared
        count = 24 * len(dataset)
        self.index = data[HEAD : HEAD + count].view(np.int64).reshape(len(dataset), 3)  # offset, height, width
        self.pixels = torch.from_numpy(data[HEAD + count :])

    def __reduce__(self) -> tuple:
        """Without the pixels: a process that is given this object maps the same file."""
        return CachedPixels, (self.dataset, self.views, self.kind, self.path)

    def __getitem__(self, i: int) -> Tensor:
        offset, height, width = self.index[i].tolist()
        if height == 0:
            return super().__getitem__(i)
        return self.pixels[offset : offset + 3 * height * width].view(height, width, 3).permute(2, 0, 1)

    def summary(self) -> str:
        where = "memory (--cache ram)" if self.kind == "ram" else f"{self.path} (--cache disk)"
        missing = int((self.index[:, 1] == 0).sum())
        left_out = f", {missing} cannot be read" if missing else ""
        return f"images are decoded once, {len(self.pixels) / 1e6:,.0f} MB in {where}{left_out}"


@dataclass(frozen=True)
class CacheOptions:
    """What --cache asks for."""

    kind: str | None  # None: ram for what is small, else none
    folder: str
    num_workers: int
    stop: Callable[[], bool] = lambda: False  # asked now and then while images are decoded
    timeout: float = workers.WORKER_TIMEOUT  # seconds without a batch


def open_pixels(dataset: ImageDataset, views: list[View], options: CacheOptions) -> Pixels:
    """Return the images, from a cache if one is asked for or worth it. Every rank must call it.

    One process of each machine makes the cache, the others map it. Raises `UserError` for too little room, `WriteError`
    for a full disk, `Interrupted` if stopped.
    """
    plain = Pixels(dataset, views)
    kind = options.kind
    expected = 0 if kind == "none" else plain.expected_bytes()
    # Rank 0 decides, for machines differ in their memory.
    small = collectives.on_main(lambda: expected <= min(SMALL, available_memory() // 8))
    kind = kind or ("ram" if small else "none")
    if kind == "none":
        with collectives.raise_on_all_ranks():
            dataset.allow_any_order(options.folder)
        return plain
    machine = system_id()
    builder = collectives.gather_objects(machine).index(machine)
    make = _in_memory if kind == "ram" else _on_disk
    with collectives.raise_on_all_ranks():
        made = make(plain, options, expected) if builder == collectives.rank() else None
    paths = collectives.gather_objects(made and made.path)
    with collectives.raise_on_all_ranks():
        return made or CachedPixels(dataset, views, kind, paths[builder])


def _in_memory(plain: Pixels, options: CacheOptions, expected: int) -> CachedPixels:
    """Write the pixels into memory that all processes of this machine map."""
    have = available_memory()
    if expected > 0.9 * have:
        raise UserError(
            f"--cache ram: {len(plain):,} images take about {expected / 1e9:.1f} GB, and {have / 1e9:.1f} GB are free: "
            "use --cache disk or none"
        )
    file, path = _memory_file()
    _write(file, plain, options)
    write_head(file, "")
    return CachedPixels(plain.dataset, plain.views, "ram", path, file)


def _memory_file() -> tuple[IO, str]:
    """Return a file in memory, and how processes of the same user open it as long as it is open here.

    A memfd has no name that would outlive a kill -9, and is not bounded by /dev/shm, of which Docker gives 64 MB.
    """
    if hasattr(os, "memfd_create"):
        file = open(os.memfd_create("cplearn_pixels"), "r+b")
        return file, f"/proc/{os.getpid()}/fd/{file.fileno()}"
    file = tempfile.NamedTemporaryFile()  # macOS
    return file, file.name


def _on_disk(plain: Pixels, options: CacheOptions, expected: int) -> CachedPixels:
    """Write the pixels into a file that later runs on the same images find, by a hash of what it is made from."""
    key = content_key(plain)
    path = Path(options.folder).expanduser() / f"pixels_{key[:20]}.bin"
    what = f"--cache disk: {len(plain):,} images"
    sound = partial(is_sound, images=len(plain))
    make_once(path, key, expected, what, lambda file: _write(file, plain, options), sound, "--cache none")
    return CachedPixels(plain.dataset, plain.views, "disk", str(path))


def content_key(plain: Pixels) -> str:
    """Return a hash of what the pixels are made from: files with their sizes and times, what the views need, Pillow."""
    needs = [(view.size, view.pad, view.scale, view.ratio) for view in plain.views]
    images = Identity.of(plain.dataset).sha256(times=True)
    content = [FORMAT, PIL.__version__, needs, plain.dataset.where, images]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def is_sound(path: Path, images: int) -> bool:
    """Return whether index and pixels of a file are as they were written, by their checksums; say so if not."""
    data = np.memmap(path, np.uint8, mode="r")
    progress, count, blocks = Progress(), HEAD + 24 * images, -(-images // BLOCK)
    try:
        index, sums = data[HEAD:count], data[len(data) - 8 * (blocks + 1) :].view(np.int64).tolist()
        good = zlib.crc32(index) == sums[-1]
        offsets = index.view(np.int64).reshape(images, 3)[::BLOCK, 0] if good else []
        pixels = data[count : len(data) - 8 * (blocks + 1)]
        for k, start in enumerate(offsets):
            end = offsets[k + 1] if k + 1 < blocks else len(pixels)
            good = good and zlib.crc32(pixels[start:end]) == sums[k]
            progress.tell(lambda start=start: f"Checking {path}: {start / 1e9:.1f} of {len(pixels) / 1e9:.1f} GB")
    except (ValueError, IndexError):  # too short for its index
        good = False
    if not good:
        say(f"WARNING: {path} is damaged: its images are decoded again")
    return good


def _write(file: IO, plain: Pixels, options: CacheOptions) -> None:
    """Decode all images in parallel; write index, pixels and checksums. Room for the head is before them."""
    index, sums = np.zeros((len(plain), 3), np.int64), np.zeros(-(-len(plain) // BLOCK) + 1, np.int64)
    arrays = _Arrays(plain)  # which go through pipes
    loader = Loader(arrays, plain.dataset.names, num_workers=options.num_workers, batch_size=16, collate_fn=list)
    filling = Filling("Decoding images once", "decoded into the cache", len(plain), options.stop)
    file.seek(HEAD + index.nbytes)
    place = done = 0
    with workers.watched(loader, options.timeout) as batches:
        for batch in batches:
            for array in batch:
                index[done, 0] = place
                if array is not None:
                    index[done, 1:] = array.shape[:2]
                    file.write(array)
                    place += array.size
                    sums[done // BLOCK] = zlib.crc32(array, sums[done // BLOCK])
                done += 1
            filling.reached(done)
    loader.stop()
    sums[-1] = zlib.crc32(index)
    file.write(sums)
    file.seek(HEAD)
    file.write(index)
    file.flush()


class _Arrays(Dataset):
    """Images as (H, W, 3) arrays for the writer; None for those that cannot be read."""

    def __init__(self, plain: Pixels):
        self.plain = plain

    def __len__(self) -> int:
        return len(self.plain)

    def __getitem__(self, i: int) -> np.ndarray | None:
        workers.note(i)
        try:
            return np.ascontiguousarray(self.plain[i].permute(1, 2, 0).numpy())
        except LocalError:
            return None
        finally:
            workers.note(-1)
