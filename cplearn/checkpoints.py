"""Checkpoints: plain containers, written so that no crash costs the last good one, loaded with `weights_only=True`.

    python -m cplearn.checkpoints DINO_CHECKPOINT OUT [--key teacher]

turns an original DINO checkpoint, which carries a pickled argparse.Namespace, into a file of backbone weights.
"""

import argparse
import os
import pathlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from cplearn import backbones, errors
from cplearn.errors import UserError
from cplearn.files import flush_folder, reading, remove_quietly, written
from cplearn.flags import ArgumentParser
from cplearn.tensor_files import load_file

FORMAT = "cplearn-1"
EXPORTED = "cplearn-export-1"  # what the files of export.py say of themselves

# What DINO's checkpoints pickle besides tensors: its parsed flags, and under submitit the paths among them. Both are
# plain data: unpickling them runs no code of the file's choosing.
DINO_CLASSES = [argparse.Namespace, pathlib.PosixPath, pathlib.PurePosixPath]

LATEST, PREVIOUS = "checkpoint.pth", "checkpoint_previous.pth"


# --- writing -------------------------------------------------------------------------------------------


def save(path: str | Path, state: dict) -> None:
    """Write state and format to `path`, or nothing: see `write`."""
    write(path, {"format": FORMAT, **state})


def write(path: str | Path, content: dict) -> None:
    """Write what torch saves to `path`, whole and flushed to the disk: never half a checkpoint.

    Raises `WriteError` if that fails; `path` is then as it was.
    """
    failures: list[OSError] = []  # of which torch makes errors of its own
    with written(Path(path), on_disk=True) as file:

        def write_part(part: bytes) -> int:
            try:
                return file.write(part)
            except OSError as error:
                failures.append(error)
                raise

        try:
            torch.save(content, SimpleNamespace(write=write_part, flush=file.flush))
        except RuntimeError:
            if failures:
                raise failures[0] from None
            raise


def save_run(folder: str | Path, state: dict, others: Sequence[str] = ()) -> None:
    """Write `folder`/checkpoint.pth, and keep the one before it as checkpoint_previous.pth.

    `others`: names under which the same is kept too, and there first. The content is written once, and is complete
    before an old file is touched. Raises `WriteError`, or OSError for a name that cannot be given.
    """
    folder = Path(folder)
    names = [*others, f"{LATEST}.new"]
    save(folder / names[0], state)
    for name in names[1:]:
        _name_again(folder / names[0], folder / name)
    _shift(folder)


def finish_writing(folder: str | Path) -> None:
    """Clear up after a run that was killed while it saved. Only for the holder of the folder's lock."""
    folder = Path(folder)
    for path in folder.glob(".checkpoint*.tmp"):
        remove_quietly(path)
    if (folder / f"{LATEST}.new").exists():  # whole, or it would not have this name
        _shift(folder)


def _shift(folder: Path) -> None:
    """Let latest be previous, too, and new be latest: at no moment is there no latest one.

    Killed anywhere in between, `finish_writing` does it again.
    """
    if (folder / LATEST).exists():
        _name_again(folder / LATEST, folder / PREVIOUS)
    os.replace(folder / f"{LATEST}.new", folder / LATEST)
    flush_folder(folder)


def _name_again(path: Path, name: Path) -> None:
    """Give a file a second name, in place of what has it; a copy on a file system without links."""
    link = name.with_name(f".{name.name}.link.tmp")
    remove_quietly(link)
    try:
        os.link(path, link)
    except OSError:
        with open(path, "rb") as content, written(name, on_disk=True) as copy:
            shutil.copyfileobj(content, copy)
        return
    os.replace(link, name)
    remove_quietly(link)  # two names of one file are not replaced: killed before, here the first time


# --- reading -------------------------------------------------------------------------------------------


def is_ours(state: dict) -> bool:
    """Return whether this is a run's checkpoint. Raises `UserError` for our files that hold no model."""
    ours = state.get("format") == FORMAT
    if ours and "model" not in state:
        raise UserError("this file holds kept features or a linear probe, not a model: give a checkpoint.pth")
    return ours


def load(path: str | Path) -> dict:
    """Load a file that `save` wrote: a run's checkpoint, kept features, or a linear probe."""
    state = load_file(path)
    if state.get("format") != FORMAT:
        raise UserError(f"{path} was not written by main_cplearn.py (its format is not {FORMAT})")
    return state


def load_run(folder: str | Path) -> tuple[dict, Path, str | None] | None:
    """Load the run in `folder`: state, file, and what is wrong with the newer file if it could not be used.

    None if there is no checkpoint at all. Raises `UserError` if there are some and none can be read.
    """
    paths = [path for path in (Path(folder) / LATEST, Path(folder) / PREVIOUS) if path.exists()]
    problems = []
    for path in paths:
        try:
            return load(path), path, "; ".join(problems) or None
        except UserError as error:
            problems.append(str(error))
    if not paths:
        return None
    reasons = "; ".join(problems)
    raise UserError(f"{reasons}; copy a numbered checkpoint over checkpoint.pth, or use another --output_dir")


