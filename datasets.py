"""Where images come from: folders, CIFAR, SVHN, and the digits that ship with scikit-learn.

A data set here has `len`, `ds[i] -> (PIL image in RGB, label)`, `classes` (a list of names, or None when there
are no labels; the label is then -1), `names` (one string an image) and `where` (for the start-up line).

    python datasets.py imagenet100 --imagenet /data/imagenet --out /data/imagenet100       # the 100 classes, as links
"""

import argparse
import errno
import hashlib
import json
import os
import re
import signal
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

import distributed
import errors
import utils
from augmentations import View, crop, draw, eval_pixels, rng_for
from errors import LocalError, UserError, WorkerError
from random_streams import FOR_ORDER, FOR_REPLACEMENT, random_stream

DATASETS = ("folder", "cifar10", "cifar100", "svhn", "digits")
EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"}
# What a file may be, whatever its name says. Pillow would also hand PostScript to an interpreter.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "PPM", "TIFF", "GIF")
MAX_PIXELS = 89_478_485  # Pillow's own limit for warning of a decompression bomb: 256 MiB in RGB
# Of the complete subset (ILSVRC 2012).
IMAGENET100_IMAGES = {"train": 126_689, "val": 5_000}
IMAGENET100_SHA256 = "5ee5db69d488bb799a286d8e181801c3d02798776c1ce9203e5450f64e086e07"

# What differs by data set: its own image size, and which augmentation recipe suits it.
NATIVE_SIZE = {"folder": 224, "cifar10": 32, "cifar100": 32, "svhn": 32, "digits": 32}
RECIPE = {"folder": "dino", "cifar10": "cifar", "cifar100": "cifar", "svhn": "svhn", "digits": "digits"}


def build_dataset(name: str, data_path: str | None, split: str, class_list: str | None = None) -> Dataset:
    """Raises `UserError` for an unknown name, and for a folder that is missing, empty or lacks listed classes."""
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


class Digits(Dataset):
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

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        image = Image.fromarray(self.images[i]).resize((32, 32), Image.Resampling.BICUBIC)
        return image.convert("RGB"), int(self.labels[i])


class Folder(Dataset):
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

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return read_image(self.root / str(self.names[i])), int(self.labels[i])


def read_image(path: Path) -> Image.Image:
    """First frame of an image file as 8-bit RGB, not turned by its EXIF orientation (as torchvision and DINO).

    Raises `LocalError` with the reason for whatever cannot be decoded whole, or is larger than `MAX_PIXELS`.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:  # known from the header, nothing is decoded yet
                raise ValueError(f"{image.width} x {image.height} pixels are more than the {MAX_PIXELS:,} allowed")
            return to_rgb(image)
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
    """8-bit RGB. 16-bit grey is scaled (Pillow's own conversion clips it to white); transparency is dropped."""
    if image.mode.startswith("I"):  # Pillow reads 16-bit files as I;16, older versions as I
        grey = np.asarray(image).astype(np.float64) / 257
        image = Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point pixels have no known range; convert them to 8 or 16 bits")
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


class _TorchvisionDataset(Dataset):
    def __init__(self, inner: Dataset, classes: list[str], where: str):
        self.inner, self.classes, self.where = inner, classes, where
        self.labels = np.asarray(getattr(inner, "targets", getattr(inner, "labels", None)))
        self.names = [f"{where}#{i}" for i in range(len(inner))]

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        image, label = self.inner[i]
        return image, int(label)


def _torchvision_dataset(name: str, data_path: str, split: str) -> Dataset:
    train = split == "train"
    try:
        if name == "svhn":
            inner = torchvision.datasets.SVHN(data_path, split="train" if train else "test")
            classes = [str(digit) for digit in range(10)]
        else:
            kind = torchvision.datasets.CIFAR10 if name == "cifar10" else torchvision.datasets.CIFAR100
            inner = kind(data_path, train=train)
            classes = inner.classes
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"--data_path {data_path} does not hold {name} as torchvision stores it ({str(error).splitlines()[0]}); "
            "nothing is downloaded here: get it once with torchvision's download=True"
        ) from None
    return _TorchvisionDataset(inner, classes, f"{name} in {data_path}, {'train' if train else 'test'} split")


def find_split(root: Path, split: str) -> Path:
    """`root/train`, `root/val` (or `root/test`) where they exist; `root` itself for pre-training otherwise.

    Raises `UserError` if an evaluation asks for a split that is not there.
    """
    for name in ("train",) if split == "train" else ("val", "test"):
        if (root / name).is_dir():
            return root / name
    if split == "train":
        return root
    raise UserError(f"--data_path {root} has no val or test folder: an evaluation needs train/ and val/ below it")


def read_class_list(path: str) -> list[str]:
    """Folder names, one a line. The bundled ImageNet-100 list is checked by hash."""
    file = Path(path)
    if not file.is_file() and file.name == path:  # a bare name may mean the bundled list
        file = Path(__file__).resolve().parent / path
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
    """Number of images and a hash of their names: what a run and its continuation must share."""
    names = "\n".join(str(name) for name in dataset.names)
    return f"{len(dataset)} images {hashlib.sha256(names.encode()).hexdigest()[:12]}"


