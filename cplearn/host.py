"""Facts about this machine, its processes and this checkout. Standard library only, so it loads at once."""

import contextlib
import ctypes
import functools
import os
import resource
import signal
import subprocess
import time
from pathlib import Path

import cplearn

ROOT = Path(__file__).resolve().parent.parent  # the checkout: scripts, recipes, tables of the paper


def system_id() -> str:
    """Return this boot of this machine and its name space of process numbers: containers may share a host's name."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def process_start(pid: int) -> str | None:
    """Return when a process of this machine started (a constant on systems without /proc); None if there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        return None if stat.rpartition(")")[2].split()[0] == "Z" else stat.rpartition(")")[2].split()[19]
    except OSError:
        pass
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return "alive"


@functools.cache  # of the code that was loaded, whatever happens to the files later
def git_commit() -> str:
    """Return the commit of this checkout, with `-dirty` if files differ from it, or outside a checkout the version."""
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return f"v{cplearn.__version__}"


def host_name() -> str:
    """Return this machine's name, or that of its node in SLURM."""
    return os.environ.get("SLURMD_NODENAME") or os.uname().nodename


def busy_cores(seconds: float = 0.2) -> float:
    """Return how many of the cores of this process others use now; 0 where the system does not say (no /proc/stat).

    It sleeps that long: what the cores do meanwhile is others' work, loader processes of this run included.
    """
    try:
        before = _core_times()
        time.sleep(seconds)
        spent = [(b1 - b0, i1 - i0) for (b0, i0), (b1, i1) in zip(before, _core_times(), strict=True)]
        return sum(busy / max(1, busy + idle) for busy, idle in spent)
    except (OSError, ValueError):
        return 0.0


def _core_times() -> list[tuple[int, int]]:
    """Return for each core of this process its ticks with work and without since the system started."""
    rows = [line.split() for line in Path("/proc/stat").read_text().splitlines() if line.startswith("cpu")]
    own = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    # user, nice, system, idle, iowait, irq, softirq, steal
    ticks = [[int(x) for x in row[1:9]] for row in rows if row[0] in own]
    return [(sum(x) - x[3] - x[4], x[3] + x[4]) for x in ticks]


def machine_cores() -> int:
    """Return the cores of this machine, or of the container in it, rounded down."""
    return max(1, int(min([os.cpu_count() or 1, *core_limits()])))


def usable_cores() -> int:
    """Return on how many cores this process may run: in a job that is its share of the node."""
    cores = machine_cores()
    return min(cores, len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else cores


def cores_of_process(processes: int) -> int:
    """Return the cores for this process, one of so many on this machine.

    A scheduler keeps each of its tasks to cores of its own; processes of torchrun share those that it may use.
    """
    own = usable_cores()
    shared = own if "TORCHELASTIC_RUN_ID" in os.environ else machine_cores()
    return max(1, min(own, shared // processes))


def physical_memory() -> int:
    """Return the bytes of memory of this machine, or of the container or job in it."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([machine, *(limit for limit, _ in memory_limits())])


def available_memory() -> int:
    """Return the bytes that can be had without swapping, as the system, container and job allow."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        free = physical_memory()
    return max(0, min([free, *(limit - used for limit, used in memory_limits())]))


def memory_limits(process: str = "/proc/self/cgroup", mounted: str = "/sys/fs/cgroup") -> list[tuple[int, int]]:
    """Return (limit, use) in bytes of each control group with a limit that this process is in: Docker's, Slurm's."""
    limits = []
    for group in control_groups("memory", process, mounted):
        for limit, use in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            with contextlib.suppress(OSError, ValueError):  # no such group, or "max"
                most, used = (int((group / name).read_text()) for name in (limit, use))
                pages = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                # Pages of files are given up when memory is asked for.
                limits.append((most, used - int(pages.get("total_inactive_file", pages.get("inactive_file", 0)))))
    return limits


def core_limits(process: str = "/proc/self/cgroup", mounted: str = "/sys/fs/cgroup") -> list[float]:
    """Return the cores that each control group with a limit lets its processes use together."""
    limits = []
    for group in control_groups("cpu", process, mounted):
        for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):  # microseconds within so many
            with contextlib.suppress(OSError, ValueError):  # no such group, or "max"
                quota, period = (int(x) for x in " ".join((group / name).read_text() for name in names).split())
                if quota > 0:  # -1 is no limit
                    limits.append(quota / period)
    return limits


def control_groups(kind: str, process: str, mounted: str) -> list[Path]:
    """Return the folders of the groups, of the second version or the first, that may limit this process, innermost
    first."""
    try:
        lines = [line.split(":", 2) for line in Path(process).read_text().splitlines()]
    except OSError:
        return []
    groups = []
    for _, kinds, name in (line for line in lines if len(line) == 3):
        if kinds and kind not in kinds.split(","):
            continue
        root = Path(mounted, kind) if kinds else Path(mounted)
        # A path that is one of outside this container leads nowhere here; the container's own group is the root.
        parts = [part for part in name.split("/") if part and part != ".."]
        groups += [root.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]
    return groups


def free_shared_memory() -> int | None:
    """Return the bytes that are free in /dev/shm, through which processes hand over tensors; None if there is none."""
    try:
        status = os.statvfs("/dev/shm")
    except OSError:
        return None
    return status.f_bavail * status.f_frsize


def allow_open_files(count: int) -> int:
    """Let this process open so many files more, as far as it may. Return how many more it can open now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    infinite = resource.RLIM_INFINITY
    try:
        used = len(os.listdir("/proc/self/fd"))
    except OSError:
        used = 64
    wanted = used + count
    if soft != infinite and soft < wanted:
        soft = wanted if hard == infinite else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return count if soft == infinite else soft - used


def end_with_parent() -> None:
    """Ask the kernel to send this process SIGTERM when its parent dies, even by kill -9. Does nothing outside Linux."""
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    except (OSError, AttributeError):
        pass


def leave_signals_to_parent(_: int) -> None:
    """Ignore signals: a scheduler sends them to every process, but the parent needs its workers until its step ends."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
