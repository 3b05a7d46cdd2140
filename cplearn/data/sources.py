"""Images as people have them: a folder, a list, tar shards, parquet, a data set by name, one image."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from cplearn.data import lists, tars
from cplearn.data.datasets import DATASETS, Digits, Folder, ImageDataset, read_class_list, torchvision_dataset
from cplearn.data.scan import EXTENSIONS, has_image_suffix, say
from cplearn.errors import UserError
from cplearn.random_streams import FOR_ORDER, random_stream
from cplearn.text import few, printable

PREFIX = "hf:"  # of --dataset, before the folder of a copy that `datasets` saved

# What a split may be called, the usual name first. Hugging Face's test splits often hide their labels.
SPLITS = {"train": ("train",), "val": ("val", "validation", "test")}

SUFFIXES = {"tar": tars.SUFFIXES, "parquet": (".parquet",), "list": lists.SUFFIXES}


class OneImage(Folder):
    """One image file."""

    def __init__(self, path: Path):
        self.root, self.names, self.labels, self.classes = path.parent, [path.name], [-1], None
        self.where = str(path)


class Sample(ImageDataset):
    """Some images of a data set, drawn at random by a seed, in its order."""

    def __init__(self, dataset: ImageDataset, count: int, seed: int):
        drawn = random_stream(FOR_ORDER, seed).permutation(len(dataset))[:count]
        self.dataset, self.rows = dataset, np.sort(drawn)
        self.names = [dataset.names[i] for i in self.rows]
        self.labels = np.asarray(dataset.labels)[self.rows]
        self.classes, self.where = dataset.classes, dataset.where

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, i: int, reduction: Callable[[int, int], int] | None = None) -> tuple[Image.Image, int]:
        return self.dataset.read(int(self.rows[i]), reduction)

    def stamps(self) -> list[tuple[str, int, int]]:
        return self.dataset.stamps()

    def file_of(self) -> np.ndarray:
        return self.dataset.file_of()[self.rows]

    def encoded(self, i: int) -> bytes:
        return self.dataset.encoded(int(self.rows[i]))


class Place(NamedTuple):
    """Where the images of a split lie."""

    kind: str  # folder, list, tar or parquet
    root: Path  # a folder
    files: list[str]  # names in it, of a list, of shards or of parquet files

    def open(self, class_list: list[str] | None = None, image_column: str | None = None) -> ImageDataset:
        """Read names and labels; `image_column` names the images where a row or a sample has several.

        Raises `UserError` for what is damaged or holds no images.
        """
        if self.kind == "folder":
            return Folder(self.root, class_list)
        if self.kind == "list":
            return lists.Listed(self.root / self.files[0], class_list)
        if self.kind == "tar":
            return tars.Tars(self.root, self.files, class_list, image_column)
        from cplearn.data.huggingface import Parquet

        return Parquet(self.root, self.files, class_list, image_column)


def open_images(path: str, flag: str = "--images", image_column: str | None = None) -> ImageDataset:
    """Return the images at a path: a folder with its sub-folders (which name classes if all images lie in some), or of
    tar shards or parquet files; one of these files, a list of images, or one image file.

    Raises `UserError`, with the flag's name, for what is none of them.
    """
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        return (_shards(Path(path)) or Place("folder", Path(path), [])).open(None, image_column)
    if not os.path.exists(path):
        raise UserError(f"{flag} {printable(path)} does not exist: give a folder of images, or one image")
    kind = kind_of(path)
    if kind and os.path.isfile(path):
        return Place(kind, Path(path).parent, [os.path.basename(path)]).open(None, image_column)
    if not os.path.isfile(path) or not has_image_suffix(path):
        raise UserError(
            f"{flag} {printable(path)} is no image: give one of {', '.join(sorted(EXTENSIONS))}, a folder, a list "
            "(.txt), tar or parquet"
        )
    return OneImage(Path(path))


def build_dataset(
    name: str, data_path: str | None, split: str, class_list: str | None = None, image_column: str | None = None
) -> ImageDataset:
    """Build a data set; `split` is train, val, or all of a set without splits, `image_column` as in `Place.open`.

    Raises `UserError` for an unknown name, and for images that are missing, incomplete or cannot be read.
    """
    check_name(name)
    local_copy = name.startswith(PREFIX)
    if class_list and name != "folder" and not local_copy:
        raise UserError(f"--class_list {class_list} only goes with --dataset folder, not with {name}")
    if name == "digits":
        return Digits(split)
    chosen = read_class_list(class_list) if class_list else None
    if local_copy:
        from cplearn.data.huggingface import SavedCopy

        return SavedCopy(name.removeprefix(PREFIX), SPLITS[split], chosen, image_column)
    if data_path is None:
        raise UserError(f"--dataset {name} needs --data_path: the folder it lies in")
    if name == "folder" and kind_of(data_path) and os.path.exists(data_path) and not os.path.isdir(data_path):
        return find_split(Path(data_path), split).open(chosen, image_column)
    try:
        os.stat(os.path.join(data_path, "."))
        os.listdir(data_path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", error)
        line = f"--data_path {printable(data_path)} is not a folder that can be read ({reason}): check path and rights"
        also = ", or name a list (.txt), tar or parquet file" if os.path.isfile(data_path) else ""
        raise UserError(line + also) from None
    if name == "folder":
        return find_split(Path(data_path), split).open(chosen, image_column)
    return torchvision_dataset(name, data_path, split)


def check_name(name: str) -> None:
    """Raise `UserError` for a --dataset that there is not."""
    if name not in DATASETS and not (name.startswith(PREFIX) and name != PREFIX):
        raise UserError(f"--dataset {name} is unknown: {', '.join(DATASETS)}, or {PREFIX}PATH")


def absolute_name(name: str) -> str:
    """Return the name of a data set so that it can be found from any folder."""
    if not name.startswith(PREFIX) or name == PREFIX:
        return name
    return PREFIX + os.path.abspath(os.path.expanduser(name.removeprefix(PREFIX)))


# --- what lies at a path -----------------------------------------------------------------------------------


def kind_of(path: str) -> str | None:
    """Return list, tar or parquet by the suffix of a file's name; None for any other."""
    return next((kind for kind, suffixes in SUFFIXES.items() if path.lower().endswith(suffixes)), None)


