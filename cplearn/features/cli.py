"""What every evaluation script shares: its flags, its start, and the line that it appends to results.jsonl."""

import argparse
from dataclasses import fields
from pathlib import Path

import torch

from cplearn import backbones
from cplearn.data import datasets, sources, workers
from cplearn.distributed import collectives, launch
from cplearn.errors import UserError
from cplearn.features.splits import Features, has_features
from cplearn.files import append_json_line, check_output_dir
from cplearn.flags import check_unread_path, expand_paths, ignore_local_rank, nonnegative, positive, seed_below
from cplearn.host import git_commit
from cplearn.load import Model, ModelRequest, WeightsFile, load_model
from cplearn.precision import DTYPES
from cplearn.text import printable

# What is fixed once features are kept.
OF_FEATURES = ("random_init", "arch", "patch_size", "image_size", "dataset", "data_path", "class_list", "image_column",
               "precision", "dump_features", "checkpoint_key")  # fmt: skip


def add_weights_flags(parser: argparse.ArgumentParser):
    """Add the flags that name a network, with DINO's names; return their group."""
    ignore_local_rank(parser)
    # fmt: off
    g = parser.add_argument_group("weights")
    g.add_argument("--pretrained_weights", default=None, help="Checkpoint of main_cplearn.py (which says the rest), or backbone weights of DINO or timm (then name --arch)")
    g.add_argument("--checkpoint_key", default=None, help="Network to use where there are two (DINO): teacher (default) or student")
    g.add_argument("--arch", type=backbones.arch_name, default=None, help="For weights that do not say (default: the checkpoint's)")
    g.add_argument("--patch_size", type=positive(int), default=None, help="For weights that do not say (default: the checkpoint's, or 16)")
    g.add_argument("--image_size", type=positive(int), default=None, help="Pixels (default: the checkpoint's; for weights that do not say 224, or the data set's own)")
    # fmt: on
    return g


def add_loader_flags(group, *, batch_size: int = 128) -> None:
    """Add the flags of a loader of images to a group."""
    # fmt: off
    group.add_argument("--image_column", default=None, help="Where a row of parquet or a sample of a tar has several images: the column's name, or the name's ending (left.jpg)")
    group.add_argument("--precision", default=None, choices=tuple(DTYPES), help="Of the backbone (default: fp32; bf16 is faster on GPUs, and on CPUs that have it)")
    group.add_argument("--batch_size_per_gpu", type=positive(int), default=batch_size, help="Images per process and step")
    group.add_argument("--num_workers", type=nonnegative(int), default=None, help="Loader processes (default: 10, or fewer with fewer cores)")
    group.add_argument("--worker_timeout", type=nonnegative(float), default=workers.WORKER_TIMEOUT, help="Seconds without a batch after which a loader process counts as hung; 0 for never")
    # fmt: on


