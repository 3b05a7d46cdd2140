"""Files that are whole or not there: text, JSON, JSON lines. Standard library only."""

import contextlib
import csv
import errno
import io
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from cplearn.errors import ExpectedError, UserError, WriteError
from cplearn.text import csv_rows


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
        fix = "free some space and run again" if full else "choose another folder"
        raise (WriteError if full else UserError)(f"{flag} {path} cannot be written: {error.strerror}; {fix}") from None
    finally:
        remove_quietly(probe)


@contextlib.contextmanager
def written(path: Path, *, on_disk: bool = False) -> Iterator[BinaryIO]:
    """Give a file to write, which is `path` afterwards, or else is gone. Raises `WriteError`.

    `on_disk`: not before its content is there, so that losing power costs nothing either.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            yield f
            if on_disk:
                f.flush()
                os.fsync(f.fileno())
        os.replace(temporary, path)
        if on_disk:
            flush_folder(path.parent)
    except OSError as error:
        if not path.parent.is_dir():
            raise WriteError(f"{path.parent} was removed meanwhile: run the same command again") from None
        reason = error.strerror or str(error)
        raise WriteError(f"{path} could not be written: {reason}; free some space and run again") from None
    finally:
        remove_quietly(temporary)


def flush_folder(folder: Path) -> None:
    """Flush the renames in a folder to the disk; not every file system lets a folder be opened."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def is_full(folder: Path) -> bool:
    """Return whether there is no space left: libraries that write speak of something else then."""
    return shutil.disk_usage(folder).free < 2**20


def write_bytes(path: Path, content: bytes) -> None:
    """Whole or not at all. Raises `WriteError`."""
    with written(path) as f:
        f.write(content)


def write_text(path: Path, text: str) -> None:
    """Whole or not at all. Raises `WriteError`."""
    write_bytes(path, text.encode("utf-8", "surrogateescape"))


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a header and rows as CSV, whole or not at all, nothing a spreadsheet takes for a formula.

    Raises `WriteError`.
    """
    text = io.StringIO()
    csv.writer(text).writerows([header, *csv_rows(rows)])
    write_text(path, text.getvalue())


MARK_WITHIN = 2**20  # bytes from the beginning or the end of a file in which its mark stands


def replaceable(path: Path, mark: bytes) -> bool:
    """Return whether an output may be written here: nothing is there, or a file that says it is ours by its mark.

    What is not ours is never replaced (docs/promises.md). A link is not ours.
    """
    if not os.path.lexists(path):
        return True
    if path.is_symlink() or not path.is_file():
        return False
    with open(path, "rb") as file:
        head = file.read(MARK_WITHIN)
        file.seek(max(0, os.fstat(file.fileno()).st_size - MARK_WITHIN))
        return mark in head or mark in file.read()


def check_replaceable(path: Path, mark: bytes, flag: str) -> None:
    """Raise `UserError` if something stands here that is not ours, or that cannot be looked at."""
    try:
        if replaceable(path, mark):
            return
        reason = "exists and was not written by this command"
    except OSError as error:
        reason = f"cannot be read: {error.strerror}"
    raise UserError(f"{flag} {path} {reason}: choose another name, or move it away")


@contextlib.contextmanager
def reading(path: str | Path, fix: str = "restore a copy, or move it away") -> Iterator[None]:
    """Read a file of ours inside: whatever goes wrong there means that it is damaged. Raises `UserError`.

    `ExpectedError` passes, and so does FileNotFoundError.
    """
    try:
        yield
    except (ExpectedError, FileNotFoundError):
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0][:120]
        raise UserError(f"{path} is damaged ({type(error).__name__}: {reason}): {fix}") from None


def remove_quietly(path: Path) -> None:
    """If it is there and can be removed; a disk that failed has been reported by then."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        pass


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


def read_text(path: str | Path, limit: int = 2**28) -> str:
    """Return what a file holds, surrogates for what is not UTF-8. Raises OSError also for more than `limit` bytes."""
    with open(path, "rb") as f:
        content = f.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, "is too large", str(path))
    return content.decode("utf-8", "surrogateescape")


def read_json(path: str | Path) -> dict:
    """Return the JSON object in a file, {} if there is no such file or it is damaged."""
    try:
        content = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def read_json_lines(path: str | Path) -> list[dict]:
    """Return the records of `append_json_line`, without what a kill cut short. [] if there is no file."""
    try:
        lines = read_text(path).split("\n")
    except OSError:
        return []
    records = []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict)]


def _json_ready(value):
    if isinstance(value, dict):
        return {k: _json_ready(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_json_ready(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
