"""What a checkpoint is turned into: a frozen model, in one line `model, transform, width = load_backbone(path)`."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from cplearn import backbones, checkpoints, random_streams, tensor_files
from cplearn.data import augmentations, color, datasets, images, sources
from cplearn.data.identity import Identity
from cplearn.errors import UserError
from cplearn.files import reading
from cplearn.methods import build_method


@dataclass(frozen=True)
class WeightsFile:
    """The content of a file of weights, and the hash of what was read."""

    path: str
    state: dict
    sha256: str


def read_weights(path: str) -> WeightsFile:
    """Read a checkpoint of ours or of DINO, or backbone weights. Raises `UserError` if the file is not safe."""
    return WeightsFile(path, *tensor_files.load_file_and_hash(path, checkpoints.DINO_CLASSES))


@dataclass(frozen=True)
class ModelRequest:
    """Which network to load, as the flags of a script say it; None is left to the file."""

    weights: str  # path of the file
    arch: str | None = None
    patch_size: int | None = None
    image_size: int | None = None
    checkpoint_key: str | None = None  # teacher or student, where there are two
    dataset: str | None = None
    data_path: str | None = None
    class_list: str | None = None
    image_column: str | None = None
    random_init: bool = False  # the network before training, without the file's weights
    seed: int = 0  # of weights that the file does not determine
    unnamed_dataset: str = "folder"  # what weights are taken to be of where neither flags nor file say it


@dataclass(frozen=True)
class Model:
    """A frozen backbone in eval mode, the method around it if the file had one, and what file and flags say of them."""

    backbone: nn.Module
    arch: str
    patch_size: int
    image_size: int
    dataset: str
    data_path: str | None
    class_list: str | None
    image_column: str | None
    weights: str  # path of the file
    weights_sha256: str
    random_init: bool  # not the file's weights, but those that such a model starts from
    epoch: int | None = None  # epochs that the weights were trained for, if the file says so
    method: nn.Module | None = None
    method_name: str | None = None
    trained_on: str | None = None  # hash of the images that a run of ours was trained on
    network: str | None = None  # teacher or student, where the method has two

    def flags(self) -> dict[str, object]:
        """Return the flags as the file completes them."""
        names = ("arch", "patch_size", "image_size", "dataset", "data_path", "class_list", "image_column")
        return {**{name: getattr(self, name) for name in names}, "method": self.method_name}

    def source(self) -> dict[str, object]:
        """Return what a result has to name of its weights."""
        named = {name: getattr(self, name) for name in ("weights", "weights_sha256", "epoch", "random_init")}
        others = {"network": self.network, "trained_on": self.trained_on}
        return named | {name: value for name, value in others.items() if value}

    def images(self, split: str):
        """Return the data set of a split. Raises `UserError` if it is not there."""
        return sources.build_dataset(self.dataset, self.data_path, split, self.class_list, self.image_column)


def load_model(request: ModelRequest, device: torch.device, file: WeightsFile | None = None) -> Model:
    """Build the model that the weights belong to and load every key.

    `file`: the same weights, if they have been read already. Raises `UserError` if they do not fit.
    """
    augmentations.check_size("--image_size", request.image_size or 0)
    file = file or read_weights(request.weights)
    build = _run_model if checkpoints.is_ours(file.state) else _bare_model
    model = build(request, file)
    key = request.checkpoint_key
    if key and model.network is None and not isinstance(file.state.get(key), dict):
        raise UserError(f"--checkpoint_key {key}: {file.path} has no such network: leave it out")
    if backbones.is_vit(model.arch) and model.image_size % model.patch_size:
        raise UserError(f"--image_size {model.image_size} is not a multiple of the patch size {model.patch_size}")
    (model.method or model.backbone).to(device).eval().requires_grad_(False)
    return model


def _run_model(request: ModelRequest, file: WeightsFile) -> Model:
    """Build what a checkpoint of main_cplearn.py holds."""
    run = _recorded_flags(file)
    _check_same(request, file, vars(run), "was trained with")
    data_path, dataset, class_list = request.data_path, request.dataset, request.class_list
    if data_path is None and dataset is None:
        data_path, dataset = run.data_path, run.dataset
    dataset = dataset or "folder"
    if class_list is None and dataset == run.dataset:
        class_list = run.class_list
    image_column = request.image_column or getattr(run, "image_column", None)
    random_streams.seed_everything(random_streams.FOR_WEIGHTS, run.seed)  # --random_init: where the run started from
    with reading(file.path, "give a checkpoint that main_cplearn.py wrote"):
        method, network = build_method(run), request.checkpoint_key or "teacher"
    if not request.random_init:
        checkpoints.load_into(method, file.state["model"], file.path)
    method.use(network)
    return Model(
        backbone=method.evaluated,
        arch=run.arch,
        patch_size=run.patch_size,
        image_size=request.image_size or run.image_size,
        dataset=dataset,
        data_path=data_path,
        class_list=class_list,
        image_column=image_column,
        weights=file.path,
        weights_sha256=file.sha256,
        random_init=request.random_init,
        epoch=file.state["epoch"],
        method=method,
        method_name=run.method,
        trained_on=_images_of(file),
        network=network if hasattr(method, "network") else None,
    )


def _images_of(file: WeightsFile) -> str | None:
    """Return the hash of the images that a run was trained on, None of an older checkpoint."""
    with reading(file.path, "give a checkpoint that main_cplearn.py wrote"):
        kept = file.state.get("images")
        return Identity(**kept).sha256(times=False) if kept else None


# What an evaluation takes from the flags that a checkpoint records; a method checks its own.
RECORDED = {"method": str, "arch": str, "patch_size": int, "image_size": int, "dataset": str, "seed": int,
            "data_path": (str, type(None)), "class_list": (str, type(None))}  # fmt: skip


def _recorded_flags(file: WeightsFile) -> argparse.Namespace:
    """Return the flags of the run that wrote a checkpoint. Raises `UserError` for a file that is none."""
    with reading(file.path, "give a checkpoint that main_cplearn.py wrote"):
        flags = dict(file.state["args"])
        kinds = {name: isinstance(flags[name], kind) for name, kind in RECORDED.items()}
        kinds |= {"epoch": isinstance(file.state["epoch"], int), "model": isinstance(file.state["model"], dict)}
        if not all(kinds.values()):
            raise TypeError(f"{', '.join(name for name, right in kinds.items() if not right)} of the run")
        return argparse.Namespace(**flags)


def _check_same(request: ModelRequest, file: WeightsFile, recorded: dict[str, object], how: str) -> None:
    """Raise `UserError` for an architecture or patch size that is not the file's."""
    for name in ("arch", "patch_size"):
        given = getattr(request, name)
        if given is not None and recorded.get(name, given) != given:
            raise UserError(f"--{name} {given}, but {file.path} {how} {recorded[name]}: leave the flag out")


