"""The k-NN vote against a loop."""

import math

import pytest
import torch
import torch.nn.functional as F

from cplearn.errors import UserError
from cplearn.metrics.knn import faiss_search, knn, leave_one_out_knn, product_search


def test_knn_equals_a_loop():
    generator = torch.Generator().manual_seed(0)
    train, test = (torch.randn(n, 5, generator=generator) for n in (60, 25))
    train_labels, test_labels = (torch.randint(0, 7, (n,), generator=generator) for n in (60, 25))
    got = knn(train, train_labels, test, test_labels, ks=[1, 9, 200], temperature=0.07)
    assert set(got) == {f"knn{k}_top{t}" for k in (1, 9, 60) for t in (1, 5)}  # 200 is capped at 60
    for k in (1, 9, 60):
        top1 = top5 = 0
        for x, y in zip(test, test_labels.tolist(), strict=True):
            similarity = F.cosine_similarity(x[None], train)
            votes = [0.0] * 7
            for j in similarity.argsort(descending=True)[:k].tolist():
                votes[train_labels[j]] += math.exp(similarity[j].item() / 0.07)
            ranked = sorted((c for c in range(7) if votes[c]), key=lambda c: -votes[c])
            top1 += ranked[0] == y
            top5 += y in ranked[:5]
        assert got[f"knn{k}_top1"] == pytest.approx(top1 / 25)
        assert got[f"knn{k}_top5"] == pytest.approx(top5 / 25)


def test_products_find_what_faiss_finds():
    generator = torch.Generator().manual_seed(2)
    train, test = (F.normalize(torch.randn(n, 16, generator=generator), dim=1) for n in (300, 70))
    cosine, neighbor = product_search(train, torch.device("cpu"))(test, 20)
    expected = faiss_search(train)(test, 20)
    torch.testing.assert_close(cosine, expected[0])
    assert torch.equal(neighbor, expected[1])


def test_knn_of_separated_classes_is_perfect():
    centers = 10 * torch.eye(4)
    labels = torch.arange(4).repeat(20)
    features = centers[labels] + 0.1 * torch.randn(80, 4)
    assert knn(features, labels, features, labels, ks=[5], temperature=0.07)["knn5_top1"] == 1


@pytest.mark.parametrize("k", [1, 5, 100])
def test_leave_one_out_is_the_knn_of_each_image_among_the_others(k):
    generator = torch.Generator().manual_seed(1)
    features, labels = torch.randn(30, 6, generator=generator), torch.randint(0, 4, (30,), generator=generator)
    features[3] = features[4]  # an image is left out, not its twin
    hits = 0
    for i in range(30):
        others = torch.arange(30) != i
        one = knn(features[others], labels[others], features[[i]], labels[[i]], ks=[k], temperature=0.07)
        hits += one[f"knn{min(k, 29)}_top1"]
    assert leave_one_out_knn(features, labels, k=k) == pytest.approx(hits / 30)
    searched = knn(features, labels, features, labels, ks=[k], temperature=0.07, leave_one_out=True)
    assert searched[f"knn{min(k, 29)}_top1"] == pytest.approx(hits / 30)


def test_one_image_has_no_neighbor():
    one, label = torch.ones(1, 4), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(UserError, match="1 images"):
        knn(one, label, one, label, ks=[1], temperature=0.07, leave_one_out=True)


def test_no_image_votes_for_itself_where_all_are_at_the_same_place():
    """Whichever of them the search returns; a class of its own is then never hit."""
    features, labels = torch.ones(9, 4), torch.arange(9)
    found = knn(features, labels, features, labels, ks=[1, 3], temperature=0.07, leave_one_out=True)
    assert found["knn1_top1"] == found["knn3_top1"] == 0
