"""Checkpoints: plain containers, written so that no crash costs the last good one, loaded with `weights_only=True`.

    python -m cplearn.checkpoints DINO_CHECKPOINT OUT [--key teacher]

turns an original DINO checkpoint, which carries a pickled argparse.Namespace, into a file of backbone weights.
"""

import argparse
import errno
import hashlib
import io
import json
import os
import pathlib
import pickle
import zipfile
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from cplearn import backbones, errors
from cplearn.errors import ReadError, UserError, WriteError
from cplearn.files import flush_folder, is_full, remove_quietly, written
from cplearn.flags import ArgumentParser

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
    path = Path(path)
    with written(path, on_disk=True) as f:
        try:
            torch.save(content, f)
        except RuntimeError as error:  # torch turns a failed write into one
            if "DataLoader" in str(error):  # a worker's death is reported wherever the main process happens to be
                raise
            reason = (str(error).splitlines() or ["unknown"])[0][:120]
            if is_full(path.parent):  # torch's own words are about positions in the file
                reason = "no space left on the disk"
            raise WriteError(f"{path} could not be written: {reason}; free some space and run again") from error


def save_run(folder: str | Path, state: dict) -> None:
    """Write `folder`/checkpoint.pth and keep the one before it as checkpoint_previous.pth.

    The new file is complete before an old one is touched. Raises `WriteError`.
    """
    folder = Path(folder)
    save(folder / f"{LATEST}.new", state)
    try:
        _shift(folder)
    except OSError as error:
        raise WriteError(
            f"{folder / LATEST} could not be renamed: {error.strerror}; run the same command again"
        ) from error


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
        link = folder / f".{LATEST}.link.tmp"
        remove_quietly(link)
        try:
            os.link(folder / LATEST, link)
            os.replace(link, folder / PREVIOUS)
            remove_quietly(link)  # two names of one file are not replaced: killed before, here the first time
        except OSError:  # a file system without links
            os.replace(folder / LATEST, folder / PREVIOUS)
    os.replace(folder / f"{LATEST}.new", folder / LATEST)
    flush_folder(folder)


# --- reading -------------------------------------------------------------------------------------------


def load_file(path: str | Path, classes: list[type] = ()) -> dict:
    """Load any file that torch saved, or a .safetensors, on the CPU, executing nothing from it.

    Raises `UserError` with the reason.

    Zip files, which is all that torch has written since 1.6, are checked against their CRC-32 first: torch itself
    does not, and would hand out weights with flipped bits. `classes` may be in the file besides tensors and plain
    containers.
    """
    with _open(path) as file:
        return _load(file, path, classes)


def load_file_and_hash(path: str | Path, classes: list[type] = ()) -> tuple[dict, str]:
    """Load as `load_file` does; also return the SHA-256 of the very bytes that were loaded.

    The file is read once, into memory: replaced meanwhile, it cannot lend its hash to other weights.
    """
    with _open(path, in_memory=True) as file:
        return _load(file, path, classes), hashlib.sha256(file.getvalue()).hexdigest()  # getvalue copies nothing


def _open(path: str | Path, in_memory: bool = False) -> BinaryIO:
    path = Path(path)
    if not path.is_file():
        reason = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"{path} {reason}: give the path of a checkpoint")
    try:
        return io.BytesIO(path.read_bytes()) if in_memory else open(path, "rb")
    except (OSError, MemoryError) as error:
        raise _unread(path, error) from None


# Reasons of the system that say nothing about the content of a file; zipfile raises others for one that is damaged.
PASSING = {errno.EIO, errno.EACCES, errno.EPERM, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT, errno.EBUSY, errno.EMFILE,
           errno.ENFILE, errno.ENODEV, errno.ENXIO, errno.EAGAIN, errno.ENOENT}  # fmt: skip


def _unread(path: str | Path, error: Exception) -> ReadError:
    reason = error.strerror if isinstance(error, OSError) else "not enough memory"
    return ReadError(f"{path} cannot be read now: {reason}; it may well be whole: mend that and run again")


def _check_archive(file: BinaryIO, path: str | Path) -> None:
    """Compare all checksums. Raises `UserError` for a wrong one, and for what torch does not write."""
    size = file.seek(0, os.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if any(x.compress_type for x in entries) or sum(x.file_size for x in entries) > size:  # or it may never end
            raise UserError(f"{path} is refused: it is compressed, as torch.save never does; use another copy")
        damaged = archive.testzip()
    if damaged is not None:
        raise UserError(f"{path} is damaged: the checksum of {damaged} is wrong; use another copy")


def _load(file: BinaryIO, path: str | Path, classes: list[type]) -> dict:
    try:
        if str(path).endswith(".safetensors"):
            return _load_safetensors(file, path)
        if file.read(2) == b"PK":
            _check_archive(file, path)
        file.seek(0)
        with torch.serialization.safe_globals(list(classes)):
            state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = "it holds Python objects that could run code" if "Weights only" in str(error) else "it is damaged"
        raise UserError(f"{path} is refused: {reason}; use a file of tensors and plain containers") from None
    except UserError:
        raise
    except Exception as error:  # a damaged file can make zipfile, pickle and torch raise anything
        passing = isinstance(error, MemoryError) or "allocate memory" in str(error)
        if passing or getattr(error, "errno", None) in PASSING:
            raise _unread(path, error) from None
        first = (str(error).splitlines() or [""])[0]
        first = type(error).__name__ if len(first) < 8 else first  # a KeyError says no more than a number
        raise UserError(f"{path} is truncated or no checkpoint at all ({first[:120]}): use another copy") from None
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}, not a dictionary of weights")
    return state


