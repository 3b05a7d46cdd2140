"""Small things every script needs: user-facing errors, counter-based random bits, schedules, seeding, logging."""

import argparse
import errno
import functools
import json
import math
import os
import random
import shlex
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from errors import UserError, WriteError

# --- random numbers with an owner ----------------------------------------------------------------


def hash64(x: Tensor) -> Tensor:
    """SplitMix64 finaliser (Steele et al. 2014) of 64-bit counters: the same bits on every device.

    Shape: x int64 (any shape) -> int64 of the same shape, read as 64 random bits. Integer products wrap
    modulo 2^64 in torch, which is what the function is defined with.
    """
    x = (x ^ _shift_right(x, 30)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9 as a signed number
    x = (x ^ _shift_right(x, 27)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's >> on int64 copies the sign bit, so those copies are masked away."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def random_bits(seed: Tensor | int, counter: Tensor) -> Tensor:
    """64 random bits for each counter of the stream `seed`: a pure function, so any block can be redrawn.

    Shape: counter int64, seed an int or an int64 tensor that broadcasts against it -> int64.
    """
    seed = torch.as_tensor(seed, dtype=torch.int64, device=counter.device)
    golden = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15, SplitMix64's increment
    return hash64(hash64(seed * golden + golden) + (counter + 1) * golden)


def random_normal(seed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers, one independent stream a row, from `random_bits` (Box-Muller).

    Shape: seed int64 (n,) -> float32 (n, *shape), on the seeds' device.
    """
    size = math.prod(shape)
    counter = torch.arange(size, device=seed.device)
    bits = random_bits(seed[:, None], counter[None])
    u1 = ((bits & 0xFFFFFF) + 1).to(torch.float32) / 2**24  # (0, 1]: 24 bits, exact in float32
    u2 = (_shift_right(bits, 24) & 0xFFFFFF).to(torch.float32) / 2**24
    return ((-2 * u1.log()).sqrt() * (2 * math.pi * u2).cos()).reshape(len(seed), *shape)


# What a stream of random numbers is for. NumPy pads short seeds with zeros, so (seed, epoch) alone would be the
# same stream as (seed, epoch, sample 0, view 0).
FOR_VIEWS, FOR_ORDER, FOR_WEIGHTS, FOR_STEP, FOR_PROBE, FOR_REPLACEMENT = range(1, 7)


def random_stream(purpose: int, *key: int) -> np.random.Generator:
    """A generator of its own for (purpose, *key), with Philox, whose stream NumPy guarantees."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((purpose, *key))))


def seed_everything(purpose: int, *key: int) -> None:
    """Seed torch, NumPy and Python from (purpose, *key), for instance (FOR_STEP, seed, step, rank)."""
    value = int(np.random.SeedSequence((purpose, *key)).generate_state(1, np.uint64)[0] >> np.uint64(1))
    torch.manual_seed(value)
    np.random.seed(value % 2**32)
    random.seed(value)


# --- schedules -----------------------------------------------------------------------------------


def cosine(start: float, end: float, progress: float) -> float:
    """Half a cosine from `start` (progress 0) to `end` (progress 1, and beyond)."""
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))


def lr_at(step: int, *, lr: float, min_lr: float, warmup_steps: int, total_steps: int) -> float:
    """DINO's learning-rate schedule: linear from 0 during the warm-up, then a cosine from `lr` to `min_lr`."""
    if step < warmup_steps:
        return lr * step / max(1, warmup_steps - 1)
    return cosine(lr, min_lr, (step - warmup_steps) / max(1, total_steps - warmup_steps))


# --- flags ---------------------------------------------------------------------------------------


class ArgumentParser(argparse.ArgumentParser):
    """argparse with printed defaults, no abbreviations, and `@file` arguments (one or more a line, # comments)."""

    def __init__(self, **kwargs):
        kwargs.setdefault("formatter_class", _HelpFormatter)
        super().__init__(allow_abbrev=False, fromfile_prefix_chars="@", **kwargs)

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        try:
            return shlex.split(arg_line, comments=True)
        except ValueError as error:
            raise UserError(f"a recipe's line cannot be read ({error}): {arg_line}") from None


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Prints a default only where there is one to print."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, argparse.SUPPRESS, []) else super()._get_help_string(action)


def bool_flag(text: str) -> bool:
    """DINO's boolean values: `--use_fp16 true`, `1`, `on`, or `false`, `0`, `off`."""
    if text.lower() in ("1", "true", "on", "yes"):
        return True
    if text.lower() in ("0", "false", "off", "no"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


# --- output --------------------------------------------------------------------------------------


def check_finite(args: argparse.Namespace) -> None:
    """Raises `UserError` for a flag that is NaN or infinite, which float() accepts."""
    for name, value in vars(args).items():
        for x in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(x, float) and not math.isfinite(x):
                raise UserError(f"--{name} {x} is not a finite number")


def expand_paths(args: argparse.Namespace, *names: str) -> None:
    """`~` in paths, also where the shell left it (--data_path=~/x)."""
    for name in names:
        if getattr(args, name):
            setattr(args, name, os.path.expanduser(getattr(args, name)))


def check_output_dir(path: str, flag: str = "--output_dir") -> None:
    """Create the folder and write to it, so that a run does not find out after its first epoch.

    Raises `UserError` with the reason.
    """
    probe = Path(path) / f".write_test_{os.getpid()}"
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO)
        mend = "free some space and run again" if full else "choose another folder"
        raise (WriteError if full else UserError)(
            f"{flag} {path} cannot be written: {error.strerror}; {mend}"
        ) from None
    finally:
        remove_quietly(probe)


def write_text(path: Path, text: str) -> None:
    """Whole or not at all. Raises `WriteError`."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise WriteError(f"{path} could not be written: {error.strerror}; free some space and run again") from None
    finally:
        remove_quietly(temporary)


def remove_quietly(path: Path) -> None:
    """If it is there and can be removed; a disk that failed has been reported by then."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        pass


def append_json_line(path: str | Path, record: dict) -> None:
    """Append one record. JSON has no NaN and no infinity: they become null. Raises `WriteError`."""
    line = json.dumps(_json_ready(record), allow_nan=False) + "\n"
    try:
        with open(path, "a", encoding="utf-8") as f:
            f.write(line)
    except OSError as error:
        raise WriteError(f"{path} could not be written: {error.strerror}; free some space and run again") from None


def _json_ready(value):
    if isinstance(value, dict):
        return {k: _json_ready(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


@functools.cache  # of the code that was loaded, whatever happens to the files later
def git_commit() -> str:
    """Commit of this checkout, with `-dirty` if files differ from it, or `unknown` outside a checkout."""
    root = Path(__file__).resolve().parent
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def format_table(rows: Sequence[Sequence[object]], header: Sequence[str]) -> str:
    """Plain-text table, which is also a Markdown one; floats get four digits after the point."""
    text = [[f"{x:.4f}" if isinstance(x, float) else "" if x is None else str(x) for x in row] for row in rows]
    widths = [max(len(r[i]) for r in [list(header), *text]) for i in range(len(header))]
    lines = [
        "| "
        + " | ".join(x.ljust(w) if i == 0 else x.rjust(w) for i, (x, w) in enumerate(zip(r, widths, strict=True)))
        + " |"
        for r in [list(header), *text]
    ]
    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


class Stopwatch:
    """Wall-clock seconds spent in a `with` block, added up."""

    def __init__(self):
        self.seconds = 0.0

    def __enter__(self):
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_):
        self.seconds += time.perf_counter() - self._start
