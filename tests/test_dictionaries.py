"""The frozen codes against NumPy and plain Python; the fast transform against the matrix; the prior buffer."""

import copy
import hashlib
import math

import numpy as np
import pytest
import torch
from scipy.linalg import hadamard as scipy_hadamard

from cplearn.dictionary import DICTIONARIES
from cplearn.dictionary.codes import Dictionary
from cplearn.dictionary.hadamard import HadamardDictionary, hadamard, hadamard_factors, paley, sylvester
from cplearn.dictionary.prior_buffer import PriorBuffer
from cplearn.dictionary.streamed_loss import streamed_loss
from cplearn.dictionary.terms import LossSpec
from cplearn.errors import UserError
from cplearn.random_streams import hash64, random_bits, random_normal
from cplearn_head import CPLearnHead, cplearn_loss


def splitmix64(x: int) -> int:
    """The finaliser with Python's unbounded integers."""
    mask = 2**64 - 1
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


# --- random signs -------------------------------------------------------------------------------------


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


def test_dictionary_bits_are_pinned():
    """The stream may never change: old checkpoints are rebuilt from it."""
    codes = Dictionary(1000, 384, seed=3).codes().numpy()
    bits = np.packbits(codes > 0, axis=1, bitorder="little")
    assert Dictionary(1000, 384, seed=3).checksum() == hashlib.sha256(bits.tobytes()).hexdigest()
    word = random_bits(3, torch.tensor([5 * 6 + 2])).item() % 2**64  # code 5, entries 128..191 (6 words a code)
    assert [(word >> i) & 1 for i in range(64)] == (codes[5, 128:192] > 0).astype(int).tolist()
    assert Dictionary(16, 64, seed=0).checksum().startswith(PINNED)


PINNED = "2cda1739bc0f55b6"


@pytest.mark.parametrize("embed_dim", [20, 64, 100, 384])
def test_dictionary_statistics(embed_dim):
    """Acceptance check 9: entries +-1, fair, mean |cos| of random pairs about 0.8 / sqrt(f_h)."""
    w = Dictionary(4000, embed_dim, seed=1).codes()
    assert w.shape == (4000, embed_dim) and set(w.unique().tolist()) == {-1.0, 1.0}
    assert abs(w.mean()) < 4 / math.sqrt(w.numel())
    assert w.mean(0).abs().max() < 5 / math.sqrt(4000)
    cos = (w[:2000] * w[2000:]).mean(1).abs().mean().item()
    assert cos == pytest.approx(math.sqrt(2 / math.pi) / math.sqrt(embed_dim), rel=0.06)


def test_dictionaries_are_nested_and_seeded():
    small, large = Dictionary(100, 128, seed=5), Dictionary(70_000, 128, seed=5)
    assert torch.equal(small.packed, large.packed[:100])
    assert not torch.equal(small.packed, Dictionary(100, 128, seed=6).packed)
    assert torch.equal(large.codes(65_530, 65_540), large.codes()[65_530:65_540])
    assert large.packed.numel() == 70_000 * 128 // 8  # one bit an entry


@pytest.mark.parametrize("kind", DICTIONARIES)
@pytest.mark.parametrize("embed_dim", [20, 48, 128])
def test_blocks_multiply_as_the_matrix(kind, embed_dim):
    """Aligned with the Hadamard blocks or not, first and last codes."""
    dictionary = DICTIONARIES[kind](1000, embed_dim, seed=2)
    w = dictionary.codes(dtype=torch.float64)
    h = torch.randn(embed_dim, 7, dtype=torch.float64)
    read = dictionary.reader(1000, torch.float64)
    for start, stop in ((0, 1000), (0, embed_dim), (embed_dim, 3 * embed_dim), (10, 700), (999, 1000)):
        block, room = read(start, stop), torch.empty(stop - start, 7, dtype=torch.float64)
        torch.testing.assert_close(block.scores(h, room), w[start:stop] @ h)
        weights = torch.randn(stop - start, 7, dtype=torch.float64)
        total = torch.ones(embed_dim, 7, dtype=torch.float64)
        torch.testing.assert_close(block.combine(weights, total), 1 + w[start:stop].T @ weights)


def test_workspaces_are_reused_and_stay_behind():
    """Float32 after float64, training after an evaluation in inference mode, copies and files without them."""
    head = CPLearnHead(8, 500, 32)
    h = torch.randn(3, 32)
    with torch.inference_mode():
        expected = head.assign(h)
    first = head.dictionary._workspaces["codes"].data_ptr()
    assert torch.equal(head.assign(h), expected)
    assert head.dictionary._workspaces["codes"].data_ptr() == first
    for dtype in (torch.float64, torch.float32):
        x = [torch.randn(3, 32, dtype=dtype, requires_grad=True) for _ in range(2)]
        streamed_loss(x, head.dictionary, 1.0, LossSpec(0.3))[0].backward()
    twin = copy.deepcopy(head)
    assert twin.dictionary._workspaces == {} and twin.dictionary.checksum() == head.dictionary.checksum()
    assert torch.equal(twin.assign(h), expected)


# --- Hadamard -----------------------------------------------------------------------------------------


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


# --- prior buffer -------------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", ["reverse", "forward"])
def test_buffer_averages_the_last_steps(prior):
    """Value: p-bar averaged with the last 3 of 5 earlier ones. Gradient: that of now at full weight."""
    torch.manual_seed(0)
    n, c, beta = 6, 11, 0.3
    buffer, past = PriorBuffer(3, c).double(), []
    for _ in range(6):
        s = [torch.randn(n, c, dtype=torch.float64).requires_grad_() for _ in range(2)]
        loss, terms, usage = cplearn_loss(s, LossSpec(beta, prior=prior, buffer=buffer))
        plain_loss, plain_terms, plain_usage = cplearn_loss(s, LossSpec(beta, prior=prior))
        p = [x.softmax(1) for x in s]
        torch.testing.assert_close(usage, (p[0] + p[1]).mean(0).detach() / 2)
        torch.testing.assert_close(usage, plain_usage)
        kept = past[-3:]
        means = [(x.mean(0) + sum(kept)) / (len(kept) + 1) for x in p]
        expected = sum((m * (m * c).log()).sum() if prior == "reverse" else -m.log().mean() for m in means) / 2
        torch.testing.assert_close(terms["prior"], expected.detach())
        invariance_only = torch.autograd.grad(plain_loss - _prior(s, prior), s)
        full_weight = torch.autograd.grad(expected * (len(kept) + 1), s)
        for got, a, b in zip(torch.autograd.grad(loss, s), invariance_only, full_weight, strict=True):
            torch.testing.assert_close(got, a + b)
        buffer.push(usage)
        past.append(usage)
    assert buffer.pushed == 6


def _prior(s, prior):
    c = s[0].shape[1]
    means = [x.softmax(1).mean(0) for x in s]
    return sum((m * (m * c).log()).sum() if prior == "reverse" else -m.log().mean() for m in means) / 2
