"""Write a trained network for another library, load it back there, and compare: the same features, or no file.

    python export.py output/pictures/checkpoint.pth --to timm

timm, hf (Hugging Face) and head are folders, safetensors and onnx are files; all say how images are prepared. The file
is compared with the checkpoint on random images before this ends: docs/export.md.
"""

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path

import torch

from cplearn import errors
from cplearn.errors import UserError
from cplearn.export import card, common, head_folder, hf_folder, onnx_file, safetensors_file, timm_folder
from cplearn.features import cli
from cplearn.text import printable
from utils import ArgumentParser, expand_paths

FORMATS = {kind.NAME: kind for kind in (timm_folder, safetensors_file, hf_folder, onnx_file, head_folder)}


def get_args_parser() -> argparse.ArgumentParser:
    # fmt: off
    parser = ArgumentParser(prog="export.py", description=__doc__)
    parser.add_argument("checkpoint", nargs="?", metavar="CKPT", help="The same as --pretrained_weights")
    parser.add_argument("--to", required=True, choices=tuple(FORMATS), help="timm: folder for create_model. safetensors: file for load_backbone. hf: folder for ViTModel. onnx: file for onnxruntime. head: folder with projector, dictionary's seed and NumPy code")
    parser.add_argument("--out", default=None, help="File or folder to write (default: beside the checkpoint, named after it)")
    parser.add_argument("--with_preprocessing", action="store_true", help="With --to onnx: take pixels in 0..1 and normalize inside the network")
    cli.add_weights_flags(parser)
    # fmt: on
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse, and fill in --pretrained_weights and --out. Raises `UserError` for what does not go together."""
    args = get_args_parser().parse_args(argv)
    if args.checkpoint is not None and args.pretrained_weights is not None:
        raise UserError(f"CKPT {args.checkpoint} and --pretrained_weights are the same: give one of them")
    args.pretrained_weights = args.checkpoint if args.pretrained_weights is None else args.pretrained_weights
    if args.pretrained_weights is None:
        raise UserError("the checkpoint is missing: python export.py CKPT --to FORMAT")
    expand_paths(args, "pretrained_weights", "out")
    if args.with_preprocessing and args.to != "onnx":
        raise UserError(
            f"--with_preprocessing goes with --to onnx; --to {args.to} says it in files of its own: leave it out"
        )
    suffix = FORMATS[args.to].SUFFIX
    if args.out is None:
        source = Path(args.pretrained_weights)
        network = f"_{args.checkpoint_key}" if args.checkpoint_key else ""
        args.out = str(source.with_name(f"{source.stem}{network}{suffix or '_' + args.to}"))
    elif suffix and not args.out.endswith(suffix):
        raise UserError(f"--out {printable(args.out)} must end in {suffix}, by which its readers know it")
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, object]:
    """Export; return the path and the largest relative difference."""
    args = parse_args(argv)
    kind, target = FORMATS[args.to], Path(args.out)
    with common.library_errors(target, kind.PACKAGES):
        for package in kind.PACKAGES:
            importlib.import_module(package)
    model = cli.open_network(args, torch.device("cpu"))
    if target.exists() and target.samefile(args.pretrained_weights):
        raise UserError(f"--out {printable(target)} is the file to export itself: name another with --out")
    common.check_target(target, args.to, folder=not kind.SUFFIX)
    kind.check(model)
    model = common.at_image_size(model)
    options = {"with_preprocessing": True} if args.with_preprocessing else {}
    with common.library_errors(target, kind.PACKAGES), common.workspace(target) as folder:
        new = folder / f"export{kind.SUFFIX}"
        if not kind.SUFFIX:
            new.mkdir()
        kind.write(model, new, **options)
        if not kind.SUFFIX:
            card.write_card(new, model, kind.LIBRARY, kind.usage("FOLDER"))
            common.mark_folder(new, common.description(model, kind.NAME))
        difference, notes = kind.verify(model, new, **options)
        common.move_into_place(new, target)
    size = f"{model.image_size} x {model.image_size} pixels"
    print(f"{printable(target)}: {model.arch}, {size}, {model.backbone.num_features} features")
    print(
        f"Loaded back with {kind.LIBRARY} and compared on {kind.COMPARED}: the largest difference is {difference:.1e}"
    )
    print(f"of the largest number (allowed: {common.TOLERANCE:.0e})")
    for note in notes:
        print(note)
    print(f"In Python: {kind.usage(printable(target))}")
    return {"out": str(target), "difference": difference}


if __name__ == "__main__":
    errors.run_script(main)
