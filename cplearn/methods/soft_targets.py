"""Cross-entropy between given targets and the softmax of a linear layer, one tensor of images x codes at a time."""

from collections.abc import Iterable, Sequence
from functools import reduce

import torch
from torch import Tensor


def loss_over_pairs(views: list[Tensor], weight: Tensor, targets: Sequence[Tensor] | Tensor, scale: float) -> Tensor:
    """Average CE(target^a, softmax(scale * x^b W^T)) over images and pairs of a global view a and another view b.

    Shape: views V x (n, d), the global ones first, weight (c, d), targets G x (n, c) without gradient -> scalar.
    """
    total = reduce(torch.add, targets)
    others = (total - targets[b] if b < len(targets) else total for b in range(len(views)))
    loss = soft_target_loss(views, weight, others, scale)
    return loss / (len(targets) * (len(views) - 1) * len(views[0]))


def soft_target_loss(views: list[Tensor], weight: Tensor, targets: Iterable[Tensor], scale: float) -> Tensor:
    """Compute -sum_v sum_ij target^v_ij log softmax_j(scale * x^v W^T)_ij, with gradient to each x^v and to W.

    The plain form is the sum of -(target * (scale * x @ weight.T).log_softmax(1)).sum(), for which autograd would keep
    logits, log-softmax and softmax of every view until the backward pass. Here the gradient is made at once: it is
    scale * (sum_j target_ij * softmax - target), so one view's logits are all there is at a time. Targets may be a
    generator that makes each when it is asked for; their rows may have any sum.

    Shape: views V x (n, d), weight (c, d), targets V x (n, c) without gradient -> scalar. First derivatives only.
    """
    return _SoftTargets.apply(weight, targets, scale, *views)


class _SoftTargets(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: Tensor, targets: Iterable[Tensor], scale: float, *views: Tensor) -> Tensor:
        loss, for_weight, for_views = weight.new_zeros(()), torch.zeros_like(weight), []
        for x, target in zip(views, targets, strict=True):
            logits = (x @ weight.T).mul_(scale)
            mass, normalizer = target.sum(1), logits.logsumexp(1)
            loss += mass @ normalizer - torch.dot(target.flatten(), logits.flatten())
            gradient = logits.sub_(normalizer[:, None]).exp_().mul_(mass[:, None]).sub_(target).mul_(scale)
            for_views.append(gradient @ weight)
            for_weight.addmm_(gradient.T, x)
        ctx.save_for_backward(for_weight, *for_views)
        return loss

    @staticmethod
    def backward(ctx, outer: Tensor):
        for_weight, *for_views = ctx.saved_tensors
        return outer * for_weight, None, None, *(outer * x for x in for_views)