def _bare_model(request: ModelRequest, file: WeightsFile) -> Model:
    """Build a backbone alone, for weights that do not say what they belong to, or say it as export.py does."""
    exported = _exported_flags(file)
    _check_same(request, file, exported, "is of")
    arch = request.arch or exported.get("arch")
    if arch is None:
        raise UserError(f"{file.path} does not say its architecture: add --arch (and --patch_size)")
    patch_size = request.patch_size or exported.get("patch_size", 16)
    dataset = request.dataset or ("folder" if request.data_path else request.unnamed_dataset)
    image_size = request.image_size or exported.get("image_size") or datasets.NATIVE_SIZE.get(dataset, 224)
    random_streams.seed_everything(random_streams.FOR_WEIGHTS, request.seed)
    backbone = backbones.build_backbone(arch, patch_size=patch_size, image_size=image_size)
    if not request.random_init:
        checkpoints.load_backbone(backbone, file.state, file.path, request.checkpoint_key or "teacher")
    return Model(
        backbone=backbone,
        arch=arch,
        patch_size=patch_size,
        image_size=image_size,
        dataset=dataset,
        data_path=request.data_path,
        class_list=request.class_list,
        image_column=request.image_column,
        weights=file.path,
        weights_sha256=file.sha256,
        random_init=request.random_init,
        epoch=exported.get("epoch"),
    )


def _exported_flags(file: WeightsFile) -> dict[str, str | int]:
    """Return what a .safetensors of export.py says of its weights, by the flags' names; {} for other files."""
    metadata = file.state.get("metadata")
    if not isinstance(metadata, dict) or metadata.get("format") != checkpoints.EXPORTED:
        return {}
    with reading(file.path, "export the weights again"):
        numbers = {name: metadata.get(name, "null") for name in ("patch_size", "image_size", "epoch")}
        return {"arch": metadata["arch"], **{name: int(text) for name, text in numbers.items() if text != "null"}}


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
        pixels = augmentations.eval_pixels(images.to_rgb(image), self.size)
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
    request = ModelRequest(str(weights), arch, patch_size, image_size, checkpoint_key)
    with random_streams.kept_state():
        return load_model(request, torch.device(device))


def load_backbone(weights: str, **options) -> Pretrained:
    """Load a frozen backbone; the options are those of `load_pretrained`.

    Returns (model, transform, width): features of an image are `model(transform(image)[None])`, of shape (1, width).
    """
    model = load_pretrained(weights, **options)
    return Pretrained(model.backbone, EvalTransform(model.image_size), model.backbone.num_features)
