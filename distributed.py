"""Processes: start and stop them, gather over them, and average over them with the right gradient.

The only file that reads launcher variables. One process without a process group is a normal case: every
function here then works on the local values alone.
"""

import inspect
import math
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils import UserError

# --- start and stop ------------------------------------------------------------------------------


def init(dist_url: str = "env://", device: str = "auto") -> torch.device:
    """Join the process group that the launcher (torchrun) announces, if any, and return this rank's device.

    NCCL serves GPUs, gloo CPUs. Raises `UserError` for a device that is not there, or for more processes
    than GPUs.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {device} is unknown: auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no GPU: use --device cpu, or install a CUDA driver")
    use_gpu = torch.cuda.is_available() if device == "auto" else device == "cuda"
    if use_gpu and local_world_size() > torch.cuda.device_count():
        raise UserError(
            f"{local_world_size()} processes but {torch.cuda.device_count()} GPUs on this machine: "
            f"use --nproc_per_node={torch.cuda.device_count()}, or --device cpu"
        )
    place = torch.device("cuda", local_rank) if use_gpu else torch.device("cpu")
    if use_gpu:
        torch.cuda.set_device(place)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group(
            "nccl" if use_gpu else "gloo",
            init_method=dist_url,
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
            timeout=timedelta(minutes=30),
            device_id=place if use_gpu else None,
        )
    return place


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_world_size() -> int:
    """Processes on this machine, which share its CPU cores."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def wrap(module: nn.Module, device: torch.device) -> nn.Module:
    """DistributedDataParallel, if there is more than one process.

    Buffers are not synchronised: batch-norm statistics are the same on all ranks already (see
    `BatchNorm`), and non-persistent buffers such as a frozen dictionary are rebuilt from the flags on
    every rank, so DDP shall not even see them.
    """
    if world_size() == 1:
        return module
    rebuilt = [
        f"{name}.{buffer}" if name else buffer
        for name, m in module.named_modules()
        for buffer in m._non_persistent_buffers_set
    ]
    ddp = nn.parallel.DistributedDataParallel
    ddp._set_params_and_buffers_to_ignore_for_model(module, rebuilt)
    # torch 2.15 renamed the switch and warns about the old name.
    renamed = "forward_sync_buffers" in inspect.signature(ddp).parameters
    never = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    return ddp(module, device_ids=[device] if device.type == "cuda" else None, **never)


# --- gather --------------------------------------------------------------------------------------


def gather_objects(value) -> list:
    """`value` of every rank, in rank order, on every rank. For small things (checksums, counts)."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def gather_rows(x: Tensor) -> Tensor:
    """Rows of every rank, interleaved: row i of rank r becomes row i * world_size + r. No gradient.

    Undoes the split `range(rank, total, world_size)`; ranks may hold one row fewer than rank 0.
    Shape: (n_r, ...) -> (sum of n_r, ...), on the tensor's device.
    """
    if world_size() == 1:
        return x
    counts = gather_objects(len(x))
    padded = x.new_zeros((max(counts), *x.shape[1:]))
    padded[: len(x)] = x
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    rows = torch.stack(parts, dim=1).flatten(0, 1)
    keep = torch.arange(max(counts))[:, None] < torch.tensor(counts)[None]
    return rows[keep.flatten().to(rows.device)]


@torch.no_grad()
def mean_over_ranks(x: Tensor) -> Tensor:
    """Plain average, for what is logged. No gradient."""
    if world_size() > 1:
        x = x.clone(memory_format=torch.contiguous_format)  # NCCL takes no other
        dist.all_reduce(x)
        x /= world_size()
    return x


# --- statistics over ranks, with gradient ----------------------------------------------------------


class _SumOverRanks(torch.autograd.Function):
    """All-reduce SUM whose backward is an all-reduce SUM: every rank's loss depends on every rank's input."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


def log_mean_over_ranks(local: Tensor) -> Tensor:
    """log of the mean over ranks of exp(local): the global lambda = log p-bar from each rank's own.

    The value is global and the same on every rank; the gradient runs through this rank's share only, with
    the weight exp(local - global), so that after the gradient averaging of DDP the gradient of any function
    of it is exact. One forward all-reduce of the numbers and one of their maxima, no autograd collective;
    nothing underflows. Every rank must call it as often, with the same shape.

    Shape: any -> the same, element by element.
    """
    if world_size() == 1:
        return local
    with torch.no_grad():
        top = local.clone(memory_format=torch.contiguous_format)  # NCCL takes no other
        dist.all_reduce(top, op=dist.ReduceOp.MAX)
        total = (local - top).exp().contiguous()
        dist.all_reduce(total)
        value = top + total.log() - math.log(world_size())
        weight = (local - value).exp()
    return value + weight * (local - local.detach())


def convert_batch_norm(module: nn.Module) -> nn.Module:
    """Replace torch's batch norms inside `module` by `BatchNorm`; names and values stay.

    Raises `UserError` in several processes for a variant that cannot be replaced (timm's norm with activation).
    """
    for name, child in module.named_children():
        if type(child) in (nn.BatchNorm1d, nn.BatchNorm2d):
            norm = BatchNorm(child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats)
            norm.load_state_dict(child.state_dict())
            setattr(module, name, norm)
        elif isinstance(child, nn.modules.batchnorm._BatchNorm) and not isinstance(child, BatchNorm):
            if world_size() > 1:
                raise UserError(
                    f"{type(child).__name__} layers cannot share their statistics over {world_size()} processes: "
                    "use one process, or another --arch"
                )
        else:
            convert_batch_norm(child)
    return module


class BatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm with statistics over the rows of all ranks, on any device and backend.

    torch's own SyncBatchNorm refuses CPU tensors, so that two gloo processes could not be compared with one.
    Names and values of the state equal `nn.BatchNorm1d`'s. In one process, and in eval mode, it is torch's
    batch norm.

    Shape: (n, features) or (n, features, height, width) -> the same; every rank holds the same n.
    """

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f"BatchNorm expects (n, features, ...), got {tuple(x.shape)}")

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(x)
        dims = [d for d in range(x.dim()) if d != 1]
        shape = [1, -1] + [1] * (x.dim() - 2)
        count = x.numel() // x.shape[1] * world_size()
        x32 = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        # Two passes: the sum of squares around the global mean does not cancel as E[x^2] - E[x]^2 does.
        mean = _SumOverRanks.apply(x32.sum(dims)) / count
        centred = x32 - mean.view(shape)
        var = _SumOverRanks.apply(centred.square().sum(dims)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            share = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean, share)
            self.running_var.lerp_(var * count / max(1, count - 1), share)
        y = centred * torch.rsqrt(var + self.eps).view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(x.dtype)
