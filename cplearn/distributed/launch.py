"""Starting: join the process group that the launcher announces, meet the other ranks, check the connection.

Launcher variables are checked here, before anything else reads them.
"""

import json
import os
import time
import uuid
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from cplearn.distributed import alive
from cplearn.distributed.collectives import local_world_size, world_size
from cplearn.errors import LocalError, PeerError, UserError
from cplearn.files import read_text, remove_quietly, write_text
from cplearn.host import host_name
from cplearn.text import format_table

# How long a rank may work while the others wait for it in a collective: rank 0 alone may decode images into a cache,
# scan a data set or save to a slow disk. A rank that does nothing at all is found much earlier (`alive.py`).
COLLECTIVE_MINUTES = 30.0


def init(
    dist_url: str = "env://", device: str = "auto", minutes: float = 5.0, peer_minutes: float = 5.0
) -> torch.device:
    """Join the process group that the launcher (torchrun) announces, if any, and return this rank's device.

    NCCL serves GPUs, gloo CPUs. Raises `UserError` for launcher variables that make no sense, for a device that is not
    there, for more processes than GPUs or two on one GPU, and `PeerError` that names the ranks which have not come
    within `minutes`. A process that gives no sign of life for `peer_minutes` ends the others, with its name; a
    collective that takes longer than that and than `COLLECTIVE_MINUTES` fails.
    """
    numbers = launcher_numbers()
    local_rank = numbers.get("LOCAL_RANK", 0)
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
    if use_gpu and local_rank >= torch.cuda.device_count():
        raise LocalError(
            f"LOCAL_RANK {local_rank} but {torch.cuda.device_count()} GPUs on this machine: start one process per GPU"
        )
    place = torch.device("cuda", local_rank) if use_gpu else torch.device("cpu")
    if use_gpu:
        torch.cuda.set_device(place)
    if "RANK" in numbers and not dist.is_initialized():
        rank, world = numbers["RANK"], numbers["WORLD_SIZE"]
        store = _store(dist_url, rank, world, timedelta(minutes=minutes))
        check_in(store, rank, world, place, minutes)
        if dist_url.startswith("file://") and rank == 0 and _is_rendezvous(path := _path_of(dist_url)):
            remove_quietly(path)
        try:
            dist.init_process_group(
                "nccl" if use_gpu else "gloo",
                store=dist.PrefixStore("group", store),
                rank=rank,
                world_size=world,
                timeout=timedelta(minutes=max(peer_minutes, COLLECTIVE_MINUTES)),
                device_id=place if use_gpu else None,
            )
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:150]
            raise PeerError(f"rank {rank} cannot connect to the others ({reason}): see their messages") from None
        names = [f"rank {one['rank']} (process {one['pid']} on {one['host']})" for one in _everyone]
        alive.start(dist.PrefixStore("alive", store), rank, names, peer_minutes)
    return place


def launcher_numbers() -> dict[str, int]:
    """Return the launcher's variables that are set. Raises `LocalError` for values that cannot be meant."""
    numbers = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        if name in os.environ:
            text = os.environ[name]
            least = int(name.endswith("SIZE"))
            if not text.isdecimal() or int(text) < least:
                what = f"environment variable {name}={text!r} is not a whole number of at least {least}"
                raise LocalError(f"{what}: let torchrun set it, or unset it")
            numbers[name] = int(text)
    if ("RANK" in numbers) != ("WORLD_SIZE" in numbers):
        there, absent = ("RANK", "WORLD_SIZE") if "RANK" in numbers else ("WORLD_SIZE", "RANK")
        if there == "RANK" or numbers[there] > 1:
            raise LocalError(f"environment variable {there}={numbers[there]} without {absent}: set both, or unset it")
    if "RANK" in numbers and numbers["RANK"] >= numbers["WORLD_SIZE"]:
        raise LocalError(
            f"environment variables RANK={numbers['RANK']} and WORLD_SIZE={numbers['WORLD_SIZE']}: ranks count from 0 "
            f"to {numbers['WORLD_SIZE'] - 1}"
        )
    return numbers


def _store(dist_url: str, rank: int, world: int, timeout: timedelta) -> dist.Store:
    """Return where the ranks meet. Unlike torch's own rendezvous it does not wait for all of them: `check_in` does."""
    if dist_url.startswith("file://"):
        return _store_named_in(_path_of(dist_url), rank, world, timeout)
    if dist_url.startswith("tcp://"):
        host, _, port = dist_url.removeprefix("tcp://").rpartition(":")
        host = host.removeprefix("[").removesuffix("]")  # an IPv6 address
        found = f"host {host!r}, port {port!r}"
    else:
        host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
        found = f"MASTER_ADDR {host!r}, MASTER_PORT {port!r}"
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"--dist_url {dist_url} names no host and port from 1 to 65535 ({found}): tcp://HOST:PORT")
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
    """Let rank 0 listen on a free port and write into the file where; the others read it there.

    No port is fixed, nothing is locked, and a file left by an earlier start does no harm: its address answers no more,
    or not with the number that is in the file. `init` removes it. Any other file is refused, and stays.
    """
    if path.exists() and not _is_rendezvous(path):
        raise UserError(f"--dist_url file://{path} is there already, and not from an earlier start: name a new file")
    if not path.parent.is_dir():
        raise UserError(f"--dist_url file://{path}: there is no folder {path.parent}, create it or name another file")
    if rank == 0:
        here = {_OURS: host_name(), "number": uuid.uuid4().hex}
        store = dist.TCPStore(here[_OURS], 0, world, True, timeout, wait_for_workers=False)
        store.set("number", here["number"])
        write_text(path, json.dumps({**here, "port": store.port}))
        return store
    end = time.monotonic() + timeout.total_seconds()
    while True:
        try:
            there = json.loads(path.read_text())
            store = dist.TCPStore(
                there[_OURS], there["port"], world, False, timedelta(seconds=10), wait_for_workers=False
            )
            if store.check(["number"]) and store.get("number").decode() == there["number"]:
                store.set_timeout(timeout)
                return store
        except (OSError, ValueError, KeyError, RuntimeError):  # not there yet, or left by an earlier start
            pass
        if time.monotonic() > end:
            raise PeerError(f"rank {rank} has not found rank 0's address in {path}: see rank 0's own log")
        time.sleep(0.2)


_OURS = "cplearn_rank_0_is_on"  # the first key in the file of file://, by which we know it


def _path_of(dist_url: str) -> Path:
    return Path(dist_url.removeprefix("file://"))


def _is_rendezvous(path: Path) -> bool:
    """Return whether the file is one that rank 0 wrote, if only its beginning, or empty, as mktemp makes them."""
    try:
        content = read_text(path)
    except OSError:
        return False
    mark = f'{{"{_OURS}": '
    return content.startswith(mark) or mark.startswith(content)


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
        while not store.check(keys):  # store.wait could not be interrupted by signals
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
                    f"ranks {first} and {one['rank']} share {one['device']} on {one['host']}: start one process per "
                    "GPU, each with its own LOCAL_RANK"
                )


def self_check(device: torch.device) -> list[str]:
    """Return what to print at start-up: ranks, hosts, devices, backend, and how long a sum over all of them takes.

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
