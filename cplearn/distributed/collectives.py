"""Ranks: who is who, gathering over them, and sums over them with the right gradient.

One process without a process group is a normal case: every function here then works on the local values alone.
`launch.py` starts the process group.
"""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cplearn.errors import ExpectedError, UserError, WriteError
from cplearn.host import host_name


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_world_size() -> int:
    """Return the number of processes on this machine, which share its CPU cores."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    return rank() == 0


def wrap(module: nn.Module, device: torch.device) -> nn.Module:
    """Wrap the module in DistributedDataParallel, if there is more than one process.

    Weights and persistent buffers are rank 0's. DDP itself synchronizes no buffers, now or later: batch-norm statistics
    are the same on all ranks already (see `BatchNorm`), and non-persistent buffers such as a frozen dictionary are
    rebuilt from the flags on every rank.

    On CPUs gradients are summed in the order of the ranks. DDP regroups them after the first step of a process, and its
    own sums over three or more ranks depend on the groups: a resumed run would differ in the last bit.
    """
    if world_size() == 1:
        return module
    for value in module.state_dict().values():
        if isinstance(value, Tensor):
            dist.broadcast(value, 0)
    devices = [device] if device.type == "cuda" else None
    wrapped = nn.parallel.DistributedDataParallel(module, device_ids=devices, init_sync=False)
    wrapped.broadcast_buffers = False  # not as an argument, whose name differs between torch's versions
    if device.type == "cpu":
        wrapped.register_comm_hook(None, _mean_in_rank_order)
    return wrapped


def _mean_in_rank_order(_, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Average a bucket of DDP's gradients, with the same result wherever in it an element lies."""
    parts = [torch.empty_like(bucket.buffer()) for _ in range(world_size())]
    dist.all_gather(parts, bucket.buffer())
    total = parts[0]
    for part in parts[1:]:
        total += part
    done = torch.futures.Future()
    done.set_result(total.div_(world_size()))
    return done


def on_main(function: Callable, *args):
    """Call function(*args) on rank 0 alone; every rank returns its value, or raises the `ExpectedError` it raised."""
    value = error = None
    if is_main():
        try:
            value = function(*args)
        except ExpectedError as expected:
            error = expected
        except OSError as failure:
            error = WriteError(f"{failure.filename or 'a file'}: {failure.strerror or failure}")
    if world_size() > 1:
        outcome = [value, error]
        dist.broadcast_object_list(outcome)
        value, error = outcome
    if error is not None:
        raise error
    return value


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Raise on all ranks, at the end, an `ExpectedError` that any rank meets inside, so that none waits."""
    local = None
    try:
        yield
    except ExpectedError as error:
        local = error
    for r, (host, error) in enumerate(gather_objects((host_name(), local))):
        if error is not None:
            raise error if r == 0 else type(error)(f"rank {r} on {host}: {error}")


def check_same(values: dict[str, object]) -> None:
    """Check that all ranks hold the same values. Raises `UserError` on every rank, naming what differs, and where."""
    (first_host, first), *others = gather_objects((host_name(), values))
    for r, (host, theirs) in enumerate(others, start=1):
        for k in values:
            if theirs.get(k) != first.get(k):
                raise UserError(
                    f"rank {r} on {host} has {k} {theirs.get(k)}, rank 0 on {first_host} {first.get(k)}: "
                    "start all processes with the same command, on the same data"
                )


# --- gather --------------------------------------------------------------------------------------


def gather_objects(value) -> list:
    """Return `value` of every rank, in rank order, on every rank. For small things (checksums, counts)."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def gather_equal_rows(x: Tensor) -> Tensor:
    """Gather the rows of every rank, interleaved: row i of rank r becomes row i * world_size + r. No gradient.

    Shape: (n, ...), the same on all ranks -> (n * world_size, ...), on the tensor's device.
    """
    if world_size() == 1:
        return x
    parts = x.new_empty((world_size() * len(x), *x.shape[1:]))
    dist.all_gather_into_tensor(parts, x.contiguous())
    return parts.unflatten(0, (world_size(), len(x))).transpose(0, 1).flatten(0, 1)


def gather_rows(x: Tensor, device: torch.device, chunk: int = 4096) -> Tensor:
    """Like `gather_equal_rows`, of ranks that may hold one row fewer than rank 0: undo range(rank, total, world_size).

    They pass through the device `chunk` rows at a time, so that it need not hold all.
    Shape: (n_r, ...), on the CPU or the device -> (sum of n_r, ...), on the CPU.
    """
    counts, rows = gather_objects(len(x)), []
    for start in range(0, max(counts), chunk):
        part, length = x[start : start + chunk].to(device), min(chunk, max(counts) - start)
        if len(part) < length:
            part = torch.cat([part, part.new_zeros((length - len(part), *part.shape[1:]))])
        rows.append(gather_equal_rows(part).cpu())
    return torch.cat(rows)[: sum(counts)] if rows else x.cpu()


@torch.no_grad()
def mean_over_ranks(x: Tensor) -> Tensor:
    """Average over ranks, for what needs no gradient: logs, a center, a limit."""
    if world_size() > 1:
        x = x.clone(memory_format=torch.contiguous_format)  # NCCL takes no other
        dist.all_reduce(x)
        x /= world_size()
    return x


@torch.no_grad()
def sum_over_ranks(x: Tensor) -> Tensor:
    """Sum over ranks. No gradient."""
    if world_size() > 1:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x)
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


class GatherOverRanks(torch.autograd.Function):
    """The tensors of all ranks, with the gradient of all ranks' losses. Shape: (...) on every rank -> (world, ...)."""

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.stack(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad[rank()]


def log_mean_over_ranks(local: Tensor) -> Tensor:
    """Return the log of the mean over ranks of exp(local): the global lambda = log p-bar from each rank's own.

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


def logsumexp_over_ranks(x: Tensor) -> Tensor:
    """Return the log of the sum over the rows of all ranks of exp(x), with gradient to all of them.

    For losses that differ between ranks; `log_mean_over_ranks` needs no collective backward, but the same loss on all.
    Shape: (n, c) -> (c,).
    """
    local = x.logsumexp(0)
    if world_size() == 1:
        return local
    top = local.detach().clone()
    dist.all_reduce(top, op=dist.ReduceOp.MAX)
    return top + _SumOverRanks.apply((local - top).exp()).log()