def backbone_weights(state: dict, key: str = "teacher") -> dict[str, Tensor]:
    """Take the backbone weights out of a checkpoint of ours, DINO's (`key`: teacher or student), or a plain state dict.

    Of a plain one, `head.weight` and `head.bias` (a classifier's, as in timm's files) are left out.
    """
    if is_ours(state):
        state = state["model"]
        of_two = {k.removeprefix(f"{key}."): v for k, v in state.items() if k.startswith(f"{key}.backbone.")}
        state = of_two or state  # DINO's teacher, in a checkpoint of ours
    elif isinstance(state.get(key), dict):
        state = state[key]
    elif isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    state = {str(k).removeprefix("module."): v for k, v in state.items()}
    inner = {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
    return inner or {k: v for k, v in state.items() if k not in ("head.weight", "head.bias")}


def load_backbone(backbone: nn.Module, state: dict, what: str, key: str = "teacher") -> None:
    """Load the backbone's weights of any file `backbone_weights` knows, resampled for its image size if need be."""
    with reading(what, "use another copy"):
        weights = backbones.resample_positions(backbone, backbone_weights(state, key))
    load_into(backbone, weights, what)


def load_into(module: nn.Module, weights: dict, what: str) -> None:
    """Load strictly. Raises `UserError` that names the keys and shapes that do not fit, or what is not finite."""
    own = module.state_dict()
    tensors = [k for k in own if not k.endswith("_extra_state")]  # which its module compares itself
    differ = [
        f"{k} {_shape(weights[k])} instead of {_shape(own[k])}"
        for k in sorted(tensors)
        if k in weights and _shape(weights[k]) != _shape(own[k])
    ]
    missing, unknown = sorted(own.keys() - weights.keys()), sorted(map(str, weights.keys() - own.keys()))
    problems = [
        f"{len(names)} {label} ({', '.join(names[:3])}{', ...' * (len(names) > 3)})"
        for label, names in (("keys missing", missing), ("unknown keys", unknown), ("other shapes", differ))
        if names
    ]
    if problems:
        raise UserError(f"{what} does not fit this model: {'; '.join(problems)}; check --arch and the sizes")
    _check_finite({k: weights[k] for k in tensors}, what)
    module.load_state_dict(weights, strict=True)


def _check_finite(weights: dict[str, Tensor], what: str | Path) -> None:
    wrong = next((k for k, x in weights.items() if not x.isfinite().all()), None)
    if wrong is not None:
        raise UserError(f"{what} holds infinite numbers or NaN, in {wrong}: its training diverged, use an earlier one")


def _shape(x: object) -> str:
    return str(tuple(x.shape)) if isinstance(x, Tensor) else type(x).__name__


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict, what: str) -> None:
    """Load strictly: as many groups, parameters and states as here, each of its parameter's shape."""
    parameters = [p for g in optimizer.param_groups for p in g["params"]]
    with reading(what):
        saved, own = ([len(g["params"]) for g in groups] for groups in (state["param_groups"], optimizer.param_groups))
        tensors = [(i, x) for i, kept in state["state"].items() for x in kept.values() if isinstance(x, Tensor)]
        if saved != own or any(x.dim() and x.shape != parameters[i].shape for i, x in tensors):
            fix = "check --optimizer, --arch and the sizes"
            raise UserError(f"the optimizer state in {what} does not fit this model: {fix}")
    # Not its options: the schedules set learning rate and decay, and on another device the fused form differs.
    optimizer.load_state_dict({"state": state["state"], "param_groups": optimizer.state_dict()["param_groups"]})


# --- files of others -----------------------------------------------------------------------------------


def convert_dino(source: str | Path, target: str | Path, key: str = "teacher") -> int:
    """Write the backbone weights of DINO's own checkpoint as a plain state dict; return how many."""
    state = load_file(source, DINO_CLASSES)
    weights = backbone_weights(state, key)
    if not weights or not all(isinstance(v, Tensor) for v in weights.values()):
        raise UserError(f"{source} holds no weights of a {key}: is it a checkpoint of DINO's main_dino.py?")
    _check_finite(weights, source)
    write(target, {"state_dict": {k: v.clone() for k, v in weights.items()}})
    return len(weights)


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(prog="python -m cplearn.checkpoints", description=__doc__)
    parser.add_argument("source", help="Checkpoint written by DINO")
    parser.add_argument("target", help="File to write")
    parser.add_argument("--key", default="teacher", choices=("teacher", "student"), help="Whose weights")
    args = parser.parse_args(argv)
    if Path(args.target).exists():
        raise UserError(f"{args.target} exists: choose another name")
    if not Path(args.target).absolute().parent.is_dir():
        raise UserError(f"the folder of {args.target} does not exist: create it first")
    print(f"{convert_dino(args.source, args.target, args.key)} tensors of the {args.key} written to {args.target}")


if __name__ == "__main__":
    errors.run_script(main)
