"""Features of images that need no labels, any number of them: what is taken from a network, and the loop over parts."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from cplearn import backbones
from cplearn.data import augmentations, color, datasets, loaders, workers
from cplearn.distributed import collectives
from cplearn.errors import UserError
from cplearn.features.files import SCRIPT, Parts, Rows
from cplearn.host import git_commit
from cplearn.load import Model

TOKENS = ("cls", "mean", "patches")
PART_IMAGES, PART_BYTES = 2048, 2**26  # of a part, at most: what a process holds, and what a kill loses


class Extraction:
    """What is taken from a network, of which view of an image.

    `tokens`: `cls` (what the backbone gives: the CLS token of a ViT, pooled features of others), or of a ViT the `mean`
    of its patch tokens, or all `patches`. `head`: also embedding and code, where there is a head; they belong to the
    backbone's own feature always. Raises `UserError` if the network has no such tokens, or cannot take such images.
    """

    def __init__(self, model: Model, device: torch.device, tokens: str, keep_aspect: bool, head: bool):
        self.model, self.device, self.tokens, self.keep_aspect = model, device, tokens, keep_aspect
        self.method = model.method if head else None
        self.patch = backbones.patch_side(model.backbone, 1)
        if tokens != "cls" and not hasattr(model.backbone, "num_prefix_tokens"):
            raise UserError(f"--tokens {tokens} is for ViTs, and --arch {model.arch} is none: leave it out")
        self.ragged = tokens == "patches" and keep_aspect  # images have different numbers of patches
        size = model.image_size
        if keep_aspect and size % self.patch:
            raise UserError(f"--image_size {size} is not a multiple of the patch size {self.patch}")
        width = size * 4 // 3 // self.patch * self.patch + self.patch if keep_aspect else size
        try:
            self.empty, self.row_bytes = self._try(size, width)
        except (RuntimeError, AssertionError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"--keep_aspect: --arch {model.arch} takes no {size} x {width} images: {reason}") from None
        self.pixels = size * width

    def view(self) -> Callable[[Image.Image], Tensor]:
        """Return what makes an RGB image uint8 (3, H, W); it can be sent to loader processes."""
        if self.keep_aspect:
            return partial(augmentations.aspect_pixels, size=self.model.image_size, multiple=self.patch)
        return augmentations.eval_view(self.model.image_size)

    @torch.inference_mode()
    def run(self, pixels: Tensor) -> list[Rows]:
        """Return what is taken of each image. Shape: uint8 (n, 3, H, W) -> n x columns, whose rows are

        features (f,) or (patches, f), grid (2,) rows and columns of patches, embedding (d,), codes ().
        """
        x = color.network_input(pixels, self.device)
        backbone, taken = self.model.backbone, {}
        if self.tokens == "cls":
            own = taken["features"] = backbone(x)
        else:
            tokens = backbone.forward_features(x)
            grid = [side // self.patch for side in x.shape[2:]]
            patches = tokens[:, backbone.num_prefix_tokens :]
            if tokens.dim() != 3 or patches.shape[1] != grid[0] * grid[1]:
                raise UserError(f"--tokens {self.tokens}: --arch {self.model.arch} has no token for each patch")
            own = backbone.forward_head(tokens)
            taken["features"] = patches.mean(1) if self.tokens == "mean" else patches
            if self.tokens == "patches":
                taken["grid"] = torch.tensor([grid], dtype=torch.int32).expand(len(x), 2)
        if self.method is not None:
            taken["embedding"] = self.method.embed(own)
            taken["codes"] = self.method.assign(taken["embedding"])
        columns = {name: rows.float() if rows.is_floating_point() else rows for name, rows in taken.items()}
        columns = {name: rows.cpu().numpy() for name, rows in columns.items()}
        return [{name: rows[i] for name, rows in columns.items()} for i in range(len(x))]

    def _try(self, height: int, width: int) -> tuple[Rows, int]:
        """Return columns without a row, and the bytes of an image's rows."""
        (row,) = self.run(torch.zeros(1, 3, height, width, dtype=torch.uint8))
        empty = {name: value[None][:0] for name, value in row.items()}
        if self.ragged:
            empty["features"] = row["features"][:0]
        return empty, sum(value.nbytes for value in row.values())

    def stack(self, rows: dict[int, Rows]) -> Rows:
        """Return the columns of a part, its images in order, as `Parts.write` takes them."""
        samples = sorted(rows)
        columns = {"samples": np.array(samples, dtype=np.int64)}
        for name, empty in self.empty.items():
            join = np.concatenate if name == "features" and self.ragged else np.stack
            columns[name] = join([rows[i][name] for i in samples]) if samples else empty
        return columns

    def identity(self, dataset, images: str) -> dict[str, object]:
        """Return what has to be equal for parts to belong together: weights, images, and what is taken of them."""
        size = self.model.image_size
        if self.keep_aspect:
            view = f"shorter side {size}, both sides cut to multiples of {self.patch}"
        else:
            shorter = augmentations.eval_resize(size)
            view = f"{size} x {size}" if shorter is None else f"shorter side {shorter}, center {size} x {size}"
        return {
            "weights_sha256": self.model.weights_sha256,
            **({"network": self.model.network} if self.model.network else {}),
            "arch": self.model.arch,
            "head": self.model.method_name if self.method is not None else None,
            "image_size": size,
            "keep_aspect": self.keep_aspect,
            "tokens": self.tokens,
            "transform": f"{view}, bicubic, RGB / 255, mean {color.MEAN}, std {color.STD}",
            "data": os.path.abspath(images),
            "data_hash": datasets.fingerprint(dataset),
        }

    def source(self, identity: dict[str, object], parts: Parts, names) -> dict[str, object]:
        """Return what the file has to say of itself: the identity, and what was left out."""
        failures = {int(i): reason for k in range(len(parts)) for i, reason in (parts.failures(k) or {}).items()}
        return {
            "script": SCRIPT,
            **self.model.source(),
            **identity,
            "patch_size": self.patch if self.patch > 1 else None,
            "out_dim": self.method.out_dim if self.method is not None else None,
            "unreadable": {str(names[i]): reason for i, reason in sorted(failures.items())},
            "commit": git_commit(),
        }

    def part_size(self, images: int, batch_size: int) -> int:
        """Return how many images make a part: whole batches, and one for each process at least."""
        most = min(PART_IMAGES, PART_BYTES // self.row_bytes, images // (4 * collectives.world_size()))
        return max(1, min(max(most // batch_size, 1) * batch_size, -(-images // collectives.world_size())))


class _Batches:
    """The batches of some parts, one after another: what a loader takes as its batch sampler."""

    def __init__(self, parts: list[range], batch_size: int):
        self.parts, self.batch_size = parts, batch_size

    def __len__(self) -> int:
        return sum(-(-len(part) // self.batch_size) for part in self.parts)

    def __iter__(self) -> Iterator[list[int]]:
        for part in self.parts:
            for start in range(0, len(part), self.batch_size):
                yield list(part[start : start + self.batch_size])


def extract(job: Extraction, dataset, parts: Parts, args: argparse.Namespace) -> None:
    """Make the parts that are missing, one per process and round. Every rank calls it.

    Raises `UserError` on all ranks when more images cannot be read than `--max_bad_images` allows.
    """
    missing = collectives.on_main(parts.missing)
    rank, world = collectives.rank(), collectives.world_size()
    loader = loaders.skipping_loader(
        dataset,
        job.view(),
        _Batches([parts.samples(k) for k in missing[rank::world]], args.batch_size_per_gpu),
        batch_bytes=args.batch_size_per_gpu * 3 * job.pixels,
        num_workers=workers.default_workers(args.num_workers),
        device=job.device,
    )
    found: dict[int, str] = {}
    missing_images = sum(len(parts.samples(k)) for k in missing)
    silent = not (collectives.is_main() and sys.stderr.isatty())
    bar = tqdm(total=parts.images, initial=parts.images - missing_images, unit="image", disable=silent)
    with workers.watched(loader, args.worker_timeout) as batches, bar:
        for first in range(0, len(missing), world):
            failures: dict[int, str] = {}
            with collectives.raise_on_all_ranks():
                if first + rank < len(missing):
                    failures = _make(job, parts, missing[first + rank], batches, args.batch_size_per_gpu, bar)
            for one in collectives.gather_objects(failures):
                found |= one
                for reason in one.values() if collectives.is_main() else ():
                    print(f"WARNING: left out: {reason}", file=sys.stderr, flush=True)
            others = [k for r, k in enumerate(missing[first : first + world]) if r != rank]
            bar.update(sum(len(parts.samples(k)) for k in others))
            _check(found, len(dataset), args.max_bad_images)


def _make(job: Extraction, parts: Parts, k: int, batches: Iterator, batch_size: int, bar: tqdm) -> dict[int, str]:
    """Write part k from the loader's next batches; return the reasons for images that have no row, by sample."""
    rows: dict[int, Rows] = {}
    failures: dict[int, str] = {}
    for _ in range(-(-len(parts.samples(k)) // batch_size)):
        groups, failed = next(batches)
        failures |= failed
        for group in groups:
            rows.update(zip(group.samples, job.run(group.pixels), strict=True))
        bar.update(len(failed) + sum(len(group.samples) for group in groups))
    parts.write(k, job.stack(rows), failures)
    return failures


def _check(found: dict[int, str], images: int, limit: float) -> None:
    if len(found) > limit * images:
        raise UserError(
            f"{len(found)} of {images} images cannot be read, more than --max_bad_images {limit:g} allows "
            f"({int(limit * images)}): repair them, or allow more, and run again; the last: {list(found.values())[-1]}"
        )
