"""Processes: start and stop them, gather over them, and average over them with the right gradient.

The only file that reads launcher variables. One process without a process group is a normal case: every
function here then works on the local values alone.
"""

import inspect
import json
import math
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from errors import PeerError, UserError, WriteError
from utils import format_table, host_name, remove_quietly, write_text

# --- start and stop ------------------------------------------------------------------------------


def init(dist_url: str = "env://", device: str = "auto", minutes: float = 5.0) -> torch.device:
    """Join the process group that the launcher (torchrun) announces, if any, and return this rank's device.

    NCCL serves GPUs, gloo CPUs. Raises `UserError` for a device that is not there, for more processes than GPUs or two
    on one GPU, and `PeerError` that names the ranks which have not come within `minutes`.
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
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store = _store(dist_url, rank, world, timedelta(minutes=minutes))
        check_in(store, rank, world, place, minutes)
        if dist_url.startswith("file://") and rank == 0:
            remove_quietly(Path(dist_url.removeprefix("file://")))
        try:
            dist.init_process_group(
                "nccl" if use_gpu else "gloo",
                store=dist.PrefixStore("group", store),
                rank=rank,
                world_size=world,
                timeout=timedelta(minutes=30),
                device_id=place if use_gpu else None,
            )
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:150]
            raise PeerError(f"rank {rank} cannot connect to the others ({reason}): see their messages") from None
    return place


def _store(dist_url: str, rank: int, world: int, timeout: timedelta) -> dist.Store:
    """Where the ranks meet. Unlike torch's own rendezvous it does not wait for all of them: `check_in` does."""
    if dist_url.startswith("file://"):
        return _store_named_in(Path(dist_url.removeprefix("file://")), rank, world, timeout)
    if dist_url.startswith("tcp://"):
        host, _, port = dist_url.removeprefix("tcp://").partition(":")
    else:
        host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not host or not port.isdigit():
        raise UserError(f"--dist_url {dist_url} names no host and port (MASTER_ADDR {host!r}, MASTER_PORT {port!r})")
    of_torchrun = dist_url == "env://" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = dist.TCPStore(
            host, int(port), world, rank == 0 and not of_torchrun, timeout, wait_for_workers=False, multi_tenant=True
        )
    except dist.DistError as error:
        if "EADDRINUSE" in str(error) or "in use" in str(error):
            raise UserError(f"port {port} is taken on {host}: choose another one (torchrun --master_port)") from None
        raise PeerError(
            f"rank {rank} cannot reach rank 0 at {host}:{port}: {str(error).splitlines()[0][:150]}"
        ) from None
    return dist.PrefixStore(f"attempt{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _store_named_in(path: Path, rank: int, world: int, timeout: timedelta) -> dist.Store:
    """Rank 0 listens on a free port and writes into the file where; the others read it there.

    No port is fixed, nothing is locked, and a file left by an earlier start does no harm: its address answers no more,
    or not with the number that is in the file. `check_in` removes it.
    """
    if rank == 0:
        here = {"host": host_name(), "number": uuid.uuid4().hex}
        store = dist.TCPStore(here["host"], 0, world, True, timeout, wait_for_workers=False)
        store.set("number", here["number"])
        write_text(path, json.dumps({**here, "port": store.port}))
        return store
    end = time.monotonic() + timeout.total_seconds()
    while True:
        try:
            there = json.loads(path.read_text())
            store = dist.TCPStore(
                there["host"], there["port"], world, False, timedelta(seconds=10), wait_for_workers=False
            )
            if store.check(["number"]) and store.get("number").decode() == there["number"]:
                store.set_timeout(timeout)
                return store
        except (OSError, ValueError, KeyError, RuntimeError):  # not there yet, or left by an earlier start
            pass
        if time.monotonic() > end:
            raise PeerError(f"rank {rank} has not found rank 0's address in {path}: see rank 0's own log")
        time.sleep(0.2)


_everyone: list[dict] = []  # who takes part, by rank


def check_in(store: dist.Store, rank: int, world: int, place: torch.device, minutes: float) -> None:
    """Tell the others who is here, and wait for them. Raises `PeerError` that names the ranks which did not come."""
    me = {"rank": rank, "host": host_name(), "local": os.environ.get("LOCAL_RANK", "0"), "pid": os.getpid()}
    me["device"] = "cpu"
    if place.type == "cuda":
        properties = torch.cuda.get_device_properties(place)
        me["device"] = f"cuda:{place.index} {properties.name}"
        me["gpu"] = str(getattr(properties, "uuid", place.index))
    store.set(f"here{rank}", json.dumps(me))
    keys = [f"here{r}" for r in range(world)]
    end = time.monotonic() + 60 * minutes
    try:
        while not store.check(keys):  # store.wait would be deaf to signals
            if time.monotonic() > end:
                missing = [str(r) for r, key in enumerate(keys) if not store.check([key])]
                raise PeerError(
                    f"rank {', '.join(missing)} of {world} did not come within {minutes:g} minutes "
                    f"({world - len(missing)} did, rank {rank} on {me['host']} is one): see its own log"
                )
            time.sleep(0.05)
        everyone = [json.loads(store.get(key)) for key in keys]
    except (dist.DistError, RuntimeError) as error:
        reason = (str(error).splitlines() or ["no reason given"])[0][:150]
        raise PeerError(f"rank {rank} has lost rank 0, which ended ({reason}): see its own log") from None
    _refuse_shared_gpus(everyone)
    _everyone[:] = everyone


def _refuse_shared_gpus(everyone: list[dict]) -> None:
    seen: dict[tuple[str, str], int] = {}
    for one in everyone:
        if "gpu" in one:
            first = seen.setdefault((one["host"], one["gpu"]), one["rank"])
            if first != one["rank"]:
                raise UserError(
                    f"ranks {first} and {one['rank']} share {one['device']} on {one['host']}: start one process a GPU, "
                    "each with its own LOCAL_RANK"
                )


def self_check(device: torch.device) -> list[str]:
    """What to print at start-up: ranks, hosts, devices, backend, and how long a sum over all of them takes.

    Every rank must call it. No lines in one process.
    """
    if world_size() == 1:
        return []
    x = torch.ones(2**18, device=device)
    dist.all_reduce(x)  # the first one connects
    start = time.perf_counter()
    dist.all_reduce(x)
    if x[0].item() != world_size() ** 2:
        raise PeerError(f"a sum over {world_size()} processes gave {x[0].item():g}: the network or a GPU is broken")
    milliseconds = 1e3 * (time.perf_counter() - start)
    hosts = len({one["host"] for one in _everyone})
    columns = ("rank", "host", "local", "device", "pid")
    head = f"{world_size()} processes on {hosts} host{'s' * (hosts > 1)}, {dist.get_backend()}"
    return [
        f"{head}, 1 MiB summed over all in {milliseconds:.2f} ms",
        format_table([[one[name] for name in columns] for one in _everyone], columns),
    ]


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_world_size() -> int:
    """Processes on this machine, which share its CPU cores."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    return rank() == 0


def wrap(module: nn.Module, device: torch.device) -> nn.Module:
    """DistributedDataParallel, if there is more than one process.

    Buffers are not synchronised: batch-norm statistics are the same on all ranks already (see
    `BatchNorm`), and non-persistent buffers such as a frozen dictionary are rebuilt from the flags on
    every rank, so DDP shall not even see them.

    On CPUs gradients are summed in the order of the ranks. DDP regroups them after the first step of a process, and its
    own sums over three or more ranks depend on the groups: a resumed run would differ in the last bit.
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
    wrapped = ddp(module, device_ids=[device] if device.type == "cuda" else None, **never)
    if device.type == "cpu":
        wrapped.register_comm_hook(None, _mean_in_rank_order)
    return wrapped


def _mean_in_rank_order(_, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's average of a bucket of gradients, the same wherever in it an element lies."""
    parts = [torch.empty_like(bucket.buffer()) for _ in range(world_size())]
    dist.all_gather(parts, bucket.buffer())
    total = parts[0]
    for part in parts[1:]:
        total += part
    done = torch.futures.Future()
    done.set_result(total.div_(world_size()))
    return done


def on_main(function: Callable, *args):
    """function(*args) on rank 0 alone; every rank gets its value, or raises the `UserError` it raised."""
    outcome = None
    if is_main():
        try:
            outcome = (function(*args), None)
        except UserError as error:
            outcome = (None, error)
        except OSError as error:
            outcome = (None, WriteError(f"{error.filename or 'a file'}: {error.strerror or error}"))
    if world_size() > 1:
        box = [outcome]
        dist.broadcast_object_list(box)
        outcome = box[0]
    value, error = outcome
    if error is not None:
        raise error
    return value


@contextmanager
def together() -> Iterator[None]:
    """A `UserError` that any rank meets inside is raised by all at the end, so that none waits for another."""
    mine = None
    try:
        yield
    except UserError as error:
        mine = error
    found = gather_objects(None if mine is None else (host_name(), mine))
    first = next((r for r, x in enumerate(found) if x is not None), None)
    if first is None:
        return
    host, error = found[first]
    raise error if first == 0 else type(error)(f"rank {first} on {host}: {error}")


def check_same(what: dict[str, object]) -> None:
    """Raises `UserError` on every rank that names what differs between the ranks, and where."""
    for r, (host, theirs) in enumerate(everyone := gather_objects((host_name(), what))):
        differ = [k for k in what if theirs.get(k) != everyone[0][1].get(k)]
        if differ:
            k = differ[0]
            raise UserError(
                f"rank {r} on {host} has {k} {theirs.get(k)}, rank 0 on {everyone[0][0]} {everyone[0][1].get(k)}: "
                "start all processes with the same command, on the same data"
            )


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


@torch.no_grad()
def sum_over_ranks(x: Tensor) -> Tensor:
    """Plain sum. No gradient."""
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


def logsumexp_over_ranks(x: Tensor) -> Tensor:
    """log of the sum over the rows of all ranks of exp(x), with gradient to all of them.

    For losses that differ between ranks; `log_mean_over_ranks` needs no collective backward, but the same loss on all.
    Shape: (n, c) -> (c,).
    """
    local = x.logsumexp(0)
    if world_size() == 1:
        return local
    top = local.detach().clone()
    dist.all_reduce(top, op=dist.ReduceOp.MAX)
    return top + _SumOverRanks.apply((local - top).exp()).log()


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
