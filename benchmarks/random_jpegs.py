"""Write random JPEG files of ImageNet's common size in class folders, to measure speed where ImageNet is not at hand.

    python benchmarks/random_jpegs.py FOLDER [--classes 100] [--images 40] [--val_images 2]

writes FOLDER/train and FOLDER/val; the first hundred classes have the names in imagenet100.txt. Smooth color and grain,
about 100 kB a file, as ImageNet's are; the same files each time. Nothing can be learnt from them.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cplearn import errors
from cplearn.errors import UserError
from cplearn.flags import ArgumentParser, positive
from cplearn.host import ROOT
from cplearn.random_streams import random_normal


def class_names(count: int) -> list[str]:
    """Return names of class folders: those of ImageNet-100, then numbers."""
    listed = [line.split()[0] for line in (ROOT / "imagenet100.txt").read_text().splitlines() if line.strip()]
    return [*listed, *(f"n9{k:07d}" for k in range(count))][:count]


def write_class(place: Path, number: int, images: int, size: tuple[int, int] = (500, 375), seed: int = 0) -> None:
    """Write the images (width x height pixels) of one class into a folder."""
    place.mkdir(parents=True, exist_ok=True)
    width, height = size
    for i in range(images):
        stream = torch.tensor([(seed * 10_000 + number) * 100_000 + i])
        smooth = F.interpolate(random_normal(stream, (3, 8, 8)), (height, width), mode="bicubic")
        pixels = 128 + 40 * smooth + 17 * random_normal(stream + 2**40, (3, height, width))
        Image.fromarray(pixels[0].clamp(0, 255).byte().permute(1, 2, 0).numpy()).save(place / f"{i}.jpg", quality=90)


def main(argv: Sequence[str] | None = None) -> None:
    """Write both splits."""
    parser = ArgumentParser(prog="benchmarks/random_jpegs.py", description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--classes", type=positive(int), default=100)
    parser.add_argument("--images", type=positive(int), default=40, help="Of a class, for training")
    parser.add_argument("--val_images", type=positive(int), default=2, help="Of a class, held out")
    args = parser.parse_args(argv)
    if Path(args.folder).exists():
        raise UserError(f"{args.folder} is there already: choose another folder")
    for seed, (split, count) in enumerate((("train", args.images), ("val", args.val_images))):
        for k, name in enumerate(class_names(args.classes)):
            write_class(Path(args.folder, split, name), k, count, seed=seed)
    print(f"{args.classes * (args.images + args.val_images)} images in {args.folder}")


if __name__ == "__main__":
    errors.run_script(main)
