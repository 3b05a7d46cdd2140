"""TODO cplearn.dictionary.blockwise."""

import math

import torch
from torch import Tensor


def _loss_and_gradient(h, dictionary, beta, prior, n_global, population, with_grad, store, block):
    """Passes A, B and C in torch operations, code-major: a block of log p is (b, V, n).

    Shape: h (V, n, f_h), scale included -> loss, invariance, prior, entropy, usage (c,), gradient (V, n, f_h).
    """
    views, n, _ = h.shape
    c = dictionary.out_dim
    rows = h.flatten(0, 1).T.contiguous()  # (f_h, V n)
    ranges = [(j, min(j + block, c)) for j in range(0, c, block)]
    read = dictionary.reader(block, h.dtype)

    size = min(block, c) * views * n  # of a block of logits
    room = dictionary.workspace("scratch", 2 * size, h.dtype).view(2, size)
    logits = h.new_empty(c, views * n) if store else dictionary.workspace("logits", size, h.dtype).view(-1, views * n)

    def scratch(which: int, *shape: int) -> Tensor:
        return room[which, : math.prod(shape)].view(shape)

    def place(start: int, stop: int) -> Tensor:
        """Where the logits of a block are. (b, V n)"""
        return logits[start:stop] if store else logits[: stop - start]

    # A: logits, their largest and the sum of exponentials. Kept apart: their sum, the logsumexp, loses digits of log p.
    tops, totals = h.new_empty(2, len(ranges), views * n)
    for k, (start, stop) in enumerate(ranges):
        s = read(start, stop).scores(rows, place(start, stop))
        torch.amax(s, 0, out=tops[k])
        torch.sum(torch.sub(s, tops[k], out=scratch(0, *s.shape)).exp_(), 0, out=totals[k])
    top, log_total = join(tops, totals)

    # B: with log p known, everything that sums over codes or over images.
    t, entropy, u = h.new_zeros(3, n_global, n)
    log_mean, usage = h.new_empty(c, n_global), h.new_empty(c)
    for start, stop in ranges:
        s = place(start, stop) if store else read(start, stop).scores(rows, place(start, stop))
        log_p = s.sub_(top).sub_(log_total).view(-1, views, n)
        own = log_p[:, :n_global]
        p = torch.exp(own, out=scratch(0, *own.shape))
        other = scratch(1, *own.shape)
        entropy -= torch.mul(p, own, out=other).sum(0)
        t += torch.sub(log_p.sum(1, keepdim=True), own, out=other).mul_(p).sum(0)
        if prior == "reverse":
            local = p.mean(2).clamp_min_(torch.finfo(h.dtype).tiny).log_()  # p log p-bar is 0 where p-bar underflows
        else:
            local = own.logsumexp(2) - math.log(n)
        now, mixed = population(local, start, stop)
        usage[start:stop] = now.exp().mean(1)
        log_mean[start:stop] = mixed
        if prior == "reverse":
            u += p.mul_(mixed[..., None] + math.log(c)).sum(0)
        else:
            u -= torch.sub(own, mixed[..., None], out=other).exp_().sum(0) / c
    summary = summarise(t, entropy, views, log_mean, usage, beta, prior)
    if not with_grad:
        return *summary, h.new_empty(0)

    # C: the derivative with respect to the logits, written over them, and its product with the codes.
    alpha, weight = beta / (n_global * (views - 1) * n), 1 / (n_global * n)
    row = alpha * (n_global + t) - weight * u
    grad = torch.zeros_like(rows)
    for start, stop in ranges:
        codes = read(start, stop)
        s = place(start, stop) if store else codes.scores(rows, place(start, stop)).sub_(top).sub_(log_total)
        log_p = s.view(-1, views, n)
        own, others = log_p[:, :n_global], log_p[:, n_global:]
        p = torch.exp(own, out=scratch(0, *own.shape))
        share = p.sum(1, keepdim=True).mul_(alpha)
        column = log_mean[start:stop, :, None]
        # As target and, for all of p's own terms, as prediction: p (row - alpha r + weight a) - share.
        minus_r = torch.sub(own, log_p.sum(1, keepdim=True), out=scratch(1, *own.shape))
        if prior == "reverse":
            coefficient = minus_r.mul_(alpha).add_(row).add_(weight * (column + math.log(c))).mul_(p)
        else:
            coefficient = minus_r.mul_(alpha).add_(row).mul_(p)
            coefficient.sub_(own.sub_(column).exp_().mul_(weight / c))
        torch.sub(coefficient, share, out=own)
        others.exp_().mul_(alpha * n_global).sub_(share)
        codes.combine(s, grad)
    return *summary, grad.T.reshape(h.shape)


def join(tops: Tensor, totals: Tensor) -> tuple[Tensor, Tensor]:
    """Largest and log of the sum of exponentials relative to it, from those of the parts. Shape: (parts, rows)."""
    top = tops.amax(0)
    return top, (totals * (tops - top).exp()).sum(0).log()


def summarise(t, entropy, views, log_mean, usage, beta, prior) -> tuple[Tensor, ...]:
    """loss, invariance, prior, entropy, usage. Shape: t and entropy (G, n), log_mean (c, G), usage (c,)."""
    n_global, n = t.shape
    invariance = -t.sum() / (n_global * (views - 1) * n)
    if prior == "reverse":
        parts = log_mean.split(2**16)  # a million codes in one piece would cost more memory than all else
        value = sum((x.exp() * (x + math.log(len(usage)))).sum(0) for x in parts).mean()
    else:
        value = -log_mean.mean()
    return beta * invariance + value, invariance, value, entropy.mean(), usage
