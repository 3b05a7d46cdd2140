"""Cross-entropy to soft targets against the plain one."""

import pytest
import torch
from helpers import all_close, gradients, randn

from cplearn.methods.soft_targets import soft_target_loss


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_soft_target_loss_is_the_plain_one(scale):
    x, y, weight = (randn(n, 7, seed=n).requires_grad_() for n in (5, 5, 11))
    targets = [randn(5, 11, seed=s).softmax(1) * torch.arange(5)[:, None] for s in (2, 3)]  # rows of any sum
    plain = -sum((t * (scale * v @ weight.T).log_softmax(1)).sum() for v, t in zip((x, y), targets, strict=True))
    fast = soft_target_loss([x, y], weight, iter(targets), scale)
    assert torch.allclose(plain, fast, rtol=1e-12)
    assert all_close(gradients(3 * fast, x, y, weight), gradients(3 * plain, x, y, weight))
    assert torch.autograd.gradcheck(lambda x, y, w: soft_target_loss([x, y], w, targets, scale), (x, y, weight))
