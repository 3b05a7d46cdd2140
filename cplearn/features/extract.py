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
from cplearn.data.images import too_many
from cplearn.distributed import collectives
from cplearn.errors import UserError
from cplearn.features.files import SCRIPT, Parts, Rows
from cplearn.host import git_commit
from cplearn.load import Model
from cplearn.precision import autocast

TOKENS = ("cls", "mean", "patches")
PART_IMAGES, PART_BYTES = 2048, 2**26  # of a part, at most: what a process holds, and what a kill loses


class Extraction:
    """What is taken from a network, of which view of an image.

    `tokens`: `cls` (what the backbone gives: the CLS token of a ViT, pooled features of others), or of a ViT the `mean`
    of its patch tokens, or all `patches`. `head`: also embedding and code, where there is a head; they belong to the
    backbone's own feature always. Raises `UserError` if the network has no such tokens, or cannot take such images.
    """

    def __init__(
        self, model: Model, device: torch.device, tokens: str, keep_aspect: bool, head: bool, precision: str = "fp32"
    ):
        self.model, self.device, self.tokens, self.keep_aspect = model, device, tokens, keep_aspect
        self.precision = precision
        self.method = model.method if head else None
        self.patch = backbones.patch_side(model.backbone, 1)
        if tokens != "cls" and not hasattr(model.backbone, "num_prefix_tokens"):
            raise UserError(f"--tokens {tokens} is for ViTs, and --arch {model.arch} is none: leave it out")
        self.ragged = tokens == "patches" and keep_aspect  # images have different numbers of patches
        size = model.image_size
        if keep_aspect and size % self.patch:
            raise UserError(f"--image_size {size} is not a multiple of the patch size {self.patch}")
        width = size * 4 // 3 // self.patch * self.patch + self.patch if keep_aspect else size
        row = self._try(size, width)
        self.columns = {name: rows[:0] for name, rows in row.items()}
        self.row_bytes = sum(rows.nbytes for rows in row.values())
        self.pixels = size * width

    def _try(self, height: int, width: int) -> Rows:
        """Return the rows of one image. Raises `UserError` if the network cannot take it."""
        try:
            return self.run(torch.zeros(1, 3, height, width, dtype=torch.uint8))[0]
        except UserError:
            raise
        except (RuntimeError, AssertionError, ValueError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            arch = self.model.arch
            raise UserError(f"--keep_aspect: --arch {arch} takes no {height} x {width} images: {reason}") from None

    def view(self) -> Callable[[Image.Image], Tensor]:
        """Return what makes an RGB image uint8 (3, H, W); it can be sent to loader processes."""
        if self.keep_aspect:
            return partial(augmentations.aspect_pixels, size=self.model.image_size, multiple=self.patch)
        return augmentations.eval_view(self.model.image_size)

    @torch.inference_mode()
    def run(self, pixels: Tensor) -> list[Rows]:
        """Return the rows of each image. Shape: uint8 (n, 3, H, W) -> n x columns.

        features (1, f), (1, patches, f) or, where images differ in their patches, (patches, f); grid (1, 2) rows and
        columns of patches; embedding (1, d); codes (1,).
        """
        x = color.network_input(pixels, self.device)
        with autocast(self.device, self.precision):
            own, taken = self._tokens_of(x)
        if self.method is not None:
            taken["embedding"] = self.method.embed(own)
            taken["codes"] = self.method.assign(taken["embedding"])
        columns = {name: rows.float() if rows.is_floating_point() else rows for name, rows in taken.items()}
        columns = {name: rows.cpu().numpy() for name, rows in columns.items()}
        images = [{name: rows[i : i + 1] for name, rows in columns.items()} for i in range(len(x))]
        if self.ragged:
            images = [rows | {"features": rows["features"][0]} for rows in images]
        return images

    def _tokens_of(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the backbone's own features, and the columns that are taken of it."""
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
        return own, taken

    def stack(self, rows: dict[int, Rows]) -> Rows:
        """Return the columns of a part, its images in order, as `Parts.write` takes them."""
        samples = sorted(rows)
        columns = {
            name: np.concatenate([empty, *(rows[i][name] for i in samples)]) for name, empty in self.columns.items()
        }
        return {"samples": np.array(samples, dtype=np.int64), **columns}

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
            **({"precision": self.precision} if self.precision != "fp32" else {}),
            "keep_aspect": self.keep_aspect,
            "tokens": self.tokens,
            "transform": f"{view}, bicubic, RGB / 255, mean {color.MEAN}, std {color.STD}",
            "data": os.path.abspath(images),
            "data_hash": datasets.fingerprint(dataset),
        }

    def source(self, identity: dict[str, object], unreadable: dict[str, str]) -> dict[str, object]:
        """Return what the file has to say of itself: the identity, and what was left out."""
        return {
            **self.model.source(),
            **identity,
            "patch_size": self.patch if self.patch > 1 else None,
            "out_dim": self.method.out_dim if self.method is not None else None,
            "unreadable": unreadable,
            "commit": git_commit(),
            "script": SCRIPT,  # the last: where `files.MARK` is looked for
        }

    def part_size(self, images: int, batch_size: int) -> int:
        """Return how many images make a part: whole batches, and one for each process at least."""
        most = min(PART_IMAGES, PART_BYTES // self.row_bytes, images // (4 * collectives.world_size()))
        return max(1, min(max(most // batch_size, 1) * batch_size, -(-images // collectives.world_size())))


def extract(job: Extraction, dataset, parts: Parts, args: argparse.Namespace) -> dict[str, str]:
    """Make the parts that are missing, one per process and round. Every rank calls it.

    Returns why images could not be read, by name: parts that miss some are made again by every run, so these are all.
    Raises `UserError` on all ranks when more images cannot be read than `--max_bad_images` allows.
    """
    missing = collectives.on_main(parts.missing)
    rank, world, size = collectives.rank(), collectives.world_size(), args.batch_size_per_gpu
    local_parts = [parts.samples(k) for k in missing[rank::world]]
    loader = loaders.skipping_loader(
        dataset,
        job.view(),
        [part[start : start + size] for part in local_parts for start in range(0, len(part), size)],
        batch_bytes=size * 3 * job.pixels,
        num_workers=workers.default_workers(args.num_workers),
        device=job.device,
    )
    failures: dict[int, str] = {}
    done = parts.images - sum(len(parts.samples(k)) for k in missing)
    quiet = None if collectives.is_main() else True  # None: without a terminal
    bar = tqdm(total=parts.images, initial=done, unit="image", disable=quiet)
    with workers.watched(loader, args.worker_timeout) as batches, bar:
        for first in range(0, len(missing), world):
            local: dict[int, str] = {}
            with collectives.raise_on_all_ranks():
                if first + rank < len(missing):
                    local = _make(job, parts, missing[first + rank], batches, size, bar)
            for one in collectives.gather_objects(local):
                failures |= one
                for reason in one.values() if collectives.is_main() else ():
                    print(f"WARNING: left out: {reason}", file=sys.stderr, flush=True)
            others = [k for r, k in enumerate(missing[first : first + world]) if r != rank]
            bar.update(sum(len(parts.samples(k)) for k in others))
            if len(failures) > args.max_bad_images * len(dataset):
                said = too_many(len(failures), len(dataset), args.max_bad_images, "repair them")
                raise UserError(f"{said}, and run again; the last: {list(failures.values())[-1]}")
    return {str(dataset.names[i]): reason for i, reason in sorted(failures.items())}


def _make(job: Extraction, parts: Parts, k: int, batches: Iterator, batch_size: int, bar: tqdm) -> dict[int, str]:
    """Write part k from the loader's next batches; return the reasons for images that have no row, by sample."""
    rows: dict[int, Rows] = {}
    failures: dict[int, str] = {}
    for _ in range(-(-len(parts.samples(k)) // batch_size)):
        groups, unreadable = next(batches)
        failures |= unreadable
        for group in groups:
            rows.update(zip(group.samples, job.run(group.pixels), strict=True))
        bar.update(len(unreadable) + sum(len(group.samples) for group in groups))
    parts.write(k, job.stack(rows))
    return failures
