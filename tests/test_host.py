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


@pytest.mark.parametrize(
    ("lines", "files", "expected"),
    [
        # Kubernetes: two cores and a half, of a node whose pods may use 30.
        ("0::/pods/7/box\n", {"pods/cpu.max": "3000000 100000", "pods/7/cpu.max": "max 100000",
         "pods/7/box/cpu.max": "250000 100000"}, [2.5, 30.0]),
        # Docker's --cpus 0.5 in the first version, where -1 is no limit.
        ("4:cpu,cpuacct:/docker/01\n3:memory:/docker/01\n", {"cpu/cpu.cfs_quota_us": "50000",
         "cpu/cpu.cfs_period_us": "100000"}, [0.5]),
        ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, []),
        ("0::/\n", {"cpu.max": "max 100000"}, []),
        ("0::/\n", {}, []),
    ],
)  # fmt: skip
def test_limits_of_cores(tmp_path, lines, files, expected):
    (tmp_path / "process").write_text(lines)
    for name, text in files.items():
        (tmp_path / "mounted" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mounted" / name).write_text(f"{text}\n")
    assert host.core_limits(str(tmp_path / "process"), str(tmp_path / "mounted")) == expected


def test_no_control_groups():
    assert host.memory_limits("/no/such/file") == host.core_limits("/no/such/file") == []


@contextlib.contextmanager
def real_group(kind: str, second: dict, first: dict):
    """A control group of this machine with a limit, made beside this process's own; skips where none can be made.

    `second` and `first`: what to write into which file of a group of that version.
    """
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    old = any(kind in kinds.split(",") for _, kinds, _ in lines)
    folder = Path("/sys/fs/cgroup", kind if old else "", f"cplearn_test_{os.getpid()}")
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("no control group can be made here")
    try:
        try:
            for name, value in (first if old else second).items():
                (folder / f"{kind}.{name}").write_text(str(value))
        except OSError:
            pytest.skip("no control group can be given a limit here")
        yield folder
    finally:
        folder.rmdir()


def run_within(folder: Path, code: str) -> list[int]:
    """Return the numbers that a process of this control group prints."""
    enter = f"import os; open('{folder}/cgroup.procs', 'w').write(str(os.getpid()))\n"
    done = subprocess.run([sys.executable, "-c", enter + code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return [int(x) for x in done.stdout.split()]


@pytest.mark.skipif(not Path("/proc/self/cgroup").exists(), reason="no control groups")
def test_a_real_limit_of_memory(tmp_path):
    """Also with more pages of files in memory than the limit leaves to anything else."""
    with real_group("memory", {"max": 400 * MIB}, {"limit_in_bytes": 400 * MIB}) as folder:
        most, free = run_within(
            folder,
            f"f = open('{tmp_path}/file', 'wb'); [f.write(bytes({MIB})) for _ in range(300)]; f.flush()\n"
            "os.fsync(f.fileno())\n"
            "from cplearn import host; print(host.physical_memory(), host.available_memory())",
        )
        assert most == 400 * MIB and 250 * MIB < free < most


@pytest.mark.skipif(not Path("/proc/self/cgroup").exists(), reason="no control groups")
def test_a_real_limit_of_cores():
    with real_group("cpu", {"max": "150000 100000"}, {"cfs_period_us": 100000, "cfs_quota_us": 150000}) as folder:
        code = "from cplearn import host; print(host.machine_cores(), host.usable_cores(), host.cores_of_process(8))"
        assert run_within(folder, code) == [1, 1, 1]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity here")
def test_cores_of_a_process_that_is_kept_to_one():
    before = os.sched_getaffinity(0)
    assert host.usable_cores() == min(len(before), host.machine_cores())
    try:
        os.sched_setaffinity(0, {min(before)})
        assert host.usable_cores() == host.cores_of_process(1) == host.cores_of_process(10**6) == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize(
    ("limits", "torchrun", "cores"),
    [
        ([], False, 8),  # a task of Slurm, one of four on a node of 64 cores, kept to eight
        ([], True, 2),  # torchrun of four processes in a job of eight cores
        ([6.0], False, 1),  # as the first, in a container of six cores: a quarter of them, rounded down
        ([2.5, 30.0], True, 1),
    ],
)
def test_cores_of_one_of_four_processes(monkeypatch, limits, torchrun, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(host, "core_limits", lambda: limits)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none") if torchrun else None
    assert host.cores_of_process(4) == cores


def test_busy_cores_are_those_of_other_programs():
    """On one core of this machine, with a program that does nothing but compute."""
    code = """
import os
from cplearn import host
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
child = os.fork()
while not child:
    pass
print(host.busy_cores(0.3))
os.kill(child, 9)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=host.ROOT)
    assert 0.7 < float(said.stdout) < 1.3
