"""SwAV against the formula and against lightly's code."""

import pytest
import torch
from helpers import FakeBackbone, all_close, gradients, has_gradient, make, randn
from lightly.loss import SwaVLoss
from lightly.loss.swav_loss import sinkhorn as lightly_sinkhorn

from cplearn.methods.swav import SwAV, sinkhorn


def test_sinkhorn_equals_the_linear_form_and_lightly():
    scores = randn(8, 5) / 5
    q = (scores / 0.05).exp()
    for _ in range(3):
        q = q / (5 * q.sum(0))
        q = q / (8 * q.sum(1, keepdim=True))
    assert torch.allclose(sinkhorn(scores / 0.05), 8 * q, atol=1e-14)
    assert torch.allclose(sinkhorn(scores / 0.05), lightly_sinkhorn(scores), atol=1e-12)
    many = sinkhorn(scores / 0.05, 500)
    assert torch.allclose(many.sum(1), torch.ones(8).double()) and many.max() <= 8 / 5 + 1e-9
    assert torch.allclose(many.sum(0), torch.full((5,), 8 / 5).double(), atol=1e-6)  # equipartition
    assert sinkhorn(torch.tensor([[2000.0, 0.0], [0.0, 2000.0]])).isfinite().all()  # no overflow


@pytest.mark.parametrize("local", [0, 3])
def test_swav_loss_equals_lightly(local):
    method = make("swav", "--queue_length", "0")
    views = [randn(6, 3, 16, 16, seed=v) for v in range(2)] + [randn(6, 3, 8, 8, seed=5 + v) for v in range(local)]
    loss, _, *_ = method(views)
    scores = [method.embed(method.backbone(v)) @ method.prototypes.weight.T for v in views]
    # lightly has local views predict too, as here; its mean runs over the same pairs.
    theirs = SwaVLoss(temperature=0.1, sinkhorn_epsilon=0.05)(scores[:2], scores[2:])
    assert torch.allclose(loss, theirs, rtol=1e-9)
    wanted = [method.prototypes.weight, *method.projector.parameters(), *method.backbone.parameters()]
    assert all_close(gradients(loss, *wanted), gradients(theirs, *wanted), 1e-8)


def test_swav_queue_is_used_when_full_and_changes_the_targets_only():
    method = make("swav", "--queue_length", "16", "--epoch_queue_starts", "1")
    batch = [[randn(8, 3, 16, 16, seed=10 * i + v) for v in range(2)] for i in range(4)]
    method.before_step(5, 1, 10)  # steps alone, skipped or of another process, fill nothing
    assert not method._queue_is_full
    embeddings, used = [], []
    for i, views in enumerate(batch):
        method.before_step(i + 1, 1, 10)  # one step an epoch: the queue starts at once
        embeddings.append([method.embed(method.backbone(v)).detach() for v in views])
        q = method.targets(0, embeddings[-1][0])
        alone = sinkhorn(embeddings[-1][0] @ method.prototypes.weight.T / 0.05)
        used.append(not torch.equal(q, alone))
        if used[-1]:
            rows = torch.cat([embeddings[i][0], embeddings[i - 1][0], embeddings[i - 2][0]])
            assert torch.allclose(q, sinkhorn(rows @ method.prototypes.weight.T / 0.05)[:8], atol=1e-10)
        method(views)
        method.after_step(None, torch.tensor(False))
    assert used == [False, False, True, True]
    kept = method.queue.clone()
    method.after_step(None, torch.tensor(True))
    assert torch.equal(method.queue, kept)


def test_swav_prototypes_are_unit_and_frozen_at_first():
    method = make("swav", "--freeze_prototypes_epochs", "2")
    assert not has_gradient(method, method.prototypes.weight, step=19)
    assert has_gradient(method, method.prototypes.weight, step=20)
    with torch.no_grad():
        method.prototypes.weight.mul_(3)
    method.after_step(None, torch.tensor(False))
    assert torch.allclose(method.prototypes.weight.norm(dim=1), torch.ones(30).double())
    parameters = sum(p.numel() for p in SwAV(FakeBackbone(384), out_dim=70).parameters())
    assert parameters == 1_054_848 + 128 * 70
