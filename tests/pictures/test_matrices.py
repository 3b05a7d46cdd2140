"""Order and averages of the drawn matrices, against loops and where the answer is known."""

import numpy as np
import pytest
import torch
from helpers import randn

from cplearn.features.splits import Features
from cplearn.metrics.analysis import Network, covariance_of
from cplearn.pictures import matrices


def network(labels, codes, classes=None, width=4) -> Network:
    n = len(codes)
    features = randn(n, width).float()
    names = [f"{i}.png" for i in range(n)]
    data = Features(features, torch.tensor(labels), torch.tensor(codes), names, classes, 100, "resnet8", {})
    return Network("net", data, features)


def test_similar_dimensions_are_neighbors():
    groups = torch.arange(24) % 4  # four factors, mixed up
    x = randn(500, 4)[:, groups] + 0.3 * randn(500, 24, seed=1)
    order = matrices.similar_together(covariance_of(x))
    assert sorted(order) == list(range(24))
    changes = (groups[order][1:] != groups[order][:-1]).sum()
    assert changes == 3
    assert list(matrices.similar_together(torch.ones(1, 1))) == [0]
    assert sorted(matrices.similar_together(torch.zeros(3, 3))) == [0, 1, 2]  # constant dimensions


def test_images_are_ordered_by_class_then_by_code():
    some = np.array([0, 1, 2, 3, 4, 6])
    net = network([1, 0, 1, 0, 1, 0, 0], [7, 5, 9, 7, 9, 1, 5], ["a", "b"])
    order = some[matrices.in_order(net, some)]
    assert list(order) == [1, 6, 3, 2, 4, 0]  # class 0: code 5 twice, 7; class 1: code 9 twice, 7


def test_cells_are_means_without_images_with_themselves():
    matrix = randn(7, 7)
    cells = matrices.in_cells(matrix, 3)  # of 3 x 3 images
    assert cells.shape == (2, 2)
    assert cells[0, 1].item() == pytest.approx(matrix[:3, 3:6].mean().item())
    own = [matrix[i, j].item() for i in range(3, 6) for j in range(3, 6) if i != j]
    assert cells[1, 1].item() == pytest.approx(np.mean(own))
    assert torch.equal(matrices.in_cells(matrix, 7), matrix)


def test_groups_are_classes_or_the_most_used_codes():
    groups, names, share = matrices.groups_of(network([1, 0, 1], [3, 3, 4], ["cat", "dog"]))
    assert groups.tolist() == [1, 0, 1] and names == ["cat (1)", "dog (2)"] and share == 1
    codes = [k for k in range(25) for _ in range(2)] + [30, 30, 30]
    groups, names, share = matrices.groups_of(network([-1] * 53, codes))
    assert names[0] == "30 (3)" and len(names) == 20 and groups[-1] == 0
    assert share == pytest.approx(41 / 53) and (groups == -1).sum() == 12
    for k in range(20):
        assert {codes[i] for i in range(53) if groups[i] == k} == {int(names[k].split()[0])}


@pytest.mark.parametrize("largest, limit", [(0.034, 0.04), (0.31, 0.4), (0.97, 1.0), (0.0, 0.01)])
def test_colors_end_at_a_round_number_above_the_values(largest, limit):
    values = torch.full((4, 4), -largest)
    values[0, 0] = float("nan")
    assert matrices.limit_of([values]) == pytest.approx(limit)
    assert matrices.limit_of([torch.full((1, 1), float("nan"))]) == 1


def test_two_digits():
    assert [matrices.two_digits(x) for x in (-0.001, 0.996, -0.126)] == ["0.00", "1.00", "-0.13"]
