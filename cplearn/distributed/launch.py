"""Starting: join the process group that the launcher announces, meet the other ranks, check the connection.

Launcher variables are checked here, before anything else reads them.
"""

import json
import os
import re
import time
import uuid
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from cplearn import errors
from cplearn.distributed.alive import Watch
from cplearn.distributed.collectives import local_world_size, world_size
from cplearn.errors import LocalError, PeerError, UserError
from cplearn.files import check_replaceable, remove_quietly, write_text
from cplearn.host import host_name, process_start, system_id
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
    rank, world, local_rank = launcher_numbers()
    place = choose_device(device, local_rank)
    if world == 1 or dist.is_initialized():
        return place
    store = open_store(dist_url, rank, world, timedelta(minutes=minutes))
    beats = dist.PrefixStore("alive", store)
    beats.set(str(rank), "0")
    everyone = check_in(store, rank, world, place, minutes)
    if dist_url.startswith("file://") and rank == 0:
        remove_quietly(_path_of(dist_url))
    errors.watch = Watch(beats, rank, everyone, peer_minutes)
    dist.init_process_group(
        "nccl" if place.type == "cuda" else "gloo",
        store=dist.PrefixStore("group", store),
        rank=rank,
        world_size=world,
        timeout=timedelta(minutes=max(peer_minutes, COLLECTIVE_MINUTES)),
        device_id=place if place.type == "cuda" else None,
    )
    return place


def launcher_numbers() -> tuple[int, int, int]:
    """Return RANK, WORLD_SIZE and LOCAL_RANK as the launcher has set them. Raises `LocalError` if they cannot be."""
    defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    texts = {name: os.environ.get(name, default) for name, default in defaults.items()}
    if not all(text.isdecimal() for text in texts.values()) or int(texts["RANK"]) >= int(texts["WORLD_SIZE"]):
        values = ", ".join(f"{name}={text!r}" for name, text in texts.items())
        raise LocalError(f"the environment has {values}: let torchrun set all of them, or unset them")
    return int(texts["RANK"]), int(texts["WORLD_SIZE"]), int(texts["LOCAL_RANK"])


def choose_device(device: str, local_rank: int) -> torch.device:
    """Return the device of this process, of which `--device` is the kind. Raises `UserError` if it is not there."""
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {device} is unknown: auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no GPU: use --device cpu, or install a CUDA driver")
    if device == "auto" and not torch.cuda.is_available() and (driver := _nvidia_driver()):
        raise UserError(
            f"this machine has an NVIDIA GPU (driver {driver}), but torch {torch.__version__}, built for CUDA "
            f"{torch.version.cuda}, cannot use it: install a newer driver or a torch for an older CUDA "
            "(https://pytorch.org/get-started), or train slowly with --device cpu"
        )
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    processes, gpus = max(local_world_size(), local_rank + 1), torch.cuda.device_count()
    if processes > gpus:
        raise LocalError(
            f"{processes} processes but {gpus} GPUs on this machine: use --nproc_per_node={gpus}, or --device cpu"
        )
    place = torch.device("cuda", local_rank)
    torch.cuda.set_device(place)
    torch.backends.cudnn.benchmark = True  # sizes do not change from step to step
    return place


DRIVER = Path("/proc/driver/nvidia/version")


