"""`--to onnx`: one file for onnxruntime, with a dynamic batch and a fixed image size."""

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from cplearn.data import color
from cplearn.errors import UserError
from cplearn.export import common
from cplearn.load import Model

NAME, LIBRARY, SUFFIX, PACKAGES = "onnx", "onnxruntime", ".onnx", ("onnx", "onnxscript", "onnxruntime")
COMPARED = common.ON_IMAGES
OPSET = 18
LARGEST = 1_900_000_000  # bytes; an ONNX file holds 2 GiB


class WithNormalization(nn.Module):
    """A backbone that takes pixels in 0..1. Shape: (n, 3, H, W) -> (n, f)."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone
        mean, std = (torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1) for values in (color.MEAN, color.STD))
        self.register_buffer("scale", (1 / std).float())
        self.register_buffer("shift", (-mean / std).float())

    def forward(self, pixels: Tensor) -> Tensor:
        return self.backbone(pixels * self.scale + self.shift)


def check(model: Model) -> None:
    """Raise `UserError` if the weights are more than one file can hold."""
    size = sum(x.nbytes for x in model.backbone.state_dict().values())
    if size > LARGEST:
        raise UserError(
            f"--to onnx: {size / 1e9:.1f} GB of weights exceed the 2 GiB of an ONNX file: use --to safetensors"
        )


def write(model: Model, path: Path, with_preprocessing: bool = False) -> None:
    """Trace the network in eval mode and write it with its metadata."""
    import onnx

    network = WithNormalization(model.backbone) if with_preprocessing else model.backbone
    example = torch.zeros(2, 3, model.image_size, model.image_size)
    with quiet():
        program = torch.onnx.export(
            network,
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=["pixels"],
            output_names=["features"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    proto = program.model_proto
    description = {**common.description(model, NAME), "input": "0..1" if with_preprocessing else "normalized"}
    onnx.helper.set_model_props(proto, common.metadata_of(description))
    path.write_bytes(proto.SerializeToString())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporter's notes on its own workings to itself."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(before)


def load(path: Path) -> Callable[[Tensor], Tensor]:
    """Load it with onnxruntime, on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(["features"], {"pixels": x.numpy()})[0])


def verify(model: Model, path: Path, with_preprocessing: bool = False) -> tuple[float, list[str]]:
    """Run it with batches of 1 and 3. Raises `WriteError` for other features."""
    prepare = (lambda x: x) if with_preprocessing else color.normalize
    kind = "pixels in 0..1" if with_preprocessing else "normalized pixels"
    size = model.image_size
    shape = (
        f"input `pixels` (batch, 3, {size}, {size}), {kind}; output `features` (batch, {model.backbone.num_features})"
    )
    return common.compare(model, load(path), LIBRARY, prepare), [f"Opset {OPSET}; {shape}"]


def usage(path: Path) -> str:
    return f'onnxruntime.InferenceSession("{path}").run(["features"], {{"pixels": pixels}})'
