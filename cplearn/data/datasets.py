"""Where images come from: folders, CIFAR, SVHN, and the digits that ship with scikit-learn.

A data set here is an `ImageDataset`: `len`, `ds[i] -> (PIL image in RGB, label)`, `classes` (a list of names, or None
when there are no labels; the label is then -1), `names` (one string an image) and `where` (for the start-up line).
"""

import errno
import hashlib
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from cplearn.errors import LocalError, UserError
from cplearn.host import ROOT

DATASETS = ("folder", "cifar10", "cifar100", "svhn", "digits")


EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"}


# What a file may be, whatever its name says. Pillow would also hand PostScript to an interpreter.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "PPM", "TIFF", "GIF")


MAX_PIXELS = 89_478_485  # Pillow's own limit for warning of a decompression bomb: 256 MiB in RGB


IMAGENET100_SHA256 = "5ee5db69d488bb799a286d8e181801c3d02798776c1ce9203e5450f64e086e07"

# What differs by data set: its own image size, and which augmentation recipe suits it.
NATIVE_SIZE = {"folder": 224, "cifar10": 32, "cifar100": 32, "svhn": 32, "digits": 32}


RECIPE = {"folder": "dino", "cifar10": "cifar", "cifar100": "cifar", "svhn": "svhn", "digits": "digits"}


class ImageDataset(Dataset):
    """What all data sets have. Images are small and in memory, unless a data set says otherwise."""

    classes: list[str] | None
    where: str

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

    def stamps(self) -> list:
        """Return what tells the images from others: names, and sizes and times of their files."""
        return [str(name) for name in self.names]


def build_dataset(name: str, data_path: str | None, split: str, class_list: str | None = None) -> Dataset:
    """Build a data set. Raises `UserError` for an unknown name, or a folder that is missing, empty or incomplete."""
    if name not in DATASETS:
        raise UserError(f"--dataset {name} is unknown: {', '.join(DATASETS)}")
    if class_list and name != "folder":
        raise UserError(f"--class_list {class_list} only goes with --dataset folder, not with {name}")
    if name == "digits":
        return Digits(split)
    if data_path is None:
        raise UserError(f"--dataset {name} needs --data_path: the folder it lies in")
    if not Path(data_path).is_dir():
        raise UserError(f"--data_path {data_path} is not a folder: check the path")
    if name == "folder":
        return Folder(find_split(Path(data_path), split), read_class_list(class_list) if class_list else None)
    return _torchvision_dataset(name, data_path, split)


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


class Folder(ImageDataset):
    """Images below a folder. If all of them lie in sub-folders, the first level of these names the classes.

    With a class list, only its folders count, in its order.
    """

    def __init__(self, root: Path, class_list: list[str] | None = None):
        if class_list is not None:
            absent = [name for name in class_list if not (root / name).is_dir()]
            if absent:
                shown = ", ".join(absent[:5]) + (f" and {len(absent) - 5} more" if len(absent) > 5 else "")
                raise UserError(f"{root} lacks {len(absent)} of the {len(class_list)} listed classes: {shown}")
        self.root = root
        names = self._scan(root, class_list)
        if not names:
            raise UserError(f"{root} holds no images ({', '.join(sorted(EXTENSIONS))}): check --data_path")
        in_folders = all("/" in name for name in names)
        found = sorted({name.split("/")[0] for name in names}) if in_folders else []
        self.classes = class_list if class_list else (found if len(found) > 1 else None)
        position = {name: i for i, name in enumerate(self.classes or [])}
        # NumPy arrays, not lists: a list of a million strings is copied into every worker as it is touched.
        self.names = np.array(names)
        self.labels = np.array([position.get(name.split("/")[0], -1) for name in names])
        if class_list and len(set(self.labels.tolist())) < len(class_list):
            empty = [c for i, c in enumerate(class_list) if i not in set(self.labels.tolist())]
            raise UserError(f"{root} has no images for {len(empty)} of the listed classes: {', '.join(empty[:5])}")
        self.where = str(root)

    @staticmethod
    def _scan(root: Path, class_list: list[str] | None) -> list[str]:
        tops = [root / name for name in class_list] if class_list else [root]
        paths = [
            Path(folder) / file
            for top in tops
            for folder, _, files in os.walk(top, followlinks=True)
            if not any(part.startswith(".") for part in Path(folder).relative_to(root).parts)  # .ipynb_checkpoints
            for file in files
            if Path(file).suffix.lower() in EXTENSIONS and not file.startswith(".")  # ._x.jpg
        ]
        return sorted(path.relative_to(root).as_posix() for path in paths)

    def __len__(self) -> int:
        return len(self.names)

    def read(self, i: int, reduction: Callable[[int, int], int] | None = None) -> tuple[Image.Image, int]:
        return read_image(self.root / str(self.names[i]), reduction), int(self.labels[i])

    def size_of(self, i: int) -> tuple[int, int]:
        path = self.root / str(self.names[i])
        try:
            with Image.open(path, formats=FORMATS) as image:
                return image.size
        except Exception as error:
            raise LocalError(f"cannot read the image {path}: {error}") from None

    def stamps(self) -> list:
        status = [os.stat(self.root / str(name)) for name in self.names]
        return [(str(name), s.st_size, s.st_mtime_ns) for name, s in zip(self.names, status, strict=True)]


