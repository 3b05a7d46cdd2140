"""`color.color` for GPUs, in kernels of Triton: each image's own order of transforms in one pass over its pixels.

To be imported only on a GPU, or in Triton's interpreter (TRITON_INTERPRET=1), in which it runs anywhere, slowly.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from cplearn.random_streams import random_normal

BLOCK = 1024  # pixels of a program
BRIGHTNESS, CONTRAST, SATURATION = (tl.constexpr(kind) for kind in range(3))  # as in color.py, and hue
# Columns of a row: which transform comes first to fourth (-1: none), how strong each is by kind, and the rest.
ORDER, STRENGTH, GRAY, SOLARIZE, TARGET, COLUMNS = (tl.constexpr(k) for k in (0, 4, 8, 9, 10, 11))


@triton.jit
def _luma(r, g, b):
    return 0.2989 * r + 0.587 * g + 0.114 * b


@triton.jit
def _mixed(x, other, weight):
    return tl.minimum(tl.maximum(weight * x + (1 - weight) * other, 0.0), 1.0)


@triton.jit
def _turned(r, g, b, turns):
    """Rotate the hue (`color._shift_hue`)."""
    value = tl.maximum(tl.maximum(r, g), b)
    chroma = value - tl.minimum(tl.minimum(r, g), b)
    hue = tl.where(value == g, (b - r) + 2 * chroma, (r - g) + 4 * chroma)
    hue = tl.where(value == r, g - b, hue) / tl.maximum(chroma, 1e-20) + 6 * turns
    hue -= 6 * tl.floor(hue / 6)
    below, above = value - 2 * chroma, value + chroma
    r = below + chroma * tl.minimum(tl.maximum(tl.abs(hue - 3), 1.0), 2.0)
    g = above - chroma * tl.minimum(tl.maximum(tl.abs(hue - 2), 1.0), 2.0)
    b = above - chroma * tl.minimum(tl.maximum(tl.abs(hue - 4), 1.0), 2.0)
    return r, g, b


@triton.jit
def _jittered(r, g, b, own, mean, UNTIL_CONTRAST: tl.constexpr):
    """Apply brightness, contrast, saturation and hue in the order of a row; only what comes before its contrast."""
    on = tl.load(own + ORDER) >= 0
    for position in tl.static_range(4):
        kind = tl.load(own + ORDER + position).to(tl.int32)
        weight = tl.load(own + STRENGTH + tl.maximum(kind, 0))
        if UNTIL_CONTRAST:
            on = on & (kind != CONTRAST)
        if on:
            if kind == BRIGHTNESS:
                r, g, b = _mixed(r, 0.0, weight), _mixed(g, 0.0, weight), _mixed(b, 0.0, weight)
            elif kind == CONTRAST:
                r, g, b = _mixed(r, mean, weight), _mixed(g, mean, weight), _mixed(b, mean, weight)
            elif kind == SATURATION:
                gray = _luma(r, g, b)
                r, g, b = _mixed(r, gray, weight), _mixed(g, gray, weight), _mixed(b, gray, weight)
            else:
                r, g, b = _turned(r, g, b, weight)
    return r, g, b


@triton.jit
def _pixels(pixels, row, i, size, SCALE: tl.constexpr):
    place = pixels + row.to(tl.int64) * 3 * size + i
    r = tl.load(place, mask=i < size, other=0).to(tl.float32) * SCALE
    g = tl.load(place + size, mask=i < size, other=0).to(tl.float32) * SCALE
    b = tl.load(place + 2 * size, mask=i < size, other=0).to(tl.float32) * SCALE
    return r, g, b


@triton.jit
def _store(out, row, i, size, r, g, b):
    place = out + row.to(tl.int64) * 3 * size + i
    tl.store(place, r, mask=i < size)
    tl.store(place + size, g, mask=i < size)
    tl.store(place + 2 * size, b, mask=i < size)


@triton.jit
def gray_sums(pixels, numbers, out, size, BLOCK: tl.constexpr):
    """Sum gray values as they are before the contrast, by block. pixels: uint8 (n, 3, size); out: (n, blocks)"""
    row, block = tl.program_id(0), tl.program_id(1)
    i = block * BLOCK + tl.arange(0, BLOCK)
    r, g, b = _pixels(pixels, row, i, size, 1 / 255)
    r, g, b = _jittered(r, g, b, numbers + row * COLUMNS, 0.0, True)
    gray = tl.where(i < size, _luma(r, g, b), 0.0)
    tl.store(out + row * tl.num_programs(1) + block, tl.sum(gray, 0))


@triton.jit
def jitter(pixels, numbers, means, out, size, BLOCK: tl.constexpr):
    """Jitter, and gray where asked for. pixels: uint8 (n, 3, size); means: (n,); out: (n, 3, size) in 0..1"""
    row = tl.program_id(0)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    own = numbers + row * COLUMNS
    r, g, b = _pixels(pixels, row, i, size, 1 / 255)
    r, g, b = _jittered(r, g, b, own, tl.load(means + row), False)
    if tl.load(own + GRAY) > 0:
        gray = _luma(r, g, b)
        r, g, b = gray, gray, gray
    _store(out, row, i, size, r, g, b)


@triton.jit
def blur(x, taps, out, height, width, reach, stride, BLOCK: tl.constexpr):
    """Blur along one side, reflected borders. x, out: (n, 3, height, width); taps: (n, reach + 1); stride: 1 along a
    row of pixels, else `width`"""
    plane = tl.program_id(0)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < height * width
    here = tl.where(stride == 1, i % width, i // width)
    last = tl.where(stride == 1, width, height) - 1
    own, start = taps + plane // 3 * (reach + 1), x + plane.to(tl.int64) * height * width + i - here * stride
    total = tl.load(own) * tl.load(start + here * stride, mask=inside, other=0.0)
    for distance in range(1, reach + 1):
        before = tl.abs(here - distance)
        after = last - tl.abs(last - here - distance)
        both = tl.load(start + before * stride, mask=inside, other=0.0)
        both += tl.load(start + after * stride, mask=inside, other=0.0)
        total += tl.load(own + distance) * both
    tl.store(out + plane.to(tl.int64) * height * width + i, total, mask=inside)


@triton.jit
def finish(x, numbers, scale, shift, out, size, BLOCK: tl.constexpr):
    """Solarize where asked for, normalize, and put each row in its place. x, out: (n, 3, size); scale, shift: (3,)"""
    row = tl.program_id(0)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    own = numbers + row * COLUMNS
    r, g, b = _pixels(x, row, i, size, 1.0)
    if tl.load(own + SOLARIZE) > 0:
        limit = 128 / 255
        r, g, b = tl.where(r >= limit, 1 - r, r), tl.where(g >= limit, 1 - g, g), tl.where(b >= limit, 1 - b, b)
    r = r * tl.load(scale) + tl.load(shift)
    g = g * tl.load(scale + 1) + tl.load(shift + 1)
    b = b * tl.load(scale + 2) + tl.load(shift + 2)
    _store(out, tl.load(own + TARGET).to(tl.int32), i, size, r, g, b)


def color(
    pixels: Tensor, params: dict[str, Tensor], orders: Tensor, target: Tensor, noise_std: float, sigma_max: float,
    scale: Tensor, shift: Tensor,
) -> Tensor:  # fmt: skip
    """Do what `color.color` does.

    Shape: pixels uint8 (n, 3, H, W); params and target (n,), orders (n, 4) on the CPU; scale and shift of three
    numbers on the device.
    """
    n, _, height, width = pixels.shape
    size, device = height * width, pixels.device
    jittered = params["order"] >= 0
    columns = [*torch.where(jittered[:, None], orders, -1).unbind(1)]
    columns += [params[name] for name in ("brightness", "contrast", "saturation", "hue", "gray", "solarize")] + [target]
    numbers = torch.stack([column.float() for column in columns], 1).to(device, non_blocking=True)
    grid = (n, triton.cdiv(size, BLOCK))
    pixels, x = pixels.contiguous(), torch.empty(pixels.shape, device=device)
    sums = torch.empty(grid, device=device)
    gray_sums[grid](pixels, numbers, sums, size, BLOCK)
    jitter[grid](pixels, numbers, sums.sum(1).div_(size), x, size, BLOCK)
    blurred = (params["sigma"] > 0).nonzero().flatten()
    if len(blurred):
        _blur(x, blurred, params["sigma"][blurred], math.ceil(3 * sigma_max))
    if noise_std > 0:
        x += noise_std * random_normal(params["noise_seed"].long().to(device, non_blocking=True), (3, height, width))
    out = torch.empty_like(x)
    finish[grid](x, numbers, scale, shift, out, size, BLOCK)
    return out


def try_out(device: torch.device) -> None:
    """Raise whatever keeps the kernels from being compiled and run."""
    params = {
        name: torch.zeros(1) for name in ("order", "brightness", "contrast", "saturation", "hue", "gray", "solarize")
    }
    params["sigma"] = torch.ones(1)
    pixels, three = torch.zeros(1, 3, 8, 8, dtype=torch.uint8, device=device), torch.ones(3, device=device)
    color(pixels, params, torch.zeros(1, 4), torch.zeros(1), 0.0, 1.0, three, three)


def _blur(x: Tensor, rows: Tensor, sigma: Tensor, radius: int) -> None:
    """Blur these rows in place. Shape: x (n, 3, H, W), rows int (k,) and sigma (k,) on the CPU."""
    taps = torch.exp(-0.5 * (torch.arange(radius + 1) / sigma[:, None]) ** 2)
    taps /= 2 * taps.sum(1, keepdim=True) - taps[:, :1]
    taps = taps[:, : int((taps > 5e-7).any(0).sum())].float()
    where = rows.to(x.device, non_blocking=True)
    part, (height, width) = x.index_select(0, where), x.shape[2:]
    other, grid = torch.empty_like(part), (3 * len(rows), triton.cdiv(height * width, BLOCK))
    for a, b, side, stride in ((part, other, width, 1), (other, part, height, width)):
        reached = taps[:, : min(taps.shape[1], side)].contiguous().to(x.device, non_blocking=True)
        blur[grid](a, reached, b, height, width, reached.shape[1] - 1, stride, BLOCK)
    x.index_copy_(0, where, part)
