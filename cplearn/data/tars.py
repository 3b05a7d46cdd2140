"""Images in tar shards (WebDataset's layout): one scan finds where each lies, then they are read in any order."""

import json
import os
import stat
import tarfile
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from cplearn.data import datasets
from cplearn.data.datasets import EXTENSIONS, say
from cplearn.data.encoded import EncodedImages, Names, check_size, check_unique, number_labels
from cplearn.errors import UserError
from cplearn.text import few, printable

# Compressed ones are known, to be refused: an image in them could only be reached through all before it.
SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")

LABELS = (".cls", ".json", ".txt")  # where a label comes from, the first that has one
JSON_KEYS = ("label", "cls", "class")
LONGEST_LABEL = 200  # characters; a .txt that is longer is a caption
MOST_JSON = 2**20  # bytes


class Entry(NamedTuple):
    """An image of a shard."""

    name: str
    offset: int
    size: int
    label: str | None
    kind: str  # of the file that the label is from: one of LABELS, or "" for none


class Tars(EncodedImages):
    """The images of tar shards: shards by name, images in the order in which they lie there."""

    def __init__(self, root: Path, shards: list[str], class_list: list[str] | None = None):
        """Raises `UserError` for shards that are damaged or compressed, and for images that share a name."""
        self.root, self.shards, self.where = root, sorted(shards), str(root)
        found = _Index(root, self.shards)
        if not found.names:
            formats = ", ".join(sorted(EXTENSIONS))
            raise UserError(f"{printable(root)}: its {len(shards)} tar shards hold no images ({formats})")
        check_unique(found.names, self.where, "pack them again under names of their own")
        self.classes, self.labels, keep = number_labels(found.useful_labels(), self.where, class_list)
        self.names = Names([found.names[i] for i in keep])
        self.place = np.stack([found.shard, found.offset, found.size], axis=1)[keep]  # int64 (n, 3)
        self._stamps = found.stamps

    def content(self, i: int) -> bytes:
        """Read it with a file of its own: processes then share no position, and few files are open."""
        shard, offset, size = self.place[i].tolist()
        check_size(size)
        with open_regular(self.root / self.shards[shard]) as file:
            return os.pread(file.fileno(), size, offset)

    def stamps(self) -> list:
        return [*self._stamps, len(self)]


class _Index:
    """What a scan of all shards finds: a row per image, size and time per shard."""

    def __init__(self, root: Path, shards: list[str]):
        self.names: list[str] = []  # with the shard's before it
        self.labels: list[str | None] = []
        self.kinds: set[str] = set()
        self.shard, self.offset, self.size = array("q"), array("q"), array("q")
        self.in_folders, self.stamps, self.said = True, [], time.monotonic()
        damaged = []
        for k, one in enumerate(shards):
            try:
                with open_regular(root / one) as file:
                    status = os.fstat(file.fileno())
                    self.stamps.append((one, status.st_size, status.st_mtime_ns))
                    self._add(k, one, scan_shard(file, lambda k=k: self._tell(root, k)))
            except (OSError, ValueError, tarfile.TarError) as error:
                damaged.append(f"{one} ({getattr(error, 'strerror', None) or error})")
        if damaged:
            raise UserError(
                f"{printable(root)} has {len(damaged)} tar shards that cannot be used: {few(damaged)}; "
                "get them again, or move them away"
            )

    def _tell(self, root: Path, shard: int) -> None:
        if time.monotonic() - self.said >= datasets.SAY_AFTER:
            self.said = time.monotonic()
            say(
                f"Still scanning {printable(root)}, in shard {shard + 1}, {len(self.names):,} images in those before it"
            )

    def _add(self, k: int, shard: str, entries: Iterator[Entry]) -> None:
        known: dict[str | None, str | None] = {}  # one string for all images of a class
        for entry in entries:
            self.names.append(f"{shard}/{entry.name}")
            self.labels.append(known.setdefault(entry.label, entry.label))
            self.kinds.add(entry.kind)
            self.in_folders &= "/" in entry.name
            for column, value in ((self.shard, k), (self.offset, entry.offset), (self.size, entry.size)):
                column.append(value)

    def useful_labels(self) -> list[str | None]:
        """Return the labels; none if they are captions; the shards' folders where no file has a label."""
        if self.kinds == {""}:
            return [name.split("/")[1] for name in self.names] if self.in_folders else self.labels
        if ".txt" in self.kinds and len(set(self.labels)) > len(self.labels) / 2:
            say("The .txt files beside the images count as captions, not as classes: more than half of them differ")
            return [None] * len(self.labels)
        return self.labels


