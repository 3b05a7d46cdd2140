"""Measures without labels against scipy, loops and cases whose answer is known; collapsed, tiny and broken input."""

import math

import label_free_measures as label_free
import numpy as np
import pytest
import scipy.linalg
import torch
from helpers import randn
from sklearn.metrics import adjusted_mutual_info_score
from sklearn.neighbors import NearestNeighbors

from cplearn.metrics import collapse


def views(n=40, d=6, noise=0.3):
    x = randn(n, d)
    return x + noise * randn(n, d, seed=1), x + noise * randn(n, d, seed=2)


def test_lidar_is_the_generalized_eigenvalue_problem():
    q = torch.stack([randn(30, 5) + 0.5 * randn(30, 5, seed=s) for s in (1, 2, 3)], 1)
    of_image = q.numpy().mean(1)
    within = sum(np.outer(v - m, v - m) for m, row in zip(of_image, q.numpy(), strict=True) for v in row) / 90
    between = np.cov(of_image.T, bias=True)
    share = scipy.linalg.eigh(between, within + 1e-4 * np.eye(5), eigvals_only=True)
    share = share / share.sum() + 1e-7
    assert label_free.lidar(q) == pytest.approx(math.exp(-(share * np.log(share)).sum()))


def test_lidar_counts_the_directions_that_tell_images_apart():
    x = torch.zeros(200, 8, dtype=torch.float64)
    x[:, :3] = randn(200, 3)
    noise = [0.1 * randn(200, 8, seed=s) for s in (1, 2)]
    assert 3 <= label_free.lidar(torch.stack([x + y for y in noise], 1)) < 3.3  # noise is whitened: 8 by RankMe's count
    # A scale common to views and images does not matter, but for delta.
    two = torch.stack([x + y for y in noise], 1)
    assert label_free.lidar(50 * two, delta=0.25) == pytest.approx(label_free.lidar(two, delta=1e-4))
    assert label_free.lidar(torch.ones(20, 2, 4)) == 1


def test_alpha_req_finds_the_exponent_of_a_power_law():
    j = torch.arange(1, 65, dtype=torch.float64)
    directions = torch.linalg.qr(randn(200, 64) - randn(200, 64).mean(0)).Q
    for alpha in (0.5, 1.0, 1.7):
        assert label_free.alpha_req(directions * j ** (-alpha / 2)) == pytest.approx(alpha, abs=1e-6)
    x = randn(60, 20)
    values = np.linalg.eigvalsh(np.cov(x.numpy().T))[::-1][4:]
    rank = np.arange(5, 21)
    slope = np.polyfit(np.log(rank), np.log(values), 1, w=np.sqrt(1 / rank))[0]
    assert label_free.alpha_req(x) == pytest.approx(-slope)
    assert math.isnan(label_free.alpha_req(randn(60, 8)))  # four eigenvalues from the fifth on


def test_view_retrieval_is_a_loop_and_counts_ties_in_part():
    a, b = views(noise=0.8)
    hits = [max(range(40), key=lambda i, row=row: torch.cosine_similarity(a[i], row, dim=0)) for row in b]
    assert label_free.view_retrieval(a, b) == pytest.approx(np.mean([i == j for i, j in enumerate(hits)]))
    assert 0.1 < label_free.view_retrieval(a, b) < 1 and label_free.view_retrieval(a, 3 * a) == 1
    assert label_free.view_retrieval(torch.ones(50, 3), torch.ones(50, 3)) == pytest.approx(1 / 50)


def test_view_nearness_is_a_sorted_list_and_tells_near_misses_apart():
    a, b = views(noise=0.8)
    cosine = [[torch.cosine_similarity(row, other, dim=0).item() for other in a] for row in b]
    places = [1 + sorted(row, reverse=True).index(row[i]) for i, row in enumerate(cosine)]
    found = collapse.view_places(a, b)
    assert found.tolist() == places and (found == 1).double().mean() == pytest.approx(label_free.view_retrieval(a, b))
    by_chance = np.mean(np.log(np.arange(1, 41)))
    assert collapse.mean_log_place(40) == pytest.approx(by_chance)
    scores = 1 - np.log(places) / by_chance
    assert collapse.view_nearness(a, b) == pytest.approx((scores.mean(), scores.std(ddof=1) / np.sqrt(40)))
    assert collapse.view_nearness(a, 3 * a) == (1, 0)
    assert collapse.view_places(torch.ones(9, 3), torch.ones(9, 3)).tolist() == [5] * 9
    assert all(math.isnan(x) for x in collapse.view_nearness(a[:1], b[:1]))


def test_view_nearness_is_0_by_chance_and_its_error_what_it_varies_by():
    found = np.array([collapse.view_nearness(randn(200, 30, seed=s), randn(200, 30, seed=s + 500)) for s in range(100)])
    assert abs(found[:, 0].mean()) < 0.006 and found[:, 0].std() == pytest.approx(found[:, 1].mean(), rel=0.25)


def blobs(n=400, k=4):
    group = torch.arange(n) % k
    return 20 * torch.eye(k, 6, dtype=torch.float64)[group] + randn(n, 6), group