def _load_safetensors(file: BinaryIO, path: str | Path) -> dict:
    """Return the tensors as `state_dict`, and what the file says of them as `metadata`."""
    try:
        from safetensors.torch import load as parse
    except ImportError:
        raise UserError(f"{path} needs the package safetensors: pip install safetensors") from None
    metadata = safetensors_metadata(file, path)
    file.seek(0)
    content = file.read()
    tensors = parse(content)
    expected = metadata.get("data_sha256")  # the format itself has no checksum
    if expected and expected != safetensors_data_hash(content):
        raise UserError(f"{path} is damaged: its checksum is wrong; use another copy")
    return {"state_dict": tensors, "metadata": metadata}


def safetensors_metadata(file: BinaryIO, path: str | Path) -> dict[str, str]:
    """Return the texts in the header of a .safetensors file. Raises `UserError` if it has no such header."""
    length = int.from_bytes(file.read(8), "little")
    try:
        header = json.loads(file.read(length)) if length < 2**27 else None
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise UserError(f"{path} is truncated or no .safetensors file: use another copy")
    metadata = header.get("__metadata__")
    return metadata if isinstance(metadata, dict) else {}


def safetensors_data_hash(content: bytes) -> str:
    """Return the SHA-256 of a .safetensors file's tensors, whatever its metadata."""
    return hashlib.sha256(memoryview(content)[8 + int.from_bytes(content[:8], "little") :]).hexdigest()


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
    problems = []
    for path in (Path(folder) / LATEST, Path(folder) / PREVIOUS):
        if not path.exists():
            continue
        try:
            return load(path), path, "; ".join(problems) or None
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError(
            "; ".join(
                problem.removesuffix(": use another copy").removesuffix("; use another copy") for problem in problems
            )
            + "; copy a numbered checkpoint over checkpoint.pth, or use another --output_dir"
        )
    return None


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
    load_into(backbone, backbones.resample_positions(backbone, backbone_weights(state, key)), what)


def load_into(module: nn.Module, weights: dict, what: str) -> None:
    """Load strictly; raises `UserError` that names the keys and shapes that do not fit."""
    own = module.state_dict()
    missing = sorted(own.keys() - weights.keys())
    unexpected = sorted(weights.keys() - own.keys())
    shapes = [
        f"{k} {_shape(weights[k])} instead of {_shape(own[k])}"
        for k in sorted(own.keys() & weights.keys())
        if isinstance(own[k], Tensor) and (not isinstance(weights[k], Tensor) or weights[k].shape != own[k].shape)
    ]
    problems = [
        f"{len(names)} {label} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for label, names in (
            ("keys missing", missing),
            ("unknown keys", unexpected),
            ("other shapes", shapes),
        )
        if names
    ]
    if problems:
        raise UserError(f"{what} does not fit this model: {'; '.join(problems)}; check --arch and the sizes")
    wrong = next((k for k in own if isinstance(own[k], Tensor) and not weights[k].isfinite().all()), None)
    if wrong is not None:
        raise UserError(f"{what} holds infinite numbers or NaN, in {wrong}: its training diverged, use an earlier one")
    module.load_state_dict(weights, strict=True)


def _shape(x: object) -> str:
    return str(tuple(x.shape)) if isinstance(x, Tensor) else type(x).__name__


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict, what: str) -> None:
    """Load strictly: as many groups, parameters and states as here, each of its parameter's shape."""
    groups = [len(g["params"]) for g in optimizer.param_groups]
    try:
        saved = [len(g["params"]) for g in state["param_groups"]]
        parameters = [p for g in optimizer.param_groups for p in g["params"]]
        wrong = saved != groups or any(
            isinstance(x, Tensor) and x.dim() and x.shape != parameters[i].shape
            for i, entries in state["state"].items()
            for x in entries.values()
        )
    except (KeyError, TypeError, AttributeError, IndexError):
        wrong = True
    if wrong:
        raise UserError(
            f"the optimizer state in {what} does not fit this model: check --optimizer, --arch and the sizes"
        )
    # Not its options: the schedules set learning rate and decay, and on another device the fused form differs.
    optimizer.load_state_dict({"state": state["state"], "param_groups": optimizer.state_dict()["param_groups"]})


# --- files of others -----------------------------------------------------------------------------------


def convert_dino(source: str | Path, target: str | Path, key: str = "teacher") -> int:
    """Write the backbone weights of an original DINO checkpoint as a plain state dict; returns how many.

    Only the classes in `DINO_CLASSES` are let through. Raises `UserError` for anything else.
    """
    state = load_file(source, DINO_CLASSES)
    if key not in state and {"teacher", "student"} & state.keys():
        raise UserError(f"{source} has no {key}: it holds {', '.join(map(str, list(state)[:8]))}")
    weights = backbone_weights(state, key)
    if not weights or not all(isinstance(v, Tensor) for v in weights.values()):
        raise UserError(f"{source} holds no backbone weights: is it a checkpoint of DINO's main_dino.py?")
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
