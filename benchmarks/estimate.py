"""What a training would take on GPUs that are not here: work per image, bytes per step, images/s, hours and price.

    python benchmarks/estimate.py @recipes/imagenet100_cplearn.txt --data_path X --out_dim 131072 --gpus 8 --card a100

Takes the flags of main_cplearn.py. Work is counted: products as torch counts them in a forward pass, bytes as the code
touches memory. How much of the card's product rate a ViT reaches is not known before it is measured (`gpu.py`), so
there is a line for each --utilization. Nothing is trained, and no image is read.
"""

import argparse
import contextlib
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from steps import flops_per_image

import main_cplearn
from cplearn import errors
from cplearn.errors import UserError
from cplearn.flags import ArgumentParser, fraction, positive
from cplearn.loss.streamed import pick_form
from cplearn.methods import build_method
from cplearn.text import format_table
from cplearn.training.memory import expected_memory

IMAGES = {"imagenet100": 126_689, "imagenet": 1_281_167, "cifar10": 50_000}


class Card(NamedTuple):
    """What the maker says, and what is assumed of connections: bytes per second that a sum over ranks moves."""

    product: float  # 16-bit, operations per second
    tf32: float
    memory: float  # bytes per second
    inside: float  # of a node
    between: float  # nodes, per GPU


CARDS = {
    "a100": Card(312e12, 156e12, 2.0e12, 230e9, 20e9),
    "h100": Card(989e12, 495e12, 3.35e12, 400e9, 45e9),
    "v100": Card(125e12, 15.7e12, 0.9e12, 120e9, 10e9),  # no TF32: its float32 rate
}
LOSS_SHARE = 0.5  # of the TF32 rate that the loss's products reach, assumed
COLOR_PASSES = 8  # over all float pixels of the views: of `color_kernels.py`, with half of the views blurred


class Step(NamedTuple):
    """Seconds of the parts of a step on one GPU."""

    backbone: float
    loss: float
    optimizer_and_colors: float
    sum_over_ranks: float

    @property
    def seconds(self) -> float:
        """All parts one after another, as an upper bound; DDP hides most of the sum behind backward."""
        return sum(self)


def loss_bytes(n: int, views: int, f: int, c: int) -> float:
    """Count the bytes that loss and gradient move to and from memory (`blockwise.py`, two global views).

    Logits: 20 passes over all views' (read or write) and 32 over the global ones', six passes more and a third reading
    of the dictionary where they are recomputed. A reading unpacks 4 bytes an entry from one bit and a table, and
    multiplies: 9 bytes.
    """
    again = pick_form("auto", views * n, c) == "recomputed"
    return 4.0 * n * c * ((26 if again else 20) * views + 32 * 2) + 9.0 * f * c * (3 if again else 2)


def estimate(args: argparse.Namespace, flags: list[str], card: Card, gpus: int, utilization: float) -> Step:
    """Return the parts of a step. `args`: the same flags, parsed."""
    n, views = args.batch_size_per_gpu, 2 + args.local_crops_number
    work = flops_per_image(flags)
    method = build_method(args)
    parameters = sum(p.numel() for p in method.parameters() if p.requires_grad)
    pixels = 3 * (2 * args.image_size**2 + args.local_crops_number * args.local_image_size**2)
    f, c = getattr(args, "embed_dim", None) or method.backbone.num_features, args.out_dim
    products = work["loss"] * (1.5 if pick_form("auto", views * n, c) == "recomputed" else 1)
    summed = 4 * (parameters + 2 * 2 * c)  # gradients; maximum and sum of the prior's mean of both global views
    optimizer = 40.0 * parameters  # bytes: weights, gradients and two moments, read and written; clipping
    return Step(
        backbone=n * work["backbone"] / (card.product * utilization),
        loss=n * products / (card.tf32 * LOSS_SHARE) + loss_bytes(n, views, f, c) / card.memory,
        optimizer_and_colors=(optimizer + 4.0 * n * pixels * COLOR_PASSES) / card.memory,
        sum_over_ranks=2 * (1 - 1 / gpus) * summed / (card.inside if gpus <= 8 else card.between),
    )


def get_args_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(prog="benchmarks/estimate.py", description=__doc__)
    parser.add_argument("--gpus", type=positive(int), default=8)
    parser.add_argument("--card", default="a100", choices=tuple(CARDS))
    shares = [0.15, 0.25, 0.35]
    parser.add_argument("--utilization", type=fraction, nargs="+", default=shares, help="Of the product rate")
    parser.add_argument("--images", default="imagenet100", help=f"Training images: a number, or {', '.join(IMAGES)}")
    parser.add_argument("--core_rate", type=positive(float), default=195, help="Images per second that a core cuts")
    parser.add_argument("--price", type=positive(float), default=2.0, help="Euros per GPU-hour")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Print the estimate."""
    ours, flags = get_args_parser().parse_known_args(argv)
    args = main_cplearn.parse_args(flags)
    if args.method != "cplearn":
        raise UserError(f"--method {args.method}: only the loss of cplearn is counted here")
    if ours.images not in IMAGES and not ours.images.isdigit():
        raise UserError(f"--images {ours.images} is neither a number nor one of {', '.join(IMAGES)}")
    args.precision = "bf16"
    images = IMAGES.get(ours.images) or int(ours.images)
    card = CARDS[ours.card]
    work = flops_per_image(flags)
    with contextlib.redirect_stdout(io.StringIO()):
        views = main_cplearn.augmentations.views_of(args)
        memory = expected_memory(build_method(args), args, views)
    print(f"{args.arch}, 2 + {args.local_crops_number} views, c = {args.out_dim:,}, {ours.gpus} x {ours.card}, "
          f"{args.batch_size_per_gpu} images each, torch {torch.__version__}")  # fmt: skip
    print(f"An image: {work['backbone'] / 1e9:.0f} GFLOP in the backbone, {work['loss'] / 1e9:.2f} in the loss")
    print(f"A GPU's memory: {memory}\n")
    rows = []
    for utilization in ours.utilization:
        step = estimate(args, flags, card, ours.gpus, utilization)
        rate = args.batch_size_per_gpu * ours.gpus / step.seconds
        hours = args.epochs * images / rate / 3600
        rows.append((f"{utilization:.0%}", *(f"{1e3 * x:.1f}" for x in (*step, step.seconds)), f"{rate:,.0f}",
                     f"{rate / ours.gpus / ours.core_rate:.1f}", f"{hours:.1f}",
                     f"{hours * ours.gpus * ours.price:,.0f}"))  # fmt: skip
    columns = ("utilization", "backbone, ms", "loss, ms", "optimizer and colors, ms", "sum over ranks, ms", "step, ms",
               "images/s", "cores per GPU", f"hours for {args.epochs} epochs", "euros")  # fmt: skip
    print(format_table(rows, columns))


if __name__ == "__main__":
    errors.run_script(main)
