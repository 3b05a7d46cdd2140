"""The memory of a run: an estimate to warn by, and the peak as measured. Only the machine refuses."""

import argparse
import resource
import sys

import torch
from torch import Tensor, nn

from cplearn.data.augmentations import View, by_size
from cplearn.distributed import collectives
from cplearn.host import available_memory
from cplearn.precision import autocast

LIBRARIES = 300_000_000  # bytes that torch and its kernels take for themselves once a step has run, as measured


class Memory(dict[str, int]):
    """Bytes per process of each part."""

    @property
    def total(self) -> int:
        return sum(self.values())

    def __str__(self) -> str:
        return f"{self.total / 1e9:.1f} GB: " + ", ".join(f"{name} {n / 1e9:.1f}" for name, n in self.items())


def expected_memory(method: nn.Module, args: argparse.Namespace, views: list[View]) -> Memory:
    """Estimate what a training process holds at once. The method must be on the CPU."""
    trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
    fixed = sum(t.nbytes for t in [*method.parameters(), *method.buffers()]) - 4 * trained
    states = 2 if args.optimizer.startswith("adam") else 1
    batch, pixels = args.batch_size_per_gpu, sum(3 * view.size**2 for view in views)
    kept = method.EXTRA_IMAGES * activation_bytes(method.backbone, views[0].size, args.precision)
    for group in by_size(views):
        kept += len(views[group]) * activation_bytes(method.backbone, views[group][0].size, args.precision)
    if args.grad_checkpointing:  # the inputs of all blocks, a sixteenth of all; one block with its gradients
        kept = kept // 16 + 2 * kept // len(method.backbone.blocks)
    return Memory({
        "weights, gradients and optimizer": 4 * trained * (2 + states) + fixed,
        "head and loss": int(4 * batch * method.out_dim * method.loss_matrices(batch, len(views))),
        "activations": kept * batch // args.accum,
        "images": (2 * 4 + 1) * batch * pixels,  # in float32, a second time side by side, and as 8-bit crops
        "libraries": LIBRARIES,
    })  # fmt: skip


def activation_bytes(backbone: nn.Module, size: int, precision: str) -> int:
    """Count what autograd keeps of one more image of this size: of three, less what it keeps of two.

    So what it keeps once, such as autocast's copies of the weights, does not count.
    """
    training, checkpointing = backbone.training, getattr(backbone, "grad_checkpointing", False)
    backbone.eval()  # batch norm would ask the other ranks
    if checkpointing:
        backbone.set_grad_checkpointing(False)
    two, three = (_bytes_kept(backbone, torch.zeros(n, 3, size, size), precision) for n in (2, 3))
    if checkpointing:
        backbone.set_grad_checkpointing()
    backbone.train(training)
    return three - two


def _bytes_kept(backbone: nn.Module, images: Tensor, precision: str) -> int:
    kept: dict[int, torch.UntypedStorage] = {}  # by address; held, so that no other takes its place

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    precision = "bf16" if precision == "fp16" else precision  # as large, and every CPU has it
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)
    with torch.enable_grad(), autocast(images.device, precision), hooks:
        backbone(images)
    return sum(storage.nbytes() for storage in kept.values())


def check_memory(method: nn.Module, args: argparse.Namespace, views: list[View], device: torch.device) -> Memory:
    """Return the estimate; warn if so much is not free."""
    need = expected_memory(method, args, views)
    on_gpu = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if on_gpu else available_memory() // collectives.local_world_size()
    if need.total > free and collectives.is_main():
        print(
            f"WARNING: this takes about {need}; {free / 1e9:.1f} GB are free. If it does not fit: a smaller "
            "--batch_size_per_gpu, --accum N or --grad_checkpointing",
            file=sys.stderr,
            flush=True,
        )
    return need


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that this process has had at once: of torch's tensors on a GPU, of everything on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
