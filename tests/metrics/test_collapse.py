"""Numbers of collapse against brute force, collapsed cases, verdicts."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import randn

from cplearn.methods.cplearn import CPLearn
from cplearn.metrics import collapse
from cplearn.metrics.analysis import covariance_of
from cplearn.probe import verdict


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
    found = collapse.probe_metrics(constant, constant, one, None, constant, one)
    assert found["features_rank"] == pytest.approx(1) and found["features_std"] == pytest.approx(0, abs=1e-9)
    assert (found["codes_used"], found["codes_perplexity"]) == (1, 1)
    assert found["agreement"] == found["agreement_chance"] == 1 and found["score"] == 0
    assert found["view_nearness"] == pytest.approx(1 - math.log((n + 1) / 2) / collapse.mean_log_place(n))
    assert found["code_cosine"] is None and found["within_code"] is None and found["images"] == n
    numbers = [v for v in found.values() if isinstance(v, float)] + found["features_spectrum"]
    assert np.isfinite(numbers).all()
    vectors = torch.sign(randn(n, 4)).float()
    features = randn(n, 4)
    codes = torch.arange(n)
    found = collapse.probe_metrics(features, -3 * vectors, codes, vectors, 2 * features, codes.flip(0))
    assert (found["view_nearness"], found["view_nearness_error"]) == (1, 0)
    assert found["code_cosine"] == pytest.approx(1) and found["agreement"] == 0
    assert found["score"] == pytest.approx(0)  # one pair of n is what chance gives
    assert found["agreement_chance"] == pytest.approx(1 / n) and found["codes_perplexity"] == pytest.approx(n)


def test_unique_prototypes_is_a_loop_and_finds_copies():
    x = randn(60, 4)
    x = torch.cat([x, 3 * x[:20] + 1e-3, -x[:5]])[torch.randperm(85, generator=torch.Generator().manual_seed(0))]
    counted = []
    for row in x:
        if all(F.cosine_similarity(row, other, dim=0) <= collapse.SIMILAR for other in counted):
            counted.append(row)
    assert 40 < len(counted) < 66
    for block in (7, 2048):
        assert collapse.unique_prototypes(x, block) == (len(counted), 85)
    assert collapse.unique_prototypes(torch.eye(30)) == (30, 30)
    assert collapse.unique_prototypes(torch.ones(9, 3)) == (1, 9)
    assert collapse.prototype_numbers(None) == {"unique_prototypes": None, "prototypes": None}


def test_of_many_prototypes_an_even_sample_is_looked_at(monkeypatch):
    monkeypatch.setattr(collapse, "MOST_PROTOTYPES", 10)
    x = torch.eye(40)
    x[20:] = x[0]  # half of them are copies
    assert collapse.prototype_numbers(x) == {"unique_prototypes": 5, "prototypes": 10}


START = {
    "start_view_nearness": 0.209, "start_view_nearness_error": 0.014, "start_features_rank": 120.0,
    "start_embedding_rank": 80.0,
    "start_features_dimensions": 12.0, "start_embedding_dimensions": 9.0, "start_features_cosine": 0.55,
    "start_agreement": 0.031, "start_agreement_chance": 0.008, "start_codes_used": 190,
    "start_codes_perplexity": 160.0, "start_within_code": 0.6,
}  # fmt: skip
BETTER = START | {
    "usage_perplexity": 900.0, "information": 0.9, "probe_images": 256, "probe_features_cosine": 0.4,
    "probe_features_rank": 107.0, "probe_embedding_rank": 57.0, "probe_embedding_dimensions": 5.0,
    "probe_features_dimensions": 8.0, "probe_codes_perplexity": 150.0, "probe_codes_used": 171,
    "probe_within_code": 0.3, "probe_agreement": 0.102, "probe_agreement_chance": 0.007, "probe_view_nearness": 0.46,
    "probe_view_nearness_error": 0.015,
}  # fmt: skip


def without(prefix, numbers=BETTER):
    return {k: v for k, v in numbers.items() if not k.startswith(prefix)}


@pytest.mark.parametrize(
    "name, changed, number, remedy",
    [
        ("representation", {"probe_features_cosine": 0.9991}, "0.9991 (at the start 0.5500)", "--lr"),
        ("representation", {"probe_features_cosine": math.nan}, "nan", "--lr"),
        ("cluster", {"usage_perplexity": 1.02}, "1.0, of 1024", "--beta"),
        ("cluster", {"probe_codes_perplexity": 1.3}, "1.3, of 1024 (at the start 160.0)", "--beta"),
        ("cluster", {"usage_perplexity": 1.0, "information": 0.0}, "1.0, of 1024", "--beta"),
        ("stuck at uniform", {"usage_perplexity": 1024.0, "information": 0.003}, "0.0030 nats", "--n_ref"),
        ("stuck at uniform", {"probe_agreement": 0.008}, "0.8% (0.7% by chance; at the start 3.1%)", "--beta"),
        ("dimensional", {"probe_embedding_dimensions": 1.2}, "vary in 1.2 dimensions (at the start 9.0)", "--out_dim"),
        ("intracluster", {"probe_within_code": 0.004}, "0.4% (at the start 60%) of the variance", "--out_dim"),
    ],
)
def test_alarms_name_the_collapse_its_evidence_beside_the_start_and_the_remedy(name, changed, number, remedy):
    found = verdict.judge(BETTER | changed, 1024)
    line = found.line(CPLearn.REMEDIES)
    assert found.name == name and number in found.evidence and name in verdict.ALARMS
    assert remedy in line and ("collapse" in line) == (name != "stuck at uniform")
    assert "--beta" not in found.line({})  # which other methods do not have
    warned = found.line(CPLearn.REMEDIES, ["--beta 10 is above 1"])
    first, then, advice = warned.partition("The start-up warned: --beta 10 is above 1. Mend that first, then try ")
    assert then and remedy in advice and found.evidence in first
    alone = verdict.judge(without("start_") | changed, 1024)
    assert alone.name == name and "at the start" not in alone.evidence


def test_the_line_of_a_run_that_learns():
    assert verdict.judge(BETTER, 1024).line({}) == (
        "learning: another view finds its image at place 11.7 of 256 on average (at the start 36.8); two views of "
        "an image get the same code in 10.2% (0.7% by chance; at the start 3.1%); 171 different codes on 256 images "
        "(at the start 190); effective rank of the features 107 (at the start 120), of the embedding 57 (at the start "
        "80); 20-NN by the labels was not measured (--knn_freq)"
    )


LABELS = {"start_knn20": 0.582, "probe_knn20": 0.568}  # of 3,670 flowers, 5 epochs
FLOWERS = LABELS | {"start_embedding_rank": 210.0, "probe_embedding_rank": 54.0}
# The laptop recipe: the embedding's rank fell from 155 to 36, and 20-NN rose from 0.191 to 0.355.
LAPTOP = {"start_embedding_rank": 155.0, "probe_embedding_rank": 36.0, "start_embedding_dimensions": 18.6,
          "probe_embedding_dimensions": 4.8, "start_knn20": 0.191, "probe_knn20": 0.355}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "name", "said"),
    [
        (
            {"probe_view_nearness": 0.1},
            "no better than at the start",
            "place 60.6 of 256 on average (at the start 36.8)",
        ),
        ({"probe_view_nearness": 0.228}, "no better than at the start", "at place 33.8 of 256"),  # 0.9 errors
        ({"probe_view_nearness": math.nan}, "no better than at the start", "at place nan of 256"),
        (
            LABELS,
            "no better than at the start",
            "20-NN by the labels 0.5680 (at the start 0.5820), standard error 0.0437",
        ),
        (FLOWERS, "no better than at the start", "of the embedding 54 (at the start 210)"),  # whatever its score
        (LAPTOP, "learning", ""),  # an embedding may lose what features may not
        (LAPTOP | {"start_features_rank": 155.0, "probe_features_rank": 36.0}, "losing dimensions", ""),
        ({"probe_within_code": None, "start_within_code": None}, "learning", ""),
        ({"start_knn20": 0.5}, "learning", ""),  # not measured in this epoch
        ({"start_knn20": 0.5, "probe_knn20": 0.51}, "no better than at the start", "standard error 0.0442"),
        ({"start_knn20": 0.5, "probe_knn20": 0.55}, "learning", "0.5500 (at the start 0.5000), standard error 0.0441"),
        ({"start_view_nearness_error": math.nan}, "no alarm", "171 different codes on 256 images"),  # no start
    ],
)
def test_what_is_better_than_at_the_start_is_learning(changed, name, said):
    found = verdict.judge(BETTER | changed, 1024)
    assert found.name == name and said in found.evidence and found.name not in verdict.ALARMS
    assert (name in verdict.WARNINGS) == (name not in ("learning", "no alarm"))


@pytest.mark.parametrize("number", verdict.KEPT)
def test_losing_dimensions_is_a_share_of_the_start(number):
    share = verdict.KEPT[number][0]
    start = {f"start_{number}": 200.0}
    found = verdict.judge(BETTER | start | {f"probe_{number}": 199.0 * share}, 1024)
    assert found.name == "losing dimensions" and "(at the start 200)" in found.evidence
    assert found.name in verdict.WARNINGS and found.name not in verdict.ALARMS
    assert verdict.judge(BETTER | start | {f"probe_{number}": 201.0 * share}, 1024).name == "learning"


@pytest.mark.parametrize(("rise", "risen"), [(0.019, False), (0.022, True), (-0.2, False), (0.0, False)])
def test_a_score_has_risen_if_chance_would_not_do_that(rise, risen):
    """Against drawn scores of these errors, which differ so much by chance in 16 %."""
    start, probe = ({"view_nearness": x, "view_nearness_error": e} for x, e in ((0.2, 0.014), (0.2 + rise, 0.015)))
    rng = np.random.default_rng(0)
    by_chance = np.mean(rng.normal(0, 0.015, 20000) - rng.normal(0, 0.014, 20000) >= rise)
    assert verdict.has_risen(probe, start) == (by_chance < 0.16) == risen


def test_without_a_start_nothing_is_said_but_that_there_is_no_alarm():
    for numbers in (without("start_"), without("start_view")):
        found = verdict.judge(numbers, 1024)
        assert found.name == "no alarm" and found.evidence.startswith("nothing is known about the start")
        assert "171 different codes on 256 images" in found.evidence


def test_verdicts_on_little():
    assert verdict.judge({}, 1024) is None  # no probe in this epoch, and a method without assignments
    window = without("probe_")
    assert verdict.judge(window, 1024) is None  # more takes a look at the probe
    few = verdict.judge(BETTER | {"probe_images": 3, "probe_agreement": 0}, 1024)
    assert few.line({}) == "no alarm: the probe has 3 images, fewer than the 32 that tell more"
    assert verdict.judge(window | {"usage_perplexity": 1.1}, 1024).name == "cluster"
    probe = {k: v for k, v in BETTER.items() if k.startswith(("probe_", "start_"))}
    assert verdict.judge(probe, 1024).name == "learning"
    both = BETTER | {"usage_perplexity": 2.0, "probe_codes_perplexity": 2.0, "probe_agreement": 0.9}
    assert verdict.judge(both, 2).name == "learning"  # two codes are all there are
    assert verdict.judge(both, 1024).name == "cluster"
