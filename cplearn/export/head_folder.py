"""`--to head`: projector and the dictionary's recipe, with a page of NumPy that turns features into codes."""

import copy
import hashlib
import json
import runpy
from pathlib import Path

import numpy as np
import torch

from cplearn.data import color
from cplearn.errors import UserError, WriteError
from cplearn.export import common
from cplearn.load import Model
from cplearn.loss import DICTIONARIES
from cplearn.loss.hadamard import hadamard
from cplearn_head import CPLearnHead

NAME, LIBRARY, SUFFIX, PACKAGES = "head", "codes.py", "", ("safetensors.torch",)
SOURCE = Path(__file__).with_name("codes.py")
NOISE = 256  # random features that are compared, beside those of random images
COMPARED = f"the features of {max(common.BATCHES)} random images and {NOISE} random ones"


def check(model: Model) -> None:
    """Raise `UserError` for weights without a head with a frozen dictionary."""
    if model.method is None:
        raise UserError(f"--to head: {model.weights} is a backbone alone: give a checkpoint of main_cplearn.py")
    if not isinstance(getattr(model.method, "head", None), CPLearnHead):
        raise UserError(
            f"--to head is for --method cplearn, whose codes are a seed; {model.weights} is of --method "
            f"{model.method_name}: extract_features.py writes the codes of its images"
        )


def write(model: Model, folder: Path) -> None:
    """Write head.safetensors (tensors), head.json (numbers) and codes.py (how to use both)."""
    head = model.method.head
    (kind,) = (name for name, of in DICTIONARIES.items() if of is type(head.dictionary))
    weights = {k: x for k, x in common.plain_weights(head).items() if k.startswith(("linear.", "norm."))}
    weights.pop("norm.num_batches_tracked")
    if kind == "hadamard":
        weights["hadamard"] = hadamard(head.dictionary.embed_dim).to(torch.int8)
    about = {
        **common.description(model, NAME),
        "in_dim": head.linear.in_features,
        "dictionary": kind,
        **head.dictionary.description(),
        "activation": head.activation,
        "norm_eps": head.norm.eps,
        "logit_scale": head.scale * head.kappa,  # p = softmax(logit_scale * h W)
    }
    common.write_weights(folder / "head.safetensors", weights)
    common.write_json(folder / "head.json", about)
    (folder / "codes.py").write_bytes(SOURCE.read_bytes())


@torch.inference_mode()
def verify(model: Model, folder: Path) -> tuple[float, list[str]]:
    """Run the codes.py that was written: dictionary by its checksum, embeddings and codes of random features.

    Embeddings are compared in float64, in which rounding decides nothing. Raises `WriteError` if something differs.
    """
    from safetensors.numpy import load_file

    written = runpy.run_path(str(folder / "codes.py"))
    head, about = load_file(folder / "head.safetensors"), json.loads((folder / "head.json").read_text())
    digest = hashlib.sha256()
    for start in range(0, about["out_dim"], 8192):
        codes = written["dictionary"](head, about, start, min(start + 8192, about["out_dim"]))
        digest.update(np.packbits(codes > 0, axis=1, bitorder="little").tobytes())
    if digest.hexdigest() != about["checksum"]:
        raise WriteError("codes.py draws another dictionary than the checkpoint's: nothing was kept")
    real = model.backbone(color.normalize(common.random_pixels(max(common.BATCHES), model.image_size)))
    noise = torch.randn(NOISE, real.shape[1], generator=torch.Generator().manual_seed(1))
    features = torch.cat([real, real.mean(0) + noise * real.std()])
    ours = copy.deepcopy(model.method.head).double()(features.double())
    theirs = torch.from_numpy(written["embed"](head, about, features.numpy()))
    difference = common.check_difference(common.relative_difference(ours, theirs), LIBRARY)
    equal = int((torch.from_numpy(written["assign"](folder, features.numpy())) == model.method.predict(features)).sum())
    return difference, [f"The dictionary has its checksum; {equal} of {len(features)} codes are ours in float32"]


def usage(path: Path) -> str:
    return f'numbers = runpy.run_path("{path}/codes.py")["assign"]("{path}", features)'
