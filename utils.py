"""Small things every script needs: schedules, flags, files, tables. Needs nothing but Python, so it loads at once."""

import argparse
import contextlib
import errno
import functools
import json
import math
import os
import shlex
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from errors import UserError, WriteError

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
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
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


def process_start(pid: int) -> str | None:
    """When a process of this machine started (a constant on systems without /proc); None if there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        return None if stat.rpartition(")")[2].split()[0] == "Z" else stat.rpartition(")")[2].split()[19]
    except OSError:
        pass
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return "alive"


def append_json_line(path: str | Path, record: dict) -> None:
    """Append one record, on a line of its own even after one that a kill cut short. JSON has no NaN and no infinity:
    they become null. Raises `WriteError`."""
    line = json.dumps(_json_ready(record), allow_nan=False) + "\n"
    try:
        with open(path, "ab+") as f:
            if f.tell() and (f.seek(-1, os.SEEK_END), f.read(1))[1] != b"\n":
                line = "\n" + line
            f.write(line.encode())
    except OSError as error:
        raise WriteError(f"{path} could not be written: {error.strerror}; free some space and run again") from None


def read_json_lines(path: str | Path) -> list[dict]:
    """Records of `append_json_line`, without what a kill cut short. [] if there is no file."""
    found = []
    try:
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
    except OSError:
        pass
    return found


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


def format_duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"


def host_name() -> str:
    """This machine's name, or that of its node in SLURM."""
    return os.environ.get("SLURMD_NODENAME") or os.uname().nodename


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


def physical_memory() -> int:
    """Bytes of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class Stopwatch:
    """Wall-clock seconds spent in a `with` block, added up."""

    def __init__(self):
        self.seconds = 0.0

    def __enter__(self):
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_):
        self.seconds += time.perf_counter() - self._start
