"""The methods by their names on the command line. Nothing that a method needs may import this."""

import argparse

from torch import nn

from cplearn.backbones import build_backbone, check_image_size, checkpoint_blocks
from cplearn.data.augmentations import View
from cplearn.errors import UserError
from cplearn.methods.barlow_twins import BarlowTwins
from cplearn.methods.cplearn import CPLearn
from cplearn.methods.dino import DINO
from cplearn.methods.gedi import GEDI
from cplearn.methods.gedi_gen import GEDIGen
from cplearn.methods.self_classifier import SelfClassifier
from cplearn.methods.swav import SwAV

METHODS = {
    "cplearn": CPLearn,
    "dino": DINO,
    "swav": SwAV,
    "barlow_twins": BarlowTwins,
    "gedi": GEDI,
    "gedi_gen": GEDIGen,
    "self_classifier": SelfClassifier,
}


def method_class(name: str) -> type:
    """Return a method's class. Raises `UserError` with the list of known methods."""
    if name not in METHODS:
        raise UserError(f"--method {name} is unknown: {', '.join(METHODS)}")
    return METHODS[name]


def build_method(args: argparse.Namespace) -> nn.Module:
    """Build backbone and method with random weights from a run's arguments; seed first for the same on every rank."""
    backbone = build_backbone(
        args.arch, patch_size=args.patch_size, image_size=args.image_size, drop_path_rate=args.drop_path_rate
    )
    return method_class(args.method).from_args(backbone, args)


def build_method_for(args: argparse.Namespace, views: list[View]) -> nn.Module:
    """Build a run's method as it trains on these views. Raises `UserError` for a size that its backbone cannot take."""
    method = build_method(args)
    for size in sorted({view.size for view in views}):
        check_image_size(method.backbone, args.arch, size)
    if args.grad_checkpointing:
        checkpoint_blocks(method.backbone, args.arch)
    method.accum = args.accum
    return method
