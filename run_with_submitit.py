"""Submit a job to SLURM through submitit: pre-training, an evaluation, or one and then the others.

    python run_with_submitit.py --nodes 1 --ngpus 8 --output_dir output/in100 \\
        @recipes/imagenet100_cplearn.txt --data_path /data/imagenet          # any flag of main_cplearn.py
    python run_with_submitit.py --status output/in100                        # how it does
    python run_with_submitit.py ... --dry_run                                # the batch script, nothing else

Preempted, out of time or short of a node, the job saves, requeues itself and goes on at the very step. The same
command again resumes what has ended. Logs and the batch script are in output_dir/slurm; %j in --output_dir is the
job's number.
"""

import argparse
import contextlib
import copy
import importlib
import io
import itertools
import os
import re
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import errors
import slurm_jobs
import utils
from errors import UserError

SCRIPTS = ("main_cplearn", *sorted(path.stem for path in slurm_jobs.ROOT.glob("eval_*.py")))
# After pre-training, one after the other: their results go to one file.
EVALUATIONS = ("eval_knn", "eval_linear", "eval_cluster", "eval_collapse")


def get_args_parser() -> argparse.ArgumentParser:
    env = {x.removeprefix("SBATCH_"): value for x, value in os.environ.items() if x.startswith("SBATCH_")}.get
    # fmt: off
    p = utils.ArgumentParser(prog="run_with_submitit.py", description=__doc__)
    p.add_argument("--script", default="main_cplearn", choices=SCRIPTS, help="Entry point; every other flag is its own")
    g = p.add_argument_group("size")
    g.add_argument("--nodes", type=int, default=1, help="Number of nodes")
    g.add_argument("--ngpus", type=int, default=8, help="GPUs, and processes, a node")
    g.add_argument("--cpu", action="store_true", help="No GPUs: --ngpus is then the number of processes a node")
    g.add_argument("--cpus_per_task", type=int, default=10, help="CPU cores a process, for its loader")
    g.add_argument("--mem", default=None, help="Memory a node in SLURM's notation, 320G (default: 40G a GPU; with --cpu the partition's)")
    g.add_argument("--timeout", type=int, default=2800, help="Minutes until the job is stopped, saved and requeued")
    g = p.add_argument_group("queue")
    g.add_argument("--partition", default=env("PARTITION"), help="Where to submit (default: the cluster's). SBATCH_PARTITION, _ACCOUNT, _QOS and _CONSTRAINT are defaults as for sbatch")
    g.add_argument("--account", default=env("ACCOUNT"))
    g.add_argument("--qos", default=env("QOS"))
    g.add_argument("--constraint", default=env("CONSTRAINT"), help="Features of the nodes, e.g. a100")
    g.add_argument("--exclude", default=None, help="Nodes not to use")
    g.add_argument("--comment", default=None, help="For the scheduler")
    g.add_argument("--sbatch", nargs="+", default=[], metavar="OPTION=VALUE", help="Any other option of sbatch: reservation=x, mail-type=END, exclusive")
    g.add_argument("--name", default=None, help="Of the job (default: the output folder's)")
    g.add_argument("--max_requeues", type=int, default=20, help="After so many the job ends as FAILED; the same command again goes on")
    g.add_argument("--signal_delay_s", type=int, default=120, help="Seconds before the time limit at which to save")
    g.add_argument("--dependency", default=None, metavar="TYPE:JOB", help="Wait for other jobs, as sbatch has it: afterok:123, afterany:123:124")
    g = p.add_argument_group("what to do")
    g.add_argument("--then", choices=("eval",), default=None, help=f"After pre-training that ends well: {', '.join(EVALUATIONS)}")
    g.add_argument("--dry_run", action="store_true", help="Print the batch script and the command, submit nothing")
    g.add_argument("--local", action="store_true", help="Without a cluster: the same job in the background of this machine")
    g.add_argument("--status", nargs="+", metavar="OUTPUT_DIR", help="State, epoch, ETA, last error and requeues of the jobs of these folders")
    # fmt: on
    return p


