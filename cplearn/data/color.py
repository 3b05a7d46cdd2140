"""Second half of the views: color, batched on the training device.

The same transforms, in the same order and with the same numbers as image by image, in few passes over memory: on a CPU
a few images at a time, so that they stay in its cache; on a GPU all at once, so that there are few launches.
"""

import math
from functools import lru_cache
from itertools import permutations

import torch
import torch.nn.functional as F
from torch import Tensor

from cplearn.data.scan import say
from cplearn.random_streams import random_normal

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, for every data set, as in DINO
ORDERS = torch.tensor(list(permutations(range(4))))  # of brightness, contrast, saturation, hue
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
CACHE = 2**22  # bytes of float pixels that a CPU works on at once: they and their temporaries stay in its cache


def color(
    pixels: Tensor, params: dict[str, Tensor], noise_std: float = 0.0, sigma_max: float = 2.0, views: int = 1
) -> Tensor:
    """Apply jitter, gray, blur, solarization and noise to a batch, each image by its own parameters, and normalize.

    `params` stay on the CPU: which images a transform touches is decided there, and the device is never asked.
    `noise_std` is of pixels in 0..1, `sigma_max` the largest sigma of a blur, whose kernel reaches three times as far.
    Rows that are `views` of each image in turn are given back view by view.
    Shape: pixels uint8 (n, 3, H, W) on any device; params one number per row -> float32 (n, 3, H, W).
    """
    jittered = params["order"] >= 0
    orders = ORDERS[params["order"].long().clamp(min=0)]
    # Rows that shift their hue at the same position lie side by side, those without jitter last: slices need no gather.
    hue_at = torch.where(jittered, (orders == HUE).long().argmax(1), 4)
    rows = (hue_at * len(ORDERS) + params["order"].long()).argsort(stable=True)
    target = torch.arange(len(pixels)).view(views, -1).T.flatten()
    if pixels.is_cuda and (color_kernels := _kernels(pixels.device)):
        with torch.cuda.device(pixels.device):  # Triton launches on the current one
            return color_kernels.color(
                pixels, params, orders, target, noise_std, sigma_max, *_normalization(pixels.device)
            )
    out = torch.empty(pixels.shape, device=pixels.device)
    scale, shift = _normalization(pixels.device)
    chunk = len(pixels) if pixels.is_cuda else max(1, CACHE // (4 * pixels[0].numel()))
    for part in rows.split(chunk):
        chosen = {name: value[part] for name, value in params.items()}
        source, where = (index.to(pixels.device, non_blocking=True) for index in (part, target[part]))
        x = pixels.index_select(0, source).float().mul_(1 / 255)
        x = _jitter(x, chosen, orders[part], hue_at[part])
        x = _gray_blur_solarize(x, chosen, math.ceil(3 * sigma_max))
        if noise_std > 0:
            seeds = chosen["noise_seed"].long().to(x.device, non_blocking=True)
            x += noise_std * random_normal(seeds, tuple(x.shape[1:]))
        out.index_copy_(0, where, x.mul_(scale).add_(shift))
    return out


@lru_cache
def _kernels(device: torch.device):
    """Return the module of Triton's kernels; None where they cannot be compiled: that takes triton, a C compiler and
    Python's headers."""
    try:
        from cplearn.data import color_kernels

        with torch.cuda.device(device):
            color_kernels.try_out(device)
        return color_kernels
    except Exception as error:  # of a compiler, a linker, a driver
        reason = (str(error).splitlines() or [""])[0][:150]
        say(f"WARNING: Triton does not work here ({type(error).__name__}: {reason}): colors take several times as long")
        return None


def to_float(pixels: Tensor) -> Tensor:
    return pixels.float() / 255


def normalize(x: Tensor) -> Tensor:
    scale, shift = _normalization(x.device)
    return x * scale + shift


def network_input(pixels: Tensor, device: torch.device) -> Tensor:
    """Shape: uint8 (n, 3, H, W) -> float32, normalized, on the device."""
    return normalize(to_float(pixels.to(device, non_blocking=True)))


@lru_cache
def _normalization(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return 1 / std and -mean / std, made once per device: making one on a GPU waits for it. Shape: (1, 3, 1, 1)."""
    with torch.inference_mode(False):  # kept, so it must serve training too
        mean, std = (torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1) for values in (MEAN, STD))
        return (1 / std).float().to(device), (-mean / std).float().to(device)


def _jitter(x: Tensor, params: dict[str, Tensor], orders: Tensor, hue_at: Tensor) -> Tensor:
    """Change brightness, contrast, saturation and hue in each image's own order, in place.

    Shape: x (n, 3, H, W), orders int (n, 4); hue_at int (n,), ascending: at which position hue comes, 4 for no jitter.
    """
    strengths = torch.stack([params[name] for name in ("brightness", "contrast", "saturation")])
    # Rows ends[p] to ends[p + 1] shift their hue at position p, those from ends[4] on are not jittered.
    ends = [int((hue_at < position).sum()) for position in range(5)]
    for position in range(4):
        start, stop = ends[position], ends[position + 1]
        for others in (slice(0, start), slice(stop, ends[4])):
            kind = orders[others, position]
            if len(kind):
                _blend(x[others], kind, strengths[:, others].gather(0, kind[None])[0])
        if stop > start:
            _shift_hue(x[start:stop], _column(params["hue"][start:stop], x.device))
    return x


def _blend(x: Tensor, kind: Tensor, weight: Tensor) -> None:
    """Brightness, contrast, saturation: mix each image with black, its mean gray value or its gray values, in place.

    Shape: x (n, 3, H, W), kind and weight (n,) on the CPU.
    """
    rest, other = 1 - weight, None
    if not (kind == BRIGHTNESS).all():
        other = _luma(x)
        if not (kind == SATURATION).all():
            contrast = _column((kind == CONTRAST) * rest, x.device) * other.mean((2, 3), keepdim=True)
            if (kind == SATURATION).any():
                other = other.mul_(_column((kind == SATURATION) * rest, x.device)).add_(contrast)
            else:
                other = contrast
        else:
            other.mul_(_column(rest, x.device))
    x.mul_(_column(weight, x.device))
    if other is not None:
        x.add_(other)
    if (weight > 1).any():  # a mean of two values in 0..1 is in there already
        x.clamp_(0, 1)


def _column(values: Tensor, device: torch.device) -> Tensor:
    """Shape: (n,) on the CPU -> float32 (n, 1, 1, 1) on the device."""
    return values.float().to(device, non_blocking=True).view(-1, 1, 1, 1)


def _luma(x: Tensor) -> Tensor:
    """Compute the gray value (ITU-R 601). Shape: (n, 3, H, W) -> (n, 1, H, W)."""
    r, g, b = x.split(1, dim=1)
    return (0.2989 * r).add_(g, alpha=0.587).add_(b, alpha=0.114)


def _shift_hue(x: Tensor, shift: Tensor) -> None:
    """Rotate the hue by `shift` turns, in place. Shape: x (n, 3, H, W) in 0..1, shift (n, 1, 1, 1)."""
    r, g, b = x.split(1, dim=1)
    value = torch.maximum(torch.maximum(r, g), b)
    chroma = value - torch.minimum(torch.minimum(r, g), b)
    # Hue in sixths of a turn, by the largest channel: red is 0, green 2, blue 4. Masks are floats, for a CPU
    # chooses by bool one number at a time.
    mask = torch.eq(value, g, out=torch.empty_like(value))
    hue = torch.lerp((r - g).add_(chroma, alpha=4), (b - r).add_(chroma, alpha=2), mask)
    hue = hue.lerp_(g - b, torch.eq(value, r, out=mask)).div_(chroma.clamp(min=1e-20)).add_(6 * shift)
    hue.sub_((hue / 6).floor_(), alpha=6)
    # Each channel is the smallest value plus chroma times a trapezoid of the hue, shifted by a third of a turn.
    below, above = value.sub(chroma, alpha=2), value + chroma
    torch.addcmul(below, torch.sub(hue, 3, out=mask).abs_().clamp_(1, 2), chroma, out=r)
    torch.addcmul(above, torch.sub(hue, 2, out=mask).abs_().clamp_(1, 2), chroma, value=-1, out=g)
    torch.addcmul(above, torch.sub(hue, 4, out=mask).abs_().clamp_(1, 2), chroma, value=-1, out=b)


def _gray_blur_solarize(x: Tensor, params: dict[str, Tensor], radius: int) -> Tensor:
    """Shape: x (n, 3, H, W), may be changed in place -> as x."""
    transforms = (
        (params["gray"] == 1, lambda y, _: y.copy_(_luma(y))),
        (params["sigma"] > 0, lambda y, i: _blur_apart(y, params["sigma"][i], radius)),
        (params["solarize"] == 1, lambda y, _: _solarize(y)),
    )
    for chosen, transform in transforms:
        index = chosen.nonzero().flatten()
        if len(index) == len(x):
            x = transform(x, index)
        elif len(index):
            where = index.to(x.device, non_blocking=True)
            x.index_copy_(0, where, transform(x.index_select(0, where), index))
    return x


def _solarize(x: Tensor) -> Tensor:
    """Invert what is not darker than 128 of 255."""
    mask = torch.ge(x, 128 / 255, out=torch.empty_like(x))
    return x.lerp_(1 - x, mask)


def _blur_apart(x: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Blur large images on a CPU one by one: a small sigma needs few taps."""
    if x.is_cuda or x[0].numel() < 2**16:
        return _blur(x, sigma, radius)
    return torch.cat([_blur(*part, radius) for part in zip(x.split(1), sigma.split(1), strict=True)])


def _blur(x: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Blur by a Gaussian, one sigma (pixels) per image, reflected borders; two taps at the same distance at a time.

    Shape: x (n, 3, H, W), sigma (n,) on the CPU -> as x.
    """
    kernel = torch.exp(-0.5 * (torch.arange(radius + 1) / sigma[:, None]) ** 2)
    kernel /= 2 * kernel.sum(1, keepdim=True) - kernel[:, :1]
    taps = [_column(tap, x.device) for tap in kernel.T if (tap > 5e-7).any()]
    for dim in (3, 2):
        reach = min(len(taps) - 1, x.shape[dim] - 1)
        padded = F.pad(x, (reach, reach, 0, 0) if dim == 3 else (0, 0, reach, reach), mode="reflect")
        size, x = x.shape[dim], x * taps[0]
        for distance in range(1, reach + 1):
            before, after = (padded.narrow(dim, reach + sign * distance, size) for sign in (-1, 1))
            x.addcmul_(before + after, taps[distance])
    return x
