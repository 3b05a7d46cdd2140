"""What a data set is; folders of images, CIFAR, SVHN, and the digits that ship with scikit-learn.

A data set here is an `ImageDataset`: `len`, `ds[i] -> (PIL image in RGB, label)`, `classes` (a list of names, or None
when there are no labels; the label is then -1), `names` (one string an image) and `where` (for the start-up line).
"""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from cplearn.data.images import MOST_BYTES, image_size, open_regular, read_image
from cplearn.data.scan import EXTENSIONS, scan
from cplearn.errors import UserError
from cplearn.host import ROOT
from cplearn.text import few, printable

DATASETS = ("folder", "cifar10", "cifar100", "svhn", "digits")

SAMPLE = 1000  # images that stand for all

IMAGENET100_SHA256 = "5ee5db69d488bb799a286d8e181801c3d02798776c1ce9203e5450f64e086e07"

# What differs by data set: its own image size, and which augmentation recipe suits it.
NATIVE_SIZE = {"folder": 224, "cifar10": 32, "cifar100": 32, "svhn": 32, "digits": 32}
RECIPE = {"folder": "dino", "cifar10": "cifar", "cifar100": "cifar", "svhn": "svhn", "digits": "digits"}


class ImageDataset(Dataset):
    """What all data sets have. Images are small and in memory, unless a data set says otherwise."""

    classes: list[str] | None
    where: str
    left_out = ""  # a word on images there that are not read

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return self.read(i)

    def read(self, i: int, reduction: Callable[[int, int], int] | None = None) -> tuple[Image.Image, int]:
        """Return image and label; the image smaller by the factor that `reduction(width, height)` gives, if any.

        Raises `LocalError` if it cannot be read.
        """
        raise NotImplementedError

    def size_of(self, i: int) -> tuple[int, int]:
        """Return width and height, as its header has them."""
        return self.read(i)[0].size

    def allow_any_order(self, cache_folder: str) -> None:
        """Prepare, before images are read in any order, what can be read fast in its own only."""

    def stamps(self) -> list[tuple[str, int, int]]:
        """Return name, bytes and time of change (ns) of each file that the images lie in; [] for those in memory."""
        return []

    def file_of(self) -> np.ndarray:
        """Return which of these files each image lies in. Shape: int (n,)."""
        return np.zeros(len(self), int)

    def sample(self) -> np.ndarray:
        """Return some images that can be read fast, spread over all. Shape: int (at most SAMPLE,)."""
        return np.unique(np.linspace(0, len(self) - 1, min(len(self), SAMPLE)).astype(int))

    def encoded(self, i: int) -> bytes:
        """Return the content of an image as it is stored. Raises what reading it raises."""
        return self.read(i)[0].tobytes()


class Digits(ImageDataset):
    """The 1,797 handwritten digits (8 x 8 pixels) of scikit-learn; every fifth one of a class is held out."""

    def __init__(self, split: str):
        from sklearn.datasets import load_digits

        data = load_digits()
        held_out = np.zeros(len(data.target), dtype=bool)
        for digit in range(10):
            held_out[np.flatnonzero(data.target == digit)[::5]] = True
        self.keep = np.flatnonzero(held_out if split == "val" else ~held_out)
        self.images = (data.images[self.keep] * (255 / 16)).round().astype(np.uint8)
        self.labels = data.target[self.keep]
        self.classes = [str(digit) for digit in range(10)]
        self.names = [f"digit_{i}" for i in self.keep]
        self.where = f"scikit-learn's bundled digits, {split} split"

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, i: int, reduction: Callable[[int, int], int] | None = None) -> tuple[Image.Image, int]:
        image = Image.fromarray(self.images[i]).resize((32, 32), Image.Resampling.BICUBIC)
        return image.convert("RGB"), int(self.labels[i])


class ImageFiles(ImageDataset):
    """Images as files, of a disk or inside other files. A kind of them adds `open`."""

    def __len__(self) -> int:
        return len(self.labels)

    def open(self, i: int) -> BinaryIO:
        """Open the file of an image as it was stored. Raises what went wrong; `read` turns it into an `ImageError`."""
        raise NotImplementedError

    def encoded(self, i: int) -> bytes:
        with self.open(i) as file:
            return file.read(MOST_BYTES)

    def full_name(self, i: int) -> str:
        """Return what names an image in a message."""
        return f"{self.where}/{self.names[i]}"

    def read(self, i: int, reduction: Callable[[int, int], int] | None = None) -> tuple[Image.Image, int]:
        return read_image(self.full_name(i), reduction, lambda: self.open(i)), int(self.labels[i])

    def size_of(self, i: int) -> tuple[int, int]:
        return image_size(self.full_name(i), lambda: self.open(i))


