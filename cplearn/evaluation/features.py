"""A frozen model from a file of weights, and features: extracted once, or those that an evaluation kept earlier."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cplearn import backbones, checkpoints, random_streams
from cplearn.data import augmentations, color, datasets, loaders, sources, workers
from cplearn.distributed import collectives
from cplearn.distributed.batch_norm import plain_average
from cplearn.errors import UserError
from cplearn.methods import build_method
from cplearn.text import few

# --- the model -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WeightsFile:
    """The content of a file of weights, and the hash of what was read."""

    path: str
    state: dict
    sha256: str


def read_weights(path: str) -> WeightsFile:
    """Read a checkpoint of ours or of DINO, or backbone weights. Raises `UserError` if the file is not safe."""
    return WeightsFile(path, *checkpoints.load_file_and_hash(path, checkpoints.DINO_CLASSES))


def no_data_flags(file: WeightsFile) -> dict[str, object]:
    """Return the data flags for who brings images of their own: weights that say nothing then stand for 224 pixels."""
    dataset = None if checkpoints.is_ours(file.state) else "folder"
    return {"random_init": False, "dataset": dataset, "data_path": None, "class_list": None}


@dataclass(frozen=True)
class Model:
    """A frozen backbone in eval mode, the method around it if the file had one, and what file and flags say of them."""

    backbone: nn.Module
    method: nn.Module | None
    method_name: str | None
    arch: str
    patch_size: int
    image_size: int
    dataset: str
    data_path: str | None
    class_list: str | None
    weights: str  # path of the file
    weights_sha256: str
    epoch: int | None  # epochs that the weights were trained for, if the file says so
    random_init: bool  # not the file's weights, but those that such a model starts from
    network: str | None  # teacher or student, where the method has two

    def flags(self) -> dict[str, object]:
        """Return the flags as the file completes them."""
        names = ("arch", "patch_size", "image_size", "dataset", "data_path", "class_list")
        return {**{name: getattr(self, name) for name in names}, "method": self.method_name}

    def source(self) -> dict[str, object]:
        """Return what a result has to name of its weights."""
        named = {name: getattr(self, name) for name in ("weights", "weights_sha256", "epoch", "random_init")}
        return named | ({"network": self.network} if self.network else {})

    def images(self, split: str):
        """Return the data set of a split. Raises `UserError` if it is not there."""
        return sources.build_dataset(self.dataset, self.data_path, split, self.class_list)


def load_model(args: argparse.Namespace, device: torch.device, file: WeightsFile | None = None) -> Model:
    """Build the model that `--pretrained_weights` belong to and load every key; data flags may come from the file.

    `file`: the same weights, if they have been read already. Raises `UserError` if they do not fit.
    """
    augmentations.check_size("--image_size", args.image_size or 0)
    file = file or read_weights(args.pretrained_weights)
    build = _run_model if checkpoints.is_ours(file.state) else _bare_model
    model = build(args, file)
    key = args.checkpoint_key
    if key and model.network is None and not isinstance(file.state.get(key), dict):
        raise UserError(f"--checkpoint_key {key}: {file.path} has no such network: leave it out")
    if backbones.is_vit(model.arch) and model.image_size % model.patch_size:
        raise UserError(f"--image_size {model.image_size} is not a multiple of the patch size {model.patch_size}")
    (model.method or model.backbone).to(device).eval().requires_grad_(False)
    return model


def _run_model(args: argparse.Namespace, file: WeightsFile) -> Model:
    """Build what a checkpoint of main_cplearn.py holds."""
    run = _recorded_flags(file)
    for name in ("arch", "patch_size"):
        given = getattr(args, name)
        if given is not None and given != getattr(run, name):
            raise UserError(
                f"--{name} {given}, but {file.path} was trained with {getattr(run, name)}: leave the flag out"
            )
    data_path, dataset, class_list = args.data_path, args.dataset, args.class_list
    if data_path is None and dataset is None:
        data_path, dataset = run.data_path, run.dataset
    dataset = dataset or "folder"
    if class_list is None and dataset == run.dataset:
        class_list = run.class_list
    random_streams.seed_everything(random_streams.FOR_WEIGHTS, run.seed)  # --random_init: where the run started from
    method, network = build_method(run), args.checkpoint_key or "teacher"
    if not args.random_init:
        checkpoints.load_into(method, file.state["model"], file.path)
    method.use(network)
    return Model(
        backbone=method.evaluated,
        method=method,
        method_name=run.method,
        arch=run.arch,
        patch_size=run.patch_size,
        image_size=args.image_size or run.image_size,
        dataset=dataset,
        data_path=data_path,
        class_list=class_list,
        weights=file.path,
        weights_sha256=file.sha256,
        epoch=file.state["epoch"],
        random_init=args.random_init,
        network=network if hasattr(method, "network") else None,
    )


# What an evaluation takes from the flags that a checkpoint records; a method checks its own.
RECORDED = {"method": str, "arch": str, "patch_size": int, "image_size": int, "dataset": str, "seed": int,
            "data_path": (str, type(None)), "class_list": (str, type(None))}  # fmt: skip


def _recorded_flags(file: WeightsFile) -> argparse.Namespace:
    """Return the flags of the run that wrote a checkpoint. Raises `UserError` for a file that is none."""
    kinds = {"args": dict, "epoch": int, "model": dict}
    wrong = [name for name, kind in kinds.items() if not isinstance(file.state.get(name), kind)]
    flags = {} if wrong else file.state["args"]
    wrong = wrong or [name for name, kind in RECORDED.items() if not isinstance(flags.get(name, b""), kind)]
    if wrong:
        raise UserError(f"{file.path} records no usable {wrong[0]} of its run: it was not written by main_cplearn.py")
    return argparse.Namespace(**{str(k): v for k, v in flags.items()})


def _bare_model(args: argparse.Namespace, file: WeightsFile) -> Model:
    """Build a backbone alone, for weights that do not say what they belong to, or say it as export.py does."""
    said = _exported_flags(file)
    for name in ("arch", "patch_size"):
        given = getattr(args, name)
        if given is not None and said.get(name, given) != given:
            raise UserError(f"--{name} {given}, but {file.path} is of {said[name]}: leave the flag out")
    arch = args.arch or said.get("arch")
    if arch is None:
        raise UserError(f"{file.path} does not say its architecture: add --arch (and --patch_size)")
    patch_size = args.patch_size or said.get("patch_size", 16)
    dataset = args.dataset or ("folder" if args.data_path else "digits")
    image_size = args.image_size or said.get("image_size") or datasets.NATIVE_SIZE.get(dataset, 224)
    random_streams.seed_everything(random_streams.FOR_WEIGHTS, args.seed)
    backbone = backbones.build_backbone(arch, patch_size=patch_size, image_size=image_size)
    if not args.random_init:
        checkpoints.load_backbone(backbone, file.state, file.path, args.checkpoint_key or "teacher")
    return Model(
        backbone=backbone,
        method=None,
        method_name=None,
        arch=arch,
        patch_size=patch_size,
        image_size=image_size,
        dataset=dataset,
        data_path=args.data_path,
        class_list=args.class_list,
        weights=file.path,
        weights_sha256=file.sha256,
        epoch=said.get("epoch"),
        random_init=args.random_init,
        network=None,
    )


def _exported_flags(file: WeightsFile) -> dict[str, str | int]:
    """Return what a .safetensors of export.py says of its weights, by the flags' names; {} for other files."""
    metadata = file.state.get("metadata")
    if not isinstance(metadata, dict) or metadata.get("format") != checkpoints.EXPORTED:
        return {}
    said = {
        name: metadata[name] for name in ("patch_size", "image_size", "epoch") if metadata.get(name, "null") != "null"
    }
    if "arch" not in metadata or not all(value.isdecimal() for value in said.values()):
        raise UserError(f"{file.path} says nothing usable of its weights: export them again")
    return {"arch": metadata["arch"], **{name: int(value) for name, value in said.items()}}


