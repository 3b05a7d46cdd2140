"""Energy off the diagonal, energy in blocks, and the entropy of a mixture, against brute force and closed forms."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import randn

from cplearn.metrics.analysis import block_cosines, block_energy, off_diagonal_energy
from cplearn.metrics.mixture import mixture_entropy


def test_off_diagonal_energy():
    x = randn(400, 3) * torch.tensor([1, 2, 3])
    c = np.cov(x.numpy().T)
    off, chance = off_diagonal_energy(x)
    assert off == pytest.approx(1 - (np.diag(c) ** 2).sum() / (c**2).sum()) and chance == pytest.approx(2 / 402)
    together = randn(50, 1).expand(50, 4)
    assert off_diagonal_energy(together)[0] == pytest.approx(0.75)
    assert off_diagonal_energy(torch.ones(9, 4))[0] == 0
    measured = [off_diagonal_energy(randn(60, 40, seed=s))[0] for s in range(20)]
    assert np.mean(measured) == pytest.approx(39 / 99, abs=0.03)  # what `chance` claims


@pytest.mark.parametrize("d", [3, 50])
def test_block_energy_is_that_of_the_whole_matrix(d):
    x, codes = randn(40, d), torch.arange(40) % 6
    squares = (F.normalize(x, dim=1) @ F.normalize(x, dim=1).T).square()
    same, different = codes[:, None] == codes, ~torch.eye(40, dtype=torch.bool)
    found = block_energy(x, codes)
    assert found["same_code_cos2"] == pytest.approx(squares[same & different].mean().item())
    assert found["other_code_cos2"] == pytest.approx(squares[~same].mean().item())
    assert block_energy(x, torch.arange(40))["same_code_cos2"] is None
    assert block_energy(x, torch.zeros(40))["other_code_cos2"] is None


def test_block_cosines_are_a_loop_over_pairs():
    x, groups = randn(14, 5), torch.tensor([0, 0, 0, 1, 1, 2, -1, -1, 0, 1, 1, 3, 3, 3])
    found = block_cosines(x, groups, 5)
    for a in range(5):
        for b in range(5):
            pairs = [(i, j) for i in range(14) for j in range(14) if i != j and groups[i] == a and groups[j] == b]
            if pairs:
                mean = np.mean([F.cosine_similarity(x[i], x[j], dim=0).item() for i, j in pairs])
                assert found[a, b].item() == pytest.approx(mean)
            else:
                assert found[a, b].isnan()
    assert found[2, 2].isnan() and found[4].isnan().all() and found[2, 3].isfinite()


def test_mixture_entropy_of_a_gaussian_is_the_closed_form():
    std = np.array([0.5, 1.0, 2.0])
    x = randn(4000, 3).numpy() * std
    entropy, fit = mixture_entropy(x, 1, samples=20_000, seed=0)
    assert fit == "ok" and entropy == pytest.approx((0.5 * np.log(2 * np.pi * np.e * std**2)).mean(), abs=0.03)
    apart = np.concatenate([x, x + 1000])  # two of them, far from each other: log 2 more
    entropy_of_two, _ = mixture_entropy(apart, 2, samples=20_000, seed=0)
    assert 3 * (entropy_of_two - entropy) == pytest.approx(math.log(2), abs=0.1)


def test_a_mixture_that_cannot_be_fitted_is_a_marked_gap():
    x = randn(30, 3).numpy()
    assert mixture_entropy(x, 31, samples=10, seed=0)[0] is None
    assert mixture_entropy(x * 0, 2, samples=10, seed=0)[0] is None
    entropy, fit = mixture_entropy(x, 10, samples=10, seed=0)
    assert entropy is not None and "3.0 images" in fit
    x[3, 1] = np.nan
    assert mixture_entropy(x, 2, samples=10, seed=0)[0] is None
