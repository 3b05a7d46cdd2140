"""`--to safetensors`: the backbone's weights under our names, with what they are of as metadata."""

from pathlib import Path

from cplearn import tensor_files
from cplearn.export import common
from cplearn.load import Model, load_backbone

NAME, LIBRARY, SUFFIX, PACKAGES = "safetensors", "load_backbone", ".safetensors", ("safetensors.torch",)
COMPARED = common.ON_IMAGES


def check(model: Model) -> None:
    """Any network can be written."""


def write(model: Model, path: Path) -> None:
    """Write one file; its metadata hold every value of the description as JSON."""
    from safetensors.torch import save

    weights = common.plain_weights(model.backbone)
    description = common.description(model, NAME)
    description["data_sha256"] = tensor_files.safetensors_data_hash(save(weights))
    path.write_bytes(save(weights, common.metadata_of(description)))


def verify(model: Model, path: Path) -> tuple[float, list[str]]:
    """Load it with `load_backbone`, which takes everything from the file. Raises `WriteError` for other features."""
    return common.compare(model, load_backbone(str(path)).model, LIBRARY), []


def usage(path: Path) -> str:
    return f'model, transform, width = cplearn.load_backbone("{path}")'
