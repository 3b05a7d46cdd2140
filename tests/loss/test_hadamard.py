"""Hadamard matrices and the dictionary of their rows."""

import math

import pytest
import torch
from scipy.linalg import hadamard as scipy_hadamard

from cplearn.errors import UserError
from cplearn.loss.hadamard import HadamardDictionary, hadamard, hadamard_factors, paley, sylvester
from cplearn_head import CPLearnHead


@pytest.mark.parametrize("order", [1, 2, 4, 8, 12, 20, 24, 28, 36, 40, 60, 64, 76, 192, 384, 512, 768, 2048])
def test_hadamard_matrices_are_orthogonal(order):
    matrix = hadamard(order)
    assert matrix.shape == (order, order) and matrix.abs().eq(1).all()
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order))
    assert matrix[0].eq(1).all()


def test_constructions():
    assert torch.equal(sylvester(16), torch.from_numpy(scipy_hadamard(16)).float())
    assert [len(f) for f in hadamard_factors(384)] == [12, 32] and [len(f) for f in hadamard_factors(2048)] == [32, 64]
    assert paley(28) is not None and paley(92) is None and paley(16) is None


@pytest.mark.parametrize(("order", "near"), [(383, "384 or 380"), (92, "88 or 96"), (6, "4 or 8")])
def test_orders_without_a_construction_are_refused(order, near):
    with pytest.raises(UserError, match=f"order {order} is built here: use --embed_dim {near}"):
        HadamardDictionary(16, order)


def test_hadamard_codes_are_orthogonal_in_blocks_and_random_across():
    w = HadamardDictionary(384 * 5 + 7, 384, seed=1).codes()
    assert set(w.unique().tolist()) == {-1.0, 1.0} and w.shape == (1927, 384)
    for start in range(0, 1927, 384):
        block = w[start : start + 384]
        assert torch.equal(block @ block.T, 384 * torch.eye(len(block)))
    across = (w[:384] @ w[384:768].T / 384).abs()
    assert across.mean().item() == pytest.approx(math.sqrt(2 / math.pi / 384), rel=0.05) and across.max() < 0.35


def test_hadamard_dictionaries_are_nested_seeded_and_named():
    small, large = HadamardDictionary(100, 48, seed=5), HadamardDictionary(1000, 48, seed=5)
    assert torch.equal(small.packed, large.packed[:100]) and large.packed.numel() == 1000 * 6
    assert not torch.equal(small.packed, HadamardDictionary(100, 48, seed=6).packed)
    assert small.description()["generator"] == "hadamard-splitmix64-v1"
    assert HadamardDictionary(50, 12).checksum().startswith(PINNED_HADAMARD)
    with pytest.raises(UserError, match="another dictionary.*generator"):
        CPLearnHead(8, 100, 48).load_state_dict(CPLearnHead(8, 100, 48, dictionary="hadamard").state_dict())


PINNED_HADAMARD = "d2726d508f8a0c47"