def test_clusters_are_found_and_the_second_view_falls_into_the_same():
    x, group = blobs()
    labels, centers = label_free.clusters(x, k=4)
    assert adjusted_mutual_info_score(group, labels) == 1 and centers.shape == (4, 6)
    assert label_free.cluster_agreement(x, x, (labels, centers)) == pytest.approx((1, 1))
    half = torch.cat([x[:200], x[200:].roll(1, 0)])  # of the second half each image has the view of another blob
    share, ami = label_free.cluster_agreement(x, half, (labels, centers))
    assert share == pytest.approx(0.5) and 0 < ami < 0.7
    share, ami = label_free.cluster_agreement(*views(n=400, noise=1e-6))
    assert share == 1 and ami == pytest.approx(1)
    share, ami = label_free.cluster_agreement(randn(400, 6), randn(400, 6, seed=1))
    assert share < 0.15 and abs(ami) < 0.05


def test_learnability_is_an_online_nearest_neighbor_classifier():
    x, _ = views()
    labels, _ = label_free.clusters(x)
    hits = []
    for i in range(1, 40):
        cosine = torch.cosine_similarity(x[:i], x[i : i + 1], dim=1)
        hits.append(labels[int(cosine.argmax())] == labels[i])
    assert label_free.learnability(x) == pytest.approx(np.mean(hits)) and 0.1 < np.mean(hits) < 1
    y, group = blobs()
    assert label_free.learnability(y, group) > 0.98


def test_intrinsic_dimension_is_two_nn_and_finds_the_dimension():
    x, _ = views(n=60)
    unit = x / x.norm(dim=1, keepdim=True)
    near = NearestNeighbors(n_neighbors=3).fit(unit.numpy()).kneighbors(unit.numpy())[0]
    assert label_free.intrinsic_dimension(x) == pytest.approx(59 / np.log(near[:, 2] / near[:, 1]).sum(), rel=1e-6)
    for d in (2, 5):  # on a sphere in d + 1 dimensions, turned into 30
        flat = randn(2000, d + 1) @ torch.linalg.qr(randn(30, d + 1, seed=3)).Q.T
        assert label_free.intrinsic_dimension(flat) == pytest.approx(d, rel=0.1)
        twice = torch.cat([flat, flat[:200]])
        assert label_free.intrinsic_dimension(twice) == pytest.approx(d, rel=0.15)  # duplicates do not count
    assert label_free.clid(0.5, 8.0) == pytest.approx(math.log(4)) and math.isnan(label_free.clid(0.0, 8.0))


def test_all_together_have_the_names_and_values_of_each():
    a, b = views(n=100, d=12)
    codes, others = torch.arange(100) % 7, torch.arange(100) % 5
    found = label_free.label_free(a, b, 3 * a[:, :10], b[:, :10], codes, others)
    assert found["features_lidar"] == label_free.lidar(torch.stack([a, b], 1))
    assert found["embedding_retrieval"] == label_free.view_retrieval(a[:, :10], b[:, :10])
    assert found["features_rank"] == collapse.rankme(a) and found["embedding_alpha"] == label_free.alpha_req(
        a[:, :10] * 3
    )
    assert found["features_alpha_distance"] == abs(found["features_alpha"] - 1)
    assert found["retrieval_chance"] == 0.01
    assert (found["features_cluster_agreement"], found["features_cluster_ami"]) == label_free.cluster_agreement(a, b)
    probe = collapse.probe_metrics(a, b, codes, None, b, others)
    assert found["features_view_nearness"] == probe["view_nearness"]
    assert (probe["view_nearness"], probe["view_nearness_error"]) == collapse.view_nearness(a, b)
    assert (found["codes_score"], found["codes_agreement"]) == (probe["score"], probe["agreement"])
    assert found["features_std"] == pytest.approx(probe["features_std"])
    assert found["codes_ami"] == pytest.approx(adjusted_mutual_info_score(codes, others))


@pytest.mark.parametrize("n", [2, 3, 5, 30])
def test_collapsed_broken_and_tiny_input_gives_numbers_or_nan(n):
    ones, codes = torch.ones(n, 8), torch.zeros(n, dtype=torch.int64)
    names = set(label_free.label_free(*[randn(n, 8)] * 4, torch.arange(n), torch.arange(n)))
    found = label_free.label_free(ones, ones, 0 * ones, 0 * ones, codes, codes)
    assert set(found) == names and not any(math.isinf(v) for v in found.values())
    assert found["features_rank"] == pytest.approx(1) and found["features_lidar"] == 1
    assert found["embedding_retrieval"] == pytest.approx(1 / n) and math.isnan(found["features_alpha"])
    broken = label_free.label_free(ones * math.nan, ones, ones, ones / 0, codes, codes)
    assert set(broken) == names and all(math.isnan(broken[f"features_{m}"]) for m in label_free.MEASURES)
    assert all(math.isnan(broken[f"embedding_{m}"]) for m in label_free.MEASURES) and broken["codes_ami"] == 0


def test_the_same_input_gives_the_same_numbers():
    a, b = views(n=120, d=20)
    codes = torch.arange(120) % 9
    one, two = (label_free.label_free(a.float(), b.float(), a, b, codes, codes) for _ in "12")
    assert one == two
