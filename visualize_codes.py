"""What the codes of a network mean: a page with the most used codes and the images that chose each, and a sheet.

    python visualize_codes.py --pretrained_weights output/digits/checkpoint.pth
    python visualize_codes.py --pretrained_weights CHECKPOINT --images ~/photos --neighbours ~/photos/cat.jpg

Into --output_dir go codes.html, one file that any browser opens from disk, and codes.png, a row per code.
"""

import argparse
import functools
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from cplearn import errors
from cplearn.data import datasets, images, sources
from cplearn.distributed import collectives, launch
from cplearn.errors import UserError
from cplearn.features import cli
from cplearn.features.splits import Features, calibrate_batch_norm, extract_features
from cplearn.files import check_output_dir, check_replaceable, write_text
from cplearn.flags import check_path
from cplearn.host import git_commit
from cplearn.load import EvalTransform, Model
from cplearn.pictures import gallery as codes
from cplearn.pictures.codes_page import draw_codes, render
from cplearn.pictures.style import drawn, png_mark, save_picture
from cplearn.text import printable
from utils import ArgumentParser, bool_flag, expand_paths, format_table, positive

SOFTWARE = "visualize_codes.py"
FILES = {"codes.html": f"<!-- written by {SOFTWARE} -->".encode(), "codes.png": png_mark(SOFTWARE)}  # with their marks
LARGEST_PAGE = 64e6  # bytes, where a thumbnail takes half a byte per pixel


def get_args_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(prog="visualize_codes.py", description=__doc__)
    # fmt: off
    cli.add_weights_flags(parser)
    g = parser.add_argument_group("data")
    g.add_argument("--images", default=None, help="Folder of images, whose sub-folders name classes (default: the checkpoint's own data)")
    g.add_argument("--split", default=None, choices=("train", "val"), help="Of the checkpoint's own data (default: val, or train where there is no other)")
    g.add_argument("--max_images", type=positive(int), default=10_000, help="A random sample of so many, where there are more")
    cli.add_loader_flags(g)
    g = parser.add_argument_group("page")
    g.add_argument("--codes", type=positive(int), default=60, help="Codes shown, the most used ones")
    g.add_argument("--per_code", type=positive(int), default=12, help="Images shown of each code, evenly spaced from the most to the least certain; also of the most and least certain of all, and of neighbours")
    g.add_argument("--thumbnail", type=positive(int), default=96, help="Largest side of a shown image, in pixels")
    g.add_argument("--neighbours", nargs="+", default=[], metavar="IMAGE", help="Also show the images nearest to these, by the cosine of their features; weights without codes have that alone")
    g.add_argument("--sheet", type=positive(int), nargs=2, default=(10, 8), metavar=("ROWS", "COLUMNS"), help="Codes, and images of each, in the PNG")
    g.add_argument("--baseline", type=bool_flag, default=True, help="Also count use and purity at random initialization, which takes as long again")
    g = parser.add_argument_group("run")
    g.add_argument("--output_dir", default=None, help="Where codes.html and codes.png go (default: codes/ beside the weights)")
    cli.add_run_flags(g)
    # fmt: on
    return parser


def main(argv: Sequence[str] | None = None) -> dict[str, object]:
    """Write page and sheet; return the numbers of the page on rank 0, {} elsewhere."""
    args = get_args_parser().parse_args(argv)
    check_flags(args)
    queries = [images.read_image(Path(path)) for path in args.neighbours]
    device = launch.init(args.dist_url, args.device)
    check_output_dir(args.output_dir)
    for name, mark in FILES.items():
        check_replaceable(Path(args.output_dir, name), mark, "--output_dir")
    model = open_model(args, device)
    dataset, of_all = open_data(args, model)
    if collectives.is_main():
        print(f"Extracting features: {datasets.summary(dataset)}", flush=True)
    data = extract_features(model, dataset, args, device)
    baseline = random_init_use(args, dataset, device) if args.baseline and model.method else None
    if not collectives.is_main():
        return {}
    gallery = build_gallery(args, model, data, device)
    gallery.baseline = baseline
    for path, image in zip(args.neighbours, queries, strict=True):
        gallery.queries.append(nearest_images(args, path, image, model, dataset, data))
    gallery.thumbnail = functools.cache(lambda i: codes.thumbnail(dataset.read(i)[0], model.image_size, args.thumbnail))
    facts = facts_of(args, model, data, of_all)
    write_all(args, gallery, facts, f"Codes of {facts['weights']}" if gallery.codes else "Nearest images")
    return numbers_of(gallery)


# --- before long work -------------------------------------------------------------------------------------


def check_flags(args: argparse.Namespace) -> None:
    """Complete and check what needs no file to be loaded. Raises `UserError`."""
    if not args.pretrained_weights:
        raise UserError("--pretrained_weights is missing: give a checkpoint of main_cplearn.py")
    expand_paths(args, "pretrained_weights", "images", "output_dir")
    args.neighbours = [check_path("--neighbours", path) for path in args.neighbours]
    for path in args.neighbours:
        if os.path.isdir(path) or not os.path.exists(path):
            raise UserError(f"--neighbours {printable(path)} is no image file: give files, not folders")
    if args.images and args.split:
        raise UserError(f"--split {args.split} is of the checkpoint's own data: leave it out with --images")
    images = (args.codes + 2 + len(args.neighbours)) * args.per_code
    if (size := images * (1500 + args.thumbnail**2 / 2) * 4 / 3) > LARGEST_PAGE:
        raise UserError(
            f"--codes {args.codes} with --per_code {args.per_code} images of --thumbnail {args.thumbnail} may make a page "
            f"of {size / 1e6:,.0f} MB, above {LARGEST_PAGE / 1e6:.0f}: make one of them smaller"
        )
    if args.output_dir is None:
        args.output_dir = str(Path(args.pretrained_weights).parent / "codes")


