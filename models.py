"""Names on the command line -> modules: `--arch` and `--method`."""

import argparse
import re

import timm
import torch
from torch import nn

import distributed
from baselines.barlow_twins import BarlowTwins
from baselines.dino import DINO
from baselines.gedi import GEDI
from baselines.gedi_gen import GEDIGen
from baselines.self_classifier import SelfClassifier
from baselines.swav import SwAV
from cplearn_head import CPLearn
from errors import UserError
from resnet import ResNet8, resnet18_cifar
from vision_transformer import SIZES, ViT

METHODS = {
    "cplearn": CPLearn,
    "dino": DINO,
    "swav": SwAV,
    "barlow_twins": BarlowTwins,
    "gedi": GEDI,
    "gedi_gen": GEDIGen,
    "self_classifier": SelfClassifier,
}

ARCHS = (*SIZES, "resnet8", "resnet8bn", "resnet8_wWIDTH", "resnet8bn_wWIDTH", "resnet18", "timm:NAME")


def method_class(name: str) -> type:
    """Raises `UserError` with the list of known methods."""
    if name not in METHODS:
        raise UserError(f"--method {name} is unknown: {', '.join(METHODS)}")
    return METHODS[name]


def is_vit(arch: str) -> bool:
    return arch in SIZES


def build_backbone(arch: str, *, patch_size: int, image_size: int, drop_path_rate: float = 0.0) -> nn.Module:
    """A backbone: images (n, 3, H, W) -> features (n, num_features), randomly initialised.

    Raises `UserError` for an unknown name, or an image size that is no multiple of the ViT's patch.
    """
    if is_vit(arch):
        if patch_size < 1 or image_size % patch_size:
            raise UserError(
                f"--image_size {image_size} is not a multiple of --patch_size {patch_size}: "
                f"use {max(1, image_size // max(1, patch_size)) * max(1, patch_size)}, or another patch size"
            )
        return ViT(arch, patch_size=patch_size, image_size=image_size, drop_path_rate=drop_path_rate)
    if arch == "resnet18":
        return resnet18_cifar()
    if match := re.fullmatch(r"resnet8(bn)?(?:_w(\d+))?", arch):
        if match[2] and int(match[2]) < 1:
            raise UserError(f"--arch {arch} has no width: resnet8_w64, for instance")
        return ResNet8(int(match[2] or 128), norm=match[1] is not None)
    if arch.startswith("timm:"):
        return _timm_backbone(arch.removeprefix("timm:"), image_size, drop_path_rate)
    raise UserError(f"--arch {arch} is unknown: {', '.join(ARCHS)}")


def _timm_backbone(name: str, image_size: int, drop_path_rate: float) -> nn.Module:
    """Any timm model, pooled features, random weights. `img_size` and drop path go to models that take them."""
    if not timm.is_model(name):
        near = timm.list_models(f"*{name}*")[:5] or timm.list_models(f"{name[:6]}*")[:5]
        raise UserError(f"--arch timm:{name} is unknown to timm {timm.__version__}; near: {', '.join(near) or '-'}")
    options = {"drop_path_rate": drop_path_rate, "img_size": image_size, "dynamic_img_size": True}
    while True:
        try:
            model = timm.create_model(name, pretrained=False, num_classes=0, **options)
            break
        except TypeError as error:
            refused = [k for k in options if k in str(error)]
            if not refused:
                raise
            del options[refused[0]]
    # Measured, because a few models report the width before their last layer.
    model.num_features = check_image_size(model, f"timm:{name}", image_size)
    return distributed.convert_batch_norm(model)


@torch.no_grad()
def check_image_size(backbone: nn.Module, arch: str, size: int) -> int:
    """Try one image, on the CPU; returns the number of features.

    Raises `UserError` if the backbone cannot take this size.
    """
    training = backbone.training
    backbone.eval()
    try:
        width = backbone(torch.zeros(1, 3, size, size)).shape[1]
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"--arch {arch} cannot take images of {size} pixels: {reason}") from None
    backbone.train(training)
    return width


def build_method(args: argparse.Namespace) -> nn.Module:
    """Backbone and method with random weights, from a run's arguments; seed first for the same on every rank."""
    backbone = build_backbone(
        args.arch, patch_size=args.patch_size, image_size=args.image_size, drop_path_rate=args.drop_path_rate
    )
    return method_class(args.method).from_args(backbone, args)
