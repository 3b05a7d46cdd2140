"""Backbones by their names on the command line (--arch): ViT, ResNet-8 and -18, any timm model."""

import difflib
import itertools
import math
import re
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cplearn.distributed.batch_norm import BatchNorm, convert_batch_norm
from cplearn.errors import UserError
from cplearn.host import physical_memory

VITS = ("vit_tiny", "vit_small", "vit_base")  # functions of vision_transformer.py
ARCHS = (*VITS, "resnet8", "resnet8bn", "resnet8_wWIDTH", "resnet8bn_wWIDTH", "resnet18", "timm:NAME")


def is_vit(arch: str) -> bool:
    return arch in VITS


def arch_name(text: str) -> str:
    """Return an --arch as it is kept: what only timm has, such as DINO's `resnet50` and `xcit_small_12_p16`, is timm's.

    Other names come back as they are, also those that nobody knows.
    """
    if text in (*VITS, "resnet18") or text.startswith(("timm:", "resnet8")):
        return text
    import timm  # which takes more than a second

    return next((f"timm:{x}" for x in (text, f"{text}_224") if "." not in text and timm.is_model(x)), text)


def build_backbone(arch: str, *, patch_size: int, image_size: int, drop_path_rate: float = 0.0) -> nn.Module:
    """Build a randomly initialized backbone: images (n, 3, H, W) -> features (n, num_features).

    Raises `UserError` for an unknown name, more weights than this machine can hold, or an image size that is no
    multiple of the ViT's patch.
    """
    if is_vit(arch):
        if patch_size < 1 or image_size % patch_size:
            raise UserError(
                f"--image_size {image_size} is not a multiple of --patch_size {patch_size}: "
                f"use {max(1, image_size // max(1, patch_size)) * max(1, patch_size)}, or another patch size"
            )
        import vision_transformer  # brings timm, at more than a second, which --help does not need

        build = getattr(vision_transformer, arch)
        return build(patch_size=patch_size, image_size=image_size, drop_path_rate=drop_path_rate)
    if arch == "resnet18":
        return resnet18_cifar()
    if match := re.fullmatch(r"resnet8(bn)?(?:_w(\d{1,9}))?", arch):
        width, norm = int(match[2] or 128), match[1] is not None
        if not 1 <= width <= 2**16:
            raise UserError(f"--arch {arch}: its width must lie between 1 and {2**16}, as in resnet8_w64")
        check_weights(lambda: ResNet8(width, norm), f"--arch {arch}")
        return ResNet8(width, norm)
    if arch.startswith("timm:"):
        return _timm_backbone(arch.removeprefix("timm:"), image_size, drop_path_rate)
    raise UserError(f"--arch {arch} is unknown: {', '.join(ARCHS)}{_near(arch)}")


def _near(arch: str) -> str:
    """Return a question that names what an unknown --arch may have meant; "" if nothing is near."""
    import timm

    ours = (*VITS, "resnet8", "resnet18")
    near = difflib.get_close_matches(arch, list(dict.fromkeys([*ours, *timm.list_models()])), n=3)
    return f"; did you mean {', '.join(x if x in ours else f'timm:{x}' for x in near)}?" if near else ""


def _timm_backbone(name: str, image_size: int, drop_path_rate: float) -> nn.Module:
    """Build any timm model: pooled features, random weights; `img_size` and drop path for models that take them."""
    import timm

    if not timm.is_model(name) or "." in name:  # after a point stands the name of somebody's weights
        raise UserError(f"--arch timm:{name} is unknown to timm {timm.__version__}{_near(name.split('.')[0])}")
    options = {"drop_path_rate": drop_path_rate, "img_size": image_size, "dynamic_img_size": True}
    for taken in (dict(x) for count in (3, 2, 1, 0) for x in itertools.combinations(options.items(), count)):
        build = partial(timm.create_model, name, pretrained=False, num_classes=0, **taken)
        try:
            check_weights(build, f"--arch timm:{name}")
            model = build()
            break
        except TypeError:  # which a model raises for an option that it does not know
            if not taken:
                raise
    model.timm_options = {name: value for name, value in taken.items() if name != "drop_path_rate"}  # for an export
    # Measured, because a few models report the width before their last layer.
    model.num_features = check_image_size(model, f"timm:{name}", image_size)
    return convert_batch_norm(model).to(memory_format=torch.channels_last)  # for convolutions


def patch_side(backbone: nn.Module, unknown: int) -> int:
    """Return the height in pixels of the patches that a backbone takes images in, `unknown` if it does not say."""
    patch = getattr(getattr(backbone, "patch_embed", None), "patch_size", unknown)
    return int(patch if isinstance(patch, int) else patch[0])


