"""Submission of a job through submitit, for `run_with_submitit.py` and the grid of `reproduce_table3.py`."""

import argparse
import contextlib
import io
import os
import re
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

from cplearn.errors import UserError
from cplearn.files import append_json_line, remove_quietly
from cplearn.host import ROOT, git_commit, process_start
from cplearn.slurm.job import Task
from cplearn.slurm.status import FOLDER


@dataclass(frozen=True)
class Resources:
    """What a job may use and where it may run: the flags of `run_with_submitit.py` of the same names."""

    nodes: int
    ngpus: int  # per node; also the number of processes per node
    cpu: bool
    cpus_per_task: int
    mem: str | None
    timeout: int  # minutes
    signal_delay_s: int
    max_requeues: int
    partition: str | None
    account: str | None
    qos: str | None
    constraint: str | None
    exclude: str | None
    comment: str | None
    sbatch: list[str]  # OPTION=VALUE
    local: bool  # in the background of this machine

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> "Resources":
        return cls(**{field.name: getattr(args, field.name) for field in fields(cls)})


# What follows a line's end in the batch script is a command. sbatch takes a backslash for an escape, even where the
# shell does not, and in the name of a log for "%j is no number".
_NOT_IN_OPTIONS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\\]")


@dataclass(frozen=True)
class JobRequest:
    """A job to submit. In `argv` and `output_dir`, %j is its number.

    Raises `UserError` for a character that must not get into a batch script.
    """

    script: str  # module name of the entry point
    argv: list[str]
    output_dir: Path  # absolute
    resources: Resources
    name: str | None = None  # of the job; None: the output folder's
    dependency: str | None = None  # as sbatch has it: afterok:123
    tasks: int | None = None  # processes per node that the job starts, which share its GPUs; None: one for each

    def __post_init__(self):
        options = {**vars(self.resources), "output_dir": self.output_dir, "name": self.name}
        for name, value in options.items():
            for word in map(str, value if isinstance(value, list) else [value]):
                if unwanted := _NOT_IN_OPTIONS.search(word):
                    raise UserError(f"--{name}: {word!a} holds the character {unwanted[0]!a}: leave it out")

    @property
    def folder(self) -> Path:
        """Where everything about the job lies."""
        return self.output_dir / FOLDER

    @property
    def tasks_per_node(self) -> int:
        return self.tasks or self.resources.ngpus

    @property
    def cpus_per_task(self) -> int:
        return self.resources.cpus_per_task * self.resources.ngpus // self.tasks_per_node

    def full_argv(self) -> list[str]:
        """Return the entry point's flags with those that follow from the resources, unless they were given."""
        given = {x.split("=")[0] for x in self.argv}
        extra = {"--num_workers": str(self.resources.cpus_per_task)}
        if self.resources.cpu:
            extra["--device"] = "cpu"
        elif not self.resources.local:
            extra["--device"] = "cuda"  # a node whose GPUs are gone must fail, not run slowly
        return [*self.argv, *(x for flag, value in extra.items() if flag not in given for x in (flag, value))]


_SAME_IN_SBATCH = ("partition", "account", "qos", "constraint", "exclude", "comment")


# --- submission -------------------------------------------------------------------------------------------


def submit(request: JobRequest) -> str:
    """Submit a job, write it down in jobs.jsonl, return its number. Raises `UserError` with Slurm's own reason."""
    import submitit

    resources, argv = request.resources, request.full_argv()
    task = Task(request.script, argv, str(request.folder), resources.max_requeues)
    start = submitit.core.utils.JobPaths.get_first_id_independent_folder(request.folder)
    before = set(start.glob("*"))
    try:
        with submitit.helpers.clean_env(), contextlib.redirect_stderr(io.StringIO()):  # this may be typed in a job
            if resources.local:
                with _in_background(resources):
                    job = _local_executor(request).submit(task).job_id
            else:
                job = _slurm_executor(request).submit(task).job_id
    except (submitit.core.utils.FailedSubmissionError, submitit.core.utils.FailedJobError) as error:
        for path in set(start.glob("*")) - before:
            remove_quietly(path)
        with contextlib.suppress(OSError):  # if they are empty
            start.rmdir()
            start.parent.rmdir()
        raise UserError(f"Slurm refused the job: {_reason(str(error))}") from None
    except OSError as error:
        raise UserError(f"--output_dir {request.output_dir} cannot be written: {error.strerror or error}") from None
    for path in set(start.glob(".submission_file*")) - before:  # links to the batch script, of no further use
        remove_quietly(path)
    size = {"nodes": resources.nodes, "processes": resources.nodes * request.tasks_per_node}
    cluster = {"cluster": "local", "started": process_start(int(job))} if resources.local else {"cluster": "slurm"}
    entry = {"job": job, **cluster, "script": request.script, "argv": argv, **size}
    jobs_file = Path(str(request.folder).replace("%j", job)) / "jobs.jsonl"
    append_json_line(jobs_file, {**entry, "time": time.time(), "commit": git_commit()})
    return job


