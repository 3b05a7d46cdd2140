"""Submit a job to SLURM through submitit: pre-training, an evaluation, or one and then the others.

    python run_with_submitit.py --nodes 1 --ngpus 8 --output_dir output/in100 \\
        @recipes/imagenet100_cplearn.txt --data_path /data/imagenet          # any flag of main_cplearn.py
    python run_with_submitit.py --status output/in100                        # progress
    python run_with_submitit.py ... --dry_run                                # the batch script, nothing else

A job that is preempted or out of time saves, requeues itself and resumes at the exact step; one that loses a node goes
on from its last checkpoint. The same command again resumes a job that has ended. Logs and the batch script are in output_dir/slurm; %j in --output_dir is
the job's number.
"""

import argparse
import dataclasses
import os
import re
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from cplearn import errors
from cplearn.errors import UserError
from cplearn.host import ROOT
from cplearn.slurm import checks
from cplearn.slurm.status import FOLDER, status
from cplearn.slurm.submit import JobRequest, Resources, batch_script, submit
from utils import ArgumentParser, nonnegative, positive

SCRIPTS = ("main_cplearn", *sorted(path.stem for path in ROOT.glob("eval_*.py")))
# What --then eval runs after pre-training, one after the other: their results go to one file.
EVALUATIONS = ("eval_knn", "eval_linear", "eval_cluster", "eval_collapse")


def get_args_parser() -> argparse.ArgumentParser:
    env = {x.removeprefix("SBATCH_"): value for x, value in os.environ.items() if x.startswith("SBATCH_")}.get
    # fmt: off
    p = ArgumentParser(prog="run_with_submitit.py", description=__doc__)
    p.add_argument("--script", default="main_cplearn", choices=SCRIPTS, help="Entry point; every other flag is its own")
    g = p.add_argument_group("size")
    g.add_argument("--nodes", type=positive(int), default=1, help="Number of nodes")
    g.add_argument("--ngpus", type=positive(int), default=8, help="GPUs, and processes, per node")
    g.add_argument("--cpu", action="store_true", help="No GPUs: --ngpus is then the number of processes per node")
    g.add_argument("--cpus_per_task", type=positive(int), default=10, help="CPU cores per process, for its loader")
    g.add_argument("--mem", default=None, help="Memory per node in SLURM's notation, 320G (default: 40G per GPU; with --cpu the partition's)")
    g.add_argument("--timeout", type=positive(int), default=2800, help="Minutes until the job is stopped, saved and requeued")
    g = p.add_argument_group("queue")
    g.add_argument("--partition", default=env("PARTITION"), help="Where to submit (default: the cluster's). SBATCH_PARTITION, _ACCOUNT, _QOS and _CONSTRAINT are defaults as for sbatch")
    g.add_argument("--account", default=env("ACCOUNT"))
    g.add_argument("--qos", default=env("QOS"))
    g.add_argument("--constraint", default=env("CONSTRAINT"), help="Features of the nodes, e.g. a100")
    g.add_argument("--exclude", default=None, help="Nodes not to use")
    g.add_argument("--comment", default=None, help="For the scheduler")
    g.add_argument("--sbatch", nargs="+", default=[], metavar="OPTION=VALUE", help="Any other option of sbatch: reservation=x, mail-type=END, exclusive")
    g.add_argument("--name", default=None, help="Name of the job (default: the output folder's)")
    g.add_argument("--max_requeues", type=nonnegative(int), default=20, help="After this many (at most 5 with --local) the job ends as FAILED; the same command again resumes it")
    g.add_argument("--signal_delay_s", type=positive(int), default=120, help="Seconds before the time limit at which to save")
    g.add_argument("--dependency", default=None, metavar="TYPE:JOB", help="Wait for other jobs, as sbatch has it: afterok:123, afterany:123:124")
    g = p.add_argument_group("what to do")
    g.add_argument("--then", choices=("eval",), default=None, help=f"After pre-training that ends well: {', '.join(EVALUATIONS)}")
    g.add_argument("--dry_run", action="store_true", help="Print the batch script and the command, submit nothing")
    g.add_argument("--local", action="store_true", help="Without a cluster: the same job in the background of this machine")
    g.add_argument("--status", nargs="+", metavar="OUTPUT_DIR", help="State, epoch, ETA, last error and requeues of the jobs of these folders")
    # fmt: on
    return p


