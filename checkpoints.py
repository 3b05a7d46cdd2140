"""Checkpoints: plain containers, written atomically, loaded with `weights_only=True` and nothing else."""

import argparse
import os
import pickle
from pathlib import Path

import torch
from torch import Tensor, nn

from utils import UserError

FORMAT = "cplearn-1"


def save(path: str | Path, state: dict) -> None:
    """Write to a temporary file beside `path`, flush it to the disk, then rename: never half a checkpoint."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            torch.save({"format": FORMAT, **state}, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_file(path: str | Path) -> dict:
    """Any file that torch saved, on the CPU, executing nothing from it. Raises `UserError` with the reason."""
    if not Path(path).is_file():
        reason = "is a folder" if Path(path).is_dir() else "does not exist"
        raise UserError(f"{path} {reason}: give the path of a checkpoint")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # plain data, and in every DINO checkpoint
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = "it holds Python objects that could run code" if "Weights only" in str(error) else "it is damaged"
        raise UserError(f"{path} is refused: {reason}; use a file of tensors and plain containers") from None
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        first = (str(error).splitlines() or [""])[0]
        first = type(error).__name__ if len(first) < 8 else first  # a KeyError says no more than a number
        raise UserError(f"{path} is truncated or no checkpoint at all ({first[:120]}): use another copy") from None
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}, not a dictionary of weights")
    return state


def is_ours(state: dict) -> bool:
    """Whether this is a run's checkpoint. Raises `UserError` for our files that hold no model."""
    if state.get("format") == FORMAT and "model" not in state:
        raise UserError("this file holds kept features or a linear probe, not a model: give a checkpoint.pth")
    return state.get("format") == FORMAT


def load(path: str | Path) -> dict:
    """A file that `save` wrote: a run's checkpoint, kept features, or a linear probe."""
    state = load_file(path)
    if state.get("format") != FORMAT:
        raise UserError(f"{path} was not written by main_cplearn.py (its format is not {FORMAT})")
    return state


def backbone_weights(state: dict, key: str = "teacher") -> dict[str, Tensor]:
    """Backbone weights out of a checkpoint of ours, DINO's (`key`: teacher or student), or a plain state dict.

    Of a plain one, `head.weight` and `head.bias` (a classifier's, as in timm's files) are left out.
    """
    if is_ours(state):
        state = state["model"]
    elif isinstance(state.get(key), dict):
        state = state[key]
    elif isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    state = {k.removeprefix("module."): v for k, v in state.items()}
    inner = {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
    return inner or {k: v for k, v in state.items() if k not in ("head.weight", "head.bias")}


def load_backbone(backbone: nn.Module, state: dict, what: str, key: str = "teacher") -> None:
    """Load the backbone's weights of any file `backbone_weights` knows, resampled for its image size if need be."""
    adapt = getattr(backbone, "adapt_state_dict", dict)
    load_into(backbone, adapt(backbone_weights(state, key)), what)


def load_into(module: nn.Module, weights: dict, what: str) -> None:
    """Strict loading; raises `UserError` that names the keys and shapes that do not fit."""
    own = module.state_dict()
    missing = sorted(own.keys() - weights.keys())
    unexpected = sorted(weights.keys() - own.keys())
    shapes = [
        f"{k} {tuple(weights[k].shape)} instead of {tuple(own[k].shape)}"
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
    module.load_state_dict(weights, strict=True)
