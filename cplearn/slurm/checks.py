"""What is checked before a job is submitted: first the user's input, then the machine."""

import argparse
import importlib
import os
import re
import shutil
import sys
import warnings
from pathlib import Path

from cplearn.errors import UserError
from cplearn.slurm.status import FOLDER, LIVE, ask, fields_of, job_state, submissions
from cplearn.slurm.submit import Resources

# --- checks of the input ----------------------------------------------------------------------------------


def parse_flags(script: str, argv: list[str]) -> argparse.Namespace:
    """Parse the flags of an entry point as it would itself. Raises `UserError`."""
    module = importlib.import_module(script)
    parse = getattr(module, "parse_args", None) or module.get_args_parser().parse_args
    return parse(argv)


def paths_of(parsed: argparse.Namespace, *names: str) -> list[str]:
    """Return the paths that these flags were given, [] where the entry point has no such flag."""
    values = [getattr(parsed, name, None) or [] for name in names]
    return [os.path.expanduser(x) for value in values for x in ([value] if isinstance(value, str) else value)]


def check_inputs(parsed: argparse.Namespace, *, may_come: bool) -> None:
    """Raise `UserError` for weights or features that are not there, unless another job may still write them.

    Warns about images that this machine does not see, because the nodes may.
    """
    for name in ("pretrained_weights", "load_features", "init_from", "checkpoints"):
        for path in paths_of(parsed, name):
            if not may_come and not os.path.exists(path):
                raise UserError(f"--{name} {path} does not exist: check the path")
    for path in paths_of(parsed, "data_path"):
        if not os.path.exists(path):
            print(f"WARNING: --data_path {path} does not exist on this machine", file=sys.stderr)


def check_run(parsed: argparse.Namespace) -> None:
    """Raise `UserError` for what the entry point itself would refuse at its start, as far as it shows without images.

    The model is built without weights (torch's meta device), which takes neither time nor memory.
    """
    from cplearn import checkpoints, tensor_files
    from cplearn.data import datasets, sources

    if parsed.class_list:
        datasets.read_class_list(parsed.class_list)
    weights = [x for x in paths_of(parsed, "pretrained_weights", "init_from") if os.path.exists(x)]
    states = [tensor_files.load_file(x, checkpoints.DINO_CLASSES) for x in weights]
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
        for state, path in zip(states, weights, strict=True):
            checkpoints.load_backbone(backbone, state, path)


def output_dir_of(script: str, parsed: argparse.Namespace) -> Path:
    """Return the absolute folder that an entry point will write to, with %j as given. Raises `UserError`."""
    features, weights = paths_of(parsed, "load_features"), paths_of(parsed, "checkpoints", "pretrained_weights")
    if script != "main_cplearn" and not features and not weights:
        raise UserError("--pretrained_weights is missing: give a checkpoint (or --load_features)")
    beside = [*features, *(str(Path(path).parent) for path in weights)]
    output_dir = [*paths_of(parsed, "output_dir"), *beside][0]
    if not output_dir.strip():
        raise UserError("--output_dir is empty: name a folder")
    if "%" in output_dir.replace("%j", ""):
        raise UserError(f"--output_dir {output_dir}: only %j, the job's number, is understood after %")
    return Path(os.path.abspath(output_dir))


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
    partitions = [fields_of(line) for line in ask("scontrol", "show", "partition", "-o").splitlines()]
    if resources.partition:
        chosen = [p for p in partitions if p["PartitionName"] in resources.partition.split(",")]
    else:
        chosen = [p for p in partitions if p["Default"] == "YES"]
    if not chosen:
        return  # sbatch refuses it
    name = chosen[0]["PartitionName"]
    most_nodes = max(min(int(p["TotalNodes"]), _number(p["MaxNodes"])) for p in chosen)
    if resources.nodes > most_nodes:
        raise UserError(f"--nodes {resources.nodes}: partition {name} gives a job {most_nodes} at most")
    longest = max(_minutes(p["MaxTime"]) for p in chosen)
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
