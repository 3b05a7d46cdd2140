"""Images as people have them, for commands that need no labels: a folder, or one image."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from cplearn.data.datasets import EXTENSIONS, Folder, ImageDataset, printable
from cplearn.errors import UserError
from cplearn.random_streams import FOR_ORDER, random_stream


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
        self.names = np.asarray(dataset.names)[self.rows]
        self.labels = np.asarray(dataset.labels)[self.rows]
        self.classes, self.where = dataset.classes, dataset.where

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, i: int, reduction: Callable[[int, int], int] | None = None) -> tuple[Image.Image, int]:
        return self.dataset.read(int(self.rows[i]), reduction)


def open_images(path: str, flag: str = "--images") -> ImageDataset:
    """Return the images at a path: a folder with its sub-folders (which name classes if all images lie in some), or one
    image file.

    Raises `UserError`, with the flag's name, for what is neither.
    """
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        return Folder(Path(path))
    if not os.path.exists(path):
        raise UserError(f"{flag} {printable(path)} does not exist: give a folder of images, or one image")
    if not os.path.isfile(path) or os.path.splitext(path)[1].lower() not in EXTENSIONS:
        raise UserError(
            f"{flag} {printable(path)} is no image: give one of {', '.join(sorted(EXTENSIONS))}, or a folder"
        )
    return OneImage(Path(path))
