"""Features of the splits of a data set: extracted once, or those that an evaluation kept earlier."""

import argparse
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor, nn

from cplearn import backbones, checkpoints, random_streams
from cplearn.data import augmentations, color, datasets, loaders, workers
from cplearn.data.identity import Identity
from cplearn.distributed import collectives
from cplearn.distributed.batch_norm import plain_average
from cplearn.errors import UserError
from cplearn.files import reading
from cplearn.load import Model
from cplearn.precision import autocast
from cplearn.text import few


@dataclass(frozen=True)
class Tokens:
    """What is taken of a backbone: its own features, or more tokens of a ViT of ours (DINO's linear probe)."""

    n_last_blocks: int = 1  # CLS tokens of so many last blocks
    average: bool = False  # and the mean of the patch tokens (--avgpool_patchtokens)

    @property
    def plain(self) -> bool:
        """Whether these are the backbone's own features, which a head takes."""
        return self.n_last_blocks == 1 and not self.average

    def file(self, folder: str, split: str) -> Path:
        """Return where they are kept by `--dump_features`."""
        return Path(folder, f"features_{split}_last{self.n_last_blocks}{'_avgpool' * self.average}.pth")

    def check(self, backbone: nn.Module) -> None:
        """Raise `UserError` for a backbone that has no such tokens."""
        if self.plain:
            return
        blocks = f"--n_last_blocks {self.n_last_blocks}"
        if not hasattr(backbone, "last_tokens"):
            flag = "--avgpool_patchtokens true" if self.average else blocks
            raise UserError(f"{flag} is for {', '.join(backbones.VITS)}: leave it out")
        if self.n_last_blocks > len(backbone.blocks):
            raise UserError(f"{blocks} exceeds the {len(backbone.blocks)} blocks of this ViT")


CLS = Tokens()


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
    source: dict  # what a result has to name: weights and data, each with a hash


def get_features(
    args: argparse.Namespace,
    model: Model | None,
    device: torch.device,
    splits: tuple[str, ...],
    tokens: Tokens = CLS,
    *,
    labels_for: str | None = None,
) -> list[Features]:
    """Extract the features of these splits (and keep them with `--dump_features`), or load them without a model.

    `labels_for`: script that needs class labels. Raises `UserError`, before anything is extracted, if there are none,
    if the splits have different classes, if kept features of two splits are of different weights or data, or if the
    backbone has no such tokens.
    """
    if model is None:
        return _load_splits(args.load_features, splits, tokens, labels_for)
    tokens.check(model.backbone)
    data = {split: model.images(split) for split in splits}
    _check_classes([dataset.classes for dataset in data.values()], splits, labels_for)
    if model.random_init:
        train = data.get("train") or model.images("train")
        calibrate_batch_norm(model, train, device, seed=args.seed)
    extracted = []
    for split, dataset in data.items():
        if collectives.is_main():
            print(f"Extracting features of {split}: {datasets.summary(dataset)}", flush=True)
        extracted.append(extract_features(model, dataset, args, device, tokens))
        if args.dump_features and collectives.is_main():
            checkpoints.save(tokens.file(args.dump_features, split), vars(extracted[-1]))
    return extracted


def _load_splits(folder: str, splits: tuple[str, ...], tokens: Tokens, labels_for: str | None) -> list[Features]:
    kept = [_load_features(folder, split, tokens) for split in splits]
    _check_classes([x.classes for x in kept], splits, labels_for)
    sources = [{k: v for k, v in x.source.items() if k not in ("data", "data_hash", "images_sha256")} for x in kept]
    other = sorted(k for x in sources for k in sources[0].keys() | x.keys() if x.get(k) != sources[0].get(k))
    if other:
        what = "data" if set(other) <= {"dataset", "data_path", "class_list"} else "weights"
        raise UserError(f"--load_features {folder}: {' and '.join(splits)} are of different {what}: extract both again")
    return kept


def _check_classes(classes: list[list[str] | None], splits: tuple[str, ...], labels_for: str | None) -> None:
    if labels_for and not all(classes):
        raise UserError(
            f"{labels_for} needs labels, but these images have none: sort them into train/CLASS/ and val/CLASS/ below "
            "--data_path (or give lists with a label per line)"
        )
    if any(c != classes[0] for c in classes):
        differ = sorted(set(classes[0] or ()) ^ set(classes[-1] or ()))
        raise UserError(f"the classes of {' and '.join(splits)} differ: {few(differ) or 'their order'}")


