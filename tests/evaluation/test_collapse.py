"""Numbers of collapse against brute force, collapsed cases, verdicts."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import randn

from cplearn.evaluation import collapse
from cplearn.evaluation.collapse_numbers import covariance_of
from cplearn.methods.cplearn import CPLearn


def test_rankme_counts_equal_directions_and_is_the_formula():
    assert collapse.rankme(3 * torch.eye(7)[:5]) == pytest.approx(5)
    assert collapse.rankme(torch.ones(9, 4)) == pytest.approx(1)
    assert collapse.rankme(torch.zeros(9, 4)) == 1
    x = randn(20, 6)
    for y in (x, x.T):
        assert np.allclose(collapse.singular_values(y), np.linalg.svd(y.numpy())[1])
    share = np.linalg.svd(x.numpy())[1]
    share = share / share.sum()
    assert collapse.rankme(x) == pytest.approx(math.exp(-(share * np.log(share)).sum()))


def test_covariance_spectrum_is_numpys():
    x = randn(30, 8) * torch.arange(1, 9)
    expected = np.linalg.eigvalsh(np.cov(x.numpy().T))[::-1]
    assert np.allclose(collapse.covariance_spectrum(x), expected)
    assert np.allclose(covariance_of(x, rows=7), np.cov(x.numpy().T))
    assert collapse.shape_of_spectrum(collapse.covariance_spectrum(x), 30) == pytest.approx(
        expected[[0, 1, 3, 7]] / expected[0], rel=1e-3
    )


def test_dimensions_is_the_participation_ratio():
    def dimensions(x):
        return collapse.dimensions(collapse.covariance_spectrum(x))

    assert dimensions(torch.cat([torch.eye(6), -torch.eye(6)])) == pytest.approx(6)
    line = randn(50, 1) * randn(1, 8, seed=1)
    assert dimensions(line) == pytest.approx(1) and dimensions(torch.ones(5, 3)) == 1
    x = randn(30, 5) * torch.arange(1, 6)
    values = np.linalg.eigvalsh(np.cov(x.numpy().T))
    assert dimensions(x) == pytest.approx(values.sum() ** 2 / (values**2).sum())


def test_mean_cosine_is_a_double_loop():
    x = randn(12, 5)
    pairs = [F.cosine_similarity(x[i], x[j], dim=0).item() for i in range(12) for j in range(12) if i != j]
    assert collapse.mean_cosine(x) == pytest.approx(np.mean(pairs))
    for same in (torch.ones(4, 3), torch.zeros(4, 3)):
        assert collapse.mean_cosine(same) == pytest.approx(1)


def test_within_code_share_against_loops_and_in_known_cases():
    x, codes = randn(40, 3), torch.arange(40) % 7
    codes[0] = 99  # a code of one image (99 % 7 is 1)
    inside = freedom = 0
    for code in codes.unique():
        rows = x[codes == code]
        inside += (rows - rows.mean(0)).square().sum().item()
        freedom += len(rows) - 1
    total = (x - x.mean(0)).square().sum().item() / 39
    assert collapse.within_code_share(x, codes) == pytest.approx(inside / freedom / total)
    assert collapse.within_code_share(x, torch.zeros(40, dtype=torch.int64)) == pytest.approx(1)
    assert collapse.within_code_share(x[codes % 7], codes) == pytest.approx(0, abs=1e-12)  # one vector a code
    assert collapse.within_code_share(x, torch.arange(40)) is None
    assert collapse.within_code_share(torch.ones(40, 3), codes) is None


def test_probe_metrics_of_collapsed_probes_are_finite():
    n, constant, one = 30, torch.ones(30, 4), torch.zeros(30, dtype=torch.int64)
    found = collapse.probe_metrics(constant, constant, one, None, one)
    assert found["features_rank"] == pytest.approx(1) and found["features_std"] == pytest.approx(0, abs=1e-9)
    assert (found["codes_used"], found["codes_perplexity"]) == (1, 1)
    assert found["agreement"] == found["agreement_chance"] == 1 and found["score"] == 0
    assert found["code_cosine"] is None and found["within_code"] is None and found["images"] == n
    numbers = [v for v in found.values() if isinstance(v, float)] + found["features_spectrum"]
    assert np.isfinite(numbers).all()
    vectors = torch.sign(randn(n, 4)).float()
    found = collapse.probe_metrics(randn(n, 4), -3 * vectors, torch.arange(n), vectors, torch.arange(n).flip(0))
    assert found["code_cosine"] == pytest.approx(1) and found["agreement"] == 0
    assert found["score"] == pytest.approx(0)  # one pair of n is what chance gives
    assert found["agreement_chance"] == pytest.approx(1 / n) and found["codes_perplexity"] == pytest.approx(n)


HEALTHY = {
    "usage_perplexity": 900.0, "information": 0.9, "probe_images": 256, "probe_features_cosine": 0.4,
    "probe_features_rank": 100.0, "probe_embedding_rank": 60.0, "probe_embedding_dimensions": 5.0,
    "probe_codes_perplexity": 150.0, "probe_codes_used": 170, "probe_within_code": 0.3,
    "probe_agreement": 0.1, "probe_agreement_chance": 0.01,
}  # fmt: skip


@pytest.mark.parametrize(
    "name, changed, number, remedy",
    [
        ("representation", {"probe_features_cosine": 0.9991}, "0.9991", "--lr"),
        ("representation", {"probe_features_cosine": math.nan}, "nan", "--lr"),
        ("cluster", {"usage_perplexity": 1.02}, "1.0, of 1024", "--beta"),
        ("cluster", {"probe_codes_perplexity": 1.3}, "1.3, of 1024", "--beta"),
        ("cluster", {"usage_perplexity": 1.0, "information": 0.0}, "1.0, of 1024", "--beta"),
        ("stuck at uniform", {"usage_perplexity": 1024.0, "information": 0.003}, "0.0030 nats", "--n_ref"),
        ("stuck at uniform", {"probe_agreement": 0.012}, "1.2% (chance 1.0%)", "--beta"),
        ("dimensional", {"probe_embedding_dimensions": 1.2}, "vary in 1.2 dimensions", "--out_dim"),
        ("intracluster", {"probe_within_code": 0.004}, "0.4% of the variance", "--out_dim"),
    ],
)
def test_verdicts_name_the_collapse_its_evidence_and_the_remedy(name, changed, number, remedy):
    found = collapse.verdict(HEALTHY | changed, 1024)
    line = found.line(CPLearn.REMEDIES)
    assert found.name == name and number in found.evidence
    assert remedy in line and ("collapse" in line) == (name != "stuck at uniform")
    assert "--beta" not in found.line({})  # which other methods do not have


def test_verdicts_on_little():
    said = collapse.verdict(HEALTHY, 1024).line({})
    assert said.startswith("healthy: codes of two views agree in 10.0% (chance 1.0%), 170 codes for 256 images")
    assert collapse.verdict(HEALTHY | {"probe_within_code": None}, 1024).name == "healthy"
    assert collapse.verdict({}, 1024) is None  # no probe in this epoch, and a method without assignments
    window = {k: v for k, v in HEALTHY.items() if not k.startswith("probe_")}
    assert collapse.verdict(window, 1024) is None  # health takes a look at the probe
    assert collapse.verdict(HEALTHY | {"probe_images": 3, "probe_agreement": 0}, 1024) is None
    assert collapse.verdict(window | {"usage_perplexity": 1.1}, 1024).name == "cluster"
    probe = {k: v for k, v in HEALTHY.items() if k.startswith("probe_")}
    assert collapse.verdict(probe, 1024).name == "healthy"
    both = HEALTHY | {"usage_perplexity": 2.0, "probe_codes_perplexity": 2.0, "probe_agreement": 0.9}
    assert collapse.verdict(both, 2).name == "healthy"  # two codes are all there are
    assert collapse.verdict(both, 1024).name == "cluster"
