"""Cross-entropy between given targets and the softmax of a linear layer, with one tensor of images x codes at a time."""

import torch
from torch import Tensor


def soft_target_loss(x: Tensor, weight: Tensor, target: Tensor, scale: float) -> Tensor:
    """-sum_ij target_ij log softmax_j(scale * x W^T)_ij, with gradient to x and weight.

    The plain form is -(target * (scale * x @ weight.T).log_softmax(1)).sum(), for which autograd would keep logits,
    log-softmax and softmax of every view until the backward pass. Here the gradient is made at once: it is
    scale * (sum_j target_ij * softmax - target), so only it and the logits' own room are needed, one view after the
    other. Rows of target may have any sum.

    Shape: x (n, d), weight (c, d), target (n, c) without gradient -> scalar. First derivatives only.
    """
    return _SoftTargets.apply(x, weight, target, scale)


class _SoftTargets(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, target: Tensor, scale: float) -> Tensor:
        logits = (x @ weight.T).mul_(scale)
        mass = target.sum(1)
        normaliser = logits.logsumexp(1)
        loss = mass @ normaliser - torch.dot(target.flatten(), logits.flatten())
        gradient = logits.sub_(normaliser[:, None]).exp_().mul_(mass[:, None]).sub_(target).mul_(scale)
        ctx.save_for_backward(gradient @ weight, gradient.T @ x)
        return loss

    @staticmethod
    def backward(ctx, outer: Tensor):
        for_x, for_weight = ctx.saved_tensors
        return outer * for_x, outer * for_weight, None, None
