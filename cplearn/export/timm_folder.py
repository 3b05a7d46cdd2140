"""`--to timm`: a folder for `timm.create_model("local-dir:FOLDER", ...)`, whose weights go by timm's own name, too."""

from pathlib import Path

import torch

from cplearn import backbones
from cplearn.data import augmentations, color
from cplearn.errors import UserError, WriteError
from cplearn.export import common
from cplearn.load import EvalTransform, Model

NAME, LIBRARY, SUFFIX, PACKAGES = "timm", "timm", "", ("timm", "safetensors.torch")
COMPARED = common.ON_IMAGES


def check(model: Model) -> None:
    """Raise `UserError` for a network that timm does not have."""
    if not (backbones.is_vit(model.arch) or model.arch.startswith("timm:")):
        raise UserError(
            f"--to timm: timm has no {model.arch} (it has vit_tiny, vit_small, vit_base and timm:NAME): "
            "use --to safetensors or --to onnx"
        )


def architecture(model: Model) -> tuple[str, dict[str, object]]:
    """Return timm's name of the network, and the arguments that make it this one."""
    import timm

    if model.arch.startswith("timm:"):
        return model.arch.removeprefix("timm:").partition(".")[0], model.backbone.timm_options
    names = [f"{model.arch}_patch{patch}_224" for patch in (model.patch_size, 16)]
    name = next(name for name in names if timm.is_model(name))  # patch 16 is there for each; the arguments say the rest
    sizes = {"patch_size": model.patch_size, "img_size": model.image_size, "dynamic_img_size": True}
    return name, sizes


def write(model: Model, folder: Path) -> None:
    """Write config.json and model.safetensors, as timm's own tools do."""
    name, options = architecture(model)
    known = getattr(model.backbone, "pretrained_cfg", None) or {}
    size = model.image_size
    common.write_weights(folder / "model.safetensors", common.plain_weights(model.backbone))
    config = {
        "architecture": name,
        "num_classes": 0,
        "num_features": model.backbone.num_features,
        "model_args": options,
        "pretrained_cfg": {
            "input_size": [3, size, size],
            "fixed_input_size": "img_size" in options and not options.get("dynamic_img_size", False),
            "pool_size": None,
            "num_classes": 0,
            **preprocessing(model),
            "first_conv": known.get("first_conv") or ("patch_embed.proj" if backbones.is_vit(model.arch) else None),
            "classifier": known.get("classifier") or ("head" if backbones.is_vit(model.arch) else None),
        },
    }
    if isinstance(pool := getattr(model.backbone, "global_pool", None), str) and pool:
        config["global_pool"] = pool
    common.write_json(folder / "config.json", config)


def preprocessing(model: Model) -> dict[str, object]:
    """Return the fixed view of our evaluations in timm's words.

    timm resizes the shorter side to floor(size / crop_pct): half a pixel more keeps the division from falling short.
    """
    size, resize = model.image_size, augmentations.eval_resize(model.image_size)
    if resize is None:
        crop = {"crop_pct": 1.0, "crop_mode": "squash"}
    else:
        exact = size / resize
        crop = {"crop_pct": exact if int(size / exact) == resize else size / (resize + 0.5), "crop_mode": "center"}
    return {"interpolation": "bicubic", **crop, "mean": list(color.MEAN), "std": list(color.STD)}


def load(folder: Path) -> torch.nn.Module:
    """Load it as timm's users do."""
    import timm

    return timm.create_model(f"local-dir:{folder.absolute()}", True).eval()


def verify(model: Model, folder: Path) -> tuple[float, list[str]]:
    """Return the largest difference of features, and what is to be said. Raises `WriteError` if one is too large."""
    from timm.data import create_transform, resolve_data_config

    loaded = load(folder)
    difference = common.compare(model, loaded, LIBRARY)
    transform = create_transform(**resolve_data_config({}, model=loaded), is_training=False)
    image = common.sample_image()
    ours, theirs = EvalTransform(model.image_size)(image), transform(image)
    apart = common.relative_difference(ours[None], theirs[None])
    if not apart <= common.TOLERANCE:
        raise WriteError(f"timm prepares an image otherwise (difference {apart:.1e}): nothing was kept")
    return difference, [f"timm's transform gives our pixels (largest difference {apart:.1e})"]


def usage(path: Path) -> str:
    return f'model = timm.create_model("local-dir:{path}", pretrained=True).eval()'