def read_image(path: Path, reduction: Callable[[int, int], int] | None = None) -> Image.Image:
    """Read the first frame of an image file as 8-bit RGB, not turned by its EXIF orientation (as torchvision and DINO).

    With `reduction`, smaller by the factor (1, 2, 4 or 8) that it gives for width and height: a JPEG is then decoded at
    that size, which is faster, other files are averaged. Raises `LocalError` with the reason for whatever cannot be
    decoded whole, or is larger than `MAX_PIXELS`.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:  # known from the header, nothing is decoded yet
                raise ValueError(f"{image.width} x {image.height} pixels are more than the {MAX_PIXELS:,} allowed")
            factor = reduction(*image.size) if reduction else 1
            if factor > 1 and image.format == "JPEG":
                image.draft(None, (image.width // factor, image.height // factor))
                factor = 1
            rgb = to_rgb(image)
            return rgb.reduce(factor) if factor > 1 else rgb
    except Exception as error:  # a damaged file can make Pillow raise anything
        if isinstance(error, MemoryError) or getattr(error, "errno", None) in (
            errno.EMFILE,
            errno.ENFILE,
            errno.ENOMEM,
        ):
            raise  # not the file's fault
        reason = (str(error).splitlines() or [type(error).__name__])[0].replace(f" {str(path)!r}", "")
        reason = reason.strip(" :") or type(error).__name__
        raise LocalError(f"cannot read the image {path}: {reason}; repair it or remove it") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert to 8-bit RGB. 16-bit gray is scaled (Pillow itself clips it to white); transparency is dropped."""
    if image.mode.startswith("I"):  # Pillow reads 16-bit files as I;16, older versions as I
        gray = np.asarray(image).astype(np.float64) / 257
        image = Image.fromarray(gray.round().clip(0, 255).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point pixels have no known range; convert them to 8 or 16 bits")
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode == "RGB":  # `convert` would copy it
        image.load()
        return image
    return image.convert("RGB")


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


def _torchvision_dataset(name: str, data_path: str, split: str) -> Dataset:
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


def find_split(root: Path, split: str) -> Path:
    """Return `root/train`, `root/val` (or `root/test`) where they exist; `root` itself for pre-training otherwise.

    Raises `UserError` if an evaluation asks for a split that is not there.
    """
    for name in ("train",) if split == "train" else ("val", "test"):
        if (root / name).is_dir():
            return root / name
    if split == "train":
        return root
    raise UserError(f"--data_path {root} has no val or test folder: an evaluation needs train/ and val/ below it")


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
        names = [line.strip() for line in content.decode().splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise UserError(f"--class_list {path} is not UTF-8 text") from None
    if not names:
        raise UserError(f"--class_list {path} is empty")
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise UserError(f"--class_list {path} names {', '.join(twice[:5])} more than once")
    return names


def fingerprint(dataset: Dataset) -> str:
    """Return the number of images and a hash of their names: what a run and its continuation must share."""
    names = "\n".join(str(name) for name in dataset.names)
    return f"{len(dataset)} images {hashlib.sha256(names.encode()).hexdigest()[:12]}"


def summary(dataset: Dataset) -> str:
    classes = f"{len(dataset.classes)} classes" if dataset.classes else "no classes"
    return f"{len(dataset):,} images, {classes}, {dataset.where}"