@torch.no_grad()
def calibrate_batch_norm(
    model: Model,
    dataset,
    device: torch.device,
    *,
    seed: int,
    images: int = 2048,
) -> None:
    """Give batch norms of an untrained network the statistics of training images.

    At initialization they hold mean 0 and variance 1, with which the baseline would look worse than a random
    network is (and its head would put every image on one code). Every rank takes the same images.
    """
    norms = [m for m in (model.method or model.backbone).modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    order = random_streams.random_stream(random_streams.FOR_ORDER, seed).permutation(len(dataset))[:images]
    starts = range(0, max(1, len(order) - 1), 256)  # no batch of one image, of which there are no statistics
    parts = [order[start : start + 256].tolist() for start in starts]
    images = loaders.EvalDataset(dataset, augmentations.eval_view(model.image_size))
    with plain_average(norms):
        for pixels, _, _ in workers.Loader(images, dataset.names, num_workers=0, batch_sampler=parts):
            features = model.backbone(color.network_input(pixels, device))
            if model.method is not None:
                model.method.predict(features)


def has_features(folder: str, split: str, tokens: Tokens = CLS) -> bool:
    """Return whether such features are kept in a folder."""
    return tokens.file(folder, split).is_file()


def _load_features(folder: str, split: str, tokens: Tokens) -> Features:
    path = tokens.file(folder, split)
    if not path.is_file():
        raise UserError(f"--load_features {folder} has no {path.name}: extract it first with --dump_features")
    state = checkpoints.load(path)
    with reading(path, "extract the features again with --dump_features"):
        kept = Features(**{field.name: state[field.name] for field in fields(Features)})
        _check_rows(kept)
    return kept


def _check_rows(kept: Features) -> None:
    """Raise ValueError for what would give wrong numbers in silence: each column has n usable rows."""
    n = len(kept.names)
    if not isinstance(kept.source, dict):
        raise ValueError("they do not say what they are of")
    if kept.features.dtype != torch.float32 or kept.features.shape[:-1] != (n,) or not kept.features.isfinite().all():
        raise ValueError(f"features are not {n} rows of finite float32")
    for rows in (kept.labels,) if kept.codes is None else (kept.labels, kept.codes):
        if rows.dtype != torch.int64 or rows.shape != (n,):
            raise ValueError(f"labels or codes are not {n} whole numbers")
    if not ((kept.labels >= -1) & (kept.labels < len(kept.classes or ()))).all():
        raise ValueError(f"labels are not below {len(kept.classes or ())}")
    if kept.codes is not None and not ((kept.codes >= 0) & (kept.codes < kept.out_dim)).all():
        raise ValueError(f"codes are not below {kept.out_dim}")


@torch.inference_mode()
def extract_features(
    model: Model, dataset, args: argparse.Namespace, device: torch.device, tokens: Tokens = CLS
) -> Features:
    """Run every image through the frozen backbone once, in eval mode, float32; each rank takes its share."""
    loader = loaders.eval_loader(
        dataset,
        model.image_size,
        batch_size=args.batch_size_per_gpu,
        num_workers=workers.default_workers(args.num_workers),
        device=device,
    )
    rows, codes = [], []
    with workers.watched(loader, args.worker_timeout) as batches:
        for pixels, _, _ in batches:
            x = color.network_input(pixels, device)
            with autocast(device, args.precision or "fp32"):
                features = backbone_features(model.backbone, x, tokens)
            rows.append(features.float().cpu())
            if model.method is not None and tokens.plain:
                codes.append(model.method.predict(features).cpu())
    if not rows:
        raise UserError(f"{len(dataset)} images are too few for {collectives.world_size()} processes")
    return Features(
        features=collectives.gather_rows(torch.cat(rows), device),
        labels=torch.as_tensor(dataset.labels).long(),
        codes=collectives.gather_rows(torch.cat(codes), device) if codes else None,
        names=[str(name) for name in dataset.names],
        classes=list(dataset.classes) if dataset.classes else None,
        out_dim=model.method.out_dim if codes else None,
        arch=model.arch,
        source={
            **model.source(),
            **({"precision": args.precision} if args.precision not in (None, "fp32") else {}),
            "image_size": model.image_size,
            "dataset": model.dataset,
            "data_path": model.data_path,
            "class_list": model.class_list,
            **data_of(dataset),
        },
    )


def data_of(dataset: datasets.ImageDataset) -> dict[str, str]:
    """Return what a result has to name of the images of a split. Every rank must call it."""
    content = collectives.on_main(lambda: Identity.of(dataset).read_sample(dataset).sha256(times=False))
    return {"data": dataset.where, "data_hash": datasets.fingerprint(dataset), "images_sha256": content}


def backbone_features(backbone: nn.Module, x: Tensor, tokens: Tokens = CLS) -> Tensor:
    """Return the backbone's features, or these tokens of a ViT side by side.

    Shape: (n, 3, H, W) -> (n, f), or (n, f * (n_last_blocks + average)).
    """
    if tokens.plain:
        return backbone(x)
    return backbone.last_tokens(x, tokens.n_last_blocks, tokens.average)
