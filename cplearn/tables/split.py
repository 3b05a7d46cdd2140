"""The tuning split: a fifth of the training images of every class, held out to choose settings by (--tune).

Both parts are lists (docs/data.md) in tuning/data: trials train on train.txt and are scored on val.txt. The images
that the table is evaluated on are in neither.
"""

import argparse
from pathlib import Path

import numpy as np

from cplearn.data import sources
from cplearn.data.datasets import Folder, read_class_list
from cplearn.errors import UserError
from cplearn.files import read_text, write_text
from cplearn.random_streams import FOR_TUNING, random_stream
from cplearn.tables.trial_rule import HELD_OUT
from cplearn.text import few, printable

SEED = 0  # of the split, whatever the seeds of the cells


def held_out(labels: np.ndarray) -> np.ndarray:
    """Choose the images to hold out: a fifth of every class, at least one, by a fixed seed.

    Shape: labels int (n,) -> bool (n,).
    """
    chosen = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        order = random_stream(FOR_TUNING, SEED, int(label)).permutation(len(members))
        chosen[members[order[: max(1, round(len(members) / HELD_OUT))]]] = True
    return chosen


def open_training_images(args: argparse.Namespace) -> Folder:
    """Return the training images of a cell, from its parsed flags. Raises `UserError` if a list cannot name them."""
    if args.dataset != "folder" or args.data_path is None:
        raise UserError(
            f"--tune holds out a part of the training images, by a list of files: --dataset {args.dataset} has none; "
            "save it as images in class folders"
        )
    place = sources.find_split(Path(args.data_path), "train")
    if place.kind not in ("folder", "list"):
        raise UserError(
            f"--tune holds out a part of the training images, by a list of files: {printable(place.root)} has them in "
            f"{place.kind} files; unpack them into class folders"
        )
    images = place.open(read_class_list(args.class_list) if args.class_list else None)
    if not images.classes or min(images.labels) < 0:
        raise UserError(f"--tune scores trials by labels, and {printable(images.where)} has none: use class folders")
    counts = np.bincount(images.labels, minlength=len(images.classes))
    if counts.min() < 2:
        small = [name for name, n in zip(images.classes, counts, strict=True) if n < 2]
        raise UserError(
            f"--tune holds out a fifth of every class, and {len(small)} classes of {printable(images.where)} have "
            f"fewer than two images ({few(small)}): add some, or leave these classes out"
        )
    broken = [name for name in map(str, images.names) if "\n" in name or name.endswith("\r")]
    broken += [name for name in images.classes if name != name.strip() or "\t" in name or name == "-1"]
    if broken:
        raise UserError(
            f"--tune writes lists of files and classes, which cannot hold {len(broken)} names of "
            f"{printable(images.where)} ({few(broken)}): rename them, without line breaks, tabs and outer blanks"
        )
    return images


def write_split(images: Folder, folder: Path) -> dict[str, int]:
    """Write train.txt and val.txt, and return how many images each has.

    Lists that are there already must be the same: trials may have been trained on them. Raises `UserError` otherwise.
    """
    labels, chosen = np.asarray(images.labels), held_out(np.asarray(images.labels))
    parts = {"train": ~chosen, "val": chosen}
    texts = {}
    for name, part in parts.items():
        lines = [f"{images.root / str(images.names[i])}\t{images.classes[labels[i]]}\n" for i in np.flatnonzero(part)]
        texts[folder / f"{name}.txt"] = "".join(lines)
    for path, text in texts.items():
        if path.exists() and read_text(path) != text:
            raise UserError(
                f"{printable(path)} does not list the images of {printable(images.where)} as they are now: "
                "choose another --output_dir"
            )
    folder.mkdir(parents=True, exist_ok=True)
    for path, text in texts.items():
        if not path.exists():
            write_text(path, text)
    return {name: int(part.sum()) for name, part in parts.items()}
