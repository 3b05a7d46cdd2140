"""`--to hf`: a folder for Hugging Face's `ViTModel.from_pretrained`, with an image processor."""

import contextlib
import io
import re
from pathlib import Path

import torch
from torch import Tensor

from cplearn import backbones
from cplearn.data import augmentations, color
from cplearn.errors import UserError, WriteError
from cplearn.export import common
from cplearn.load import EvalTransform, Model

NAME, LIBRARY, SUFFIX, PACKAGES = "hf", "transformers", "", ("transformers", "safetensors.torch")
COMPARED = common.ON_IMAGES

# Names as in Hugging Face's files of ViTs, which both its version 4 and its version 5 read.
OUTSIDE = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
IN_BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def check(model: Model) -> None:
    """Raise `UserError` for a network that is none of our ViTs."""
    if not backbones.is_vit(model.arch):
        raise UserError(
            f"--to hf is for {', '.join(backbones.VITS)}, which are Hugging Face's ViTModel; {model.arch} is not: "
            "use --to timm, --to safetensors or --to onnx"
        )


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a ViT's weights under Hugging Face's names: query, key and value apart."""
    found = {}
    for name, x in state.items():
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", name)
        if block is None:
            base, dot, kind = name.rpartition(".") if name.endswith((".weight", ".bias")) else (name, "", "")
            found[f"{OUTSIDE[base]}{dot}{kind}"] = x
        elif block[2] == "attn.qkv":
            for part, rows in zip(("query", "key", "value"), x.chunk(3), strict=True):
                found[f"encoder.layer.{block[1]}.attention.attention.{part}.{block[3]}"] = rows.clone()
        else:
            found[f"encoder.layer.{block[1]}.{IN_BLOCK[block[2]]}.{block[3]}"] = x
    return found


def write(model: Model, folder: Path) -> None:
    """Write config.json, model.safetensors and preprocessor_config.json."""
    vit = model.backbone
    common.write_weights(folder / "model.safetensors", renamed(common.plain_weights(vit)))
    config = {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "hidden_size": vit.embed_dim,
        "num_hidden_layers": len(vit.blocks),
        "num_attention_heads": vit.blocks[0].attn.num_heads,
        "intermediate_size": vit.blocks[0].mlp.fc1.out_features,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": vit.norm.eps,
        "image_size": model.image_size,
        "patch_size": model.patch_size,
        "num_channels": 3,
        "qkv_bias": True,
    }
    common.write_json(folder / "config.json", config)
    common.write_json(folder / "preprocessor_config.json", preprocessing(model))


def preprocessing(model: Model) -> dict[str, object]:
    """Return the fixed view of our evaluations as an image processor's settings.

    ViTImageProcessor only resizes to a square, as we do with small images; BitImageProcessor resizes the shorter side
    and crops the center.
    """
    size, resize = model.image_size, augmentations.eval_resize(model.image_size)
    square = {"height": size, "width": size}
    if resize is None:
        kind, sizes = "ViTImageProcessor", {"size": square}
    else:
        crop = {"do_center_crop": True, "crop_size": square}
        kind, sizes = "BitImageProcessor", {"size": {"shortest_edge": resize}, **crop}
    return {
        "image_processor_type": kind,
        "do_convert_rgb": True,
        "do_resize": True,
        **sizes,
        "resample": 3,  # Pillow's number for bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(color.MEAN),
        "image_std": list(color.STD),
    }


def load(folder: Path) -> torch.nn.Module:
    """Load it as Hugging Face's users do, with nothing fetched and nothing printed."""
    import transformers

    with contextlib.redirect_stderr(io.StringIO()):
        return transformers.ViTModel.from_pretrained(
            folder.absolute(), add_pooling_layer=False, local_files_only=True
        ).eval()


def verify(model: Model, folder: Path) -> tuple[float, list[str]]:
    """Return the largest difference of features, and what is to be said of the pixels.

    Raises `WriteError` if the features are too far apart. The pixels may be: its crop can lie one pixel off.
    """
    from transformers import AutoImageProcessor

    loaded = load(folder)
    difference = common.compare(model, lambda x: loaded(pixel_values=x).last_hidden_state[:, 0], LIBRARY)
    processor = AutoImageProcessor.from_pretrained(folder.absolute(), local_files_only=True)
    image = common.sample_image()
    theirs = torch.as_tensor(processor(images=image, return_tensors="np")["pixel_values"])[0]
    ours = EvalTransform(model.image_size)(image)
    if theirs.shape != ours.shape:
        raise WriteError(f"its image processor makes {tuple(theirs.shape)} of an image, not {tuple(ours.shape)}")
    gray = float(((ours - theirs).abs() * torch.tensor(color.STD)[:, None, None]).max())
    return difference, [f"The image processor's pixels differ by up to {255 * gray:.1f} of 255 on a test image"]


def usage(path: Path) -> str:
    return f'model = transformers.ViTModel.from_pretrained("{path}", add_pooling_layer=False).eval()'
