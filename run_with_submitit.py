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
import copy
import importlib
import itertools
import os
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from cplearn import errors
from cplearn.errors import UserError
from cplearn.flags import ArgumentParser
from cplearn.host import ROOT
from cplearn.slurm.status import FOLDER, status
from cplearn.slurm.submit import check_partition, refuse_twice, submit

SCRIPTS = ("main_cplearn", *sorted(path.stem for path in ROOT.glob("eval_*.py")))


# After pre-training, one after the other: their results go to one file.
EVALUATIONS = ("eval_knn", "eval_linear", "eval_cluster", "eval_collapse")


def get_args_parser() -> argparse.ArgumentParser:
    env = {x.removeprefix("SBATCH_"): value for x, value in os.environ.items() if x.startswith("SBATCH_")}.get
    # fmt: off
    p = ArgumentParser(prog="run_with_submitit.py", description=__doc__)
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
        print(f"Watch: tail -F {shlex.quote(f'{where}/{FOLDER}/{jobs[0]}_0_log.out')}")
        print(f"       {Path(sys.argv[0]).name} --status {shlex.quote(where)}")
    return jobs


def show_status(folders: list[str]) -> None:
    if len(folders) == 1:
        print("\n".join(status(folders[0])))
        return
    for folder in folders:
        try:
            lines = status(folder)
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


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # | head
    # By its name, not as __main__: a job loads what was pickled from the file, as it is then.
    errors.run_script(importlib.import_module("run_with_submitit").main)
