"""The prior buffer against averages written out."""

import pytest
import torch

from cplearn.loss.prior_buffer import PriorBuffer
from cplearn.loss.spec import LossSpec
from cplearn_head import cplearn_loss


@pytest.mark.parametrize("prior", ["reverse", "forward"])
def test_buffer_averages_the_last_steps(prior):
    """Value: p-bar averaged with the last 3 of 5 earlier ones. Gradient: that of now at full weight."""
    torch.manual_seed(0)
    n, c, beta = 6, 11, 0.3
    buffer, past = PriorBuffer(3, c).double(), []
    for _ in range(6):
        s = [torch.randn(n, c, dtype=torch.float64).requires_grad_() for _ in range(2)]
        loss, terms, usage = cplearn_loss(s, LossSpec(beta, prior=prior, buffer=buffer))
        plain_loss, plain_terms, plain_usage = cplearn_loss(s, LossSpec(beta, prior=prior))
        p = [x.softmax(1) for x in s]
        torch.testing.assert_close(usage, (p[0] + p[1]).mean(0).detach() / 2)
        torch.testing.assert_close(usage, plain_usage)
        kept = past[-3:]
        means = [(x.mean(0) + sum(kept)) / (len(kept) + 1) for x in p]
        expected = sum((m * (m * c).log()).sum() if prior == "reverse" else -m.log().mean() for m in means) / 2
        torch.testing.assert_close(terms["prior"], expected.detach())
        invariance_only = torch.autograd.grad(plain_loss - _prior(s, prior), s)
        full_weight = torch.autograd.grad(expected * (len(kept) + 1), s)
        for got, a, b in zip(torch.autograd.grad(loss, s), invariance_only, full_weight, strict=True):
            torch.testing.assert_close(got, a + b)
        buffer.push(usage)
        past.append(usage)
    assert buffer.pushed == 6


def _prior(s, prior):
    c = s[0].shape[1]
    means = [x.softmax(1).mean(0) for x in s]
    return sum((m * (m * c).log()).sum() if prior == "reverse" else -m.log().mean() for m in means) / 2
