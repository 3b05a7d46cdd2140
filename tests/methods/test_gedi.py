"""GEDI in both readings against formulas written out."""

import math

import pytest
import torch
from helpers import FakeBackbone, all_close, gradients, make, randn

from cplearn.loss.spec import LossSpec
from cplearn.methods.gedi import GEDI, gedi_loss_as_published
from cplearn_head import cplearn_loss


def test_gedi_in_both_readings():
    logits = [randn(6, 9, seed=v).requires_grad_() for v in range(2)]
    p1, p2 = (x.softmax(1) for x in logits)
    ce = -(p2 * p1.log()).sum(1).mean()
    back = -(p1 * p2.log()).sum(1).mean()
    published = 0.5 * -p1.mean(0).log().sum() + 0.5 * 0.1 * ce
    ours, terms, usage = gedi_loss_as_published(logits, 0.1)
    assert torch.allclose(ours, published) and all_close(gradients(ours, *logits), gradients(published, *logits))
    assert torch.allclose(terms["invariance"], ce) and torch.allclose(usage, p1.mean(0))
    assert torch.allclose(terms["entropy"], -(p1 * p1.log()).sum(1).mean())
    equations = 0.25 * (ce + back) / 2 - (p1.mean(0).log().mean() + p2.mean(0).log().mean()) / 2
    assert torch.allclose(cplearn_loss(logits, LossSpec(0.25, prior="forward"))[0], equations)
    views = [randn(6, 3, 16, 16, seed=v) for v in range(2)]
    for reduction, loss in (("mean", lambda x: cplearn_loss(x, LossSpec(0.25, prior="forward"))[0]),
                            ("sum", lambda x: gedi_loss_as_published(x, 0.25)[0])):  # fmt: skip
        method = make("gedi", "--gedi_prior_reduction", reduction)
        expected = loss([method.projector(method.backbone(v)) / 0.1 for v in views])
        assert torch.allclose(method(views)[0], expected)
        uniform = loss([torch.zeros(6, 30).double()] * 2).item()
        assert math.isclose(method.references(6).uniform, uniform, rel_tol=1e-9)
    parameters = sum(p.numel() for p in GEDI(FakeBackbone(384), out_dim=50, beta=1.0).parameters())
    assert parameters == 792_576 + 2_049 * 50


@pytest.mark.parametrize("part", [0.9, 1.1])
@pytest.mark.parametrize(("reduction", "limit"), [("mean", 1), ("sum", 30)])
def test_the_warning_of_beta_is_of_a_step_that_lowers_the_loss(reduction, limit, part):
    """All images a little towards the same codes, from uniform: the loss falls where the warning has it."""
    beta, same = part * limit, randn(1, 30, seed=0).expand(6, 30)

    def loss(logits):
        both = [logits] * 2
        published = reduction == "sum"
        return (gedi_loss_as_published(both, beta) if published else cplearn_loss(both, LossSpec(beta, "forward")))[0]

    falls = bool(loss(0.001 * same) < loss(0 * same))
    method = GEDI(FakeBackbone(8), out_dim=30, beta=beta, gedi_prior_reduction=reduction)
    warned = any(f"--beta {beta:g} is above {limit}" in message for message in method.warnings())
    assert falls == warned == (beta > limit)
