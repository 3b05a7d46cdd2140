"""A file in --cache_dir that is made once: whole or not there, by one process, for all others and later runs."""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from cplearn.data.scan import Progress
from cplearn.errors import Interrupted, UserError, WriteError
from cplearn.files import remove_quietly
from cplearn.lock import Lock

FOLDER = "~/.cache/cplearn"  # unless --cache_dir names another
HEAD = 4096  # bytes of the file before what it holds: a key, and how long it is


def make_once(
    path: Path,
    key: str,
    expected: int,
    what: str,
    write: Callable[[BinaryIO], None],
    sound: Callable[[Path], bool],
    other: str,
) -> None:
    """Have `write` fill a new file unless one with this key is there and `sound`; others who want it wait.

    `expected` bytes must be free; `what` names them in a message and `other` what could be done without the file.
    Raises `UserError` for too little room, `WriteError` for a folder that cannot be written.
    """
    try:
        if _is_whole(path, key) and sound(path):  # also in a folder that nobody may write
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with Lock(path.with_suffix(".lock")):
            if _is_whole(path, key) and sound(path):
                return
            for partial in path.parent.glob(f"{path.stem}.*.partial"):  # of a process that was killed
                remove_quietly(partial)
            free = shutil.disk_usage(path.parent).free
            if expected > 0.95 * free:
                raise UserError(
                    f"{what} take about {expected / 1e9:.1f} GB, and {path.parent} has {free / 1e9:.1f} GB left: "
                    f"make room, choose another --cache_dir, or {other}"
                )
            number, partial = tempfile.mkstemp(".partial", f"{path.stem}.", path.parent)  # a name of its own, no link
            try:
                with open(number, "r+b") as file:
                    write(file)
                    write_head(file, key)
                    os.fsync(file.fileno())
                os.replace(partial, path)
            finally:
                remove_quietly(Path(partial))
    except OSError as error:
        raise WriteError(f"{what}: {path} could not be written: {error.strerror}; see --cache_dir") from None


class Filling:
    """How far a file is that is filled from many images: a line now and then, an end where one is asked for."""

    def __init__(self, doing: str, done_to_images: str, images: int, stop: Callable[[], bool]):
        self.doing, self.done_to_images, self.images, self.stop = doing, done_to_images, images, stop
        self.start, self.progress = time.monotonic(), Progress()

    def reached(self, done: int) -> None:
        """Raises `Interrupted` if `stop` says so."""
        if self.stop():
            raise Interrupted(f"stopped while images were {self.done_to_images}, nothing is lost: run it again")
        seconds = time.monotonic() - self.start
        self.progress.tell(lambda: f"{self.doing}: {done:,} of {self.images:,}, {seconds:.0f} s")


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
