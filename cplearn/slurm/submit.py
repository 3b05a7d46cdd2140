"""TODO cplearn.slurm.submit."""

import argparse
import contextlib
import io
import os
import re
import shlex
import sys
import time
from pathlib import Path

from cplearn.errors import UserError
from cplearn.files import append_json_line, remove_quietly
from cplearn.host import ROOT, git_commit, process_start
from cplearn.slurm.job import Task
from cplearn.slurm.status import FOLDER, LIVE, ask, job_state, submissions


def check_partition(args: argparse.Namespace) -> None:
    """sbatch itself accepts more nodes, or more time, than a partition has, and such a job waits for ever."""
    found = ask("scontrol", "show", "partition", "-o")
    partitions = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in found.splitlines()]
    names = (args.partition or "").split(",")
    mine = [p for p in partitions if p.get("PartitionName") in names or (not args.partition and p["Default"] == "YES")]
    if not mine:
        return  # sbatch will tell
    most = max(min(int(p["TotalNodes"]), _number(p["MaxNodes"])) for p in mine)
    if args.nodes > most:
        raise UserError(f"--nodes {args.nodes}: partition {mine[0]['PartitionName']} gives a job {most} at most")
    longest = max(_minutes(p["MaxTime"]) for p in mine)
    if args.timeout > longest:
        raise UserError(
            f"--timeout {args.timeout}: partition {mine[0]['PartitionName']} gives a job {longest:g} minutes at most "
            "(it saves and requeues itself then)"
        )


def _number(text: str) -> float:
    return float(text) if text.isdigit() else float("inf")


def _minutes(text: str) -> float:
    """[days-]hours:minutes:seconds."""
    if not re.fullmatch(r"(\d+-)?\d+:\d+:\d+", text):
        return float("inf")
    days, _, clock = text.rpartition("-")
    hours, minutes, seconds = map(int, clock.split(":"))
    return 24 * 60 * int(days or 0) + 60 * hours + minutes + seconds / 60


def refuse_twice(output_dir: Path, args: argparse.Namespace) -> None:
    """One pre-training a folder, and with --then one set of evaluations. An evaluation alone may go beside others."""
    if args.script != "main_cplearn":
        return
    folder = output_dir / FOLDER
    for entry in submissions(folder):
        if entry["script"] == "main_cplearn" or args.then:
            state = job_state(folder, entry)["JobState"]
            if state in LIVE:
                stop = f"kill {entry['job']}" if entry["cluster"] == "local" else f"scancel {entry['job']}"
                raise UserError(
                    f"{output_dir} has job {entry['job']} ({entry['script']}), which is {state}: {stop}, "
                    "or choose another --output_dir"
                )


# --- submission -------------------------------------------------------------------------------------------


