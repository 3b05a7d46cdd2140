"""What every format shares: what it says of the network, where it is written, and the comparison with ours."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cplearn import backbones
from cplearn.checkpoints import EXPORTED
from cplearn.data import augmentations, color
from cplearn.errors import ExpectedError, UserError, WriteError
from cplearn.files import check_output_dir, check_replaceable, is_full, read_json
from cplearn.host import git_commit
from cplearn.load import Model
from cplearn.text import printable

TOLERANCE = 1e-5  # largest difference that passes, in units of the largest absolute value of our features
BATCHES = (1, 3)  # of random images that are compared
ON_IMAGES = "random images in batches of {} and {}".format(*BATCHES)
MARKER = "cplearn_export.json"  # in a folder that this command wrote; a file carries the same as metadata


# --- what is said of the network ------------------------------------------------------------------------


def at_image_size(model: Model) -> Model:
    """Return the model with the position embeddings of a ViT of ours resampled for the image size that is asked for.

    That is what it does itself at every forward pass; other libraries do it in other ways.
    """
    if not backbones.is_vit(model.arch) or model.backbone.patch_embed.img_size[0] == model.image_size:
        return model
    backbone = backbones.build_backbone(model.arch, patch_size=model.patch_size, image_size=model.image_size)
    backbone.load_state_dict(backbones.resample_positions(backbone, model.backbone.state_dict()))
    return replace(model, backbone=backbone.eval().requires_grad_(False))


def description(model: Model, to: str) -> dict[str, object]:
    """Return what is known of the weights and their images, as plain values: the metadata of every format."""
    return {
        "format": EXPORTED,
        "to": to,
        "arch": model.arch,
        "patch_size": model.patch_size if backbones.is_vit(model.arch) else None,
        "image_size": model.image_size,
        "resize": augmentations.eval_resize(model.image_size),  # shorter side before the center crop; None: to a square
        "interpolation": "bicubic",
        "mean": list(color.MEAN),
        "std": list(color.STD),
        "num_features": model.backbone.num_features,
        "method": model.method_name,
        "network": model.network,
        "epoch": model.epoch,
        "weights_sha256": model.weights_sha256,
        "commit": git_commit(),
    }


def metadata_of(description: dict[str, object]) -> dict[str, str]:
    """Return a description as the metadata of a file: what is no text as JSON."""
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in description.items()}


def plain_weights(module: torch.nn.Module) -> dict[str, Tensor]:
    """Return a module's state on the CPU, each tensor in memory of its own and in its usual order."""
    state = module.state_dict()
    tensors = {name: x for name, x in state.items() if isinstance(x, Tensor)}
    return {name: x.detach().cpu().clone(memory_format=torch.contiguous_format) for name, x in tensors.items()}


# --- where it is written ----------------------------------------------------------------------------------


def check_target(target: Path, to: str, *, folder: bool) -> None:
    """Check before any work that the export can be written there, in place of an earlier one of its kind at most.

    Raises `UserError`, for a name that other libraries cannot read, too.
    """
    name = printable(target)
    try:
        str(target.absolute()).encode()
    except UnicodeEncodeError:
        raise UserError(f"--out {name} is not UTF-8, which other libraries need: choose another name") from None
    if not target.absolute().parent.is_dir():
        raise UserError(f"--out {name}: the folder it goes to does not exist: create it first")
    check_output_dir(str(target.absolute().parent), "--out")
    if not folder:
        check_replaceable(target, EXPORTED.encode(), "--out")
    elif os.path.lexists(target) and not is_marked_folder(target, to):
        raise UserError(f"--out {name} is there, and no earlier export of this kind: choose another name")


@contextlib.contextmanager
def workspace(target: Path) -> Iterator[Path]:
    """Give a new folder beside the target, on the same disk; it is gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name[:100]}.", suffix=".tmp", dir=target.absolute().parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def library_errors(target: Path, packages: Sequence[str]) -> Iterator[None]:
    """Turn whatever a library raises where a disk fails into a `WriteError`, and packages that are not there, or do not
    fit each other, into a `UserError` with the command that installs them."""
    try:
        yield
    except ExpectedError:
        raise
    except ImportError as error:
        names = " ".join(sorted({name.partition(".")[0] for name in packages}))
        raise UserError(f"this export needs other packages ({error}): pip install --upgrade {names}") from None
    except Exception as error:
        full = is_full(target.absolute().parent)
        if not full and getattr(error, "errno", None) is None:  # not the system's: libraries raise OSError of their own
            raise
        reason = "no space left on the disk" if full else os.strerror(error.errno)
        raise WriteError(f"{printable(target)} could not be written: {reason}; run again with more space") from None


def move_into_place(new: Path, target: Path) -> None:
    """Put what is complete under its name, in place of an earlier export."""
    old = new.with_name("old")
    if target.is_dir():  # which no renaming replaces
        os.rename(target, old)
    try:
        os.replace(new, target)
    except OSError:
        if old.exists():
            os.rename(old, target)
        raise


def write_weights(path: Path, weights: dict[str, Tensor]) -> None:
    """Write a .safetensors file for other libraries, whose word for torch's tensors is pt."""
    from safetensors.torch import save

    path.write_bytes(save(weights, {"format": "pt"}))


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def mark_folder(folder: Path, described: dict[str, object]) -> None:
    """Write the description beside the other files, with their names: what a later export may replace."""
    names = sorted(path.name for path in folder.iterdir())
    write_json(folder / MARKER, {**described, "files": [*names, MARKER]})


def is_marked_folder(folder: Path, to: str) -> bool:
    """Return whether a folder is an earlier export of this kind, and holds nothing else. A link is none."""
    marker = read_json(folder / MARKER)
    if folder.is_symlink() or (marker.get("format"), marker.get("to")) != (EXPORTED, to):
        return False
    return {path.name for path in folder.iterdir()} <= set(marker.get("files", ()))


# --- the comparison ---------------------------------------------------------------------------------------


def random_pixels(n: int, size: int) -> Tensor:
    """Return random images, always the same. Shape: -> (n, 3, size, size) in 0..1."""
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(0))


def sample_image() -> Image.Image:
    """Return a smooth image of 4:3, always the same, to try a library's preprocessing on."""
    coarse = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC)


@torch.inference_mode()
def compare(
    model: Model,
    features: Callable[[Tensor], Tensor],
    library: str,
    prepare: Callable[[Tensor], Tensor] = color.normalize,
) -> float:
    """Return the largest difference between a library's features and ours, relative to our largest absolute feature.

    `prepare` turns pixels in 0..1 into what the library's network takes. Raises `WriteError` if it exceeds `TOLERANCE`.
    """
    worst = 0.0
    for n in BATCHES:
        pixels = random_pixels(n, model.image_size)
        worst = max(worst, relative_difference(model.backbone(color.normalize(pixels)), features(prepare(pixels))))
    return check_difference(worst, library)


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """Return max |ours - theirs| / max |ours|; infinity for other shapes and for NaN."""
    if ours.shape != theirs.shape:
        return float("inf")
    difference = float((ours.double() - theirs.double()).abs().max() / ours.double().abs().max().clamp(min=1e-30))
    return difference if difference == difference else float("inf")


def check_difference(difference: float, library: str) -> float:
    """Return it. Raises `WriteError` if it exceeds `TOLERANCE`: nothing is kept then."""
    if not difference <= TOLERANCE:
        raise WriteError(
            f"{library} computes other features from the exported file (largest difference {difference:.1e} of our "
            f"largest feature, allowed is {TOLERANCE:.0e}): nothing was kept; try another version of {library}"
        )
    return difference