def summary(dataset: Dataset) -> str:
    classes = f"{len(dataset.classes)} classes" if dataset.classes else "no classes"
    return f"{len(dataset):,} images, {classes}, {dataset.where}"


# --- loading ---------------------------------------------------------------------------------------


class Batches:
    """Which samples each rank sees at each step: a pure function of (seed, epoch).

    The global batch at a step is one run of a seeded permutation, and rank r takes its r-th slice, so two
    processes of 32 see the images of one process of 64. The last incomplete batch is dropped. Yields lists
    of (epoch, sample): workers learn the epoch with each sample and never go stale. Begins at step `first`.
    """

    def __init__(self, size: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1):
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = self.first = 0

    def __len__(self) -> int:
        return self.size // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = random_stream(FOR_ORDER, self.seed, self.epoch).permutation(self.size)
        for step in range(self.first, len(self)):
            start = (step * self.world_size + self.rank) * self.batch_size
            yield [(self.epoch, int(i)) for i in order[start : start + self.batch_size]]


class ViewDataset(Dataset):
    """Geometry half of the views.

    Item (epoch, i) -> (list of (uint8 pixels, parameters), label, j, failures). j is i, or where its file cannot be
    read another sample, drawn from (seed, epoch, i); failures is then JSON, a list of [sample, reason], else "".
    """

    TRIES = 20

    def __init__(self, dataset: Dataset, views: list[View], seed: int, num_workers: int = 0):
        self.dataset, self.views, self.seed = dataset, views, seed
        # Which process reads which sample now (-1: none): shared memory, read when a worker died or hangs.
        self.reading = torch.full((max(1, num_workers), 2), -1).share_memory_()

    def __getitem__(self, item: tuple[int, int]) -> tuple[list[tuple[Tensor, dict]], int, int, str]:
        epoch, i = item
        image, label, j, failures = self._read(epoch, i)
        views = []
        for v, view in enumerate(self.views):
            params = draw(view, *image.size, rng_for(self.seed, epoch, i, v))
            views.append((crop(image, view, params), params))
        self._note(-1)
        return views, label, j, json.dumps(failures) if failures else ""

    def _read(self, epoch: int, i: int) -> tuple[Image.Image, int, int, list[tuple[int, str]]]:
        failures: list[tuple[int, str]] = []
        j, others = i, None
        for _ in range(self.TRIES):
            self._note(j)
            try:
                return *self.dataset[j], j, failures
            except LocalError as error:
                failures.append((j, str(error).partition("; repair it")[0]))
            others = others or random_stream(FOR_REPLACEMENT, self.seed, epoch, i)
            j = int(others.integers(len(self.dataset)))
        raise LocalError(f"{self.TRIES} images in a row cannot be read; the last: {failures[-1][1]}")

    def _note(self, sample: int) -> None:
        worker = get_worker_info()
        row = self.reading[worker.id if worker else 0]
        row[0], row[1] = os.getpid(), sample


class EvalDataset(Dataset):
    """The fixed evaluation view: uint8 pixels, label, index."""

    def __init__(self, dataset: Dataset, image_size: int):
        self.dataset, self.image_size = dataset, image_size

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> tuple[Tensor, int, int]:
        image, label = self.dataset[i]
        return eval_pixels(image, self.image_size), label, i


def train_loader(
    dataset: Dataset,
    views: list[View],
    *,
    batch_size: int,
    seed: int,
    num_workers: int,
    pin_memory: bool,
) -> DataLoader:
    """Loader of views for this rank. `loader.batch_sampler.epoch` and `.first` choose epoch and first step."""
    batches = Batches(len(dataset), batch_size, seed, distributed.rank(), distributed.world_size())
    if len(batches) == 0:
        raise UserError(
            f"a batch of {batch_size * distributed.world_size()} images ({distributed.world_size()} processes x "
            f"--batch_size_per_gpu {batch_size}) is larger than the data set of {len(dataset)}: use a smaller batch"
        )
    return DataLoader(
        ViewDataset(dataset, views, seed, num_workers),
        batch_sampler=batches,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        persistent_workers=num_workers > 0,
        generator=torch.Generator(),  # the loader's own, so that it leaves the global one (drop path) alone
    )


def read_failures(texts: list[str]) -> list[tuple[int, str]]:
    """Sample and reason of each image that could not be read for a batch, from its fourth entry."""
    return [(sample, reason) for text in texts if text for sample, reason in json.loads(text)]


def _start_worker(_: int) -> None:
    get_worker_info().dataset._note(-1)
    _leave_signals_to_parent(_)


