"""What a checkpoint is turned into: a frozen model, in one line `model, transform, width = load_backbone(path)`."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from cplearn import backbones, checkpoints, random_streams
from cplearn.data import augmentations, color, datasets, sources
from cplearn.errors import UserError
from cplearn.methods import build_method


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


# --- for any code ------------------------------------------------------------------------------------------


class Pretrained(NamedTuple):
    """What `load_backbone` returns."""

    model: nn.Module  # in eval mode, without gradients: images (n, 3, H, W) -> features (n, width)
    transform: Callable[[Image.Image], Tensor]  # PIL image -> (3, image_size, image_size), normalized
    width: int


class EvalTransform:
    """The fixed view of every evaluation, as the network takes it.

    Shape: PIL image of any mode and size -> float32 (3, size, size).
    """

    def __init__(self, size: int):
        self.size = size

    def __call__(self, image: Image.Image) -> Tensor:
        pixels = augmentations.eval_pixels(datasets.to_rgb(image), self.size)
        return color.network_input(pixels[None], pixels.device)[0]

    def __repr__(self) -> str:
        return f"EvalTransform(size={self.size})"


def load_pretrained(
    weights: str,
    *,
    arch: str | None = None,
    patch_size: int | None = None,
    image_size: int | None = None,
    checkpoint_key: str | None = None,
    device: str | torch.device = "cpu",
) -> Model:
    """Load a checkpoint of main_cplearn.py with its head, or backbone weights of DINO or timm (then name `arch`).

    `image_size` is the checkpoint's, or 224, unless given. Needs no process group and no parser.
    Raises `UserError` if the file is damaged, unsafe, or does not fit.
    """
    file = read_weights(str(weights))
    flags = argparse.Namespace(
        pretrained_weights=file.path, arch=arch, patch_size=patch_size, image_size=image_size,
        checkpoint_key=checkpoint_key, seed=0, **no_data_flags(file),
    )  # fmt: skip
    with random_streams.kept_state():
        return load_model(flags, torch.device(device), file)


def load_backbone(weights: str, **options) -> Pretrained:
    """Load a frozen backbone; the options are those of `load_pretrained`.

    Returns (model, transform, width): features of an image are `model(transform(image)[None])`, of shape (1, width).
    """
    model = load_pretrained(weights, **options)
    return Pretrained(model.backbone, EvalTransform(model.image_size), model.backbone.num_features)
