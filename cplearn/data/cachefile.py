"""A file in --cache_dir that is made once: whole or not there, by one process, for all others and later runs."""

import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from cplearn.errors import UserError, WriteError
from cplearn.files import remove_quietly

FOLDER = "~/.cache/cplearn"  # unless --cache_dir names another
HEAD = 4096  # bytes of the file before what it holds: a key, and how long it is


def make_once(path: Path, key: str, expected: int, what: str, write: Callable[[BinaryIO], None], other: str) -> None:
    """Have `write` fill a new file unless one with this key is there; others who want it wait.

    `expected` bytes must be free; `what` names them in a message and `other` what could be done without the file.
    Raises `UserError` for too little room, `WriteError` for a folder that cannot be written.
    """
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(os.open(partial, os.O_RDWR | os.O_CREAT, 0o600), "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # goes with the process; whoever comes second finds the file made
            if not _is_whole(path, key):
                free = shutil.disk_usage(path.parent).free + file.seek(0, os.SEEK_END)
                if expected > 0.95 * free:
                    raise UserError(
                        f"{what} take about {expected / 1e9:.1f} GB, and {path.parent} has {free / 1e9:.1f} GB left: "
                        f"make room, choose another --cache_dir, or {other}"
                    )
                file.truncate(0)
                write(file)
                write_head(file, key)
                os.fsync(file.fileno())
                os.replace(partial, path)
    except OSError as error:
        raise WriteError(f"{what}: {path} could not be written: {error.strerror}; see --cache_dir") from None
    finally:
        remove_quietly(partial)


def write_head(file: BinaryIO, key: str) -> None:
    """Finish a file whose other bytes are written."""
    total = file.seek(0, os.SEEK_END)
    file.seek(0)
    file.write(json.dumps({"key": key, "bytes": total}).encode().ljust(HEAD, b"\0"))
    file.flush()


def _is_whole(path: Path, key: str) -> bool:
    try:
        with open(path, "rb") as file:
            head = json.loads(file.read(HEAD).rstrip(b"\0"))
        return head["key"] == key and path.stat().st_size == head["bytes"]
    except (OSError, ValueError, KeyError):
        return False
