"""The streamed loss in torch operations, block by block: forms `stored` and `recomputed`.

Letters and passes as in `streamed.py`. Everything is code-major: a block of log p is (b, V, n).
"""

import math

import torch
from torch import Tensor

from cplearn.loss.codes import Dictionary
from cplearn.loss.spec import LossSpec, join, population, summarize


def blockwise_loss(
    h: Tensor, dictionary: Dictionary, spec: LossSpec, *, with_grad: bool, store: bool, block: int
) -> tuple[Tensor, ...]:
    """Run passes A, B and C. `store` keeps the logits of pass A; otherwise each pass multiplies again.

    Shape: h (V, n, f_h), scale included -> loss, invariance, prior, entropy, usage (c,), gradient (V, n, f_h).
    """
    blocks = _Blocks(h, dictionary, store, block)
    blocks.norms = _row_norms(blocks)
    t, entropy, u, log_mean, usage = _sums(blocks, spec)
    values = summarize(spec, t, entropy, blocks.views, log_mean, usage)
    if not with_grad:
        return *values, h.new_empty(0)
    return *values, _gradient(blocks, spec, t, u, log_mean).T.reshape(h.shape)


class _Blocks:
    """The logits, a block of codes at a time, and scratch memory for work on one block."""

    def __init__(self, h: Tensor, dictionary: Dictionary, store: bool, block: int):
        self.views, self.n, _ = h.shape
        self.c, self.store = dictionary.out_dim, store
        columns = self.views * self.n
        self.h = h.flatten(0, 1).T.contiguous()  # (f_h, V n)
        self.ranges = [(j, min(j + block, self.c)) for j in range(0, self.c, block)]
        self.read = dictionary.reader(block, h.dtype)
        size = min(block, self.c) * columns  # of a block of logits
        self._scratch = dictionary.workspace("scratch", 2 * size, h.dtype).view(2, size)
        self._logits = h.new_empty(self.c, columns) if store else dictionary.workspace("logits", size, h.dtype)
        self._logits = self._logits.view(-1, columns)
        self.norms: tuple[Tensor, Tensor]  # of each row: the largest logit, the log of the sum relative to it

    def scratch(self, which: int, *shape: int) -> Tensor:
        return self._scratch[which, : math.prod(shape)].view(shape)

    def place(self, start: int, stop: int) -> Tensor:
        """Return where the logits of a block are, as (b, V n)."""
        return self._logits[start:stop] if self.store else self._logits[: stop - start]

    def log_p(self, start: int, stop: int, codes=None, *, stored: bool) -> Tensor:
        """Return log p of a block, from the stored logits or multiplied again, as (b, V, n).

        `stored`: the place holds log p already. Larger and smaller part of the logsumexp are subtracted apart: their
        sum loses digits of log p.
        """
        if self.store and stored:
            return self.place(start, stop).view(-1, self.views, self.n)
        s = self.place(start, stop)
        if not self.store:
            s = (codes or self.read(start, stop)).scores(self.h, s)
        top, log_total = self.norms
        return s.sub_(top).sub_(log_total).view(-1, self.views, self.n)


def _row_norms(blocks: _Blocks) -> tuple[Tensor, Tensor]:
    """Run pass A: of each row the largest logit, and the log of the sum of exponentials relative to it. (V n,)"""
    tops, totals = blocks.h.new_empty(2, len(blocks.ranges), blocks.h.shape[1])
    for k, (start, stop) in enumerate(blocks.ranges):
        s = blocks.read(start, stop).scores(blocks.h, blocks.place(start, stop))
        torch.amax(s, 0, out=tops[k])
        torch.sum(torch.sub(s, tops[k], out=blocks.scratch(0, *s.shape)).exp_(), 0, out=totals[k])
    return join(tops, totals)


def _sums(blocks: _Blocks, spec: LossSpec) -> tuple[Tensor, ...]:
    """Run pass B: everything that sums over codes or over images.

    Shape: -> t, entropy, u (G, n), log_mean (c, G), usage (c,).
    """
    c, n, n_global, tiny = blocks.c, blocks.n, spec.n_global, torch.finfo(blocks.h.dtype).tiny
    t, entropy, u = blocks.h.new_zeros(3, n_global, n)
    log_mean, usage = blocks.h.new_empty(c, n_global), blocks.h.new_empty(c)
    for start, stop in blocks.ranges:
        log_p = blocks.log_p(start, stop, stored=False)
        own = log_p[:, :n_global]
        p = torch.exp(own, out=blocks.scratch(0, *own.shape))
        other = blocks.scratch(1, *own.shape)
        entropy -= torch.mul(p, own, out=other).sum(0)
        t += torch.sub(log_p.sum(1, keepdim=True), own, out=other).mul_(p).sum(0)
        if spec.prior == "reverse":
            local = p.mean(2).clamp_min_(tiny).log_()  # p log p-bar is 0 where p-bar underflows
        else:
            local = own.logsumexp(2) - math.log(n)
        now, mixed = population(spec, local, start, stop)
        usage[start:stop] = now.exp().mean(1)
        log_mean[start:stop] = mixed
        if spec.prior == "reverse":
            u += p.mul_(mixed[..., None] + math.log(c)).sum(0)
        else:
            u -= torch.sub(own, mixed[..., None], out=other).exp_().sum(0) / c
    return t, entropy, u, log_mean, usage


def _gradient(blocks: _Blocks, spec: LossSpec, t: Tensor, u: Tensor, log_mean: Tensor) -> Tensor:
    """Run pass C: the derivative by the logits, written over them, and its product with the codes. (f_h, V n)"""
    n, n_global, log_c = blocks.n, spec.n_global, math.log(blocks.c)
    alpha, weight = spec.beta / (n_global * (blocks.views - 1) * n), 1 / (n_global * n)
    row = alpha * (n_global + t) - weight * u
    grad = torch.zeros_like(blocks.h)
    for start, stop in blocks.ranges:
        codes = blocks.read(start, stop)
        log_p = blocks.log_p(start, stop, codes, stored=True)
        own, others = log_p[:, :n_global], log_p[:, n_global:]
        column = log_mean[start:stop, :, None]
        p = torch.exp(own, out=blocks.scratch(0, *own.shape))
        share = p.sum(1, keepdim=True).mul_(alpha)
        # As target and, for all of p's own terms, as prediction: p (row - alpha r + weight a) - share.
        coefficient = blocks.scratch(1, *own.shape)
        torch.sub(own, log_p.sum(1, keepdim=True), out=coefficient).mul_(alpha).add_(row)
        if spec.prior == "reverse":
            coefficient.add_(weight * (column + log_c)).mul_(p)
        else:
            coefficient.mul_(p)
            own.sub_(column).exp_().mul_(weight / blocks.c)  # log p of the global views is lost here
            coefficient.sub_(own)
        # Log p is not read again: the derivative of all views takes its place.
        torch.sub(coefficient, share, out=own)
        others.exp_().mul_(alpha * n_global).sub_(share)
        codes.combine(blocks.place(start, stop), grad)
    return grad
