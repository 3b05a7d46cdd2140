"""Self-Classifier against the formula, on either head."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import all_close, gradients, make, randn

from cplearn.methods.self_classifier import self_classifier_loss


def naive_self_classifier(logits, n_global, row=0.1, col=0.05, eps=1e-12):
    terms = []
    n, c = logits[0].shape
    for a in range(len(logits)):
        for b in range(len(logits)):
            if a == b or (a >= n_global and b >= n_global):
                continue
            target = (logits[a] / col).softmax(0)
            target = target / target.sum(1, keepdim=True)
            prediction = (logits[b] / row).softmax(1)
            prediction = prediction / prediction.sum(0)
            terms.append(-(target * (n / c * prediction + eps).log()).sum() / n)
    return sum(terms) / len(terms)


@pytest.mark.parametrize("views", [2, 4])
def test_self_classifier_loss_is_the_formula(views):
    logits = [(randn(7, 5, seed=v) / 3).requires_grad_() for v in range(views)]
    (ours, terms, usage), expected = self_classifier_loss(logits), naive_self_classifier(logits, 2)
    rows = torch.cat([(x / 0.1).softmax(1) for x in logits[:2]])
    assert torch.allclose(usage, rows.mean(0)) and torch.allclose(
        terms["entropy"], torch.special.entr(rows).sum(1).mean()
    )
    assert torch.allclose(ours, expected) and all_close(gradients(ours, *logits), gradients(expected, *logits), 1e-8)
    same_for_all = [randn(1, 5).expand(7, 5)] * 2
    assert math.isclose(self_classifier_loss(same_for_all)[0].item(), math.log(5), rel_tol=1e-9)
    perfect = [100 * torch.eye(5, dtype=torch.float64).repeat(2, 1)] * 2
    assert abs(self_classifier_loss(perfect)[0]) < 1e-9


def test_self_classifier_on_either_head():
    z = randn(6, 16)
    own, borrowed = make("self_classifier"), make("self_classifier", "--head", "cplearn")
    for method in (own, borrowed):
        cosines = method.logits([z])[0]
        assert cosines.shape == (6, 30) and cosines.abs().max() <= 1 + 1e-9
        assert torch.equal(method.predict(z), cosines.argmax(1))
    codes = borrowed.frozen_head.dictionary.codes(dtype=torch.float64)
    h = borrowed.frozen_head(z)
    assert torch.allclose(borrowed.logits([z])[0], F.normalize(h, dim=1) @ F.normalize(codes, dim=1).T)
    assert not any("packed" in k for k in borrowed.state_dict())