def parse_args(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Flags of the launcher, and those of the entry point (recipes written out). Raises `UserError`."""
    args, rest = get_args_parser().parse_known_args(argv)
    for name in ("nodes", "ngpus", "cpus_per_task", "timeout", "signal_delay_s"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)} must be positive")
    if args.max_requeues < 0:
        raise UserError(f"--max_requeues {args.max_requeues} must not be negative")
    if args.signal_delay_s >= 60 * args.timeout:
        raise UserError(f"--signal_delay_s {args.signal_delay_s} exceeds --timeout {args.timeout} minutes: shorten it")
    if args.mem and not re.fullmatch(r"\d+[KMGT]?", args.mem):
        raise UserError(f"--mem {args.mem} is not a memory size: 320G, or 0 for the whole node")
    if args.then and args.script != "main_cplearn":
        raise UserError(f"--then {args.then} follows pre-training, not --script {args.script}")
    if args.local and args.nodes > 1:
        raise UserError(f"--local has one machine: leave out --nodes {args.nodes}")
    if args.local and args.then:
        raise UserError("--local knows no dependencies: run the evaluations when it is done, leave out --then")
    if args.dependency and not re.fullmatch(r"after\w*(:\d+)+(,after\w*(:\d+)+)*", args.dependency):
        raise UserError(f"--dependency {args.dependency} is not sbatch's TYPE:JOB: afterok:123")
    if args.local and args.dependency:
        raise UserError(f"--local knows no dependencies: leave out --dependency {args.dependency}")
    if "--time" in rest:
        raise UserError("--time is called --timeout here, and counts minutes")
    wrong = [x for x in args.sbatch if not re.fullmatch(r"[a-z][a-z-]*(=.+)?", x)]
    if wrong:
        raise UserError(f"--sbatch {wrong[0]} is not OPTION=VALUE or OPTION, without dashes: mail-type=END")
    if args.status and rest:
        raise UserError(f"--status takes folders only: leave out {' '.join(rest)}")
    return args, rest


def main(argv: Sequence[str] | None = None) -> list[str]:
    """Submit, or tell of what was submitted; returns the job numbers."""
    args, rest = parse_args(argv)
    if args.status:
        show_status(args.status)
        return []
    if args.local:  # its job has no number in advance
        rest = [x.replace("%j", f"local{os.getpid()}") for x in rest]
    folder = Path(os.path.abspath(check_flags(args, rest)))
    if not args.local and not args.dry_run and shutil.which("sbatch") is None:
        raise UserError(
            "no Slurm here (no sbatch on PATH): submit on a login node, or run on this machine with --local, "
            f"or torchrun --nproc_per_node={args.ngpus} {args.script}.py"
        )
    if args.script == "main_cplearn":
        rest = with_output_dir(rest, folder)  # whatever becomes of the folder it was submitted from
    if not args.local:
        check_partition(args)
    if not args.dry_run:
        refuse_twice(folder, args)
    jobs = [submit(args, args.script, rest, folder, args.dependency)]
    if args.then:
        folder = Path(str(folder).replace("%j", jobs[0]))
        weights = ["--pretrained_weights", str(folder / "checkpoint.pth")]
        one_node = copy.copy(args)
        one_node.nodes = 1
        for script in EVALUATIONS:  # each if pre-training ended well, whatever became of the one before
            dependency = f"afterok:{jobs[0]}" + f",afterany:{jobs[-1]}" * (len(jobs) > 1)
            jobs.append(submit(one_node, script, weights, folder, dependency))
    if not args.dry_run:
        where = str(folder).replace("%j", jobs[0])
        print(f"Watch: tail -F {shlex.quote(f'{where}/{slurm_jobs.FOLDER}/{jobs[0]}_0_log.out')}")
        print(f"       {Path(sys.argv[0]).name} --status {shlex.quote(where)}")
    return jobs


def show_status(folders: list[str]) -> None:
    if len(folders) == 1:
        print("\n".join(slurm_jobs.status(folders[0])))
        return
    for folder in folders:
        try:
            lines = slurm_jobs.status(folder)
        except UserError as error:  # of output/*
            lines = [f"          {error}"]
        print("\n".join([f"{folder}:", *lines]))


# --- before anything is submitted -----------------------------------------------------------------------


def check_flags(args: argparse.Namespace, argv: list[str]) -> str:
    """The entry point's own check of its flags, here and not after hours in a queue. Returns its output folder."""
    module = importlib.import_module(args.script)
    parse = getattr(module, "parse_args", None) or module.get_args_parser().parse_args
    theirs = parse([x.replace("%j", "0") for x in argv])
    given = {name: os.path.expanduser(value) for name, value in vars(theirs).items() if value and name in PATHS}
    numbered = "%j" in " ".join(argv)
    for name in ("pretrained_weights", "load_features", "init_from"):
        # What another job is going to write cannot be there yet.
        if name in given and not numbered and not args.dependency and not os.path.exists(given[name]):
            raise UserError(f"--{name} {given[name]} does not exist: check the path")
    if "data_path" in given and not os.path.exists(given["data_path"]):
        print(f"WARNING: --data_path {given['data_path']} does not exist on this machine", file=sys.stderr)
    elif args.then and "data_path" in given and theirs.dataset == "folder":
        if not any(os.path.isdir(os.path.join(given["data_path"], split)) for split in ("val", "test")):
            raise UserError(f"--then eval needs a val or test folder with classes in --data_path {given['data_path']}")
    output_dir = _value_of("--output_dir", argv)  # as given: %j is not known yet
    if output_dir is None:
        source = given.get("load_features") or str(Path(given.get("pretrained_weights", ".")).parent)
        output_dir = given.get("output_dir") or source
        if args.script != "main_cplearn" and not {"load_features", "pretrained_weights"} & given.keys():
            raise UserError("--pretrained_weights is missing: give a checkpoint (or --load_features)")
    if not output_dir.strip():
        raise UserError("--output_dir is empty: name a folder")
    if "%" in output_dir.replace("%j", ""):
        raise UserError(f"--output_dir {output_dir}: only %j, the job's number, is understood after %")
    return os.path.expanduser(output_dir)


PATHS = ("data_path", "pretrained_weights", "load_features", "init_from", "output_dir")


def _value_of(flag: str, argv: list[str]) -> str | None:
    """The last one counts, as for argparse."""
    found = None
    for word, following in itertools.zip_longest(argv, argv[1:], fillvalue=""):
        if word == flag:
            found = following
        elif word.startswith(f"{flag}="):
            found = word.removeprefix(f"{flag}=")
    return found


def with_output_dir(argv: list[str], folder: Path) -> list[str]:
    kept, skip = [], False
    for word in argv:
        if not skip and word != "--output_dir" and not word.startswith("--output_dir="):
            kept.append(word)
        skip = word == "--output_dir"
    return [*kept, "--output_dir", str(folder)]


def check_partition(args: argparse.Namespace) -> None:
    """sbatch itself accepts more nodes, or more time, than a partition has, and such a job waits for ever."""
    found = slurm_jobs.ask("scontrol", "show", "partition", "-o")
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
    folder = output_dir / slurm_jobs.FOLDER
    for entry in slurm_jobs.submissions(folder):
        if entry["script"] == "main_cplearn" or args.then:
            state = slurm_jobs.job_state(folder, entry)["JobState"]
            if state in slurm_jobs.LIVE:
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

    folder = output_dir / slurm_jobs.FOLDER
    argv = own_flags(args, argv)
    task = slurm_jobs.Task(script, argv, str(folder), args.max_requeues)
    executor = make_executor(args, folder, script, dependency)
    if args.dry_run:
        print(executor._make_submission_file_text(executor._submitit_command_str, ""))
        print(f"# Every process then runs: {script}.py {shlex.join(argv)}\n")
        return "JOB"
    here = {}
    if args.local:  # what the batch script does elsewhere
        here["PYTHONPATH"] = os.pathsep.join(filter(None, [str(slurm_jobs.ROOT), os.environ.get("PYTHONPATH")]))
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
            utils.remove_quietly(path)
        with contextlib.suppress(OSError):  # if they are empty
            start.rmdir()
            start.parent.rmdir()
        raise UserError(f"Slurm refused the job: {_reason(str(error))}") from None
    except OSError as error:
        raise UserError(f"--output_dir {output_dir} cannot be written: {error.strerror or error}") from None
    for path in set(start.glob(".submission_file*")) - before:  # links to the script, of no further use
        utils.remove_quietly(path)
    folder = Path(str(folder).replace("%j", job.job_id))
    size = {"nodes": args.nodes, "processes": args.nodes * args.ngpus}
    entry = {"job": job.job_id, "cluster": "local" if args.local else "slurm", "script": script, "argv": argv, **size}
    if args.local:
        entry["started"] = utils.process_start(int(job.job_id))
    utils.append_json_line(folder / "jobs.jsonl", {**entry, "time": time.time(), "commit": utils.git_commit()})
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
    finish = [sys.executable, "-u", str(slurm_jobs.ROOT / "slurm_jobs.py"), str(folder), str(args.max_requeues)]
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
            f"export PYTHONPATH={shlex.quote(str(slurm_jobs.ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}",
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


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # | head
    # By its name, not as __main__: a job loads what was pickled from the file, as it is then.
    errors.run_script(importlib.import_module("run_with_submitit").main)
