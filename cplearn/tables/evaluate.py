"""The evaluations of a cell, in one process (or process group): features are extracted once and kept for all of them.

Each evaluation is its script, with its flags; only where its features come from is added. `cell.py` starts this.
"""

import importlib
import shutil
from collections.abc import Sequence
from pathlib import Path

from cplearn.backbones import is_vit
from cplearn.distributed import collectives, launch
from cplearn.errors import UserError
from cplearn.features.splits import has_features
from cplearn.lock import FolderLock
from cplearn.tables.cell import get_args_parser, machine_flags, read_cell
from cplearn.tables.grid import Cell, checkpoint_args, is_random, script_of


def main(argv: Sequence[str] | None = None) -> None:
    """Run the evaluations that have no result yet. Raises `UserError` if the checkpoint is another run's."""
    args = get_args_parser().parse_args(argv)
    cell, _ = read_cell(args.folder)
    launch.init(args.dist_url, args.device or "auto")
    place = cell.results_folder(random=False)
    collectives.on_main(lambda: place.mkdir(exist_ok=True))
    with FolderLock(place, "cell"):
        for name in collectives.on_main(_todo, cell):
            script, flags = script_of(name), _flags(cell, name)
            more = collectives.on_main(_features, cell, name)
            importlib.import_module(script).main([*flags, *more, *machine_flags(args), "--dist_url", args.dist_url])
        collectives.on_main(_forget, cell)


def _todo(cell: Cell) -> list[str]:
    """Return the evaluations without a result."""
    if differs := cell.differs():
        raise UserError(f"{cell.name}: its checkpoint has {differs}: move {cell.folder} away")
    _forget(cell)  # what a killed process has kept
    return cell.missing()


def _flags(cell: Cell, name: str) -> list[str]:
    """Return the flags of an evaluation, without where its features come from."""
    place = cell.results_folder(random=is_random(name))
    return ["--output_dir", str(place), "--seed", str(cell.seed), *cell.evaluate[name]]


def _features(cell: Cell, name: str) -> list[str]:
    """Return the flags that extract features, or take those that an evaluation of the same network has kept."""
    extract = ["--pretrained_weights", str(cell.folder / "checkpoint.pth"), *["--random_init"] * is_random(name)]
    splits = _splits(cell, name)
    if not splits:
        return extract
    kept = _kept(cell, random=is_random(name))
    if all(has_features(str(kept), split) for split in splits):
        return ["--load_features", str(kept)]
    return [*extract, "--dump_features", str(kept)]


def _splits(cell: Cell, name: str) -> tuple[str, ...]:
    """Return the splits of which an evaluation takes the plain features of center crops, if these are all it needs.

    eval_collapse.py also takes embeddings. eval_linear.py augments the training images at the paper's scale, and takes
    more tokens of a ViT.
    """
    script, flags = script_of(name), " ".join(cell.evaluate[name])
    if script == "eval_linear":
        arch = checkpoint_args(cell.folder / "checkpoint.pth")["arch"]
        return ("train", "val") if "--augment false" in flags and not is_vit(arch) else ()
    return {"eval_knn": ("train", "val"), "eval_cluster": ("val",)}.get(script, ())


def _kept(cell: Cell, *, random: bool) -> Path:
    return cell.results_folder(random=random) / ".kept_features"


def _forget(cell: Cell) -> None:
    for random in (False, True):
        shutil.rmtree(_kept(cell, random=random), ignore_errors=True)
