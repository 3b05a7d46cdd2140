"""What the evaluations share: flags, a frozen model from a file, features extracted once, one JSON line a result."""

import argparse
import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from cplearn import backbones, checkpoints, random_streams
from cplearn.data import augmentations, datasets, loaders
from cplearn.distributed import collectives
from cplearn.errors import UserError
from cplearn.methods import build_method

# --- the model -----------------------------------------------------------------------------------------


@dataclass
class Model:
    """A frozen backbone in eval mode, and the method around it if the file had one."""

    backbone: nn.Module
    method: nn.Module | None
    image_size: int
    epoch: int | None


def load_model(args: argparse.Namespace, device: torch.device) -> Model:
    """Build what the weights belong to, load every key, and fill in the data flags that were not given.

    Raises `UserError` if the file is no safe checkpoint or does not fit.
    """
    state = checkpoints.load_file(args.pretrained_weights, checkpoints.DINO_CLASSES)
    if checkpoints.is_ours(state):
        theirs = argparse.Namespace(**state["args"])
        for name in ("arch", "patch_size"):
            given = getattr(args, name)
            if given is not None and given != getattr(theirs, name):
                raise UserError(
                    f"--{name} {given}, but {args.pretrained_weights} was trained with {getattr(theirs, name)}: "
                    "leave the flag out"
                )
        if args.data_path is None and args.dataset is None:
            args.data_path, args.dataset = theirs.data_path, theirs.dataset
        args.dataset = args.dataset or "folder"
        if args.class_list is None and args.dataset == theirs.dataset == "folder":
            args.class_list = theirs.class_list
        args.arch, args.patch_size = theirs.arch, theirs.patch_size
        image_size = args.image_size or theirs.image_size
        random_streams.seed_everything(
            random_streams.FOR_WEIGHTS, theirs.seed
        )  # --random_init: where the run started from
        method = build_method(theirs)
        if not args.random_init:
            checkpoints.load_into(method, state["model"], args.pretrained_weights)
        method.use(args.checkpoint_key or "teacher")
        backbone, epoch = method.evaluated, state["epoch"]
        args.method = theirs.method
    else:
        if args.arch is None:
            raise UserError(f"{args.pretrained_weights} does not say its architecture: add --arch (and --patch_size)")
        args.patch_size = args.patch_size or 16
        args.dataset = args.dataset or ("folder" if args.data_path else "digits")
        image_size = args.image_size or datasets.NATIVE_SIZE.get(args.dataset, 224)
        random_streams.seed_everything(random_streams.FOR_WEIGHTS, args.seed)
        backbone = backbones.build_backbone(args.arch, patch_size=args.patch_size, image_size=image_size)
        if not args.random_init:
            checkpoints.load_backbone(backbone, state, args.pretrained_weights, args.checkpoint_key or "teacher")
        method, epoch, args.method = None, None, None
    args.dataset = args.dataset or ("folder" if args.data_path else "digits")
    args.image_size = image_size
    if backbones.is_vit(args.arch) and image_size % args.patch_size:
        raise UserError(f"--image_size {image_size} is not a multiple of the patch size {args.patch_size}")
    (method or backbone).to(device).eval().requires_grad_(False)
    return Model(backbone, method, image_size, epoch)


# --- features -------------------------------------------------------------------------------------------


@dataclass
class Features:
    """One split, in the data set's order, on the CPU."""

    features: Tensor  # float32 (n, f)
    labels: Tensor  # int64 (n,), -1 where there are none
    codes: Tensor | None  # int64 (n,), the method's own assignment
    names: list[str]
    classes: list[str] | None
    out_dim: int | None  # number of codes of the method
    arch: str  # of the backbone
    source: dict  # weights, epoch, random_init, data: what a result has to name


def features(
    args: argparse.Namespace,
    device: torch.device,
    splits: tuple[str, ...],
    n_last_blocks: int = 1,
    *,
    labels_for: str | None = None,
) -> tuple[list[Features], Model | None]:
    """Features of the asked splits, from `--load_features`, or extracted (and kept by `--dump_features`).

    `labels_for`: script that needs class labels. Raises `UserError`, before anything is extracted, if there are
    none, if the splits have different classes, or if kept features of two splits belong to different weights.
    """
    if args.load_features:
        found = [_load_features(args.load_features, split, n_last_blocks) for split in splits]
        _check_classes([x.classes for x in found], splits, labels_for)
        sources = [{k: v for k, v in x.source.items() if not k.startswith("data")} for x in found]
        if any(source != sources[0] for source in sources):
            raise UserError(f"--load_features {args.load_features}: {' and '.join(splits)} come from different weights")
        return found, None
    model = load_model(args, device)
    data = {split: datasets.build_dataset(args.dataset, args.data_path, split, args.class_list) for split in splits}
    _check_classes([dataset.classes for dataset in data.values()], splits, labels_for)
    if args.random_init:
        train = data.get("train") or datasets.build_dataset(args.dataset, args.data_path, "train", args.class_list)
        calibrate_batch_norm(model, train, device, seed=args.seed)
    found = []
    for split, dataset in data.items():
        if collectives.is_main():
            print(f"Extracting features of {split}: {datasets.summary(dataset)}", flush=True)
        found.append(extract_features(model, dataset, args, device, n_last_blocks))
        if args.dump_features and collectives.is_main():
            checkpoints.save(_feature_file(args.dump_features, split, n_last_blocks), vars(found[-1]))
    return found, model