def open_model(args: argparse.Namespace, device: torch.device, **more: object) -> Model:
    """Load the network. Raises `UserError` if it has no codes, unless neighbours are asked for."""
    model = cli.open_network(argparse.Namespace(**vars(args), **more), device)
    if model.method is None and not args.neighbours:
        raise UserError(
            f"{model.weights} has no head, so no codes: give a checkpoint of main_cplearn.py, or ask for --neighbours"
        )
    if model.method is None and not args.images:
        raise UserError(f"{model.weights} does not say what it was trained on: name a folder with --images")
    return model


def open_data(args: argparse.Namespace, model: Model) -> tuple[datasets.ImageDataset, int]:
    """Return the images, a sample where there are more than --max_images, and how many there are in all."""
    if args.images:
        dataset = sources.open_images(args.images, image_column=model.image_column)
    elif args.split:
        dataset = model.images(args.split)
    else:
        try:
            dataset = model.images("val")
        except UserError:  # a folder that is not split; where it is gone this raises again
            dataset = model.images("train")
    if len(dataset) <= args.max_images:
        return dataset, len(dataset)
    return sources.Sample(dataset, args.max_images, args.seed), len(dataset)


# --- what is shown ----------------------------------------------------------------------------------------


def random_init_use(args: argparse.Namespace, dataset: datasets.ImageDataset, device: torch.device) -> codes.Use | None:
    """Count use and purity of the codes of the same network, untrained; None for a single image."""
    if len(dataset) < 2:  # batch norm has no statistics of one
        return None
    model = open_model(args, device, random_init=True)
    calibrate_batch_norm(model, dataset, device, seed=args.seed)
    return codes.measure_use(extract_features(model, dataset, args, device), args.seed)


def build_gallery(args: argparse.Namespace, model: Model, data: Features, device: torch.device) -> codes.Gallery:
    """Choose codes and images to show; of weights without codes, none."""
    method = model.method
    if method is None:
        return codes.Gallery(data)
    certainty = codes.certainty_of(method, data.features, device)
    order = certainty.argsort(descending=True, stable=True).tolist()
    return codes.Gallery(
        data,
        certainty,
        method.CERTAINTY,
        use=codes.measure_use(data, args.seed),
        codes=codes.describe_codes(
            data,
            certainty,
            lambda numbers: method.code_vectors(numbers.to(device)),
            count=args.codes,
            per_code=args.per_code,
            seed=args.seed,
        ),
        most=order[: args.per_code],
        least=order[::-1][: args.per_code],
    )


@torch.inference_mode()
def nearest_images(
    args: argparse.Namespace, path: str, image, model: Model, dataset: datasets.ImageDataset, data: Features
) -> codes.Query:
    """Return the images nearest to a file; not the file itself, where it is one of them."""
    device = next(model.backbone.parameters()).device
    features = model.backbone(EvalTransform(model.image_size)(image)[None].to(device))
    (rows,) = codes.nearest(features, data.features, args.per_code + 1)
    root = getattr(getattr(dataset, "dataset", dataset), "root", None)
    if root is not None:
        own = os.path.realpath(path)
        rows = [(i, cosine) for i, cosine in rows if os.path.realpath(os.path.join(root, data.names[i])) != own]
    return codes.Query(path, codes.thumbnail(image, model.image_size, args.thumbnail), rows[: args.per_code])


def facts_of(args: argparse.Namespace, model: Model, data: Features, of_all: int) -> dict[str, object]:
    """Return what the page is of."""
    n = len(data.names)
    sample = "all of them" if n == of_all else f"a random sample of {of_all:,}, seed {args.seed}"
    classes = f"{len(data.classes)} classes" if data.classes else "no labels"
    facts = {
        "weights": model.weights,
        "sha256": model.weights_sha256,
        "epoch": model.epoch,
        "method": f"{model.method_name} ({model.network})" if model.network else model.method_name,
        "architecture": model.arch,
        "image size": model.image_size,
        "data": f"{data.source['data']} ({classes})",
        "images": f"{n:,}, {sample}",
        "hash of their names": data.source["data_hash"],
        "commit": git_commit(),
    }
    return {name: value for name, value in facts.items() if value is not None}


# --- what is written --------------------------------------------------------------------------------------


def write_all(args: argparse.Namespace, gallery: codes.Gallery, facts: dict[str, object], title: str) -> None:
    """Write the page, and the sheet where there are codes."""
    page, sheet = (Path(args.output_dir, name) for name in FILES)
    write_text(page, render(gallery, facts, title, args.thumbnail))
    if gallery.codes:
        save_picture(drawn(draw_codes(gallery, *args.sheet), dpi=300), sheet, SOFTWARE)
    for path in (page, sheet) if gallery.codes else (page,):
        print(f"{printable(path)}: {path.stat().st_size / 1e6:.1f} MB")


def numbers_of(gallery: codes.Gallery) -> dict[str, object]:
    """Print and return how codes are used, beside random initialization."""
    if gallery.use is None:
        return {}
    rows = {"trained": gallery.use} | ({"random init": gallery.baseline} if gallery.baseline else {})
    table = [(name, use.used, use.perplexity, use.purity, use.chance) for name, use in rows.items()]
    print(format_table(table, ("", "codes used", "perplexity", "purity", "random codes, same counts")))
    return {name: asdict(use) for name, use in rows.items()}


if __name__ == "__main__":
    errors.run_script(main)
