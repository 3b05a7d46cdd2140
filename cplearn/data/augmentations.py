"""How one image becomes views, in two halves.

Geometry (crop, flip) runs in the loader's worker and leaves uint8 pixels. Color (jitter, gray, blur,
solarize, noise, normalize) runs batched on the training device. Every random number of a view is drawn from
(seed, epoch, sample, view) by `draw` and from nothing else, so a view does not depend on which worker made
it, or when.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import permutations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from cplearn.errors import UserError
from cplearn.random_streams import FOR_VIEWS, random_normal, random_stream

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, for every data set, as in DINO

BICUBIC = Image.Resampling.BICUBIC
ORDERS = torch.tensor(list(permutations(range(4))))  # of brightness, contrast, saturation, hue


@dataclass(frozen=True)
class View:
    """One kind of view: size in pixels, ranges and probabilities of its random transforms."""

    size: int
    scale: tuple[float, float] = (0.4, 1.0)  # of the crop's area
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    pad: int = 0  # > 0: pad (reflecting) and crop at native size, instead of a random resized crop
    flip_p: float = 0.5
    jitter_p: float = 0.0
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)  # brightness, contrast, saturation, hue
    gray_p: float = 0.0
    blur_p: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels
    solarize_p: float = 0.0
    noise_std: float = 0.0  # of pixels in 0..1


def dino_views(size, local_size, n_local, global_scale, local_scale) -> list[View]:
    """Return DINO's views: blur on view 1, rarely on 2, half the time on local crops; solarization on view 2."""
    color = View(size, scale=global_scale, jitter_p=0.8, gray_p=0.2)
    local = replace(color, size=local_size, scale=local_scale, blur_p=0.5)
    return [replace(color, blur_p=1.0), replace(color, blur_p=0.1, solarize_p=0.2), *[local] * n_local]


def cifar_views(size, local_size, n_local, global_scale, local_scale, flip_p=0.5) -> list[View]:
    """Return the paper's views for CIFAR and SVHN (Table 6): pad 4 and crop, rare jitter and gray, noise 0.03."""
    view = View(size, pad=4, flip_p=flip_p, jitter_p=0.1, jitter=(0.4, 0.4, 0.4, 0.1), gray_p=0.1, noise_std=0.03)
    local = replace(view, size=local_size, pad=0, scale=local_scale)
    return [view, view, *[local] * n_local]


def cifar_strong_views(size, local_size, n_local, global_scale, local_scale) -> list[View]:
    """Return stronger views for 32 x 32: random resized crops and DINO's colors, no blur; solarization on view 2."""
    view = View(size, scale=global_scale, jitter_p=0.8, gray_p=0.2)
    local = replace(view, size=local_size, scale=local_scale)
    return [view, replace(view, solarize_p=0.2), *[local] * n_local]


def svhn_views(size, local_size, n_local, global_scale, local_scale) -> list[View]:
    """Return the views for CIFAR without flips: a mirrored digit is another one (Table 6)."""
    return cifar_views(size, local_size, n_local, global_scale, local_scale, flip_p=0.0)


def digits_views(size, local_size, n_local, global_scale, local_scale) -> list[View]:
    """Return random crops with a little blur and noise: handwriting has no color and must not be mirrored."""
    view = View(size, scale=global_scale, flip_p=0.0, blur_p=0.5, blur_sigma=(0.1, 1.5), noise_std=0.05)
    return [view, view, *[replace(view, size=local_size, scale=local_scale)] * n_local]


RECIPES = {
    "dino": dino_views,
    "cifar": cifar_views,
    "cifar_strong": cifar_strong_views,
    "svhn": svhn_views,
    "digits": digits_views,
}


def build_views(recipe: str, **sizes) -> list[View]:
    """Build the views of a recipe, global crops first. Raises `UserError` with the known recipes."""
    if recipe not in RECIPES:
        raise UserError(f"--augmentation {recipe} is unknown: {', '.join(RECIPES)}")
    views = RECIPES[recipe](**sizes)
    for view in views:
        if view.size <= view.pad:
            raise UserError(f"--augmentation {recipe} pads by {view.pad} pixels: --image_size {view.size} is too small")
    return views


# --- random numbers ----------------------------------------------------------------------------------


def rng_for(seed: int, epoch: int, sample: int, view: int) -> np.random.Generator:
    return random_stream(FOR_VIEWS, seed, epoch, sample, view)


