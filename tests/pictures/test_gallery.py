"""What is said of codes, against loops and formulas; thumbnails and their bound."""

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from cplearn.data import sources
from cplearn.data.datasets import Digits
from cplearn.features.splits import Features
from cplearn.pictures import gallery as codes


def features_of(numbers, labels=None, classes=None, width=6, seed=0) -> Features:
    n = len(numbers)
    x = torch.randn(n, width, generator=torch.Generator().manual_seed(seed))
    labels = torch.full((n,), -1) if labels is None else torch.tensor(labels)
    names = [f"{i}.jpg" for i in range(n)]
    return Features(x, labels, torch.tensor(numbers), names, classes, 50, "resnet8", {"data": "here"})


DATA = features_of([7, 7, 7, 7, 3, 3, 9, 9, 9, 5], [0, 0, 1, 2, 1, 1, 2, 2, 0, 0], ["ant", "bee", "cat"])
CERTAINTY = torch.tensor([0.1, 0.4, 0.3, 0.2, 0.9, 0.8, 0.5, 0.6, 0.7, 0.05])


def test_purity_and_its_chance():
    counts, largest = codes.largest_classes(DATA.codes.numpy(), DATA.labels.numpy())
    assert counts.tolist() == [2, 1, 4, 3] and largest.tolist() == [2, 1, 2, 2]  # codes 3, 5, 7, 9
    use = codes.measure_use(DATA, seed=0)
    share = np.array([0.2, 0.1, 0.4, 0.3])
    assert (use.used, use.purity) == (4, pytest.approx(0.7))
    assert use.perplexity == pytest.approx(np.exp(-(share * np.log(share)).sum()))
    levels = codes.chance_level(DATA.codes.numpy(), DATA.labels.numpy(), 0)
    assert levels[1] == 1 and use.chance == pytest.approx(levels.sum() / 10)  # one image is pure always


def test_chance_is_what_random_codes_reach():
    rng = np.random.default_rng(0)
    numbers, labels = rng.integers(0, 300, 3000), rng.integers(0, 10, 3000)
    _, largest = codes.largest_classes(numbers, labels)
    assert codes.chance_level(numbers, labels, 1).sum() == pytest.approx(largest.sum(), rel=0.03)


def test_codes_are_the_most_used_with_evenly_spaced_images():
    shown = codes.describe_codes(DATA, CERTAINTY, lambda _: None, count=3, per_code=2, seed=0)
    assert [(code.number, code.count) for code in shown] == [(7, 4), (9, 3), (3, 2)]
    assert [code.images for code in shown] == [[1, 0], [8, 6], [4, 5]]  # the most and the least certain
    assert shown[0].classes == [("ant", 2), ("bee", 1), ("cat", 1)] and shown[0].purity == 0.5
    assert shown[1].classes == [("cat", 2), ("ant", 1)] and shown[2].purity == 1
    assert shown[0].certainty == pytest.approx(0.25) and 0.25 < shown[0].chance <= 1
    assert [code.near_vectors for code in shown] == [[], [], []]


def test_images_without_labels_have_no_purity():
    data = features_of([1, 1, 2])
    assert codes.measure_use(data, 0).purity is None
    (first, _) = codes.describe_codes(data, torch.rand(3), lambda _: None, count=9, per_code=9, seed=0)
    assert (first.classes, first.purity, first.chance) == ([], None, None)


def test_nearest_codes_by_vectors_and_by_images():
    table = torch.randn(50, 8, generator=torch.Generator().manual_seed(1))
    asked = []

    def vectors_of(numbers):
        asked.append(numbers.tolist())
        return table[numbers]

    shown = codes.describe_codes(DATA, CERTAINTY, vectors_of, count=3, per_code=2, seed=0)
    assert asked == [[7, 9, 3]]  # of the shown codes only
    cosine = F.cosine_similarity(table[7], table[[9, 3]], dim=1).tolist()
    assert dict(shown[0].near_vectors) == pytest.approx(dict(zip((9, 3), cosine, strict=True)))
    assert shown[0].near_vectors[0][1] >= shown[0].near_vectors[1][1]
    unit = DATA.features / DATA.features.norm(dim=1, keepdim=True)
    means = {k: unit[DATA.codes == k].mean(0) - unit.mean(0) for k in (7, 9, 3)}
    expected = {k: F.cosine_similarity(means[9], means[k], dim=0).item() for k in (7, 3)}
    assert dict(shown[1].near_images) == pytest.approx(expected, abs=1e-6)


def test_nearest_images():
    x = torch.randn(30, 5, generator=torch.Generator().manual_seed(2))
    (found,) = codes.nearest(x[4:5] * 3, x, 4)
    expected = F.cosine_similarity(x[4:5], x).argsort(descending=True)[:4].tolist()
    assert [i for i, _ in found] == expected and found[0] == (4, pytest.approx(1))
    assert codes.nearest(x[:1], x[:1], 5, itself=True) == [[]]


@pytest.mark.parametrize(("count", "expected"), [(1, [0]), (2, [0, 9]), (4, [0, 3, 6, 9]), (10, list(range(10)))])
def test_spread(count, expected):
    assert codes.spread(range(10), count) == expected
    assert codes.spread([3, 4], 5) == [3, 4]


def test_a_thumbnail_is_what_the_network_sees():
    image = Image.new("RGB", (400, 200), "blue")
    image.paste("red", (100, 0, 300, 200))  # the middle square
    pixels = np.asarray(Image.open(io.BytesIO(codes.thumbnail(image, 112, 48))), dtype=int)
    assert pixels.shape == (48, 48, 3) and pixels[..., 0].min() > 200
    small = Image.open(io.BytesIO(codes.thumbnail(image, 32, 48)))
    assert small.size == (32, 32)  # nothing is made up


def test_a_thumbnail_reads_a_large_photo_at_a_fraction_of_its_size():
    class Photos:
        def read(self, i, reduction):
            asked.append([reduction(w, h) for w, h in ((4000, 3000), (1200, 900), (300, 300), (40, 40))])
            return Image.new("RGB", (300, 300)), 0

    asked = []
    codes.read_thumbnail(Photos(), 0, 224, 96)
    assert asked == [[8, 2, 1, 1]]


def test_a_sample_is_drawn_by_its_seed_and_keeps_the_order():
    digits = Digits("val")
    one, again, other = (sources.Sample(digits, 40, seed) for seed in (3, 3, 4))
    assert list(one.names) == list(again.names) != list(other.names)
    assert len(one) == 40 and one.classes == digits.classes and np.all(np.diff(one.rows) > 0)
    i = list(digits.names).index(one.names[7])
    image, label = one[7]
    assert np.array_equal(np.asarray(image), np.asarray(digits[i][0])) and label == digits.labels[i] == one.labels[7]
