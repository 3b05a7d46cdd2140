"""The evaluations of a cell, in one process (or process group): features are extracted once and kept for all of them.

Each evaluation is its script, with its flags; only where its features come from is added. `cell.py` starts this.
"""

import importlib
import shutil
from collections.abc import Sequence
from pathlib import Path

from cplearn.backbones import is_vit
from cplearn.distributed import collectives, launch
from cplearn.features.splits import has_features
from cplearn.lock import FolderLock
from cplearn.tables.cell import get_args_parser, machine_flags, read_cell
from cplearn.tables.grid import Cell, checkpoint_args, is_random, script_of


def main(argv: Sequence[str] | None = None) -> None:
    """Run the evaluations that have no result yet."""
    args = get_args_parser().parse_args(argv)
    cell, _ = read_cell(args.folder)
    launch.init(args.dist_url, args.device or "auto")
    place = cell.results_folder(random=False)
    kept = place / ".kept_features"

    def begin() -> list[str]:
        shutil.rmtree(kept, ignore_errors=True)  # of a process that was killed
        return cell.missing()

    collectives.on_main(lambda: place.mkdir(exist_ok=True))
    with FolderLock(place, "cell"):
        for name in collectives.on_main(begin):
            source = collectives.on_main(feature_flags, cell, name, kept)
            out = ["--output_dir", str(cell.results_folder(random=is_random(name))), "--seed", str(cell.seed)]
            flags = [*source, *out, *cell.evaluate[name], *machine_flags(args), "--dist_url", args.dist_url]
            importlib.import_module(script_of(name)).main(flags)
        collectives.on_main(shutil.rmtree, kept, True)


def feature_flags(cell: Cell, name: str, kept: Path) -> list[str]:
    """Return the flags that extract features, or load those that an evaluation of the same network has kept.

    eval_collapse.py extracts its own, as it also takes embeddings; so does eval_linear.py where it augments the
    training images (ImageNet-100), or takes more tokens (of a ViT).
    """
    random, script = is_random(name), script_of(name)
    extract = ["--pretrained_weights", str(cell.folder / "checkpoint.pth"), *["--random_init"] * random]
    splits = {"eval_knn": ("train", "val"), "eval_linear": ("train", "val"), "eval_cluster": ("val",)}.get(script)
    if script == "eval_linear":
        vit = is_vit(checkpoint_args(cell.folder / "checkpoint.pth")["arch"])
        splits = splits if "--augment false" in " ".join(cell.evaluate[name]) and not vit else None
    if splits is None:
        return extract
    place = str(kept / ("random" if random else "trained"))
    if all(has_features(place, split) for split in splits):
        return ["--load_features", place]
    return [*extract, "--dump_features", place]
