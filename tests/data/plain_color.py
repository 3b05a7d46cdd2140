"""The color half of the views in plain form, one transform after the other: what `color` must equal."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from cplearn.data.augmentations import View
from cplearn.data.color import MEAN, ORDERS, STD
from cplearn.random_streams import random_normal


def plain_color(pixels: Tensor, params: dict[str, Tensor], view: View) -> Tensor:
    """Apply the color half to one view of a batch, and normalize.

    `params` stay on the CPU: which images a transform touches is decided there, and the device is never asked.
    Shape: pixels uint8 (n, 3, H, W) on any device; params one number per image -> float32 (n, 3, H, W).
    """
    x = pixels.float() / 255
    if view.jitter_p > 0:
        x = _jitter(x, params)
    if view.gray_p > 0:
        x = _on_rows(x, params["gray"] == 1, lambda y, _: _luma(y).expand_as(y))
    if view.blur_p > 0:
        x = _on_rows(x, params["sigma"] > 0, lambda y, i: _blur(y, params["sigma"][i], view.blur_sigma[1]))
    if view.solarize_p > 0:
        x = _on_rows(x, params["solarize"] == 1, lambda y, _: torch.where(y >= 128 / 255, 1 - y, y))
    if view.noise_std > 0:
        seeds = params["noise_seed"].long()
        x = x + view.noise_std * random_normal(seeds, tuple(x.shape[1:]))
    return (x - _per_channel(MEAN)) / _per_channel(STD)


def _per_channel(values: tuple[float, float, float]) -> Tensor:
    return torch.tensor(values).view(1, 3, 1, 1)


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
    order = ORDERS[params["order"].long().clamp(min=0)]
    for position in range(4):
        for k, step in enumerate(steps):
            x = _on_rows(x, jittered & (order[:, position] == k), step)
    return x


def _blend(x: Tensor, other: Tensor, weight: Tensor) -> Tensor:
    return (weight * x + (1 - weight) * other).clamp(0, 1)


def _luma(x: Tensor) -> Tensor:
    """Compute the gray value (ITU-R 601). Shape: (n, 3, H, W) -> (n, 1, H, W)."""
    return (x * _per_channel((0.2989, 0.587, 0.114))).sum(1, keepdim=True)


def _shift_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Rotate the hue by `shift` turns. Shape: x (n, 3, H, W) in 0..1, shift (n, 1, 1, 1)."""
    value, which = x.max(1, keepdim=True)
    chroma = value - x.amin(1, keepdim=True)
    r, g, b = x.split(1, dim=1)
    safe = torch.where(chroma > 0, chroma, torch.ones_like(chroma))
    sextant = torch.where(which == 0, (g - b) / safe, torch.where(which == 1, 2 + (b - r) / safe, 4 + (r - g) / safe))
    hue = (sextant / 6 + shift) % 1.0
    # Each channel is `value` minus chroma times a trapezoid of the hue, shifted by a third of a turn.
    k = (_per_channel((5.0, 3.0, 1.0)) + hue * 6) % 6
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
