"""What is checked before a job is submitted: first the user's input, then the machine."""

import argparse
import importlib
import itertools
import os
import re
import shutil
import sys
import warnings
from pathlib import Path

from cplearn.errors import UserError
from cplearn.slurm.status import FOLDER, LIVE, ask, job_state, submissions
from cplearn.slurm.submit import Resources

# --- checks of the input ----------------------------------------------------------------------------------


def parse_flags(script: str, argv: list[str]) -> argparse.Namespace:
    """Parse the flags of an entry point as it would itself. Raises `UserError`."""
    module = importlib.import_module(script)
    parse = getattr(module, "parse_args", None) or module.get_args_parser().parse_args
    return parse([x.replace("%j", "0") for x in argv])


def check_inputs(parsed: argparse.Namespace, *, may_come: bool) -> None:
    """Raise `UserError` for weights or features that are not there, unless another job may still write them.

    Warns about images that this machine does not see, because the nodes may.
    """
    named = [(name, path_of(parsed, name)) for name in ("pretrained_weights", "load_features", "init_from")]
    for name, path in [*named, *(("checkpoints", os.path.expanduser(x)) for x in _checkpoints_of(parsed))]:
        if path and not may_come and not os.path.exists(path):
            raise UserError(f"--{name} {path} does not exist: check the path")
    data_path = path_of(parsed, "data_path")
    if data_path and not os.path.exists(data_path):
        print(f"WARNING: --data_path {data_path} does not exist on this machine", file=sys.stderr)


def check_run(parsed: argparse.Namespace) -> None:
    """Raise `UserError` for what the entry point itself would refuse at its start, as far as it shows without images.

    The model is built without weights (torch's meta device), which takes neither time nor memory.
    """
    from cplearn import checkpoints
    from cplearn.data import datasets, sources

    if parsed.class_list:
        datasets.read_class_list(parsed.class_list)
    weights = path_of(parsed, "pretrained_weights") or path_of(parsed, "init_from")
    state = checkpoints.load_file(weights, checkpoints.DINO_CLASSES) if os.path.exists(weights) else None
    if not hasattr(parsed, "method"):
        return  # an evaluation: its model is that of the weights

    import torch

    from cplearn.data import augmentations
    from cplearn.methods import build_method_for

    local_copy = parsed.dataset.startswith(sources.PREFIX)
    if not local_copy and (not parsed.data_path or (parsed.class_list and parsed.dataset != "folder")):
        sources.build_dataset(parsed.dataset, None, "train", parsed.class_list)
    views = augmentations.views_of(parsed)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that weights cannot be copied there
        backbone = build_method_for(parsed, views).backbone
        if state is not None:
            checkpoints.load_backbone(backbone, state, weights)


def output_dir_of(script: str, argv: list[str], parsed: argparse.Namespace) -> Path:
    """Return the absolute folder that an entry point will write to, with %j as given. Raises `UserError`."""
    output_dir = _value_of("--output_dir", argv)
    if output_dir is None:
        weights, features = _weights_of(parsed), path_of(parsed, "load_features")
        output_dir = path_of(parsed, "output_dir") or features or str(Path(weights or ".").parent)
        if script != "main_cplearn" and not (weights or features):
            raise UserError("--pretrained_weights is missing: give a checkpoint (or --load_features)")
    if not output_dir.strip():
        raise UserError("--output_dir is empty: name a folder")
    if "%" in output_dir.replace("%j", ""):
        raise UserError(f"--output_dir {output_dir}: only %j, the job's number, is understood after %")
    return Path(os.path.abspath(os.path.expanduser(output_dir)))


def _checkpoints_of(parsed: argparse.Namespace) -> list[str]:
    """Return the paths of --checkpoints of eval_collapse.py."""
    return getattr(parsed, "checkpoints", None) or []


def _weights_of(parsed: argparse.Namespace) -> str:
    """Return the path of the weights beside which an evaluation writes, "" if there are none."""
    several = _checkpoints_of(parsed)
    return os.path.expanduser(several[0]) if several else path_of(parsed, "pretrained_weights")


def path_of(parsed: argparse.Namespace, name: str) -> str:
    """Return the value of a flag that is a path, "" if the entry point has no such flag or it was not given."""
    return os.path.expanduser(getattr(parsed, name, None) or "")


def _value_of(flag: str, argv: list[str]) -> str | None:
    """Return the last value of a flag in a command line, as argparse would."""
    value = None
    for word, following in itertools.zip_longest(argv, argv[1:], fillvalue=""):
        if word == flag:
            value = following
        elif word.startswith(f"{flag}="):
            value = word.removeprefix(f"{flag}=")
    return value


# --- checks of the machine --------------------------------------------------------------------------------


def check_slurm(resources: Resources, script: str) -> None:
    """Raise `UserError` with the other ways to run if there is no Slurm on this machine."""
    if shutil.which("sbatch") is None:
        raise UserError(
            "no Slurm here (no sbatch on PATH): submit on a login node, or run on this machine with --local, "
            f"or torchrun --nproc_per_node={resources.ngpus} {script}.py"
        )


def check_partition(resources: Resources) -> None:
    """Raise `UserError` if the partition cannot give what the job asks for. Checks nothing where there is no Slurm.

    sbatch itself accepts more nodes or time than a partition has, and such a job never starts.
    """
    shown = ask("scontrol", "show", "partition", "-o").splitlines()
    partitions = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in shown]
    if resources.partition:
        mine = [p for p in partitions if p.get("PartitionName") in resources.partition.split(",")]
    else:
        mine = [p for p in partitions if p.get("Default") == "YES"]
    if not mine:
        return  # sbatch refuses it
    name = mine[0]["PartitionName"]
    most_nodes = max(min(int(p["TotalNodes"]), _number(p["MaxNodes"])) for p in mine)
    if resources.nodes > most_nodes:
        raise UserError(f"--nodes {resources.nodes}: partition {name} gives a job {most_nodes} at most")
    longest = max(_minutes(p["MaxTime"]) for p in mine)
    if resources.timeout > longest:
        raise UserError(
            f"--timeout {resources.timeout}: partition {name} gives a job {longest:g} minutes at most "
            "(it saves and requeues itself then)"
        )


def _number(text: str) -> float:
    return float(text) if text.isdigit() else float("inf")


def _minutes(text: str) -> float:
    """Convert [days-]hours:minutes:seconds; any other text means no limit."""
    if not re.fullmatch(r"(\d+-)?\d+:\d+:\d+", text):
        return float("inf")
    days, _, clock = text.rpartition("-")
    hours, minutes, seconds = map(int, clock.split(":"))
    return 24 * 60 * int(days or 0) + 60 * hours + minutes + seconds / 60


def refuse_second(output_dir: Path, *, evaluations_too: bool) -> None:
    """Raise `UserError` if a pre-training of this folder, or an evaluation if asked, waits or runs already."""
    for entry in submissions(output_dir / FOLDER):
        if entry["script"] == "main_cplearn" or evaluations_too:
            state = job_state(output_dir / FOLDER, entry)["JobState"]
            if state in LIVE:
                stop = f"kill {entry['job']}" if entry["cluster"] == "local" else f"scancel {entry['job']}"
                raise UserError(
                    f"{output_dir} has job {entry['job']} ({entry['script']}), which is {state}: {stop}, "
                    "or choose another --output_dir"
                )
