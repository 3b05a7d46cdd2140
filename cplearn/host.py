"""Facts about this machine, its processes and this checkout. Standard library only, so it loads at once."""

import ctypes
import functools
import os
import resource
import signal
import subprocess
from pathlib import Path

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
    """Return the commit of this checkout, with `-dirty` if files differ from it, or `unknown` outside a checkout."""
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def host_name() -> str:
    """Return this machine's name, or that of its node in SLURM."""
    return os.environ.get("SLURMD_NODENAME") or os.uname().nodename


def physical_memory() -> int:
    """Return the bytes of memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def available_memory() -> int:
    """Return the bytes that can be had without swapping, as the system and the container's limit have them."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return physical_memory()
    for group in ("/sys/fs/cgroup", "/sys/fs/cgroup/memory"):
        try:
            v2 = Path(group, "memory.max")
            limit = v2 if v2.exists() else Path(group, "memory.limit_in_bytes")
            used = Path(group, "memory.current" if v2.exists() else "memory.usage_in_bytes")
            return min(free, max(0, int(limit.read_text()) - int(used.read_text())))
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return free


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


def keep_freed_memory() -> None:
    """Tell the C library to keep the memory of freed tensors for the next ones, where it is glibc.

    By default it gives pieces above some hundred kilobytes back to the system each time, which zeroes them anew: a
    quarter of the time of the color half of the views.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: larger pieces are mapped one by one; glibc allows no more
        mallopt(-1, 2**30)  # M_TRIM_THRESHOLD: free memory at the end of the heap that is kept
    except (OSError, AttributeError):
        pass


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
