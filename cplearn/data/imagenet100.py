"""TODO cplearn.data.imagenet100."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from torch.utils.data import Dataset

from cplearn.data.datasets import Folder, fingerprint, read_class_list
from cplearn.errors import UserError
from cplearn.flags import ArgumentParser, expand_paths

# Of the complete subset (ILSVRC 2012).
IMAGENET100_IMAGES = {"train": 126_689, "val": 5_000}


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
    parser = ArgumentParser(prog="datasets.py", description=__doc__.split("\n\n")[0])
    sub = parser.add_subparsers(dest="what", required=True, parser_class=argparse.ArgumentParser)
    links = sub.add_parser("imagenet100", help="The 100-class subset as a tree of links")
    links.add_argument(
        "--imagenet", required=True, help="Folder with train/ and val/, each with the 1000 class folders"
    )
    links.add_argument("--out", required=True, help="Folder to make")
    links.add_argument("--allow_incomplete", action="store_true", help="Also if images are missing")
    args = parser.parse_args(argv)
    expand_paths(args, "imagenet", "out")
    made = link_imagenet100(args.imagenet, args.out, incomplete=args.allow_incomplete)
    for split, data in made.items():
        print(f"{split}: {len(data.classes)} classes, {fingerprint(data)}")
