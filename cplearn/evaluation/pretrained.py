"""A frozen backbone for any code, in one line: `model, transform, width = load_backbone("checkpoint.pth")`."""

import argparse
from collections.abc import Callable
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from cplearn import random_streams
from cplearn.data import augmentations, color, datasets
from cplearn.evaluation.features import Model, load_model, no_data_flags, read_weights


class Pretrained(NamedTuple):
    """What `load_backbone` returns."""

    model: nn.Module  # in eval mode, without gradients: images (n, 3, H, W) -> features (n, width)
    transform: Callable[[Image.Image], Tensor]  # PIL image -> (3, image_size, image_size), normalized
    width: int


class EvalTransform:
    """The fixed view of every evaluation, as the network takes it.

    Shape: PIL image of any mode and size -> float32 (3, size, size).
    """

    def __init__(self, size: int):
        self.size = size

    def __call__(self, image: Image.Image) -> Tensor:
        pixels = augmentations.eval_pixels(datasets.to_rgb(image), self.size)
        return color.network_input(pixels[None], pixels.device)[0]

    def __repr__(self) -> str:
        return f"EvalTransform(size={self.size})"


def load_pretrained(
    weights: str,
    *,
    arch: str | None = None,
    patch_size: int | None = None,
    image_size: int | None = None,
    checkpoint_key: str | None = None,
    device: str | torch.device = "cpu",
) -> Model:
    """Load a checkpoint of main_cplearn.py with its head, or backbone weights of DINO or timm (then name `arch`).

    `image_size` is the checkpoint's, or 224, unless given. Needs no process group and no parser.
    Raises `UserError` if the file is damaged, unsafe, or does not fit.
    """
    file = read_weights(str(weights))
    flags = argparse.Namespace(
        pretrained_weights=file.path, arch=arch, patch_size=patch_size, image_size=image_size,
        checkpoint_key=checkpoint_key, seed=0, **no_data_flags(file),
    )  # fmt: skip
    with random_streams.kept_state():
        return load_model(flags, torch.device(device), file)


def load_backbone(weights: str, **options) -> Pretrained:
    """Load a frozen backbone; the options are those of `load_pretrained`.

    Returns (model, transform, width): features of an image are `model(transform(image)[None])`, of shape (1, width).
    """
    model = load_pretrained(weights, **options)
    return Pretrained(model.backbone, EvalTransform(model.image_size), model.backbone.num_features)