def draw(view: View, width: int, height: int, rng: np.random.Generator) -> dict[str, float | int]:
    """Draw all random numbers of one view of one image: a box in pixels, and color parameters.

    Every number is drawn whether it is used or not, so that changing one probability leaves the rest alone.
    """
    u = rng.random(16)

    def between(low: float, high: float, x: float) -> float:
        return low + (high - low) * x

    jitter = u[0] < view.jitter_p
    b, c, s, h = view.jitter
    params = {
        "flip": int(u[1] < view.flip_p),
        "brightness": between(1 - b, 1 + b, u[2]) if jitter else 1.0,
        "contrast": between(1 - c, 1 + c, u[3]) if jitter else 1.0,
        "saturation": between(1 - s, 1 + s, u[4]) if jitter else 1.0,
        "hue": between(-h, h, u[5]) if jitter else 0.0,
        "order": int(u[6] * len(ORDERS)) if jitter else -1,  # -1: no jitter
        "gray": int(u[7] < view.gray_p),
        "sigma": between(*view.blur_sigma, u[8]) if u[9] < view.blur_p else 0.0,
        "solarize": int(u[10] < view.solarize_p),
        "noise_seed": int(u[11] * 2**52) if view.noise_std > 0 else -1,
    }
    if view.pad:
        params["left"] = int(u[12] * (2 * view.pad + 1))
        params["top"] = int(u[13] * (2 * view.pad + 1))
        params["width"] = params["height"] = view.size
    else:
        params |= _crop_box(view, width, height, rng)
    return params


