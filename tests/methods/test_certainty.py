"""`certainty` of every method against its formula on the whole (n, c) matrix."""

import pytest
import torch
import torch.nn.functional as F
from helpers import GEN, make, randn

from cplearn.loss.spec import largest_probability
from cplearn.methods import METHODS, method_class
from cplearn.methods.base import LinearCodes, Method


def logits_of(method, name: str, h):
    """The logits of the loss's prediction, written out."""
    if name == "cplearn":
        return method.head.scale * method.head.kappa * h @ method.head.dictionary.codes(dtype=h.dtype).T
    if name == "dino":
        last = method.teacher["head"].last_layer
        return h @ (last.weight_g * last.weight_v / last.weight_v.norm(dim=1, keepdim=True)).T / 0.1
    if name == "swav":
        return h @ method.prototypes.weight.T / 0.1
    if name == "self_classifier" and method.frozen_head is not None:
        return F.normalize(h, dim=1) @ F.normalize(method.frozen_head.dictionary.codes(dtype=h.dtype), dim=1).T / 0.2
    if name == "self_classifier":
        return F.normalize(h, dim=1) @ F.normalize(method.classifier.weight, dim=1).T / 0.2
    return (h @ method.projector[-1].weight.T + method.projector[-1].bias) / 0.1


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("cplearn", ()),
        ("cplearn", ("--activation", "tanh", "--dictionary", "hadamard", "--n_ref", "9")),
        ("dino", ("--norm_last_layer", "false")),
        ("swav", ()),
        ("gedi", ()),
        ("gedi_gen", GEN),
        ("self_classifier", ("--row_temp", "0.2")),
        ("self_classifier", ("--row_temp", "0.2", "--head", "cplearn", "--embed_dim", "24")),
    ],
)
def test_certainty_is_the_probability_of_the_code(name, more):
    method = make(name, *more).eval()
    with torch.no_grad():
        h = method.embed(randn(7, method.backbone.num_features))
        p = logits_of(method, name, h).softmax(1)
        got, codes = method.certainty(h), method.assign(h)
    assert method.CERTAINTY == "probability" and p.shape == (7, method.out_dim)
    assert torch.equal(codes, p.argmax(1))
    assert torch.allclose(got.double(), p[torch.arange(7), codes], rtol=1e-5)


def test_barlow_twins_has_the_standardized_output_instead():
    method = make("barlow_twins", "--projector_width", "20").eval()
    with torch.no_grad():
        h = method.embed(randn(7, method.backbone.num_features))
        outputs = h @ method.projector[-1].weight.T
        outputs = (outputs - method.norm.running_mean) / (method.norm.running_var + method.norm.eps).sqrt()
        assert torch.allclose(method.certainty(h), outputs[torch.arange(7), method.assign(h)])
    assert method.CERTAINTY == "standardized output"


def test_every_method_says_how_sure_it_is():
    own = {name for name in METHODS if method_class(name).certainty is not Method.certainty}
    codes = {name for name in METHODS if method_class(name).codebook is not Method.codebook}
    assert own == {"barlow_twins"} and own | codes == set(METHODS) and make("barlow_twins").code_vectors(0) is None


@pytest.mark.parametrize("width", [1, 3, 40, 64])
def test_blocks_give_what_the_whole_gives(width):
    logits = 30 * randn(5, 40)  # the largest is not in the first block for every row
    logits[0] -= 2000
    assert torch.allclose(largest_probability(logits.split(width, 1)), logits.softmax(1).amax(1))


def test_many_codes_in_blocks():
    x, weight, bias = randn(2**20, 1), randn(9, 1, seed=1), randn(9, seed=2)  # 4 codes at a time
    certainty = LinearCodes(weight, 2.0, bias).certainty(x)
    assert torch.allclose(certainty, (2 * (x @ weight.T + bias)).softmax(1).amax(1))


@pytest.mark.parametrize("block", [1, 7, 64])
def test_head_in_blocks(block):
    head = make("cplearn").head.float()
    h = F.normalize(randn(5, head.dictionary.embed_dim).float(), dim=1)
    assert torch.allclose(head.certainty(h, block=block), head.logits(h).softmax(1).amax(1), rtol=1e-5)
