"""Text for people: tables, durations, names, cells of a spreadsheet, and output that nobody may be reading."""

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TextIO


def format_duration(seconds: float) -> str:
    """Return the duration in hours, minutes or seconds."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"


def format_table(rows: Sequence[Sequence[object]], header: Sequence[str]) -> str:
    """Return a plain-text table, which is also a Markdown one; floats get four digits after the point."""
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


def csv_rows(rows: Iterable[Sequence[object]]) -> list[list[object]]:
    """Return rows that no spreadsheet takes for formulas: an apostrophe before =, +, - and @, never before a number."""
    return [[_csv_cell(x) if isinstance(x, str) else x for x in row] for row in rows]


def _csv_cell(text: str) -> str:
    try:
        float(text)
    except ValueError:
        return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text
    return text


# --- names ---------------------------------------------------------------------------------------------
# A file's name is any bytes but 0 and /. Python holds bytes that are not UTF-8 as lone surrogates, which no output
# takes; a line end would break a line in two.


def printable(name: object) -> str:
    """Return a name in one line of proper text, what is none as in a Python string: \\udce9, \\n, \\\\."""
    return "".join(c if c.isprintable() and c != "\\" else c.encode("unicode_escape").decode() for c in str(name))


def from_printable(text: str) -> str:
    """Return the name that `printable` was given."""
    return text.encode("latin-1", "backslashreplace").decode("unicode_escape")


def few(names: list[str]) -> str:
    """Return the first of some names for a message, the middle of long ones left out."""
    short = [name if len(name) <= 200 else f"{name[:100]}...{name[-60:]}" for name in map(printable, names[:5])]
    return ", ".join(short) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def names_of(paths: Sequence[str | Path]) -> list[str]:
    """Name each file by its folder, with as much of its path as tells them apart."""
    parts = [Path(path).expanduser().absolute().parts for path in paths]
    for depth in range(2, max(map(len, parts)) + 1):
        names = ["/".join(p[-depth:-1]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{i + 1}: {Path(path).name}" for i, path in enumerate(paths)]


# --- output ----------------------------------------------------------------------------------------------


class LastingStream:
    """A standard stream that goes quiet where writing fails (its reader is gone, the disk full); it never raises."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        self._attempt(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _attempt(self, act: Callable, *args) -> None:
        try:
            act(*args)
        except OSError:  # what is still buffered goes to nowhere, too, and not into an error at the exit
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


def outlive_output() -> None:
    """Let this process go on without its output where that is closed (>&-) or breaks (| head).

    Characters that a terminal cannot show are written as escapes.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass  # was closed at the start: a checkpoint must not get its number, and what libraries print
    os.close(number)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w", encoding="utf-8")
        stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, LastingStream(stream))
