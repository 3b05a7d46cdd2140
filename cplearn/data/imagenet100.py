"""The 100-class subset of ImageNet as a tree of links, complete and with the right classes, or refused.

python -m cplearn.data.imagenet100 --imagenet /data/imagenet --out /data/imagenet100
"""

from collections.abc import Sequence
from pathlib import Path

from torch.utils.data import Dataset

from cplearn import errors
from cplearn.data.datasets import Folder, fingerprint, read_class_list
from cplearn.errors import UserError
from cplearn.flags import ArgumentParser, expand_paths

# Of the complete subset (ILSVRC 2012).
IMAGENET100_IMAGES = {"train": 126_689, "val": 5_000}


# --- the ImageNet-100 tree -----------------------------------------------------------------------------


def link_imagenet100(imagenet: str, out: str, *, incomplete: bool = False) -> dict[str, Dataset]:
    """Make a folder with train/ and val/ of the 100 classes of `imagenet100.txt`, as links to those of ImageNet.

    Raises `UserError`, before a link is made, if a class is missing or images are, unless `incomplete` is allowed.
    The same call again only checks.
    """
    classes = read_class_list("imagenet100.txt")
    sources = {}
    for split, complete in IMAGENET100_IMAGES.items():
        folder = Path(imagenet, split)
        if not folder.is_dir():
            raise UserError(f"--imagenet {imagenet} has no {split} folder: it needs train/ and val/ with class folders")
        sources[split] = Folder(folder, classes)
        if len(sources[split]) != complete and not incomplete:
            raise UserError(
                f"{folder} has {len(sources[split]):,} images of the 100 classes, the data set {complete:,}: "
                "complete it, or add --allow_incomplete"
            )
    for split, data in sources.items():
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
    made = {split: Folder(Path(out, split)) for split in sources}
    assert all(fingerprint(made[split]) == fingerprint(sources[split]) for split in sources)
    return made


def get_args_parser() -> ArgumentParser:
    p = ArgumentParser(prog="python -m cplearn.data.imagenet100", description=__doc__)
    p.add_argument("--imagenet", required=True, help="Folder with train/ and val/, each with the 1000 class folders")
    p.add_argument("--out", required=True, help="Folder to make")
    p.add_argument("--allow_incomplete", action="store_true", help="Also if images are missing")
    return p


def main(argv: Sequence[str] | None = None) -> None:
    args = get_args_parser().parse_args(argv)
    expand_paths(args, "imagenet", "out")
    made = link_imagenet100(args.imagenet, args.out, incomplete=args.allow_incomplete)
    for split, data in made.items():
        print(f"{split}: {len(data.classes)} classes, {fingerprint(data)}")


if __name__ == "__main__":
    errors.run_script(main)