def find_split(root: Path, split: str) -> Place:
    """Return where the images of a split lie; those of "all" at `root` itself.

    In this order: a folder `train`; a list `train.txt`; tar or parquet files with the word `train` in their names, also
    in a folder `data`; for val accordingly, with `val`, `validation` or `test`, and what lies beside a `root` that is
    called `train`. For pre-training otherwise all of `root`, without the files named for another split. Raises
    `UserError` if an evaluation asks for what is not there.
    """
    if not root.is_dir():
        if split in ("train", "all"):
            return Place(kind_of(str(root)), root.parent, [root.name])
        raise UserError(
            f"--data_path {printable(root)} is one file, for pre-training only: an evaluation needs a folder with both "
            "splits, such as train.txt and val.txt"
        )
    if split == "all":
        return _shards(root) or Place("folder", root, [])
    if place := _named(root, split):
        return place
    if split == "train":
        return _shards(root, "") or Place("folder", root, [])
    raise UserError(
        f"--data_path {printable(root)} has no val or test folder: an evaluation needs train/ and val/ below it (or "
        "train.txt and val.txt, or tar or parquet files with train and val in their names)"
    )


def _named(root: Path, split: str) -> Place | None:
    """Return what bears the name of a split in a folder, for val also beside one called train; None if nothing does."""
    for name in SPLITS[split]:
        if os.path.isdir(root / name):
            return _shards(root / name) or Place("folder", root / name, [])
    for name in SPLITS[split]:
        for suffix in lists.SUFFIXES:
            if os.path.isfile(root / f"{name}{suffix}") and lists.names_images(root / f"{name}{suffix}"):
                return Place("list", root, [f"{name}{suffix}"])
        for folder in (root, root / "data"):
            if place := _shards(folder, name):
                return place
    return _named(root.parent, split) if (split, root.name) == ("val", "train") else None


def has_split(data_path: str, split: str) -> bool:
    """Return whether a --data_path has images of a split, by the names that lie there."""
    try:
        find_split(Path(data_path), split)
    except UserError:
        return False
    return True


def is_undivided(data_path: str) -> bool:
    """Return whether the images of a --data_path are one set: a file, or a folder in which no split has a name."""
    root = Path(data_path)
    return root.is_file() or (root.is_dir() and not any(_named(root, split) for split in SPLITS))


def _shards(folder: Path, split: str | None = None) -> Place | None:
    """Return the tar or parquet files of a folder: all, those with the name of a split, or ("") those without any.

    None if there are none, or if images lie beside them or in folders beside them, whose archives they may be. Raises
    `UserError` for files of both kinds, and where all belong to other splits.
    """
    files, folders = _visible(folder)
    shards = {name: kind_of(name) for name in files if kind_of(name) in ("tar", "parquet")}
    if not shards or _any_image(files) or any(_any_image(_visible(folder / name)[0]) for name in folders):
        return None
    if split:
        shards = {name: kind for name, kind in shards.items() if split in _words(name)}
    elif split == "":
        others = {word for names in SPLITS.values() for word in names}
        own = {name: kind for name, kind in shards.items() if not others & _words(name)}
        if shards and not own:
            raise UserError(
                f"--data_path {printable(folder)} has no train split, but {few(sorted(shards))}: name one file to "
                "train on it"
            )
        shards = own
    tars_of = {os.path.splitext(name)[0] for name, kind in shards.items() if kind == "tar"}
    if tars_of >= {os.path.splitext(name)[0] for name, kind in shards.items() if kind == "parquet"}:
        shards = {name: kind for name, kind in shards.items() if kind == "tar" or not tars_of}  # img2dataset's layout
    if len(set(shards.values())) > 1:
        raise UserError(f"{printable(folder)} holds tar and parquet files: move one kind away")
    _tell_missing(folder, list(shards))
    return Place(next(iter(shards.values())), folder, sorted(shards)) if shards else None


def _tell_missing(folder: Path, shards: list[str]) -> None:
    """Say how many files are missing of those that are counted in their names, as train-00000-of-00004.parquet."""
    counted = [match for match in map(re.compile(r"(.*)-(\d+)-of-(\d+)(\..*)").fullmatch, shards) if match]
    for kind in {(m[1], m[3], m[4]) for m in counted}:
        there = len({m[2] for m in counted if (m[1], m[3], m[4]) == kind})
        if there < int(kind[1]):
            name = printable(f"{kind[0]}-*-of-{kind[1]}{kind[2]}")
            say(f"WARNING: {printable(folder)} has {there} of the {int(kind[1])} files {name}")


def _visible(folder: Path) -> tuple[list[str], list[str]]:
    """Return the names of files and folders that lie in a folder; none if it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            is_folder = {entry.name: entry.is_dir() for entry in entries if not entry.name.startswith(".")}
    except OSError:
        return [], []
    return [name for name in is_folder if not is_folder[name]], [name for name in is_folder if is_folder[name]]


def _any_image(names: list[str]) -> bool:
    return any(map(has_image_suffix, names))


def _words(name: str) -> set[str]:
    return {word.rstrip("0123456789") for word in re.split(r"[-_.]", name.lower())}
