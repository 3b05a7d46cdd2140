"""The hash against plain Python; moments and independence of what is drawn."""

import torch

from cplearn.random_streams import FOR_ORDER, FOR_PROBE, hash64, random_bits, random_normal, random_stream


def splitmix64(x: int) -> int:
    """The finalizer with Python's unbounded integers."""
    mask = 2**64 - 1
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def test_hash_equals_splitmix64_in_python():
    values = [0, 1, 2**31, 2**62 + 12345, -1, -(2**63)]
    expected = [splitmix64(v % 2**64) for v in values]
    assert [v % 2**64 for v in hash64(torch.tensor(values)).tolist()] == expected


def test_random_bits_are_a_pure_function_of_seed_and_counter():
    golden = 0x9E3779B97F4A7C15
    state = splitmix64((7 * golden + golden) % 2**64)
    expected = [splitmix64((state + (i + 1) * golden) % 2**64) for i in range(5)]
    assert [v % 2**64 for v in random_bits(7, torch.arange(5)).tolist()] == expected


def test_random_normal_moments_and_independence_of_streams():
    x = random_normal(torch.tensor([1, 2, 3]), (100_000,))
    assert x.isfinite().all()
    torch.testing.assert_close(x.mean(1), torch.zeros(3), atol=0.02, rtol=0)
    torch.testing.assert_close(x.std(1), torch.ones(3), atol=0.02, rtol=0)
    assert (torch.corrcoef(x) - torch.eye(3)).abs().max() < 0.02
    assert abs((x > 1.96).float().mean() - 0.025) < 0.003


def test_streams_of_different_purpose_differ():
    """NumPy pads seeds with zeros: without a purpose the order of images would be the first view's stream."""
    streams = [random_stream(purpose, *key) for purpose in (FOR_ORDER, FOR_PROBE) for key in ((3, 1), (3,), (3, 0))]
    assert len({tuple(s.random(4)) for s in streams}) == 6 - 2  # (3,) and (3, 0) are one