def resample_positions(backbone: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a ViT, ours or timm's, with position embeddings resampled for the image size of this one.

    Ours as DINO does it, timm's as timm does it (antialiased). Weights of other networks, and those that fit, come back
    as they are.
    """
    old, new = state.get("pos_embed"), getattr(backbone, "pos_embed", None)
    grid = getattr(getattr(backbone, "patch_embed", None), "grid_size", None)
    if grid is None or not (isinstance(old, Tensor) and isinstance(new, Tensor) and old.dim() == new.dim() == 3):
        return state
    prefix = 0 if getattr(backbone, "no_embed_class", False) else getattr(backbone, "num_prefix_tokens", 0)
    side = math.isqrt(max(0, old.shape[1] - prefix))
    if old.shape == new.shape or old.shape[2] != new.shape[2] or side * side != old.shape[1] - prefix:
        return state  # fits, or is of another network
    from timm.layers import resample_abs_pos_embed

    import vision_transformer

    if isinstance(backbone, vision_transformer.ViT):
        resampled = vision_transformer.resample_positions(old, (side, side), grid)
    else:
        resampled = resample_abs_pos_embed(old, list(grid), num_prefix_tokens=prefix)
    return {**state, "pos_embed": resampled}


def has_batch_norm(module: nn.Module) -> bool:
    """Return whether a network has batch norm, by which images of a batch see each other."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules())


def check_weights(build: Callable[[], nn.Module], flag: str) -> None:
    """Raise `UserError` if a network's weights alone exceed this machine's memory: the system would kill the process.

    It is made on torch's meta device, without memory; one that cannot be is not checked.
    """
    try:
        with torch.device("meta"):
            module = build()
    except RuntimeError:
        return
    need, have = sum(t.nbytes for t in [*module.parameters(), *module.buffers()]), physical_memory()
    if need > have:
        raise UserError(
            f"{flag}: its weights alone take {need / 1e9:,.0f} GB, this machine has {have / 1e9:.0f} GB: "
            "choose a smaller network"
        )


@torch.no_grad()
def check_image_size(backbone: nn.Module, arch: str, size: int) -> int:
    """Try one image, on the CPU; return the number of features. Raises `UserError` if it cannot take this size."""
    training = backbone.training
    try:
        width = backbone.eval()(torch.zeros(1, 3, size, size)).shape[1]
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"--arch {arch} cannot take images of {size} pixels: {reason}") from None
    backbone.train(training)
    return width


def checkpoint_blocks(backbone: nn.Module, arch: str) -> None:
    """Keep the input of each block only, and compute the rest again in backward: the same bits, less memory.

    Raises `UserError` for a network that cannot (batch norm would count its images twice).
    """
    if has_batch_norm(backbone) or not (hasattr(backbone, "set_grad_checkpointing") and hasattr(backbone, "blocks")):
        raise UserError(f"--grad_checkpointing is for ViTs, not for --arch {arch}: use --accum N")
    backbone.set_grad_checkpointing()


SLOPE = 0.2  # of every LeakyReLU (paper, Table 5)


class _Block(nn.Module):
    """Pre-activation block without normalization (paper, Table 5): two 3x3 convolutions and a shortcut.

    The shortcuts of blocks 2 to 4 are not printed in the paper: the pooled identity, or the identity.
    """

    def __init__(self, in_channels: int, channels: int, *, pool: bool, first: bool = False, norm: bool = False):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, channels, 1) if in_channels != channels else nn.Identity()
        self.norm1, self.norm2 = (BatchNorm(channels) if norm else nn.Identity() for _ in range(2))
        self.pool, self.first = pool, first

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.first else F.leaky_relu(x, SLOPE)
        y = self.norm2(self.conv2(F.leaky_relu(self.norm1(self.conv1(y)), SLOPE)))
        if self.pool:
            x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
        return self.shortcut(x) + y


class ResNet8(nn.Module):
    """ResNet-8 of the paper's Table 5: width F = 128 (256 for CIFAR-100), no normalization layers.

    `norm=True` puts batch norm behind every 3x3 convolution: not the paper's network, but one that learns in
    minutes on a CPU (results/cifar10_dictionary_size.md).

    Shape: (n, 3, H, W), H and W at least 4 -> (n, F).
    """

    def __init__(self, width: int = 128, norm: bool = False):
        super().__init__()
        self.blocks = nn.Sequential(
            _Block(3, width, pool=True, first=True, norm=norm),
            _Block(width, width, pool=True, norm=norm),
            _Block(width, width, pool=False, norm=norm),
            _Block(width, width, pool=False, norm=norm),
        )
        self.num_features = width
        self.to(memory_format=torch.channels_last)  # 1.4 times as fast on a CPU

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x.contiguous(memory_format=torch.channels_last)).mean((2, 3))


def resnet18_cifar() -> nn.Module:
    """Build torchvision's ResNet-18 with a 3x3 stem of stride 1 and no max pooling; 512 features.

    Its batch norm takes the statistics of all ranks.
    """
    import torchvision

    net = torchvision.models.resnet18(weights=None, norm_layer=BatchNorm)
    net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    net.maxpool = nn.Identity()
    net.fc = nn.Identity()
    net.num_features = 512
    return net.to(memory_format=torch.channels_last)
