"""The frozen codes against NumPy; products with them against the matrix."""

import copy
import hashlib
import math

import numpy as np
import pytest
import torch

from cplearn.loss import DICTIONARIES
from cplearn.loss.codes import Dictionary
from cplearn.loss.spec import LossSpec
from cplearn.loss.streamed import streamed_loss
from cplearn.random_streams import random_bits
from cplearn_head import CPLearnHead


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