def _leave_signals_to_parent(_: int) -> None:
    """A scheduler signals every process of a job, but the workers are still needed while the parent ends its step."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raises RuntimeError inside after that time; 0 for never. In the main thread, where the loader is read.

    torch's own timeout waits for the begin of a message only, and does not see a worker that is frozen in one.
    """
    if not seconds or threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(*_) -> None:
        raise RuntimeError(f"DataLoader timed out after {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def worker_error(error: RuntimeError, loader: DataLoader) -> WorkerError | None:
    """What to tell of a loader's worker that died or hangs, and of the file it was at; None for other errors."""
    text = str(error)
    if "DataLoader worker" not in text and "DataLoader timed out" not in text:
        return None
    source: ViewDataset = loader.dataset
    named = {int(pid) for pid in re.findall(r"\d+", text.partition("exited")[0].partition("is killed")[0])}
    rows = [(pid, sample) for pid, sample in source.reading.tolist() if pid >= 0]
    files = [source.dataset.names[j] for pid, j in rows if j >= 0 and (pid in named or "timed out" in text)]
    at = f"while reading {', '.join(map(str, files[:5]))}" if files else "between two files"
    what = " ".join(text.split()).removesuffix(".")[:200]
    return WorkerError(f"{what}, {at}: try that file alone, fewer --num_workers, or more memory (or --worker_timeout)")


def stop_workers(loader: DataLoader) -> None:
    """kill -9: they heed no other signal, may hang, and Python waits for its children before it ends."""
    iterator = getattr(loader, "_iterator", None)
    children = getattr(iterator, "_workers", [])
    if not children:
        return
    # Its own way of ending waits for locks that a killed worker may hold.
    iterator._shutdown = True
    here = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if here else None  # torch's raises at a worker's death
    for child in children:
        child.kill()
        child.join()
    if handler is not None:
        signal.signal(signal.SIGCHLD, handler)


def eval_loader(
    dataset: Dataset, image_size: int, *, batch_size: int, num_workers: int, device: torch.device
) -> DataLoader:
    """Every world_size-th image for this rank, in order; `distributed.gather_rows` puts them together again."""
    mine = range(distributed.rank(), len(dataset), distributed.world_size())
    return DataLoader(
        EvalDataset(dataset, image_size),
        batch_size=batch_size,
        sampler=mine,
        num_workers=num_workers,
        worker_init_fn=_leave_signals_to_parent,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),
    )


def default_workers(requested: int | None) -> int:
    """`--num_workers`: DINO's 10, or fewer where processes share fewer cores."""
    if requested is not None:
        return requested
    return min(10, max(1, (os.cpu_count() or 1) // distributed.local_world_size() - 1))


# --- the ImageNet-100 tree -----------------------------------------------------------------------------


def link_imagenet100(imagenet: str, out: str, *, incomplete: bool = False) -> dict[str, Dataset]:
    """A folder with train/ and val/ of the 100 classes of `imagenet100.txt`, as links to those of ImageNet.

    Raises `UserError`, before a link is made, if a class is missing or images are, unless `incomplete` is allowed.
    The same call again only checks.
    """
    classes = read_class_list("imagenet100.txt")
    found = {}
    for split, complete in IMAGENET100_IMAGES.items():
        folder = Path(imagenet, split)
        if not folder.is_dir():
            raise UserError(f"--imagenet {imagenet} has no {split} folder: it needs train/ and val/ with class folders")
        found[split] = Folder(folder, classes)
        if len(found[split]) != complete and not incomplete:
            raise UserError(
                f"{folder} has {len(found[split]):,} images of the 100 classes, the data set {complete:,}: "
                "complete it, or add --allow_incomplete"
            )
    for split, data in found.items():
        try:
            (Path(out) / split).mkdir(parents=True, exist_ok=True)
            for name in classes:
                link, target = Path(out, split, name), (data.root / name).resolve()
                if not link.is_symlink() or link.resolve() != target:
                    link.symlink_to(target, target_is_directory=True)
        except OSError as error:
            raise UserError(f"--out {out} cannot be made ({error.strerror}): name an empty folder") from None
        extra = sorted({path.name for path in Path(out, split).iterdir()} - set(classes))
        if extra:
            raise UserError(f"--out {out} has other things in {split}: {', '.join(extra[:3])}; name an empty folder")
    made = {split: Folder(Path(out, split)) for split in found}
    assert all(fingerprint(made[split]) == fingerprint(found[split]) for split in found)
    return made


def main(argv: Sequence[str] | None = None) -> None:
    parser = utils.ArgumentParser(prog="datasets.py", description=__doc__.split("\n\n")[0])
    sub = parser.add_subparsers(dest="what", required=True, parser_class=argparse.ArgumentParser)
    links = sub.add_parser("imagenet100", help="The 100-class subset as a tree of links")
    links.add_argument(
        "--imagenet", required=True, help="Folder with train/ and val/, each with the 1000 class folders"
    )
    links.add_argument("--out", required=True, help="Folder to make")
    links.add_argument("--allow_incomplete", action="store_true", help="Also if images are missing")
    args = parser.parse_args(argv)
    utils.expand_paths(args, "imagenet", "out")
    made = link_imagenet100(args.imagenet, args.out, incomplete=args.allow_incomplete)
    for split, data in made.items():
        print(f"{split}: {len(data.classes)} classes, {fingerprint(data)}")


if __name__ == "__main__":
    errors.run_script(main)
