"""`--to safetensors`: the backbone's weights under our names, with what they are of as metadata."""

import json
from pathlib import Path

from cplearn import checkpoints
from cplearn.errors import UserError
from cplearn.export import common
from cplearn.load import Model, load_backbone

NAME, LIBRARY, SUFFIX, PACKAGES = "safetensors", "load_backbone", ".safetensors", ("safetensors.torch",)
COMPARED = common.ON_IMAGES


def check(model: Model) -> None:
    """Any network can be written."""


def is_earlier(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return checkpoints.safetensors_metadata(file, path).get("format") == checkpoints.EXPORTED
    except (OSError, UserError):
        return False


def write(model: Model, path: Path) -> None:
    """Write one file; its metadata hold every value of the description as JSON."""
    save = common.need("safetensors.torch", NAME).save
    weights = common.plain_weights(model.backbone)
    said = {**common.description(model, NAME), "data_sha256": checkpoints.safetensors_data_hash(save(weights))}
    metadata = {key: value if isinstance(value, str) else json.dumps(value) for key, value in said.items()}
    path.write_bytes(save(weights, metadata))


def verify(model: Model, path: Path) -> tuple[float, list[str]]:
    """Load it with `load_backbone`, which takes everything from the file. Raises `WriteError` for other features."""
    return common.compare(model, load_backbone(str(path)).model, common.normalized, LIBRARY), []


def usage(path: Path) -> str:
    return f'model, transform, width = cplearn.load_backbone("{path}")'