# --- features -------------------------------------------------------------------------------------------


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
        calibrate_batch_norm(model, train, device, seed=args.seed, timeout=args.worker_timeout)
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
    sources = [{k: v for k, v in x.source.items() if k not in ("data", "data_hash")} for x in kept]
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
    timeout: float = workers.WORKER_TIMEOUT,
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
    loader = DataLoader(loaders.EvalDataset(dataset, augmentations.eval_view(model.image_size)), batch_sampler=parts)
    with plain_average(norms), workers.watched(loader, timeout) as batches:
        for pixels, _, _ in batches:
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
    kept = {name: state.get(name) for name in Features.__dataclass_fields__}
    if not _whole(**kept):
        raise UserError(f"{path} holds no kept features: extract them again with --dump_features")
    return Features(**kept)


def _whole(features, labels, codes, names, classes, out_dim, arch, source) -> bool:
    """Return whether these are what `Features` has, each of n images."""
    rows = isinstance(features, Tensor) and features.dtype == torch.float32 and features.dim() == 2
    shape = features.shape[:1] if rows else None
    whole = [isinstance(x, Tensor) and x.dtype == torch.int64 and x.shape == shape for x in (labels, codes)]
    texts = [isinstance(x, list) and all(isinstance(y, str) for y in x) for x in (names, classes)]
    return (
        (rows and whole[0] and texts[0] and len(names) == len(features) and isinstance(arch, str))
        and (whole[1] or codes is None)
        and (texts[1] or classes is None)
        and (out_dim is None or (type(out_dim) is int and out_dim > 1))
        and (codes is None or (out_dim is not None and bool(((codes >= 0) & (codes < out_dim)).all())))
        and (isinstance(source, dict) and all(isinstance(k, str) for k in source))
    )


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
            rows.append(backbone_features(model.backbone, x, tokens))
            if model.method is not None and tokens.plain:
                codes.append(model.method.predict(rows[-1]))
    if not rows:
        raise UserError(f"{len(dataset)} images are too few for {collectives.world_size()} processes")
    return Features(
        features=collectives.gather_rows(torch.cat(rows)).float().cpu(),
        labels=torch.as_tensor(dataset.labels).long(),
        codes=collectives.gather_rows(torch.cat(codes)).cpu() if codes else None,
        names=[str(name) for name in dataset.names],
        classes=list(dataset.classes) if dataset.classes else None,
        out_dim=model.method.out_dim if codes else None,
        arch=model.arch,
        source={
            **model.source(),
            "image_size": model.image_size,
            "dataset": model.dataset,
            "data_path": model.data_path,
            "class_list": model.class_list,
            **data_of(dataset),
        },
    )


def data_of(dataset: datasets.ImageDataset) -> dict[str, str]:
    """Return what a result has to name of the images of a split."""
    return {"data": dataset.where, "data_hash": datasets.fingerprint(dataset)}


def backbone_features(backbone: nn.Module, x: Tensor, tokens: Tokens = CLS) -> Tensor:
    """Return the backbone's features, or these tokens of a ViT side by side.

    Shape: (n, 3, H, W) -> (n, f), or (n, f * (n_last_blocks + average)).
    """
    if tokens.plain:
        return backbone(x)
    return backbone.last_tokens(x, tokens.n_last_blocks, tokens.average)