def _crop_box(view: View, width: int, height: int, rng: np.random.Generator) -> dict[str, int]:
    """Draw the box of a random resized crop: area and log aspect ratio uniform, ten tries, then a center crop."""
    log_ratio = np.log(view.ratio)
    for _ in range(10):
        area = width * height * rng.uniform(*view.scale)
        ratio = math.exp(rng.uniform(*log_ratio))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
            return {"left": left, "top": top, "width": w, "height": h}
    w = min(width, max(1, round(height * view.ratio[1])))
    h = min(height, max(1, round(width / view.ratio[0])))
    return {"left": (width - w) // 2, "top": (height - h) // 2, "width": w, "height": h}


# --- first half: geometry, one image, uint8 ----------------------------------------------------------


def _functional():
    """Import torchvision's transforms when an image is first cut: that takes a second, which --help does not need."""
    from torchvision.transforms.v2 import functional

    return functional


def crop(image: Image.Image, view: View, params: dict) -> Tensor:
    """Cut and mirror one view. Shape: PIL image -> uint8 (3, size, size)."""
    tvf = _functional()
    box = (params["top"], params["left"], params["height"], params["width"])
    if view.pad:
        if image.size != (view.size, view.size):
            image = tvf.resize(image, [view.size, view.size], interpolation=BICUBIC)
        pixels = tvf.crop(tvf.pad(tvf.pil_to_tensor(image), view.pad, padding_mode="reflect"), *box)
    else:
        size = [view.size, view.size]
        pixels = tvf.pil_to_tensor(tvf.resized_crop(image, *box, size, interpolation=BICUBIC))
    return pixels.flip(-1) if params["flip"] else pixels


def eval_pixels(image: Image.Image, size: int) -> Tensor:
    """Make the fixed view of every evaluation: shorter side to 256/224 of `size`, center crop (DINO); small images
    (size below 96) are only resized, because their border matters. Shape: PIL image -> uint8 (3, size, size)."""
    tvf = _functional()
    if size < 96:
        image = tvf.resize(image, [size, size], interpolation=BICUBIC)
    else:
        image = tvf.resize(image, [round(size * 256 / 224)], interpolation=BICUBIC)
        image = tvf.center_crop(image, [size, size])
    return tvf.pil_to_tensor(image)


# --- second half: color, batched, on the device -----------------------------------------------------


def color(pixels: Tensor, params: dict[str, Tensor], view: View) -> Tensor:
    """Apply the color half to one view of a batch, and normalize.

    `params` stay on the CPU: which images a transform touches is decided there, and the device is never asked.
    Shape: pixels uint8 (n, 3, H, W) on any device; params one number per image -> float32 (n, 3, H, W).
    """
    x = to_float(pixels)
    if view.jitter_p > 0:
        x = _jitter(x, params)
    if view.gray_p > 0:
        x = _on_rows(x, params["gray"] == 1, lambda y, _: _luma(y).expand_as(y))
    if view.blur_p > 0:
        x = _on_rows(x, params["sigma"] > 0, lambda y, i: _blur(y, params["sigma"][i], view.blur_sigma[1]))
    if view.solarize_p > 0:
        x = _on_rows(x, params["solarize"] == 1, lambda y, _: torch.where(y >= 128 / 255, 1 - y, y))
    if view.noise_std > 0:
        seeds = params["noise_seed"].to(x.device, non_blocking=True)
        x = x + view.noise_std * random_normal(seeds, tuple(x.shape[1:]))
    return normalize(x)


def color_views(crops: list, views: list[View], device: torch.device) -> list[Tensor]:
    """Apply the color half to a batch of each view. Shape: V x (uint8 (n, 3, H_v, W_v), params) -> V x float32."""
    return [
        color(pixels.to(device, non_blocking=True), params, view)
        for (pixels, params), view in zip(crops, views, strict=True)
    ]


def to_float(pixels: Tensor) -> Tensor:
    return pixels.float() / 255


def normalize(x: Tensor) -> Tensor:
    return (x - _per_channel(MEAN, x.device)) / _per_channel(STD, x.device)


@lru_cache
def _per_channel(values: tuple[float, float, float], device: torch.device) -> Tensor:
    """Make a constant once per device: making one on a GPU waits for it. Shape: -> (1, 3, 1, 1)."""
    with torch.inference_mode(False):  # kept, so it must serve training too
        return torch.tensor(values, device=device).view(1, 3, 1, 1)


def _on_rows(x: Tensor, chosen: Tensor, transform) -> Tensor:
    """Apply transform(rows, their indices on the CPU) to the chosen images, in place; `chosen` is bool on the CPU."""
    index = chosen.nonzero().flatten()
    if len(index) == 0:
        return x
    where = index.to(x.device, non_blocking=True)
    return x.index_copy_(0, where, transform(x[where], index))


def _jitter(x: Tensor, params: dict[str, Tensor]) -> Tensor:
    """Change brightness, contrast, saturation and hue in each image's own order."""

    def column(name: str, index: Tensor) -> Tensor:
        return params[name][index].float().to(x.device, non_blocking=True).view(-1, 1, 1, 1)

    steps = (
        lambda y, i: (y * column("brightness", i)).clamp(0, 1),
        lambda y, i: _blend(y, _luma(y).mean((1, 2, 3), keepdim=True), column("contrast", i)),
        lambda y, i: _blend(y, _luma(y), column("saturation", i)),
        lambda y, i: _shift_hue(y, column("hue", i)),
    )
    jittered = params["order"] >= 0
    order = ORDERS[params["order"].clamp(min=0)]
    for position in range(4):
        for k, step in enumerate(steps):
            x = _on_rows(x, jittered & (order[:, position] == k), step)
    return x


def _blend(x: Tensor, other: Tensor, weight: Tensor) -> Tensor:
    return (weight * x + (1 - weight) * other).clamp(0, 1)


def _luma(x: Tensor) -> Tensor:
    """Compute the gray value (ITU-R 601). Shape: (n, 3, H, W) -> (n, 1, H, W)."""
    return (x * _per_channel((0.2989, 0.587, 0.114), x.device)).sum(1, keepdim=True)


def _shift_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Rotate the hue by `shift` turns. Shape: x (n, 3, H, W) in 0..1, shift (n, 1, 1, 1)."""
    value, which = x.max(1, keepdim=True)
    chroma = value - x.amin(1, keepdim=True)
    r, g, b = x.split(1, dim=1)
    safe = torch.where(chroma > 0, chroma, torch.ones_like(chroma))
    sextant = torch.where(which == 0, (g - b) / safe, torch.where(which == 1, 2 + (b - r) / safe, 4 + (r - g) / safe))
    hue = (sextant / 6 + shift) % 1.0
    # Each channel is `value` minus chroma times a trapezoid of the hue, shifted by a third of a turn.
    k = (_per_channel((5.0, 3.0, 1.0), x.device) + hue * 6) % 6
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


def _blur(x: Tensor, sigma: Tensor, sigma_max: float) -> Tensor:
    """Blur by a Gaussian, one sigma (pixels) per image, reflected borders.

    Shape: x (n, 3, H, W), sigma (n,) on the CPU -> as x.
    """
    n, channels, height, width = x.shape
    radius = min(math.ceil(3 * sigma_max), height - 1, width - 1)
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (offsets[None] / sigma.float()[:, None]) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).to(x.device, non_blocking=True)
    kernel = kernel.repeat_interleave(channels, 0)[:, None, None]  # (n * 3, 1, 1, taps)
    x = F.pad(x.reshape(1, n * channels, height, width), (radius,) * 4, mode="reflect")
    x = F.conv2d(x, kernel, groups=n * channels)
    x = F.conv2d(x, kernel.transpose(2, 3), groups=n * channels)
    return x.view(n, channels, height, width)
