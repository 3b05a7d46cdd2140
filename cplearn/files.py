"""Files that are whole or not there: text, JSON, JSON lines. Standard library only."""

import contextlib
import csv
import errno
import io
import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from cplearn.errors import UserError, WriteError


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


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a header and rows as CSV, whole or not at all. Raises `WriteError`."""
    text = io.StringIO()
    csv.writer(text).writerows([header, *rows])
    write_text(path, text.getvalue())


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


def read_json(path: str | Path) -> dict:
    """Return the JSON object in a file, {} if there is no such file or it is damaged."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


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
