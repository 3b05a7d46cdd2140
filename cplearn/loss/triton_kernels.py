"""The streamed loss as Triton kernels that read the dictionary as bits and expand them in registers.

Same mathematics and letters as `streamed.py`, one kernel a sum:

    row_norms      logits, their running maximum and sum of exponentials            pass A
    column_means   log of the mean assignment of each code over the images          pass B
    row_sums       entropy, t and u of each image                                   pass B
    coefficients   derivative with respect to the logits, for a chunk of codes      pass C
    gradient       its product with the codes of that chunk, added up               pass C

The logits are recomputed in the first four; the only thing of size images x codes is one chunk of coefficients.
Sums are float32; the products' inputs are float32 (ieee), tf32 or bf16. With TRITON_INTERPRET=1 they run on the CPU,
which is how the tests compare them with the plain form. **They have not been run on a GPU yet.**
"""

import math
import os
from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from cplearn.errors import UserError
from cplearn.loss.codes import Dictionary
from cplearn.loss.spec import LossSpec, join, population, summarize

CHUNK_NUMBERS = 2**24  # coefficients kept at a time: 64 MiB


@triton.jit
def _signs(bits, j, k, f, c, n_bytes, DTYPE: tl.constexpr):
    """Read entries k of codes j, from broadcastable index tiles: -1, +1 (and whatever beyond c and f)."""
    byte = tl.load(bits + j.to(tl.int64) * n_bytes + (k >> 3), mask=(j < c) & (k < f), other=0)
    return (((byte.to(tl.int32) >> (k & 7)) & 1) * 2 - 1).to(DTYPE)


