"""The memory a run needs, before it begins: weights and optimizer, head and loss, activations, images."""

import argparse
import sys
from dataclasses import dataclass

import torch
from torch import nn

from cplearn.backbones import bytes_kept, patch_side
from cplearn.data.augmentations import View, by_size
from cplearn.distributed import collectives
from cplearn.errors import UserError
from cplearn.host import available_memory, physical_memory
from cplearn.precision import autocast


@dataclass(frozen=True)
class Memory:
    """Bytes per process."""

    weights: int  # with gradients and optimizer states
    loss: int  # head and loss
    activations: int  # of the backbone, kept for the gradient
    images: int  # views in float32, a second time beside each other, and 8-bit crops
    libraries: int = 300_000_000  # what torch and its kernels take for themselves once a step has run, as measured

    @property
    def total(self) -> int:
        return self.weights + self.loss + self.activations + self.images + self.libraries

    def __str__(self) -> str:
        parts = {
            "weights, gradients and optimizer": self.weights,
            "head and loss": self.loss,
            "activations": self.activations,
            "images": self.images,
            "libraries": self.libraries,
        }
        return f"{self.total / 1e9:.1f} GB: " + ", ".join(f"{name} {n / 1e9:.1f}" for name, n in parts.items())


def expected_memory(method: nn.Module, args: argparse.Namespace, views: list[View]) -> Memory:
    """Estimate what a training process holds at once. The method must be on the CPU."""
    trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
    fixed = sum(t.nbytes for t in [*method.parameters(), *method.buffers()]) - 4 * trained
    states = 2 if args.optimizer.startswith("adam") else 1
    batch, pixels = args.batch_size_per_gpu, sum(3 * view.size**2 for view in views)
    groups = [views[group] for group in by_size(views)]
    sizes = [(group[0].size, len(group)) for group in groups]
    kept = sum(count * activation_bytes(method.backbone, size, args.precision) for size, count in sizes)
    if method.EXTRA_IMAGES:
        kept += method.EXTRA_IMAGES * activation_bytes(method.backbone, views[0].size, "fp32")
    if args.grad_checkpointing:  # the input of each block, and one block's own with its gradients
        depth, width = len(method.backbone.blocks), method.backbone.num_features
        patch = patch_side(method.backbone, args.patch_size)
        tokens = sum(count * ((size // patch) ** 2 + 1) for size, count in sizes)
        kept = 2 * kept // depth + 4 * depth * tokens * width
    return Memory(
        weights=4 * trained * (2 + states) + fixed,
        loss=method.loss_memory(batch, len(views)),
        activations=kept * batch // args.accum,
        images=(2 * 4 + 1) * batch * pixels,
    )


def activation_bytes(backbone: nn.Module, size: int, precision: str) -> int:
    """Count what autograd keeps of one image of this size, by a forward pass of two on the CPU."""
    own = [*backbone.parameters(), *backbone.buffers()]
    training = backbone.training
    backbone.eval()  # batch norm would ask the other ranks
    precision = "bf16" if precision == "fp16" else precision  # as large, and every CPU has it
    with autocast(torch.device("cpu"), precision):
        kept = bytes_kept(lambda: backbone(torch.zeros(2, 3, size, size)), own)
    backbone.train(training)
    return kept // 2


def check_memory(method: nn.Module, args: argparse.Namespace, views: list[View], device: torch.device) -> Memory:
    """Return the estimate. Raises `UserError`, with numbers, for what cannot fit; warns of what is not free now."""
    need = expected_memory(method, args, views)
    if device.type == "cuda":
        have = torch.cuda.get_device_properties(device).total_memory
        free = torch.cuda.mem_get_info(device)[0]
    else:
        share = collectives.local_world_size()
        have, free = physical_memory() // share, available_memory() // share
    batch, rest, parts = args.batch_size_per_gpu, need.total - need.activations, args.accum
    while method.SPLITS and rest + need.activations * args.accum // parts > free and batch % (2 * parts) == 0:
        parts *= 2
    fix = f"--accum {parts}, a smaller --batch_size_per_gpu" if parts > args.accum else "a smaller --batch_size_per_gpu"
    if need.total > have:
        raise UserError(
            f"--method {args.method} --out_dim {args.out_dim} with {batch} images and {len(views)} views takes about "
            f"{need}; a process has {have / 1e9:.1f} GB: {fix}, --out_dim or network"
        )
    if need.total > free and collectives.is_main():
        print(
            f"WARNING: this takes about {need}; {free / 1e9:.1f} GB are free, beyond which the machine swaps or kills: "
            f"{fix}, or fewer other programs",
            file=sys.stderr,
            flush=True,
        )
    return need