def open_regular(path: Path) -> BinaryIO:
    """Open a file to read. Raises OSError for what is none: a pipe would be waited for without end."""
    file = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb", buffering=0)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(0, "is no regular file", str(path))
    return file


def scan_shard(file: BinaryIO, tell: Callable[[], None] = lambda: None) -> Iterator[Entry]:
    """Yield the images of a tar file in their order; what is hidden, a link, a folder or sparse is left out.

    `tell` is called for every file in it, for a line on progress.
    Raises ValueError, TarError or OSError with the reason for a file that is damaged, cut or compressed.
    """
    if os.pread(file.fileno(), 8, 0).startswith(COMPRESSED):
        raise ValueError("compressed: decompress it, images hardly get smaller by it")
    images, labels = [], {}
    for member in _members(file):
        tell()
        name = os.path.normpath(member.name).lstrip("/")
        if any(part.startswith(".") and part != ".." for part in name.split("/")):
            continue
        stem, suffix = os.path.splitext(name)
        suffix = suffix.lower()
        if suffix in EXTENSIONS:
            images.append((name, member.offset_data, member.size))
        elif suffix in LABELS and (text := _label(file, member, suffix)) is not None:
            labels[stem, suffix] = text
    for name, offset, size in images:
        folder, base = os.path.split(name)
        # key.left.jpg may have its label in key.left.cls or, as WebDataset reads names, in key.cls.
        stems = (os.path.splitext(name)[0], os.path.join(folder, base.partition(".")[0]))
        kind = next((kind for kind in LABELS if any((stem, kind) in labels for stem in stems)), "")
        label = next((labels[stem, kind] for stem in stems if (stem, kind) in labels), None)
        yield Entry(name, offset, size, label, kind)


def _members(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Yield the regular files of a tar file. `tarfile` itself takes a damaged header for the end."""
    length, last = os.fstat(file.fileno()).st_size, -1
    with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # it would keep all
            if tar.offset <= last or member.size < 0:
                raise ValueError(f"damaged at byte {member.offset:,}")
            last = tar.offset
            if member.isreg() and not member.issparse():
                if member.offset_data + member.size > length:
                    raise ValueError(f"cut: {printable(member.name)} goes on behind its end")
                yield member
        end = os.pread(file.fileno(), 512, tar.offset)
        if end.strip(b"\0"):
            raise ValueError(f"damaged at byte {tar.offset:,}")
        if len(end) < 512:
            raise ValueError("cut: it has no end mark")


def _label(file: BinaryIO, member: tarfile.TarInfo, suffix: str) -> str | None:
    """Return the label that a small file next to an image holds, None if it is none."""
    if member.size > (MOST_JSON if suffix == ".json" else 4 * LONGEST_LABEL):
        return None
    text = os.pread(file.fileno(), member.size, member.offset_data).decode("utf-8", "replace").strip()
    if suffix == ".json":
        try:
            content = json.loads(text)
        except (ValueError, RecursionError):
            return None
        values = [content.get(key) for key in JSON_KEYS] if isinstance(content, dict) else []
        text = next((str(x) for x in values if isinstance(x, (int, str)) and not isinstance(x, bool)), "")
    return text if text and len(text) <= LONGEST_LABEL and text.isprintable() else None