@triton.jit
def _product(a, b, acc, PRECISION: tl.constexpr):
    if PRECISION == "bf16":
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), acc)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _logits(
    h, i, n, bits, j, f, c, n_bytes,
    BI: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute h[i] . w_j for a tile of rows and codes. -> (BI, BJ) float32"""
    acc = tl.zeros((BI, BJ), tl.float32)
    for start in range(0, f, BK):
        k = start + tl.arange(0, BK)
        x = tl.load(h + i[:, None] * f + k[None, :], mask=(i < n)[:, None] & (k < f)[None, :], other=0.0)
        acc = _product(x, _signs(bits, j[None, :], k[:, None], f, c, n_bytes, tl.float32), acc, PRECISION)
    return acc


@triton.jit
def _log_p(
    h, norm, view, views, i, n, bits, j, f, c, n_bytes,
    BI: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute log-assignments of one view. h: (V + 1, n, f), norm: (2, V + 1, n); last, the sum of the local views."""
    s = _logits(h + view * n * f, i, n, bits, j, f, c, n_bytes, BI, BJ, BK, PRECISION)
    place = norm + view * n + i
    s -= tl.load(place, mask=i < n, other=0.0)[:, None]
    return s - tl.load(place + (views + 1) * n, mask=i < n, other=0.0)[:, None]


@triton.jit
def row_norms(
    h, bits, out, n, f, c, n_bytes, per_split,
    BI: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute largest logit and sum of exponentials relative to it, over one split of the codes. out: (splits, 2, n)"""
    i = tl.program_id(0) * BI + tl.arange(0, BI)
    split = tl.program_id(1)
    top = tl.full((BI,), float("-inf"), tl.float32)
    total = tl.zeros((BI,), tl.float32)
    for start in range(split * per_split, min(c, (split + 1) * per_split), BJ):
        j = start + tl.arange(0, BJ)
        s = _logits(h, i, n, bits, j, f, c, n_bytes, BI, BJ, BK, PRECISION)
        s = tl.where((j < c)[None, :], s, float("-inf"))
        new = tl.maximum(top, tl.max(s, 1))
        total = total * tl.exp(top - new) + tl.sum(tl.exp(s - new[:, None]), 1)
        top = new
    tl.store(out + 2 * split * n + i, top, mask=i < n)
    tl.store(out + (2 * split + 1) * n + i, total, mask=i < n)


@triton.jit
def column_means(
    h, bits, norm, views, out, n, f, c, n_bytes,
    BI: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the log of the sum over images of p, for one view and tile of codes. out: (G, c)"""
    j = tl.program_id(0) * BJ + tl.arange(0, BJ)
    view = tl.program_id(1)
    top = tl.full((BJ,), float("-inf"), tl.float32)
    total = tl.zeros((BJ,), tl.float32)
    for start in range(0, n, BI):
        i = start + tl.arange(0, BI)
        s = _log_p(h, norm, view, views, i, n, bits, j, f, c, n_bytes, BI, BJ, BK, PRECISION)
        s = tl.where((i < n)[:, None], s, float("-inf"))
        new = tl.maximum(top, tl.max(s, 0))
        total = total * tl.exp(top - new) + tl.sum(tl.exp(s - new[None, :]), 0)
        top = new
    tl.store(out + view * c + j, top + tl.log(total), mask=j < c)


@triton.jit
def _both(
    h, norm, views, i, n, bits, j, f, c, n_bytes,
    LOCAL: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute log p of the two global views, and r of each: the sum of log p over all other views."""
    inside = (j < c)[None, :]  # beyond c: any finite value, left out by the callers
    l0 = _log_p(h, norm, 0, views, i, n, bits, j, f, c, n_bytes, BI, BJ, BK, PRECISION)
    l1 = _log_p(h, norm, 1, views, i, n, bits, j, f, c, n_bytes, BI, BJ, BK, PRECISION)
    l0, l1 = tl.where(inside, l0, 0.0), tl.where(inside, l1, 0.0)
    if LOCAL:  # the other views enter through their sum alone: one product more, for any number of them
        rest = _log_p(h, norm, views, views, i, n, bits, j, f, c, n_bytes, BI, BJ, BK, PRECISION)
        return l0, l1, l1 + rest, l0 + rest
    else:
        return l0, l1, l1, l0


@triton.jit
def row_sums(
    h, bits, norm, views, log_mean, out, n, f, c, n_bytes, per_split,
    LOCAL: tl.constexpr, FORWARD: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum over one split of the codes: entropy, t, u of both views. out: (splits, 6, n)"""
    i = tl.program_id(0) * BI + tl.arange(0, BI)
    split = tl.program_id(1)
    e0 = tl.zeros((BI,), tl.float32)
    e1, t0, t1, u0, u1 = e0, e0, e0, e0, e0
    log_c = tl.log(c.to(tl.float32))
    for start in range(split * per_split, min(c, (split + 1) * per_split), BJ):
        j = start + tl.arange(0, BJ)
        l0, l1, r0, r1 = _both(h, norm, views, i, n, bits, j, f, c, n_bytes, LOCAL, BI, BJ, BK, PRECISION)
        inside = (j < c)[None, :]
        p0, p1 = tl.where(inside, tl.exp(l0), 0.0), tl.where(inside, tl.exp(l1), 0.0)
        e0 -= tl.sum(p0 * l0, 1)
        e1 -= tl.sum(p1 * l1, 1)
        t0 += tl.sum(p0 * r0, 1)
        t1 += tl.sum(p1 * r1, 1)
        m0 = tl.load(log_mean + j, mask=j < c, other=0.0)[None, :]
        m1 = tl.load(log_mean + c + j, mask=j < c, other=0.0)[None, :]
        if FORWARD:
            u0 -= tl.sum(tl.where(inside, tl.exp(l0 - m0), 0.0), 1) / c
            u1 -= tl.sum(tl.where(inside, tl.exp(l1 - m1), 0.0), 1) / c
        else:
            u0 += tl.sum(p0 * (m0 + log_c), 1)
            u1 += tl.sum(p1 * (m1 + log_c), 1)
    place = out + split * 6 * n + i
    tl.store(place, e0, mask=i < n)
    tl.store(place + n, e1, mask=i < n)
    tl.store(place + 2 * n, t0, mask=i < n)
    tl.store(place + 3 * n, t1, mask=i < n)
    tl.store(place + 4 * n, u0, mask=i < n)
    tl.store(place + 5 * n, u1, mask=i < n)


@triton.jit
def coefficients(
    h, bits, norm, views, log_mean, row, out, n, f, c, n_bytes, first, chunk, alpha, weight,
    LOCAL: tl.constexpr, FORWARD: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the derivative by the logits of all views, codes first .. first + chunk. out: (V, n, chunk)"""
    i = tl.program_id(1) * BI + tl.arange(0, BI)
    column = tl.program_id(0) * BJ + tl.arange(0, BJ)
    j = first + column
    l0, l1, r0, r1 = _both(h, norm, views, i, n, bits, j, f, c, n_bytes, LOCAL, BI, BJ, BK, PRECISION)
    p0, p1 = tl.exp(l0), tl.exp(l1)
    share = alpha * (p0 + p1)
    c0 = tl.load(row + i, mask=i < n, other=0.0)[:, None] - alpha * r0
    c1 = tl.load(row + n + i, mask=i < n, other=0.0)[:, None] - alpha * r1
    m0 = tl.load(log_mean + j, mask=j < c, other=0.0)[None, :]
    m1 = tl.load(log_mean + c + j, mask=j < c, other=0.0)[None, :]
    if FORWARD:
        c0 = p0 * c0 - weight / c * tl.exp(l0 - m0)
        c1 = p1 * c1 - weight / c * tl.exp(l1 - m1)
    else:
        log_c = tl.log(c.to(tl.float32))
        c0 = p0 * (c0 + weight * (m0 + log_c))
        c1 = p1 * (c1 + weight * (m1 + log_c))
    place = out + i[:, None] * chunk + column[None, :]
    inside = (j < c)[None, :]
    mask = (i < n)[:, None] & (column < chunk)[None, :]
    tl.store(place, tl.where(inside, c0 - share, 0.0), mask=mask)
    tl.store(place + n * chunk, tl.where(inside, c1 - share, 0.0), mask=mask)
    for view in range(2, views):
        p = tl.exp(_log_p(h, norm, view, views, i, n, bits, j, f, c, n_bytes, BI, BJ, BK, PRECISION))
        local = tl.where(inside, 2 * alpha * p - share, 0.0)
        tl.store(place + view * n * chunk, local, mask=mask)


@triton.jit
def gradient(
    coefficient, bits, out, rows, f, c, n_bytes, first, chunk, per_split,
    BI: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add coefficient W over one split of the chunk. coefficient: (rows, chunk); out: (splits, rows, f)"""
    i = tl.program_id(0) * BI + tl.arange(0, BI)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    split = tl.program_id(2)
    acc = tl.zeros((BI, BK), tl.float32)
    for start in range(split * per_split, min(chunk, (split + 1) * per_split), BJ):
        column = start + tl.arange(0, BJ)
        x = tl.load(
            coefficient + i[:, None] * chunk + column[None, :],
            mask=(i < rows)[:, None] & (column < chunk)[None, :],
            other=0.0,
        )
        j = first + column
        acc = _product(x, _signs(bits, j[:, None], k[None, :], f, c, n_bytes, tl.float32), acc, PRECISION)
    place = out + (split * rows + i)[:, None] * f + k[None, :]
    mask = (i < rows)[:, None] & (k < f)[None, :]
    tl.store(place, tl.load(place, mask=mask, other=0.0) + acc, mask=mask)


# With these no kernel spills registers on sm_80 and sm_90 (64 entries deep, float32 took 6 kB of stack per thread).
DEPTH, WARPS = {"ieee": 16, "tf32": 32, "bf16": 64}, 8


def tile(size: int, largest: int) -> int:
    """Return a power of two from 16 (tl.dot's smallest) to `largest` that covers `size` if it can."""
    return min(largest, max(16, triton.next_power_of_2(size)))


def triton_loss(
    h: Tensor, dictionary: Dictionary, spec: LossSpec, *, with_grad: bool, precision: str
) -> tuple[Tensor, ...]:
    """Compute what `blockwise.blockwise_loss` computes, in kernels; `precision` is that of the products' inputs.

    Raises `UserError` without a GPU (unless TRITON_INTERPRET=1), for float64, and for other than two global views.
    """
    n_global = spec.n_global
    if n_global != 2 or h.dtype != torch.float32:
        raise UserError(
            f"loss form triton takes two global views in float32, not {n_global} in {h.dtype}: use stored or recomputed"
        )
    if h.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError(
            "loss form triton needs a GPU: use --loss_form auto, or set TRITON_INTERPRET=1 to try it slowly"
        )
    if h.device.type != "cuda" and precision == "bf16":
        raise UserError("loss form triton: the interpreter has no bf16 products, use --loss_precision fp32")
    # Triton launches on the current device, whatever the tensors' device.
    with torch.cuda.device(h.device) if h.device.type == "cuda" else nullcontext():
        return _launch(h.contiguous(), dictionary, spec, with_grad, precision)


def _launch(h: Tensor, dictionary: Dictionary, spec: LossSpec, with_grad: bool, precision: str) -> tuple[Tensor, ...]:
    views, n, f = h.shape
    n_global = spec.n_global
    c, bits = dictionary.out_dim, dictionary.packed
    shape = (n, f, c, bits.shape[1])
    tiles = {"BI": tile(n, 64), "BJ": tile(c, 64), "BK": tile(f, DEPTH[precision]), "PRECISION": precision}
    tiles["num_warps"] = WARPS
    image_tiles = triton.cdiv(n, tiles["BI"])
    processors = torch.cuda.get_device_properties(h.device).multi_processor_count if h.device.type == "cuda" else 1
    per_split = split_of(c, tiles["BJ"], 4 * processors // (views * image_tiles))
    splits = triton.cdiv(c, per_split)

    parts = h.new_empty(splits, 2, views * n)
    grid = (triton.cdiv(views * n, tiles["BI"]), splits)
    row_norms[grid](h, bits, parts, views * n, *shape[1:], per_split, **tiles)
    norm = torch.stack(join(parts[:, 0], parts[:, 1])).view(2, views, n)
    # The local views as one more: r is linear in the logits.
    h = torch.cat([h, h[2:].sum(0, keepdim=True)])
    norm = torch.cat([norm, norm[:, 2:].sum(1, keepdim=True)], dim=1)

    local = h.new_empty(n_global, c)
    column_means[(triton.cdiv(c, tiles["BJ"]), n_global)](h, bits, norm, views, local, *shape, **tiles)
    now, log_mean = population(spec, (local - math.log(n)).T, 0, c)
    usage = now.exp().mean(1)
    log_mean = log_mean.T.contiguous()

    kind = {"LOCAL": views > 2, "FORWARD": spec.prior == "forward"}
    parts = h.new_empty(splits, 6, n)
    row_sums[(image_tiles, splits)](h, bits, norm, views, log_mean, parts, *shape, per_split, **kind, **tiles)
    entropy, t, u = parts.sum(0).view(3, 2, n)
    summary = summarize(spec, t, entropy, views, log_mean.T, usage)
    if not with_grad:
        return *summary, h.new_empty(0)

    alpha, weight = spec.beta / (n_global * (views - 1) * n), 1 / (n_global * n)
    row = (alpha * (n_global + t) - weight * u).contiguous()
    chunk = min(triton.cdiv(c, tiles["BJ"]), max(1, CHUNK_NUMBERS // (views * n * tiles["BJ"]))) * tiles["BJ"]
    per_split = split_of(chunk, tiles["BJ"], 4 * processors // (grid[0] * triton.cdiv(f, tiles["BK"])))
    splits = triton.cdiv(chunk, per_split)
    scratch, grads = h.new_empty(views, n, chunk), h.new_zeros(splits, views * n, f)
    for first in range(0, c, chunk):
        coefficients[(chunk // tiles["BJ"], image_tiles)](  # the many on the axis without a limit
            h, bits, norm, views, log_mean, row, scratch, *shape, first, chunk, alpha, weight, **kind, **tiles
        )
        gradient[(grid[0], triton.cdiv(f, tiles["BK"]), splits)](
            scratch, bits, grads, views * n, *shape[1:], first, chunk, per_split, **tiles
        )
    return *summary, grads.sum(0).view(views, n, f)


def split_of(size: int, step: int, wanted: int) -> int:
    """Return the codes per split, a multiple of the tile `step`, for about `wanted` splits (2 to 64)."""
    return triton.cdiv(triton.cdiv(size, min(64, max(2, wanted))), step) * step