def _check_classes(classes: list[list[str] | None], splits: tuple[str, ...], labels_for: str | None) -> None:
    if labels_for and not all(classes):
        raise UserError(f"{labels_for} needs labels, but these images do not lie in class folders")
    if any(c != classes[0] for c in classes):
        differ = sorted(set(classes[0] or ()) ^ set(classes[-1] or ()))
        raise UserError(f"the class folders of {' and '.join(splits)} differ: {', '.join(differ[:5]) or 'their order'}")


@torch.no_grad()
def calibrate_batch_norm(model: Model, dataset, device: torch.device, *, seed: int, images: int = 2048) -> None:
    """Give batch norms of an untrained network the statistics of training images.

    At initialisation they hold mean 0 and variance 1, with which the baseline would look worse than a random
    network is (and its head would put every image on one code). Every rank takes the same images.
    """
    norms = [m for m in (model.method or model.backbone).modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over batches
        norm.train()
    order = random_streams.random_stream(random_streams.FOR_ORDER, seed).permutation(len(dataset))[:images]
    view = loaders.EvalDataset(dataset, model.image_size)
    for start in range(0, max(1, len(order) - 1), 256):  # no batch of one image, of which there are no statistics
        pixels = torch.stack([view[int(i)][0] for i in order[start : start + 256]]).to(device)
        features = model.backbone(augmentations.normalise(augmentations.to_float(pixels)))
        if model.method is not None:
            model.method.predict(features)
    for norm in norms:
        norm.eval()


def _feature_file(folder: str, split: str, n_last_blocks: int) -> Path:
    return Path(folder, f"features_{split}_last{n_last_blocks}.pth")


def has_features(folder: str, split: str, n_last_blocks: int) -> bool:
    return _feature_file(folder, split, n_last_blocks).is_file()


def _load_features(folder: str, split: str, n_last_blocks: int) -> Features:
    path = _feature_file(folder, split, n_last_blocks)
    if not path.is_file():
        raise UserError(f"--load_features {folder} has no {path.name}: extract it first with --dump_features")
    state = checkpoints.load(path)
    return Features(**{name: state[name] for name in Features.__dataclass_fields__})


@torch.inference_mode()
def extract_features(model: Model, dataset, args, device: torch.device, n_last_blocks: int = 1) -> Features:
    """Run every image through the frozen backbone once, in eval mode, float32; each rank takes its share."""
    loader = loaders.eval_loader(
        dataset,
        model.image_size,
        batch_size=args.batch_size_per_gpu,
        num_workers=loaders.default_workers(args.num_workers),
        device=device,
    )
    rows, codes = [], []
    for pixels, _, _ in loader:
        x = augmentations.normalise(augmentations.to_float(pixels.to(device, non_blocking=True)))
        rows.append(backbone_features(model.backbone, x, n_last_blocks))
        if model.method is not None and n_last_blocks == 1:
            codes.append(model.method.predict(rows[-1]))
    if not rows:
        raise UserError(f"{len(dataset)} images are too few for {collectives.world_size()} processes")
    classes = list(dataset.classes) if dataset.classes else None
    return Features(
        features=collectives.gather_rows(torch.cat(rows)).float().cpu(),
        labels=torch.as_tensor(dataset.labels).long(),
        codes=collectives.gather_rows(torch.cat(codes)).cpu() if codes else None,
        names=[str(name) for name in dataset.names],
        classes=classes,
        out_dim=model.method.out_dim if codes else None,
        arch=args.arch,
        source={
            "weights": args.pretrained_weights,
            "weights_sha256": file_sha256(args.pretrained_weights),
            "epoch": model.epoch,
            "random_init": args.random_init,
            **({"network": args.checkpoint_key or "teacher"} if hasattr(model.method, "network") else {}),
            "data": dataset.where,
            "data_hash": datasets.fingerprint(dataset),
            "image_size": model.image_size,
        },
    )


def backbone_features(backbone: nn.Module, x: Tensor, n_last_blocks: int = 1) -> Tensor:
    """Shape: (n, 3, H, W) -> (n, f * n_last_blocks)."""
    if n_last_blocks == 1:
        return backbone(x)
    if not hasattr(backbone, "last_cls_tokens"):
        raise UserError(f"--n_last_blocks {n_last_blocks} is for vit_tiny, vit_small and vit_base: leave it out")
    if n_last_blocks > len(backbone.blocks):
        raise UserError(f"--n_last_blocks {n_last_blocks} exceeds the {len(backbone.blocks)} blocks of this ViT")
    return backbone.last_cls_tokens(x, n_last_blocks)


def file_sha256(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
