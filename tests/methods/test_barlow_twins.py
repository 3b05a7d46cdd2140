"""Barlow Twins against the explicit form and against lightly's code."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import FakeBackbone, all_close, gradients, randn
from lightly.loss import BarlowTwinsLoss

from cplearn.methods.barlow_twins import BarlowTwins, barlow_loss, barlow_loss_explicit


@pytest.mark.parametrize(("n", "c"), [(12, 7), (6, 50)])
def test_the_gram_form_is_the_explicit_one_and_lightlys(n, c):
    raw = [randn(n, c, seed=v).requires_grad_() for v in range(2)]
    z = [F.batch_norm(x, None, None, training=True, eps=1e-5) for x in raw]
    gram, _ = barlow_loss(z, 0.0051)
    explicit = barlow_loss_explicit(*z, 0.0051)
    theirs = BarlowTwinsLoss(lambda_param=0.0051)(*raw)
    assert torch.allclose(gram, explicit, rtol=1e-12) and torch.allclose(gram, theirs, rtol=1e-12)
    assert all_close(gradients(gram, *raw), gradients(explicit, *raw))
    assert all_close(gradients(gram, *raw), gradients(theirs, *raw))


def test_barlow_multi_crop_is_the_mean_over_pairs():
    z = [randn(8, 6, seed=v) for v in range(4)]
    pairs = [(a, b) for a in range(2) for b in range(4) if a != b]
    expected = sum(barlow_loss_explicit(z[a], z[b], 0.01) for a, b in pairs) / len(pairs)
    assert torch.allclose(barlow_loss(z, 0.01)[0], expected)


def test_barlow_reference_losses():
    method = BarlowTwins(FakeBackbone(4), out_dim=400, projector_width=8)
    refs = method.references(100)
    draws = [barlow_loss_explicit(*(F.batch_norm(randn(100, 400, seed=2 * i + v), None, None, training=True)
                                    for v in range(2)), 0.0051) for i in range(20)]  # fmt: skip
    assert abs(torch.stack(draws).mean().item() / refs.uniform - 1) < 0.03
    z = torch.linalg.qr(randn(400, 100))[0].T * math.sqrt(400)  # the best that 100 rows can do is not below the floor
    assert 0 < refs.floor <= barlow_loss_explicit(z, z, 0.0051)


def test_barlow_parameters_as_specified():
    def count(out_dim):
        return sum(p.numel() for p in BarlowTwins(FakeBackbone(384), out_dim=out_dim).parameters())

    assert [round(count(c) / 1e6) for c in (32768, 65536, 131072)] == [72, 139, 273]


def test_barlow_needs_no_square_of_the_width():
    """131072 outputs: the matrix C would take 69 GB."""
    z = [torch.randn(8, 131072, generator=torch.Generator().manual_seed(v)).requires_grad_() for v in range(2)]
    loss, _ = barlow_loss([F.batch_norm(x, None, None, training=True) for x in z], 0.0051)
    loss.backward()
    assert loss.isfinite() and z[0].grad.isfinite().all()
    assert loss > 0.0051 * (131072 - 8 + 1)  # the floor