def parse_args(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Parse the launcher's flags; return them and those of the entry point (recipes written out). Raises `UserError`."""
    args, rest = get_args_parser().parse_known_args(argv)
    if args.signal_delay_s >= 60 * args.timeout:
        raise UserError(f"--signal_delay_s {args.signal_delay_s} exceeds --timeout {args.timeout} minutes: shorten it")
    if args.mem and not re.fullmatch(r"\d+[KMGT]?", args.mem):
        raise UserError(f"--mem {args.mem} is not a memory size: 320G, or 0 for the whole node")
    if args.then and args.script != "main_cplearn":
        raise UserError(f"--then {args.then} follows pre-training, not --script {args.script}")
    if args.local and args.nodes > 1:
        raise UserError(f"--local has one machine: leave out --nodes {args.nodes}")
    if args.local and (args.then or args.dependency):
        flag = f"--dependency {args.dependency}" if args.dependency else "--then and type the evaluations afterwards"
        raise UserError(f"--local knows no dependencies: leave out {flag}")
    if args.dependency and not re.fullmatch(r"after\w*(:\d+)+(,after\w*(:\d+)+)*", args.dependency):
        raise UserError(f"--dependency {args.dependency} is not sbatch's TYPE:JOB: afterok:123")
    if "--time" in rest:
        raise UserError("--time is called --timeout here, and counts minutes")
    wrong = [x for x in args.sbatch if not re.fullmatch(r"[a-z][a-z-]*(=.+)?", x)]
    if wrong:
        raise UserError(f"--sbatch {wrong[0]} is not OPTION=VALUE or OPTION, without dashes: mail-type=END")
    if args.status and rest:
        raise UserError(f"--status takes folders only: leave out {' '.join(rest)}")
    return args, rest


def check_flags(args: argparse.Namespace, rest: list[str]) -> Path:
    """Check the entry point's flags, now and not after hours in a queue; return its output folder. Raises `UserError`."""
    parsed = checks.parse_flags(args.script, rest)
    checks.check_inputs(parsed, may_come=bool(args.dependency) or "%j" in " ".join(rest))
    checks.check_run(parsed)
    if args.then and parsed.dataset == "folder":
        from cplearn.data import sources  # loads torch

        for path in checks.paths_of(parsed, "data_path"):
            if os.path.exists(path) and not sources.has_split(path, "val"):
                raise UserError(f"--then eval needs a val or test split with classes in --data_path {path}")
    return checks.output_dir_of(args.script, parsed)


def main(argv: Sequence[str] | None = None) -> list[str]:
    """Submit jobs, or print their status. Returns the job numbers."""
    args, rest = parse_args(argv)
    if args.status:
        print_status(args.status)
        return []
    if args.local:  # a job of this machine has no number in advance
        rest = [x.replace("%j", f"local{os.getpid()}") for x in rest]
    output_dir, resources = check_flags(args, rest), Resources.from_args(args)
    if not args.local and not args.dry_run:
        checks.check_slurm(resources, args.script)
    if not args.local:
        checks.check_partition(resources)
    if args.script == "main_cplearn" and not args.dry_run:
        checks.refuse_second(output_dir, evaluations_too=bool(args.then))
    if args.script == "main_cplearn":  # the last value counts: absolute, and with ~ expanded
        rest = [*rest, "--output_dir", str(output_dir)]
    send = print_job if args.dry_run else submit_job
    jobs = [send(JobRequest(args.script, rest, output_dir, resources, args.name, args.dependency))]
    output_dir = Path(str(output_dir).replace("%j", jobs[0]))
    if args.then:
        weights = ["--pretrained_weights", str(output_dir / "checkpoint.pth")]
        one_node = dataclasses.replace(resources, nodes=1)
        for script in EVALUATIONS:  # each if pre-training ended well, however the evaluation before it ended
            dependency = f"afterok:{jobs[0]}" + f",afterany:{jobs[-1]}" * (len(jobs) > 1)
            jobs.append(send(JobRequest(script, weights, output_dir, one_node, args.name, dependency)))
    if not args.dry_run:
        print(f"Watch: tail -F {shlex.quote(f'{output_dir}/{FOLDER}/{jobs[0]}_0_log.out')}")
        print(f"       {Path(sys.argv[0]).name} --status {shlex.quote(str(output_dir))}")
    return jobs


def submit_job(request: JobRequest) -> str:
    """Submit a job and print what it is. Returns its number."""
    job, size = submit(request), request.resources
    after = f" after {request.dependency}" if request.dependency else ""
    where = str(request.output_dir).replace("%j", job)
    print(f"Submitted job {job}: {request.script}, {size.nodes} x {size.ngpus} processes, {where}{after}")
    return job


def print_job(request: JobRequest) -> str:
    """Print what `submit_job` would submit. Returns a word that stands for the job's number."""
    if not request.resources.local:
        print(batch_script(request))
    print(f"# Every process then runs: {request.script}.py {shlex.join(request.full_argv())}\n")
    return "JOB"


def print_status(folders: list[str]) -> None:
    """Print a line for each job of these folders."""
    if len(folders) == 1:
        print("\n".join(status(folders[0])))
        return
    for folder in folders:
        try:
            lines = status(folder)
        except UserError as error:  # output/* has other folders, too
            lines = [f"          {error}"]
        print("\n".join([f"{folder}:", *lines]))


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # | head
    errors.run_script(main)
