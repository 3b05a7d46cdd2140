"""Names and labels of images that come with a text each: in lists, tar shards, parquet, saved copies."""

import operator
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from cplearn.data.datasets import check_listed
from cplearn.data.scan import say
from cplearn.errors import UserError
from cplearn.text import few, printable


class Names(Sequence):
    """Names as one block of bytes: a list of a million strings would be copied into every worker as it is touched."""

    def __init__(self, names: Iterable[str]):
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]
        self.ends = np.cumsum([0, *map(len, encoded)])
        self.bytes = np.frombuffer(b"".join(encoded), np.uint8)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, i: int | slice) -> str | list[str]:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        i = operator.index(i) % len(self)  # also of NumPy and torch
        return self.bytes[self.ends[i] : self.ends[i + 1]].tobytes().decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))


def check_unique(names: Sequence[str], where: str, fix: str) -> None:
    """Raise `UserError` for images that share a name: by it a run knows which could not be read."""
    if len(set(names)) < len(names):
        seen: set[str] = set()
        twice = sorted({name for name in names if name in seen or seen.add(name)})
        raise UserError(f"{printable(where)} names {len(twice)} images more than once ({few(twice)}): {fix}")


def number_labels(
    texts: Sequence[str | None], where: str, class_list: list[str] | None = None, classes: list[str] | None = None
) -> tuple[list[str] | None, np.ndarray, np.ndarray]:
    """Return classes, labels and which images to keep, from a text per image; None, "" and "-1" stand for no label.

    The classes are `class_list` (whose images alone are kept), or `classes`, or all texts in order: numbers by value if
    all are whole numbers. There are none (and all labels are -1) if images lack a label, or all have the same one.
    Shape: n texts -> list of c, int64 (k,), int64 (k,), with k = n without a class list. Raises `UserError` for listed
    classes that are not there.
    """
    texts = [None if text in ("", "-1") else text for text in texts]
    labels = set(texts)
    if class_list:
        check_listed(class_list, labels, where)
    elif None in labels:
        if labels != {None}:
            missing = sum(text is None for text in texts)
            say(f"{printable(where)}: {missing:,} of {len(texts):,} images have no label, so no label is used")
        return None, np.full(len(texts), -1), np.arange(len(texts))
    classes = class_list or classes or _in_order(labels)
    place = {name: k for k, name in enumerate(classes if len(classes) > 1 or class_list else [])}
    numbers = np.array([place.get(text, -1) for text in texts], np.int64)
    keep = np.flatnonzero(numbers >= 0) if class_list else np.arange(len(texts))
    return classes if place else None, numbers[keep], keep


def _in_order(labels: set[str]) -> list[str]:
    try:
        return sorted(labels, key=lambda text: (int(text), text))
    except ValueError:
        return sorted(labels)
