"""Images that a text file names: one path per line, or a path, a tab and a label."""

import csv
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path

from cplearn.data.datasets import Folder
from cplearn.data.images import MOST_BYTES, open_regular
from cplearn.data.labels import Names, check_unique, number_labels
from cplearn.data.scan import EXTENSIONS, Progress
from cplearn.errors import UserError
from cplearn.text import few, printable

SUFFIXES = (".txt", ".tsv", ".lst", ".csv")
PATH_COLUMNS = ("path", "file", "filename", "file_name", "filepath", "image", "image_path", "img_path")  # of a header
LABEL_COLUMNS = ("label", "class", "class_name", "target", "category")

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
        self.names = Names([names[i] for i in keep])
        _check_files(self.root, self.names, path)


def read_list(path: Path) -> tuple[list[str], list[str] | None]:
    """Return the paths of a list and their labels, None if it has none.

    What follows the last tab of a line is its label. Without tabs, a number after blanks is, if every line ends in an
    image's suffix, blanks and a number. A .csv, and a .tsv with a header, has one of `PATH_COLUMNS` and perhaps one of
    `LABEL_COLUMNS`. Raises `UserError` for a file that is no such list.
    """
    where = f"the list {printable(path)}"
    try:
        with open_regular(path) as file:
            text = file.read(MOST_BYTES).decode("utf-8", "surrogateescape").removeprefix("\ufeff")
    except OSError as error:
        raise UserError(f"{where} cannot be read ({error.strerror}): check path and rights") from None
    if "\0" in text:
        raise UserError(f"{where} holds NUL bytes: save it as plain text, in UTF-8")
    header = text.partition("\n")[0].lower().split("\t")
    if path.suffix.lower() == ".csv" or (path.suffix.lower() == ".tsv" and set(header) & set(PATH_COLUMNS)):
        return _read_table(text, "\t" if path.suffix.lower() == ".tsv" else ",", where)
    numbered = enumerate(text.split("\n"), 1)
    lines = {number: line.removesuffix("\r") for number, line in numbered if line.strip()}
    if not lines:
        raise UserError(f"{where} is empty: write one path per line, or path, tab, label")
    if not any("\t" in line for line in lines.values()):
        matches = [_NUMBERED.fullmatch(line) for line in lines.values()]
        return ([m[1] for m in matches], [m[2] for m in matches]) if all(matches) else (list(lines.values()), None)
    parts = {number: line.rpartition("\t") for number, line in lines.items()}
    wrong = [str(number) for number, (name, _, label) in parts.items() if not name or not label.strip()]
    if wrong:
        raise UserError(
            f"{where} has labels, but {len(wrong)} lines have none (line {few(wrong)}): every line is path, tab, "
            "label, or none has a tab"
        )
    return [name for name, _, _ in parts.values()], [label.strip() for _, _, label in parts.values()]


def names_images(path: Path) -> bool:
    """Return whether a file found by its name is a list. A .csv may be anything: its first row has to name a file."""
    if path.suffix.lower() != ".csv":
        return True
    try:
        with open_regular(path) as file:  # of a million rows, two
            head = b"".join(file.readline(2**16) for _ in range(2)).decode("utf-8", "surrogateescape")
        return os.path.isfile(path.parent / _read_table(head.removeprefix("\ufeff"), ",", str(path))[0][0])
    except (OSError, ValueError):  # a `UserError` is one, as is a NUL byte in a path
        return False


def _read_table(text: str, delimiter: str, where: str) -> tuple[list[str], list[str] | None]:
    """Return paths and labels (None without such a column) of a table with a header. Raises `UserError`."""
    try:
        header, *rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    except (csv.Error, ValueError) as error:
        raise UserError(f"{where} is no table that can be read ({error}): save it as CSV, in UTF-8") from None
    header = [name.strip().lower() for name in header]
    of = [next((header.index(x) for x in names if x in header), None) for names in (PATH_COLUMNS, LABEL_COLUMNS)]
    rows = {number: row for number, row in enumerate(rows, 2) if row}
    if of[0] is None or not rows:
        found = f"has the columns {', '.join(map(printable, header[:8]))}" if rows else "has no rows"
        raise UserError(f"{where} {found}: a header names path and label, as in path,label")
    short = [str(number) for number, row in rows.items() if len(row) != len(header) or not row[of[0]].strip()]
    if short:
        raise UserError(f"{where}: {len(short)} rows are not as the header says ({few(short)}): mend them")
    names, labels = ([row[k] for row in rows.values()] if k is not None else None for k in of)
    return names, labels and [label.strip() for label in labels]


def _check_files(root: Path, names: Sequence[str], path: Path) -> None:
    """Raise `UserError` for what is not there, and for pipes and devices."""
    wrong, progress = [], Progress()
    for k, name in enumerate(names, 1):
        if not os.path.isfile(root / name):
            wrong.append(name)
        progress.tell(lambda k=k: f"Still looking for the files of {printable(path)}, {k:,} of {len(names):,}")
    if wrong:
        raise UserError(
            f"the list {printable(path)}: {len(wrong):,} of {len(names):,} lines name no file: {few(wrong)}; paths are "
            "relative to the list's folder, and a tab comes before a label"
        )
