"""Features of a folder of images, for use elsewhere: no labels needed, any number of images.

python extract_features.py --pretrained_weights output/pictures/checkpoint.pth --images ~/pictures --out features.npz
torchrun --nproc_per_node=8 extract_features.py --pretrained_weights CHECKPOINT --images LIST.txt --out features.parquet

Killed, it goes on where it was: the same command again.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from cplearn import checkpoints, errors
from cplearn.data import datasets
from cplearn.data.datasets import ImageDataset
from cplearn.data.identity import Changes, Identity
from cplearn.data.sources import open_images
from cplearn.distributed import collectives, launch
from cplearn.errors import UserError
from cplearn.features import cli, extract, files
from cplearn.features.files import Parts
from cplearn.lock import FolderLock
from utils import ArgumentParser, check_output_dir, expand_paths, fraction


def get_args_parser() -> argparse.ArgumentParser:
    # fmt: off
    parser = ArgumentParser(prog="extract_features.py", description=__doc__)
    cli.add_weights_flags(parser)
    g = parser.add_argument_group("images")
    g.add_argument("--images", default=None, help="Folder (with its sub-folders), one image, a text file of paths, tar shards or parquet")
    g.add_argument("--max_bad_images", type=fraction, default=0.001, help="Stop when more than this fraction of the images cannot be read; fewer are named and left out")
    cli.add_loader_flags(g)
    g = parser.add_argument_group("features")
    g.add_argument("--out", default=None, help="File to write: .npz, .parquet, or .npy (features alone, names in a .json beside it)")
    g.add_argument("--tokens", choices=extract.TOKENS, default="cls", help="cls: what the backbone gives (the pooled feature, if it is no ViT); mean or all of the patch tokens of a ViT")
    g.add_argument("--keep_aspect", action="store_true", help="The whole image, its shorter side --image_size, instead of a square from its center")
    g = parser.add_argument_group("run")
    cli.add_run_flags(g)
    # fmt: on
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = get_args_parser().parse_args(argv)
    for flag in ("images", "out"):
        if not getattr(args, flag):
            raise UserError(f"--{flag} is missing: {'a folder of images' if flag == 'images' else 'features.npz, say'}")
    expand_paths(args, "pretrained_weights", "images", "out")
    out = Path(args.out)
    device = launch.init(args.dist_url, args.device)
    collectives.on_main(files.check_out, out)
    collectives.on_main(check_output_dir, str(out.parent), "--out")
    model = cli.open_network(args, device)
    dataset = open_images(args.images, "--images", args.image_column)
    job = extract.Extraction(
        model, device, args.tokens, args.keep_aspect, out.suffix != ".npy", args.precision or "fp32"
    )
    identity = job.identity(dataset, args.images)
    collectives.check_same(identity)
    content = Identity.of(dataset) if collectives.is_main() else None
    exact = {"files_sha256": collectives.on_main(lambda: content.sha256(times=True))}
    if (identity | exact).items() <= collectives.on_main(files.source_of, out).items():
        if collectives.is_main():
            print(f"{out} is there already, of the same weights and images: remove it to extract again")
        return
    parts = Parts(out)
    collectives.on_main(check_output_dir, str(parts.folder), "--out")
    with FolderLock(parts.folder, "--out"):
        size = job.part_size(len(dataset), args.batch_size_per_gpu)
        parts.images, parts.size = collectives.on_main(begin, parts, job, identity, content, dataset, size)
        unreadable = extract.extract(job, dataset, parts, args)
        if collectives.is_main():
            source = job.source(identity | exact, unreadable)
            count = files.assemble(out, parts, job.columns, dataset.names, source)
            parts.remove()
            print(summary(out, count, job, source))
    if collectives.is_main():
        parts.folder.rmdir()


def begin(
    parts: Parts, job: extract.Extraction, identity: dict, content: Identity, dataset: ImageDataset, size: int
) -> tuple[int, int]:
    """Start the parts, or go on with those that are there; return how many images are in all and in each.

    Parts of images that have changed since are made again.
    """
    parts.open(identity, len(dataset), size)
    kept = parts.folder / "images.pth"
    before = Identity(**checkpoints.load(kept)["images"]) if kept.exists() else None
    changes = content.changes(before, dataset) if before else Changes("", range(len(dataset)))
    if changes.text:
        print(f"{changes.text}: what was extracted of them is made again", flush=True)
    parts.forget(changes.images)
    if before is None or changes.text or changes.copied:
        checkpoints.save(kept, {"images": content.read_sample(dataset).state()})
    head = "" if job.method is None else f", embedding and code of {job.method.out_dim}"
    what = {"cls": "feature", "mean": "mean of the patch tokens", "patches": "patch tokens"}[job.tokens]
    print(f"Extracting {what}{head}: {datasets.summary(dataset)}", flush=True)
    done = len(dataset) - sum(len(parts.samples(k)) for k in parts.missing())
    if done:
        print(f"Going on: {done:,} images are done already", flush=True)
    return parts.images, parts.size


def summary(out: Path, count: int, job: extract.Extraction, source: dict) -> str:
    """Return the last line: what the file holds."""
    left_out = f", {len(source['unreadable'])} left out (they are named in it)" if source["unreadable"] else ""
    width = job.model.backbone.num_features
    if out.suffix == ".npy":
        return f"{out}: {count:,} images{left_out}, {width} numbers each; names in {files.sidecar(out).name}"
    head = "no head in these weights, so no embedding and no codes"
    if job.method is not None:
        head = f"embedding of {job.columns['embedding'].shape[1]}, codes of {job.method.out_dim}"
    return f"{out}: {count:,} images{left_out}, features of {width} numbers, {head}"


if __name__ == "__main__":
    errors.run_script(main)
