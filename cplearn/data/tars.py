"""Images in tar shards (WebDataset's layout): one scan finds where each lies, then they are read in any order."""

import json
import os
import tarfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from cplearn.data.datasets import ImageFiles
from cplearn.data.images import check_bytes, file_stamp, open_regular
from cplearn.data.labels import Names, check_unique, number_labels
from cplearn.data.scan import EXTENSIONS, Progress, has_image_suffix, left_out, say
from cplearn.errors import UserError
from cplearn.text import few, printable

# Compressed ones are known, to be refused: an image in them could only be reached through all before it.
SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")

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


class Tars(ImageFiles):
    """The images of tar shards: shards by name, images in the order in which they lie there."""

    def __init__(
        self, root: Path, shards: list[str], class_list: list[str] | None = None, image_column: str | None = None
    ):
        """`image_column` is the ending of the images to take where a sample has several, as left.jpg, or `all`.

        Raises `UserError` for shards that cannot be read, for images that share a name, and for several of a sample.
        """
        self.root, self.shards, self.where = root, sorted(shards), str(root)
        self._stamps, names, labels, kinds, damaged, others = [], [], [], set(), [], Counter()
        place, known, progress = array("q"), {}, Progress()
        for k, shard in enumerate(self.shards):
            scanning = f"Still scanning {printable(root)}, in shard {k + 1}, {len(names):,} images in those before it"
            try:
                with open_regular(root / shard) as file:
                    self._stamps.append(file_stamp(shard, file))
                    for entry in scan_shard(file, others, lambda line=scanning: progress.tell(lambda: line)):
                        names.append(f"{shard}/{entry.name}")
                        labels.append(known.setdefault(entry.label, entry.label))  # one string for all of a class
                        kinds.add(entry.kind)
                        place.extend((k, entry.offset, entry.size))
            except Exception:  # a damaged header can make tarfile raise anything
                damaged.append(shard)
        if damaged:
            raise UserError(
                f"{printable(root)} has {len(damaged)} tar shards that cannot be read: {few(damaged)}; get them again, "
                "whole and not compressed, or move them away"
            )
        if not names:
            formats = ", ".join(sorted(EXTENSIONS))
            raise UserError(f"{printable(root)}: its {len(shards)} tar shards hold no images ({formats})")
        check_unique(names, self.where, "pack them again under names of their own")
        chosen, self.left_out = _of_one_ending(names, image_column, self.where), left_out(others)
        texts = _classes_of([names[i] for i in chosen], [labels[i] for i in chosen], kinds)
        self.classes, self.labels, keep = number_labels(texts, self.where, class_list)
        keep = chosen[keep]
        self.names = Names([names[i] for i in keep])
        self.place = np.array(place, np.int64).reshape(-1, 3)[keep]  # shard, offset, size

    def open(self, i: int) -> BinaryIO:
        """Read it with a file of its own: processes then share no position, and few files are open."""
        shard, offset, size = self.place[i].tolist()
        check_bytes(size)
        with open_regular(self.root / self.shards[shard]) as file:
            return BytesIO(os.pread(file.fileno(), size, offset))

    def stamps(self) -> list[tuple[str, int, int]]:
        return self._stamps

    def file_of(self) -> np.ndarray:
        return self.place[:, 0]


def _of_one_ending(names: list[str], ending: str | None, where: str) -> np.ndarray:
    """Return which images to take: all, or those with this ending where samples (names up to the first dot) have
    several. Raises `UserError` where it has to be named."""
    keys, endings = zip(*(_key_and_ending(name) for name in names), strict=True)
    counts, samples = Counter(endings), len(set(keys))
    several = len(counts) < samples < len(names)  # or else a dot in the names means something else
    if ending == "all" or not (ending or several):
        return np.arange(len(names))
    if ending in counts:
        return np.flatnonzero(np.array(endings) == ending)
    found = f"{samples:,} samples with {few([f'{count:,} {name}' for name, count in counts.most_common()])}"
    what = f"no image of a sample is called --image_column {printable(ending)}" if ending else "a sample has several"
    raise UserError(f"{printable(where)}, {found}: {what}, so name one of these endings with --image_column, or all")


def _key_and_ending(name: str) -> tuple[str, str]:
    """Split a name as WebDataset does, at the first dot behind the folder: a/7, left.jpg."""
    folder, base = os.path.split(name)
    key, _, ending = base.partition(".")
    return f"{folder}/{key}", ending.lower()


def _classes_of(names: list[str], labels: list[str | None], kinds: set[str]) -> list[str | None]:
    """Return the labels; none if they are captions; the shards' folders where no file has a label."""
    if kinds == {""}:
        folders = [name.split("/")[1:-1] for name in names]
        return [folder[0] for folder in folders] if all(folders) else labels
    if ".txt" in kinds and len(set(labels)) > len(labels) / 2:
        say("The .txt files beside the images count as captions, not as classes: more than half of them differ")
        return [None] * len(labels)
    return labels


def scan_shard(file: BinaryIO, others: Counter[str], tell: Callable[[], None] = lambda: None) -> Iterator[Entry]:
    """Yield the images of a tar file in their order; what is hidden, a link, a folder or sparse is left out.

    `others` counts the suffixes of what is no image.
    `tell` is called for every file in it, for a line on progress.
    Raises ValueError, TarError or OSError for a file that is damaged, cut or compressed.
    """
    images, labels = [], {}
    for member in _members(file):
        tell()
        name = os.path.normpath(member.name).lstrip("/")
        if any(part.startswith(".") and part != ".." for part in name.split("/")):
            continue
        stem, suffix = os.path.splitext(name)
        if has_image_suffix(name):
            images.append((name, member.offset_data, member.size))
            continue
        others[suffix.lower()] += 1
        if suffix.lower() in LABELS and (text := _label(file, member, suffix.lower())) is not None:
            labels[stem, suffix.lower()] = text
    for name, offset, size in images:
        folder, base = os.path.split(name)
        # key.left.jpg may have its label in key.left.cls or, as WebDataset reads names, in key.cls.
        stems = (os.path.splitext(name)[0], os.path.join(folder, base.partition(".")[0]))
        keys = [(stem, kind) for kind in LABELS for stem in stems if (stem, kind) in labels]
        yield Entry(name, offset, size, *((labels[keys[0]], keys[0][1]) if keys else (None, "")))


def _members(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Yield the regular files of a tar file. Raises ValueError for damaged headers: `tarfile` takes one for the end."""
    length, last = os.fstat(file.fileno()).st_size, -1
    with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # it would keep all
            if tar.offset <= last or member.size < 0:
                raise ValueError("a header that leads back")
            last = tar.offset
            if member.isreg() and not member.issparse():
                if member.offset_data + member.size > length:
                    raise ValueError("a file behind the end")
                yield member
        position = tar.offset
        if os.pread(file.fileno(), 512, position) != bytes(512):
            raise ValueError("no end mark")
        while rest := os.pread(file.fileno(), 2**20, position):
            if rest.count(0) < len(rest):
                raise ValueError("more behind its end: another file was added to it")
            position += len(rest)


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