def add_run_flags(group) -> None:
    """Add seed, device and rendezvous to a group."""
    # fmt: off
    group.add_argument("--seed", type=seed_below(2**31), default=0)
    group.add_argument("--device", default="auto", help="auto, cpu or cuda")
    group.add_argument("--dist_url", default="env://", help="Rendezvous of the processes; torchrun needs no other")
    # fmt: on


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of every evaluation."""
    # fmt: off
    g = add_weights_flags(parser)
    g.add_argument("--random_init", action="store_true", help="Evaluate the same model at random initialization: the baseline every result needs")
    g = parser.add_argument_group("data")
    g.add_argument("--dataset", default=None, help=f"One of {', '.join(datasets.DATASETS)}, or hf:PATH (default: the checkpoint's)")
    g.add_argument("--data_path", default=None, help="Folder with train/ and val/ (or test/), with train.txt and val.txt, or with tar or parquet files of both; of one set without splits, eval_cluster.py, eval_collapse.py and eval_knn.py take all images (default: the checkpoint's)")
    g.add_argument("--class_list", default=None, help="File of classes to use (default: the checkpoint's; '' for all)")
    add_loader_flags(g)
    g.add_argument("--dump_features", default=None, metavar="DIR", help="Keep the extracted features in this folder")
    g.add_argument("--load_features", default=None, metavar="DIR", help="Use the features kept there; no images and no weights are read")
    g = parser.add_argument_group("run")
    g.add_argument("--output_dir", default=None, help="Where results.jsonl goes (default: beside the weights)")
    add_run_flags(g)
    # fmt: on


def start(args: argparse.Namespace) -> torch.device:
    """Check the flags, fill in --output_dir, join the process group, try to write. Every evaluation calls it first."""
    expand_paths(args, "pretrained_weights", "data_path", "output_dir", "dump_features", "load_features")
    if args.dataset:
        args.dataset = sources.absolute_name(args.dataset)
    if args.class_list:  # '' stands for all classes
        expand_paths(args, "class_list")
    if args.pretrained_weights and args.load_features:
        raise UserError("--load_features holds features of other weights already: leave out --pretrained_weights")
    if not args.pretrained_weights and not args.load_features:
        raise UserError("--pretrained_weights is missing: give a checkpoint (or --load_features)")
    check_unread_path(args)
    given = [f"--{name}" for name in OF_FEATURES if getattr(args, name)]
    if args.load_features and given:
        raise UserError(f"{', '.join(given)} cannot change kept features: leave it out, or extract again")
    if args.output_dir is None:
        args.output_dir = args.load_features or str(Path(args.pretrained_weights).parent)
    device = launch.init(args.dist_url, args.device)
    check_output_dir(args.output_dir)
    if args.dump_features:
        check_output_dir(args.dump_features, "--dump_features")
    return device


def request_of(args: argparse.Namespace, unnamed_dataset: str) -> ModelRequest:
    """Return which network the flags ask for; of flags that a script does not have, the defaults."""
    given = {field.name: getattr(args, field.name) for field in fields(ModelRequest) if hasattr(args, field.name)}
    return ModelRequest(args.pretrained_weights, **given, unnamed_dataset=unnamed_dataset)


def open_model(args: argparse.Namespace, device: torch.device, file: WeightsFile | None = None) -> Model | None:
    """Load the model of --pretrained_weights (`file`, if it has been read already); None for kept features.

    Raises `UserError` if it has no such network, cannot take such images, or if the split to evaluate is not there.
    """
    if args.load_features:
        return None
    model = _load_and_try(request_of(args, unnamed_dataset="digits"), device, file)
    if getattr(args, "split", None) == "val" and model.dataset == "folder" and not is_undivided(args, model):
        root = Path(model.data_path or "")
        if root.is_dir() and not sources.has_split(str(root), "val"):
            raise UserError(f"--data_path {root} has no val or test folder: add one, or --split train")
    return model


def open_network(args: argparse.Namespace, device: torch.device) -> Model:
    """Load the network of --pretrained_weights for a command that brings its own images (`add_weights_flags` only).

    Raises `UserError` if the flag is missing, or if the file has no such network.
    """
    if not args.pretrained_weights:
        raise UserError("--pretrained_weights is missing: give a checkpoint, or backbone weights with --arch")
    expand_paths(args, "pretrained_weights")
    return _load_and_try(request_of(args, unnamed_dataset="folder"), device)


def _load_and_try(request: ModelRequest, device: torch.device, file: WeightsFile | None = None) -> Model:
    """Load a model, and run one image through it. Raises `UserError` if it cannot take such images."""
    model = load_model(request, device, file)
    size = model.image_size
    try:
        with torch.no_grad():
            model.backbone(torch.zeros(1, 3, size, size, device=device))
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"--image_size {size}: --arch {model.arch} cannot take such images: {reason}") from None
    return model


def is_undivided(args: argparse.Namespace, model: Model | None) -> bool:
    """Return whether the images are one set without splits, or features kept of one."""
    if model is None:
        kept = [split for split in ("train", "val", "all") if has_features(args.load_features, split)]
        return kept == ["all"]
    return model.dataset == "folder" and sources.is_undivided(model.data_path or "")


def take_all_if_undivided(args: argparse.Namespace, model: Model | None) -> None:
    """Set --split to "all", and say so, where there is nothing to split."""
    if args.split == "all" or not is_undivided(args, model):
        return
    args.split = "all"
    if model is not None and collectives.is_main():
        print(f"{printable(model.data_path)} has no train/ and no val/: all of its images are used", flush=True)


def effective_flags(args: argparse.Namespace, model: Model | None) -> dict[str, object]:
    """Return all flags as the model's file completes them (None for kept features)."""
    return vars(args) | (model.flags() if model else {})


def write_result(
    flags: dict[str, object],
    script: str,
    metrics: dict,
    data: Features,
    split: str = "val",
    train: dict[str, str] | None = None,
) -> None:
    """Append one JSON line to --output_dir/results.jsonl: metrics with everything needed to trace them.

    `flags` are those of `effective_flags`, `train` (`data_of`) the images that `data` was compared with. Only rank 0
    writes.
    """
    if not collectives.is_main():
        return
    record = {
        "script": script,
        **data.source,
        "split": split,
        **({f"train_{name}": train.get(name) for name in ("data", "data_hash", "images_sha256")} if train else {}),
        "seed": flags["seed"],
        "commit": git_commit(),
        "metrics": metrics,
        "flags": flags,
    }
    append_json_line(Path(flags["output_dir"], "results.jsonl"), record)
