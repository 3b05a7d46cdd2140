"""Images that a text file names: one path per line, or a path, a tab and a label."""

import os
import re
import stat
import time
from collections.abc import Sequence
from pathlib import Path

from cplearn.data import datasets
from cplearn.data.datasets import EXTENSIONS, Folder, say
from cplearn.data.encoded import Names, check_unique, number_labels
from cplearn.errors import UserError
from cplearn.files import read_text
from cplearn.text import few, printable

SUFFIXES = (".txt", ".tsv", ".lst")

# As many lists have it: a path that ends as images do, blanks, a number.
_NUMBERED = re.compile(rf"(.*(?:{'|'.join(map(re.escape, sorted(EXTENSIONS)))}))[ ]+(-?\d+)", re.IGNORECASE)


class Listed(Folder):
    """The image files that a list names, in its order. Paths are relative to the list's folder."""

    def __init__(self, path: Path, class_list: list[str] | None = None):
        self.root, self.where = path.parent, str(path)
        names, labels = read_list(path)
        check_unique(names, self.where, "leave one of each in the list")
        if class_list and labels is None:
            raise UserError(f"{printable(path)} has no labels for --class_list to choose by: write path, tab, label")
        self.classes, self.labels, keep = number_labels(labels or [None] * len(names), self.where, class_list)
        _check_files(self.root, [names[i] for i in keep], path)
        self.names = Names([names[i] for i in keep])


def read_list(path: Path) -> tuple[list[str], list[str] | None]:
    """Return the paths of a list and their labels, None if it has none.

    What follows the last tab of a line is its label. Without tabs, a number after blanks is, if every line ends in an
    image's suffix, blanks and a number. Raises `UserError` for a file that is no such list.
    """
    try:
        text = read_text(path)
    except OSError as error:
        raise UserError(
            f"the list {printable(path)} cannot be read ({error.strerror}): check path and rights"
        ) from None
    if "\0" in text:
        raise UserError(f"the list {printable(path)} holds NUL bytes: save it as plain text, in UTF-8")
    lines = [line.removesuffix("\r") for line in text.removeprefix("\ufeff").split("\n")]
    numbers = [k for k, line in enumerate(lines, 1) if line.strip()]
    lines = [lines[k - 1] for k in numbers]
    if not lines:
        raise UserError(f"the list {printable(path)} is empty: write one path per line, or path, tab, label")
    if not any("\t" in line for line in lines):
        found = [_NUMBERED.fullmatch(line) for line in lines]
        return ([m[1] for m in found], [m[2] for m in found]) if all(found) else (lines, None)
    parts = [line.rpartition("\t") for line in lines]
    wrong = [k for k, (name, _, label) in zip(numbers, parts, strict=True) if not name or not label.strip()]
    if wrong:
        raise UserError(
            f"the list {printable(path)} has labels, but {len(wrong)} lines have none (line "
            f"{few(list(map(str, wrong)))}): every line is path, tab, label, or none has a tab"
        )
    return [name for name, _, _ in parts], [label.strip() for _, _, label in parts]


def _check_files(root: Path, names: Sequence[str], path: Path) -> None:
    """Raise `UserError` for what is not there, and for pipes and devices, which might be waited for without end."""
    wrong, said = [], time.monotonic()
    for k, name in enumerate(names):
        try:
            regular = stat.S_ISREG(os.stat(root / name).st_mode)
        except (OSError, ValueError):
            regular = False
        if not regular:
            wrong.append(name)
        if time.monotonic() - said >= datasets.SAY_AFTER:
            said = time.monotonic()
            say(f"Still looking for the files of {printable(path)}, {k + 1:,} of {len(names):,}")
    if wrong:
        raise UserError(
            f"the list {printable(path)}: {len(wrong):,} of {len(names):,} lines name no file: {few(wrong)}; paths are "
            "relative to the list's folder, and a tab comes before a label"
        )
