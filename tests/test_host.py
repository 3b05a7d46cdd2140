"""What this process may use of its machine: memory within the limits of containers and jobs, cores of its own."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cplearn import host

MIB = 2**20


def group(folder: Path, limit: str, use: int, reclaimable: int, *, first: bool = False) -> None:
    """Write a control group's files as the kernel does, of its first version or its second."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if first else ("memory.max", "memory.current")
    for name, value in zip(names, (limit, use), strict=True):
        (folder / name).write_text(f"{value}\n")
    (folder / "memory.stat").write_text(f"cache 7\n{'total_' * first}inactive_file {reclaimable}\n")


@pytest.mark.parametrize(
    ("lines", "groups", "expected"),
    [
        # A job of Slurm: its step has no limit, the job around it has one.
        ("0::/system.slice/job_7/step_0\n", {"system.slice/job_7": ("4000", 3000, 500), "system.slice/job_7/step_0":
         ("max", 900, 0)}, [(4000, 2500)]),
        # The same in the first version, beside other controllers.
        ("4:cpu,cpuacct:/slurm/job_7\n3:memory:/slurm/job_7\n0::/\n", {"memory/slurm/job_7": ("4000", 3000, 500),
         "memory/slurm": ("9000", 5000, 0)}, [(4000, 2500), (9000, 5000)]),
        # Docker with the host's path, and within a name space of its own: the container's group is the root.
        ("0::/docker/0123\n", {"": ("4000", 3000, 500)}, [(4000, 2500)]),
        ("0::/../../docker/0123\n", {"": ("4000", 3000, 500)}, [(4000, 2500)]),
        ("0::/\n", {}, []),
        ("a line of another kind\n", {"": ("4000", 3000, 500)}, []),
    ],
)  # fmt: skip
def test_limits_of_containers_and_jobs(tmp_path, lines, groups, expected):
    (tmp_path / "process").write_text(lines)
    for name, values in groups.items():
        group(tmp_path / "mounted" / name, *values, first=name.startswith("memory"))
    assert host.memory_limits(str(tmp_path / "process"), str(tmp_path / "mounted")) == expected


def test_no_control_groups():
    assert host.memory_limits("/no/such/file") == []


@contextlib.contextmanager
def real_group(limit: int):
    """A control group of this machine, made beside this process's own; skips where none can be made."""
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    first = next((name for _, kinds, name in lines if "memory" in kinds.split(",")), None)
    root, name = (Path("/sys/fs/cgroup/memory"), "limit_in_bytes") if first else (Path("/sys/fs/cgroup"), "max")
    folder = root / f"cplearn_test_{os.getpid()}"
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("no control group can be made here")
    try:
        try:
            (folder / f"memory.{name}").write_text(str(limit))
        except OSError:
            pytest.skip("no control group can be given a limit here")
        yield folder
    finally:
        folder.rmdir()


@pytest.mark.skipif(not Path("/proc/self/cgroup").exists(), reason="no control groups")
def test_a_real_limit(tmp_path):
    """Also with more pages of files in memory than the limit leaves to anything else."""
    with real_group(400 * MIB) as folder:
        code = (
            f"import os; open('{folder}/cgroup.procs', 'w').write(str(os.getpid()))\n"
            f"f = open('{tmp_path}/file', 'wb'); [f.write(bytes({MIB})) for _ in range(300)]; f.flush()\n"
            "os.fsync(f.fileno())\n"
            "from cplearn import host; print(host.physical_memory(), host.available_memory())"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        most, free = map(int, done.stdout.split())
        assert most == 400 * MIB and 250 * MIB < free < most


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity here")
def test_cores_of_a_process_that_is_kept_to_one():
    before = os.sched_getaffinity(0)
    assert host.usable_cores() == len(before)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert host.usable_cores() == host.cores_of_process(1) == host.cores_of_process(10**6) == 1
    finally:
        os.sched_setaffinity(0, before)


def test_what_this_process_has():
    have = host.resident_memory()
    assert have is None or 10 * MIB < have < host.physical_memory()