def batch_script(request: JobRequest) -> str:
    """Return the batch script that `submit` would submit. Needs no Slurm."""
    executor = _slurm_executor(request)
    return executor._make_submission_file_text(executor._submitit_command_str, "")  # submitit has no dry run


def _slurm_executor(request: JobRequest):
    import submitit

    class Executor(submitit.SlurmExecutor):
        @classmethod
        def affinity(cls) -> int:
            return 1  # or a dry run would need srun

    resources = request.resources
    name = request.name or request.output_dir.name.replace("%j", "") or "cplearn"
    memory = resources.mem or (None if resources.cpu else f"{40 * resources.ngpus}G")
    finish = [sys.executable, "-u", str(ROOT / "cplearn/slurm/__main__.py"), "finish", str(request.folder)]
    executor = Executor(request.folder, python=_python())
    executor.update_parameters(
        job_name=name if request.script == "main_cplearn" else f"{name}-{request.script.rpartition('.')[2]}",
        nodes=resources.nodes,
        ntasks_per_node=request.tasks_per_node,
        cpus_per_task=request.cpus_per_task,
        time=resources.timeout,
        **{name: getattr(resources, name) for name in _SAME_IN_SBATCH},
        dependency=request.dependency,
        signal_delay_s=resources.signal_delay_s,
        stderr_to_stdout=True,
        wckey=None,
        setup=[f"export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-{_threads(resources)}}}"],
        # One process that fails ends the others; and srun does not inherit the number of cores from sbatch.
        srun_args=["--kill-on-bad-exit=1", f"--cpus-per-task={request.cpus_per_task}"],
        teardown=[f"{shlex.join(finish)} {resources.max_requeues} $?"],
        additional_parameters={
            "requeue": True,
            **{x.partition("=")[0]: x.partition("=")[2] or True for x in resources.sbatch},
            **({"mem": memory} if memory else {}),
            **({"kill-on-invalid-dep": "yes"} if request.dependency else {}),
        },
        **_gpus(resources),
    )
    return executor


def _local_executor(request: JobRequest):
    import submitit

    executor, resources = submitit.LocalExecutor(request.folder, python=_python()), request.resources
    executor.update_parameters(
        tasks_per_node=resources.ngpus,
        timeout_min=resources.timeout,
        signal_delay_s=resources.signal_delay_s,
        stderr_to_stdout=True,
        **_gpus(resources),
    )
    return executor


def _python() -> str:
    """Return what submitit starts every process with: this code, whatever lies in the working folder."""
    path = os.pathsep.join([str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))])
    return shlex.join(["env", "PYTHONSAFEPATH=1", f"PYTHONPATH={path}", sys.executable])


def _gpus(resources: Resources) -> dict[str, int]:
    return {} if resources.cpu else {"gpus_per_node": resources.ngpus}


def _threads(resources: Resources) -> int:
    """Return OMP_NUM_THREADS as torchrun sets it: 1 for processes with a GPU, whose loaders need the other cores."""
    return resources.cpus_per_task if resources.cpu else 1


@contextlib.contextmanager
def _in_background(resources: Resources) -> Iterator[None]:
    """Start inside what outlives this command: it gets no standard streams, or a reader of this command's output would
    wait for the job's end."""
    threads = os.environ.get("OMP_NUM_THREADS") or str(_threads(resources))
    before = dict(os.environ)
    # submitit starts its controller with -m, which would import a submitit.py of the working folder.
    os.environ.update(OMP_NUM_THREADS=threads, PYTHONSAFEPATH="1")
    sys.stdout.flush()
    streams = [os.dup(fd) for fd in range(3)]
    try:
        with open(os.devnull, "r+b") as null:
            for fd in range(3):
                os.dup2(null.fileno(), fd)
        yield
    finally:
        for fd, stream in enumerate(streams):
            os.dup2(stream, fd)
            os.close(stream)
        os.environ.clear()
        os.environ.update(before)


def _reason(text: str) -> str:
    """Return sbatch's messages without their prefixes."""
    messages = [line.removeprefix("Batch job submission failed: ") for line in re.findall(r"sbatch: error: (.+)", text)]
    return "; ".join(dict.fromkeys(messages)) or " ".join(text.split())[:200]
