"""The parts of public data sets that the commands in results/ name: images chosen by rule, as class folders.

    python experiments/subsets.py cifar10k ~/cifar10 ~/cifar10k         # from class folders in train/ and test/
    python experiments/subsets.py fashion6k ~/fashion ~/fashion6k       # from Fashion-MNIST's four idx files

An image of class folders is copied as it is; one of Fashion-MNIST is written as PNG. Names are sorted within a class.
"""

import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cplearn.errors import UserError, run_script
from cplearn.flags import ArgumentParser

# Images of every class in train/ and in test/ (None: all): the first ones.
SUBSETS = {"cifar6k": (600, None), "cifar10k": (1000, None), "fashion6k": (600, None), "fashion3k": (300, None)}


def class_folders(source: Path) -> Iterator[tuple[str, str, list[Path]]]:
    """Yield split, class and sorted images of `source`/train and /test."""
    for split in ("train", "test"):
        if not (source / split).is_dir():
            raise UserError(f"{source / split} is no folder: unpack the data set with train/CLASS/ and test/CLASS/")
        for folder in sorted((source / split).iterdir()):
            yield split, folder.name, sorted(folder.iterdir())


def fashion(source: Path) -> Iterator[tuple[str, str, list[Image.Image]]]:
    """Yield split, class and images of Fashion-MNIST (of `source`/FashionMNIST/raw), in order."""
    from torchvision.datasets import FashionMNIST

    for split, train in (("train", True), ("test", False)):
        images = FashionMNIST(str(source), train=train, download=False)
        for label in range(10):
            yield split, str(label), [images[i][0] for i in (images.targets == label).nonzero().flatten().tolist()]


def main(argv: Sequence[str] | None = None) -> None:
    """Build the subset that the command line names."""
    parser = ArgumentParser(prog="experiments/subsets.py", description=__doc__)
    parser.add_argument("name", choices=SUBSETS)
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path)
    args = parser.parse_args(argv)
    counts = dict(zip(("train", "test"), SUBSETS[args.name], strict=True))
    count = 0
    for split, label, images in (fashion if args.name.startswith("fashion") else class_folders)(args.source):
        folder = args.output / split / label
        folder.mkdir(parents=True, exist_ok=True)
        for index, image in enumerate(images[: counts[split]]):
            if isinstance(image, Path):
                shutil.copy2(image, folder)
            else:
                image.save(folder / f"{index:04d}.png")
            count += 1
    print(f"{count:,} images in {args.output}")


if __name__ == "__main__":
    run_script(main)