def submit(args: argparse.Namespace, script: str, argv: list[str], output_dir: Path, dependency: str | None = None):
    """One job; returns its number. Raises `UserError` with Slurm's own reason if it is refused.

    With --dry_run: prints what would be submitted.
    """
    import submitit

    folder = output_dir / FOLDER
    argv = own_flags(args, argv)
    task = Task(script, argv, str(folder), args.max_requeues)
    executor = make_executor(args, folder, script, dependency)
    if args.dry_run:
        print(executor._make_submission_file_text(executor._submitit_command_str, ""))
        print(f"# Every process then runs: {script}.py {shlex.join(argv)}\n")
        return "JOB"
    here = {}
    if args.local:  # what the batch script does elsewhere
        here["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        here["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS") or str(threads(args))
    start = submitit.core.utils.JobPaths.get_first_id_independent_folder(folder)
    before, said = set(start.glob("*") if start.exists() else ()), io.StringIO()
    try:
        # Without the variables of a job in which this was typed.
        with submitit.helpers.clean_env(), submitit.core.utils.environment_variables(**here):
            with contextlib.redirect_stderr(said), _without_terminal() if args.local else contextlib.nullcontext():
                job = executor.submit(task)
    except (submitit.core.utils.FailedSubmissionError, submitit.core.utils.FailedJobError) as error:
        for path in set(start.glob("*")) - before:
            remove_quietly(path)
        with contextlib.suppress(OSError):  # if they are empty
            start.rmdir()
            start.parent.rmdir()
        raise UserError(f"Slurm refused the job: {_reason(str(error))}") from None
    except OSError as error:
        raise UserError(f"--output_dir {output_dir} cannot be written: {error.strerror or error}") from None
    for path in set(start.glob(".submission_file*")) - before:  # links to the script, of no further use
        remove_quietly(path)
    folder = Path(str(folder).replace("%j", job.job_id))
    size = {"nodes": args.nodes, "processes": args.nodes * args.ngpus}
    entry = {"job": job.job_id, "cluster": "local" if args.local else "slurm", "script": script, "argv": argv, **size}
    if args.local:
        entry["started"] = process_start(int(job.job_id))
    append_json_line(folder / "jobs.jsonl", {**entry, "time": time.time(), "commit": git_commit()})
    after = f" after {dependency}" if dependency else ""
    print(
        f"Submitted job {job.job_id}: {script}, {args.nodes} x {args.ngpus} processes, {output_dir}{after}".replace(
            "%j", job.job_id
        )
    )
    return job.job_id


@contextlib.contextmanager
def _without_terminal():
    """What is started inside has its own standard streams: a pipe to this command would wait for a job's end."""
    sys.stdout.flush()
    kept = [os.dup(fd) for fd in range(3)]
    null = os.open(os.devnull, os.O_RDWR)
    try:
        for fd in range(3):
            os.dup2(null, fd)
        yield
    finally:
        for fd, before in enumerate(kept):
            os.dup2(before, fd)
            os.close(before)
        os.close(null)


def own_flags(args: argparse.Namespace, argv: list[str]) -> list[str]:
    """Flags of the entry point that follow from the launcher's, unless they were given."""
    given = {x.split("=")[0] for x in argv}
    extra = {"--num_workers": str(args.cpus_per_task)}
    if args.cpu:
        extra["--device"] = "cpu"
    elif not args.local:
        extra["--device"] = "cuda"  # a node whose GPUs are gone shall fail, not crawl
    return [*argv, *(x for name, value in extra.items() if name not in given for x in (name, value))]


def make_executor(args: argparse.Namespace, folder: Path, script: str, dependency: str | None):
    import submitit

    gpus = {} if args.cpu else {"gpus_per_node": args.ngpus}
    if args.local:
        executor = submitit.LocalExecutor(folder)
        executor.update_parameters(
            tasks_per_node=args.ngpus,
            timeout_min=args.timeout,
            signal_delay_s=args.signal_delay_s,
            stderr_to_stdout=True,
            **gpus,
        )
        return executor
    name = args.name or folder.parent.name.replace("%j", "") or "cplearn"
    memory = args.mem or (None if args.cpu else f"{40 * args.ngpus}G")
    finish = [sys.executable, "-u", str(ROOT / "cplearn/slurm/job.py"), str(folder), str(args.max_requeues)]
    executor = (anywhere() if args.dry_run else submitit.SlurmExecutor)(folder)
    executor.update_parameters(
        job_name=name if script == "main_cplearn" else f"{name}-{script}",
        nodes=args.nodes,
        ntasks_per_node=args.ngpus,
        cpus_per_task=args.cpus_per_task,
        time=args.timeout,
        partition=args.partition,
        account=args.account,
        qos=args.qos,
        constraint=args.constraint,
        exclude=args.exclude,
        comment=args.comment,
        dependency=dependency,
        signal_delay_s=args.signal_delay_s,
        stderr_to_stdout=True,
        wckey=None,
        setup=[
            f"export PYTHONPATH={shlex.quote(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}",
            f"export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-{threads(args)}}}",
        ],
        # One process that fails ends the others; and srun, unlike sbatch, has to be told of the cores.
        srun_args=["--kill-on-bad-exit=1", f"--cpus-per-task={args.cpus_per_task}"],
        teardown=[f"{shlex.join(finish)} $?"],
        additional_parameters={
            "requeue": True,
            **{x.partition("=")[0]: x.partition("=")[2] or True for x in args.sbatch},
            **({"mem": memory} if memory else {}),
            **({"kill-on-invalid-dep": "yes"} if dependency else {}),
        },
        **gpus,
    )
    return executor


def threads(args: argparse.Namespace) -> int:
    """As torchrun does it: one for each of several processes with a GPU, whose loaders need the other cores."""
    return args.cpus_per_task if args.cpu else 1


def anywhere():
    """submitit's executor, where there is no Slurm: to print the batch script."""
    import submitit

    class Anywhere(submitit.SlurmExecutor):
        @classmethod
        def affinity(cls) -> int:
            return 1

    return Anywhere


def _reason(text: str) -> str:
    """What sbatch said, without its name."""
    said = [line.removeprefix("Batch job submission failed: ") for line in re.findall(r"sbatch: error: (.+)", text)]
    return "; ".join(dict.fromkeys(said)) or " ".join(text.split())[:200]
