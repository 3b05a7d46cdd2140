"""For torch.hub: trained networks out of a checkpoint, in one line, from a checkout and without network.

import torch
model = torch.hub.load("/path/to/cplearn", "vit_small", pretrained_weights="checkpoint.pth", source="local")
head = torch.hub.load("/path/to/cplearn", "cplearn_head", pretrained_weights="checkpoint.pth", source="local")
embedding = head(model(images))

Networks come in eval mode, their parameters with gradients; without weights they are random. What is wrong with a file
raises `cplearn.errors.UserError`.
"""

from torch import nn as _nn

# Not `utils`: while this file is read its folder comes first in sys.path, and a user's own utils.py must stay theirs.
from cplearn import backbones as _backbones
from cplearn.errors import UserError as _UserError
from cplearn.load import load_pretrained as _load_pretrained
from cplearn_head import CPLearnHead as _CPLearnHead

dependencies = ["torch", "torchvision", "timm", "numpy", "PIL"]


def backbone(
    arch: str | None = None,
    pretrained_weights: str | None = None,
    *,
    patch_size: int | None = None,
    image_size: int | None = None,
    checkpoint_key: str | None = None,
) -> _nn.Module:
    """Return any backbone of --arch: images (n, 3, H, W) -> features (n, num_features).

    A checkpoint of main_cplearn.py says its architecture and sizes; for weights of DINO or timm name `arch`.
    """
    if pretrained_weights is not None:
        options = {"arch": arch, "patch_size": patch_size, "image_size": image_size, "checkpoint_key": checkpoint_key}
        return _load_pretrained(pretrained_weights, **options).backbone.requires_grad_(True)
    if arch is None:
        raise _UserError(f"arch is missing, without weights that say it: {', '.join(_backbones.ARCHS)}")
    return _backbones.build_backbone(arch, patch_size=patch_size or 16, image_size=image_size or 224).eval()


def vit_tiny(pretrained_weights: str | None = None, **options) -> _nn.Module:
    """Return a ViT-Ti: 192 features. Options as in `backbone`."""
    return backbone("vit_tiny", pretrained_weights, **options)


def vit_small(pretrained_weights: str | None = None, **options) -> _nn.Module:
    """Return a ViT-S: 384 features. Options as in `backbone`."""
    return backbone("vit_small", pretrained_weights, **options)


def vit_base(pretrained_weights: str | None = None, **options) -> _nn.Module:
    """Return a ViT-B: 768 features. Options as in `backbone`."""
    return backbone("vit_base", pretrained_weights, **options)


def resnet8(pretrained_weights: str | None = None, **options) -> _nn.Module:
    """Return the paper's ResNet-8 for small images: 128 features. Other widths: `backbone("resnet8_w64")`."""
    return backbone("resnet8", pretrained_weights, **options)


def resnet18(pretrained_weights: str | None = None, **options) -> _nn.Module:
    """Return a ResNet-18 for images of 32 x 32: 512 features. Options as in `backbone`."""
    return backbone("resnet18", pretrained_weights, **options)


def cplearn_head(pretrained_weights: str | None = None, **options) -> _CPLearnHead:
    """Return the head of a checkpoint (projector, norm, frozen codes), or a new one with the options of `CPLearnHead`.

    Features (n, f) -> embeddings (n, f_h); `head.assign(embeddings)` gives their codes (n,).
    """
    if pretrained_weights is None:
        return _CPLearnHead(**options)
    method = _load_pretrained(pretrained_weights, **options).method
    head = getattr(method, "head", None) or getattr(method, "frozen_head", None)  # of CPLearn, of Self-Classifier
    if not isinstance(head, _CPLearnHead):
        what = "backbone weights alone" if method is None else f"a run of {type(method).__name__}"
        raise _UserError(
            f"{pretrained_weights} holds {what}, without a head of CPLearn: give a checkpoint that has one"
        )
    return head.requires_grad_(True)