class Folder(ImageFiles):
    """Images below a folder. If all of them lie in sub-folders, the first level of these names the classes.

    With a class list, only its folders count, in its order.
    """

    def __init__(self, root: Path, class_list: list[str] | None = None):
        if class_list is not None:
            check_listed(class_list, {name for name in class_list if os.path.isdir(root / name)}, root)
        self.root, self.where = root, str(root)
        names, self.left_out = scan(root, class_list or [""])
        if not names:
            raise UserError(f"{printable(root)} holds no images ({', '.join(sorted(EXTENSIONS))}): check the path")
        tops = [name.partition("/")[0] for name in names]
        folders = set(tops) if all("/" in name for name in names) else set()
        self.classes = class_list or (sorted(folders) if len(folders) > 1 else None)
        place = {name: i for i, name in enumerate(self.classes or [])}
        # NumPy arrays, not lists: a list of a million strings is copied into every worker as it is touched.
        self.names = np.array(names)
        self.labels = np.array([place.get(top, -1) for top in tops])
        if class_list and (empty := [name for name in class_list if name not in folders]):
            raise UserError(f"{printable(root)} has no images for {len(empty)} of the listed classes: {few(empty)}")

    def open(self, i: int) -> BinaryIO:
        return open_regular(self.full_name(i))

    def full_name(self, i: int) -> str:
        return str(self.root / str(self.names[i]))

    def stamps(self) -> list[tuple[str, int, int]]:
        return [(str(name), *_size_and_time(f"{self.root}/{name}")) for name in self.names]

    def file_of(self) -> np.ndarray:
        return np.arange(len(self))


def _size_and_time(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError:  # a link that leads nowhere, or just removed
        return 0, 0
    return status.st_size, status.st_mtime_ns


class _TorchvisionDataset(ImageDataset):
    def __init__(self, inner: Dataset, classes: list[str], where: str):
        self.inner, self.classes, self.where = inner, classes, where
        self.labels = np.asarray(getattr(inner, "targets", getattr(inner, "labels", None)))
        self.names = [f"{where}#{i}" for i in range(len(inner))]

    def __len__(self) -> int:
        return len(self.inner)

    def read(self, i: int, reduction: Callable[[int, int], int] | None = None) -> tuple[Image.Image, int]:
        image, label = self.inner[i]
        return image, int(label)


def torchvision_dataset(name: str, data_path: str, split: str) -> Dataset:
    """Return CIFAR or SVHN from torchvision's files. Raises `UserError` if they are not there."""
    from torchvision import datasets  # at most of a second, and only for these

    train = split == "train"
    try:
        if name == "svhn":
            inner = datasets.SVHN(data_path, split="train" if train else "test")
            classes = [str(digit) for digit in range(10)]
        else:
            kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
            inner = kind(data_path, train=train)
            classes = inner.classes
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"--data_path {data_path} does not hold {name} as torchvision stores it ({str(error).splitlines()[0]}); "
            "nothing is downloaded here: get it once with torchvision's download=True"
        ) from None
    return _TorchvisionDataset(inner, classes, f"{name} in {data_path}, {'train' if train else 'test'} split")


def check_listed(class_list: list[str], found: Collection[str], where: str | Path) -> None:
    """Raise `UserError` that names the listed classes that are not among those found."""
    absent = [name for name in class_list if name not in found]
    if absent:
        counts = f"{len(absent)} of the {len(class_list)} listed classes"
        raise UserError(f"{printable(where)} lacks {counts}: {few(absent)}")


def read_class_list(path: str) -> list[str]:
    """Read folder names, one per line. The bundled ImageNet-100 list is checked by hash."""
    file = Path(path)
    if not file.is_file() and file.name == path:  # a bare name may mean the bundled list
        file = ROOT / path
    if not file.is_file():
        raise UserError(f"--class_list {path} does not exist: imagenet100.txt is the bundled one")
    content = file.read_bytes()
    if file.name == "imagenet100.txt" and hashlib.sha256(content).hexdigest() != IMAGENET100_SHA256:
        raise UserError(f"--class_list {path} is not the ImageNet-100 list of the literature: restore the file")
    try:
        lines = [line.strip() for line in content.decode("utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise UserError(f"--class_list {path} is not UTF-8 text") from None
    if not lines:
        raise UserError(f"--class_list {path} is empty")
    names = [os.path.normpath(line) for line in lines]  # cat/ and ./cat are cat
    wrong = [line for line, name in zip(lines, names, strict=True) if "/" in name or name.startswith(".")]
    if wrong:
        raise UserError(
            f"--class_list {path} has lines that are no name of a class folder: {few(wrong)}; "
            "write the names alone, as they are below train/ and val/"
        )
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise UserError(f"--class_list {path} names {few(twice)} more than once")
    return names


def fingerprint(dataset: Dataset) -> str:
    """Return the number of images and a hash of their names: what a run and its continuation must share."""
    names = "\n".join(str(name) for name in dataset.names)
    return f"{len(dataset)} images {hashlib.sha256(names.encode(errors='surrogateescape')).hexdigest()[:12]}"


def summary(dataset: Dataset) -> str:
    classes = f"{len(dataset.classes)} classes" if dataset.classes else "no classes"
    return f"{len(dataset):,} images{dataset.left_out}, {classes}, {printable(dataset.where)}"