def _nvidia_driver() -> str:
    """Return the version of the driver of an NVIDIA GPU of this machine; "" if there is none, or if it is hidden."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1") or not DRIVER.exists():
        return ""
    version = re.search(r"\d+\.\d+(\.\d+)?", DRIVER.read_text())
    return version[0] if version else "unknown"


# --- where the ranks meet ----------------------------------------------------------------------------------


def open_store(dist_url: str, rank: int, world: int, timeout: timedelta) -> dist.Store:
    """Return where the ranks meet. Unlike torch's own rendezvous it does not wait for all of them: `check_in` does."""
    if dist_url.startswith("file://"):
        return _store_named_in(_path_of(dist_url), rank, world, timeout)
    if dist_url.startswith("tcp://"):
        host, _, port = dist_url.removeprefix("tcp://").rpartition(":")
        host = host.removeprefix("[").removesuffix("]")  # an IPv6 address
    else:
        host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        address = f"host {host!r}, port {port!r}"
        raise UserError(f"--dist_url {dist_url} names no host and port from 1 to 65535 ({address}): tcp://HOST:PORT")
    of_torchrun = dist_url == "env://" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    listens = rank == 0 and not of_torchrun
    try:
        store = dist.TCPStore(host, int(port), world, listens, timeout, wait_for_workers=False, multi_tenant=True)
    except dist.DistError as error:
        reason = str(error).splitlines()[0][:150]
        if listens:
            fix = "if the port is taken, choose another one (torchrun --master_port)"
            raise UserError(f"rank 0 cannot listen at {host}:{port} ({reason}): {fix}") from None
        raise PeerError(f"rank {rank} cannot reach rank 0 at {host}:{port}: {reason}") from None
    return dist.PrefixStore(f"attempt{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


_OURS = "cplearn_rank_0_is_on"  # the first key in the file of file://, by which we know it


def _path_of(dist_url: str) -> Path:
    return Path(dist_url.removeprefix("file://"))


def _store_named_in(path: Path, rank: int, world: int, timeout: timedelta) -> dist.Store:
    """Let rank 0 listen on a free port and write into the file where; the others read it there.

    No port is fixed, nothing is locked, and a file left by an earlier start does no harm: its address answers no more,
    or does not know the number that is in the file. `init` removes it. Any other file is refused, and stays.
    """
    check_replaceable(path, f'"{_OURS}"'.encode(), "--dist_url")
    if not path.parent.is_dir():
        raise UserError(f"--dist_url file://{path}: there is no folder {path.parent}, create it or name another file")
    if rank == 0:
        number = uuid.uuid4().hex
        store = dist.TCPStore(host_name(), 0, world, True, timeout, wait_for_workers=False)
        store.set(number, "")
        write_text(path, json.dumps({_OURS: host_name(), "number": number, "port": store.port}))
        return store
    end = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < end:
        try:
            there = json.loads(path.read_text())
            soon = timedelta(seconds=10)
            store = dist.TCPStore(there[_OURS], there["port"], world, False, soon, wait_for_workers=False)
            if store.check([there["number"]]):
                store.set_timeout(timeout)
                return store
        except (OSError, ValueError, KeyError, RuntimeError):  # not there yet, or left by an earlier start
            pass
        time.sleep(0.2)
    raise PeerError(f"rank {rank} has not found rank 0's address in {path}: see rank 0's own log")


def check_in(store: dist.Store, rank: int, world: int, place: torch.device, minutes: float) -> list[dict]:
    """Tell the others who is here, wait for them, and return who all are. Raises `PeerError` that names the ranks
    which did not come."""
    pid = os.getpid()
    me = {"rank": rank, "host": host_name(), "local": os.environ.get("LOCAL_RANK", "0"), "device": "cpu", "pid": pid,
          "system": system_id(), "started": process_start(pid), "gpu": None}  # fmt: skip
    if place.type == "cuda":
        properties = torch.cuda.get_device_properties(place)
        me["device"] = f"cuda:{place.index} {properties.name}"
        me["gpu"] = str(getattr(properties, "uuid", place.index))
    end = time.monotonic() + 60 * minutes
    keys = [f"here{r}" for r in range(world)]
    try:
        store.set(keys[rank], json.dumps(me))
        while not store.check(keys):  # store.wait could not be interrupted by signals
            if time.monotonic() > end:
                missing = [str(r) for r, key in enumerate(keys) if not store.check([key])]
                raise PeerError(
                    f"rank {', '.join(missing)} of {world} did not come within {minutes:g} minutes "
                    f"({world - len(missing)} did, rank {rank} on {me['host']} is one): see its own log"
                )
            time.sleep(0.05)
        everyone = [json.loads(answer) for answer in store.multi_get(keys)]
    except RuntimeError as error:
        reason = (str(error).splitlines() or ["no reason given"])[0][:150]
        raise PeerError(f"rank {rank} has lost rank 0, which ended ({reason}): see its own log") from None
    refuse_shared_gpus(everyone)
    return everyone


def refuse_shared_gpus(everyone: list[dict]) -> None:
    """Raise `UserError` if two ranks use one GPU."""
    first: dict[tuple[str, str], int] = {}
    for one in everyone:
        if one["gpu"] and first.setdefault((one["host"], one["gpu"]), one["rank"]) != one["rank"]:
            raise UserError(
                f"ranks {first[one['host'], one['gpu']]} and {one['rank']} share {one['device']} on {one['host']}: "
                "start one process per GPU, each with its own LOCAL_RANK"
            )


def self_check(device: torch.device) -> list[str]:
    """Return what to print at start-up: ranks, hosts, devices, backend, and how long a sum over all of them takes.

    Every rank must call it. No lines in one process.
    """
    if world_size() == 1:
        return []
    x = torch.ones(2**18, device=device)
    dist.all_reduce(x)  # the first one connects
    x[0].item()
    start = time.perf_counter()
    dist.all_reduce(x)
    if x[0].item() != world_size() ** 2:
        raise PeerError(f"a sum over {world_size()} processes gave {x[0].item():g}: the network or a GPU is broken")
    milliseconds = 1e3 * (time.perf_counter() - start)
    everyone = errors.watch.everyone
    hosts = len({one["host"] for one in everyone})
    columns = ("rank", "host", "local", "device", "pid")
    head = f"{world_size()} processes on {hosts} host{'s' * (hosts > 1)}, {dist.get_backend()}"
    return [
        f"{head}, 1 MiB summed over all in {milliseconds:.2f} ms",
        format_table([[one[name] for name in columns] for one in everyone], columns),
    ]
