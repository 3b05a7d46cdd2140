"""Head and loss against formulas written out."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import logits_of
from scipy.linalg import hadamard

from cplearn import checkpoints
from cplearn.errors import UserError
from cplearn.loss import DICTIONARIES
from cplearn.loss.spec import LossSpec
from cplearn_head import CPLearnHead, cplearn_loss, invariance, log_mean_probs, prior_forward, prior_reverse


def cross_entropy(p, q):
    return -(p * q.log()).sum(1).mean()


def kl(p, q):
    return (p * (p / q).log()).sum()


def test_dictionary_is_neither_trained_nor_saved():
    head = CPLearnHead(8, 50, 16)
    assert set(head.state_dict()) == {
        "dictionary._extra_state",
        "linear.weight", "linear.bias", "norm.weight", "norm.bias",
        "norm.running_mean", "norm.running_var", "norm.num_batches_tracked",
    }  # fmt: skip
    before = head.dictionary.checksum()
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.1, weight_decay=0.5)
    assert all(p is not head.dictionary.packed for group in optimizer.param_groups for p in group["params"])
    head.logits(head(torch.randn(6, 8))).square().mean().backward()
    optimizer.step()
    assert head.dictionary.checksum() == before
    twin = CPLearnHead(8, 50, 16)
    twin.load_state_dict(head.state_dict())
    assert twin.dictionary.checksum() == before


@pytest.mark.parametrize("other", [{"seed": 1}, {"out_dim": 51}])
def test_loading_with_another_dictionary_is_refused(other):
    state = CPLearnHead(8, 50, 16).state_dict()
    with pytest.raises(UserError, match="another dictionary"):
        CPLearnHead(**{"in_dim": 8, "out_dim": 50, "embed_dim": 16} | other).load_state_dict(state)


def test_safetensors_keep_a_head_and_know_its_dictionary(tmp_path):
    """Which trainers of others write and read: tensors alone, the description of the codes as bytes."""
    safetensors = pytest.importorskip("safetensors.torch")
    head, path = torch.nn.Sequential(torch.nn.Linear(4, 8), CPLearnHead(8, 50, 16)), tmp_path / "model.safetensors"
    safetensors.save_model(head, path)
    twin = torch.nn.Sequential(torch.nn.Linear(4, 8), CPLearnHead(8, 50, 16))
    safetensors.load_model(twin, path)
    x = torch.randn(3, 4)
    assert torch.equal(head.eval()(x), twin.eval()(x))
    with pytest.raises(UserError, match="another dictionary.*seed"):
        safetensors.load_model(torch.nn.Sequential(torch.nn.Linear(4, 8), CPLearnHead(8, 50, 16, seed=1)), path)


def test_the_description_of_earlier_versions_is_read():
    state = CPLearnHead(8, 50, 16).state_dict()
    state["dictionary._extra_state"] = CPLearnHead(8, 50, 16).dictionary.description()
    CPLearnHead(8, 50, 16).load_state_dict(state)
    checkpoints.load_into(CPLearnHead(8, 50, 16), state, "an earlier checkpoint")
    with pytest.raises(UserError, match="another dictionary"):
        CPLearnHead(8, 50, 16, seed=1).load_state_dict(state)


def test_head_parameter_count():
    """f * f_h + 3 f_h, whatever c (specification 1.1)."""
    for out_dim in (10, 5000):
        head = CPLearnHead(384, out_dim, 2048)
        assert sum(p.numel() for p in head.parameters()) == 792_576


def test_perfect_alignment_gives_eps():
    """Acceptance check 1: h = w_j and orthogonal codes: p_max = 1 - eps (c - 1), all others eps."""
    c, eps = 4096, 1e-8
    head = CPLearnHead(4, c, c, activation="tanh", eps=eps, n_ref=1)
    codes = torch.from_numpy(hadamard(c))
    shifts = torch.arange(8)
    head.dictionary.packed = ((codes > 0).view(c, c // 8, 8).long() << shifts).sum(2).to(torch.uint8)
    assert torch.equal(head.dictionary.codes(5, 6)[0], codes[5].float())
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        p = head.logits(codes[[0, 7, 4095]].to(dtype)).softmax(1)
        assert p.dtype == dtype
        expected = torch.full_like(p, eps)
        expected[[0, 1, 2], [0, 7, 4095]] = 1 - eps * (c - 1)
        torch.testing.assert_close(p, expected, rtol=tolerance, atol=0)


def test_l2_logits_are_scaled_cosines():
    head = CPLearnHead(6, 30, 40, activation="l2", n_ref=4)
    h = head(torch.randn(5, 6))
    scale = 2 * math.log((1 - 1e-8 * 29) / 1e-8)
    cos = F.cosine_similarity(h[:, None], head.dictionary.codes()[None], dim=2)
    torch.testing.assert_close(head.logits(h), scale * cos)


def test_tanh_logits_follow_the_definition():
    head = CPLearnHead(6, 30, 40, activation="tanh").eval()
    z = torch.randn(5, 6)
    a = (z @ head.linear.weight.T + head.linear.bias) / math.sqrt(1 + 1e-5)
    scale = math.log((1 - 1e-8 * 29) / 1e-8)
    torch.testing.assert_close(head.logits(head(z)), scale / 40 * torch.tanh(a) @ head.dictionary.codes().T)


@pytest.mark.parametrize("activation", ["tanh", "l2"])
def test_no_batch_dependence_in_eval_mode(activation):
    """Acceptance check 2."""
    head = CPLearnHead(6, 30, 40, activation=activation)
    head(torch.randn(32, 6))  # moves the running statistics away from 0 and 1
    head.eval()
    z = torch.randn(64, 6)
    whole = head.logits(head(z)).softmax(1)
    for n in (1, 7):
        torch.testing.assert_close(head.logits(head(z[:n])).softmax(1), whole[:n], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", DICTIONARIES)
def test_assign_is_the_argmax_in_blocks(kind):
    head = CPLearnHead(6, 1000, 48, dictionary=kind)
    h = head(torch.randn(33, 6))
    expected = (h @ head.dictionary.codes().T).argmax(1)
    for block in (7, 250, 10_000):
        assert torch.equal(head.assign(h, block=block), expected)


@pytest.mark.parametrize(("activation", "n_ref"), [("tanh", 1), ("tanh", 64), ("l2", 1), ("l2", 4)])
def test_initial_logit_std_is_what_is_measured(activation, n_ref):
    head = CPLearnHead(64, 3000, 256, activation=activation, n_ref=n_ref)
    with torch.no_grad():
        measured = head.logits(head(torch.randn(512, 64))).std().item()
    assert head.initial_logit_std() == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"out_dim": 1}, "out_dim 1"),
        ({"out_dim": 100, "eps": 0.01}, "eps 0.01"),
        ({"out_dim": 100, "eps": 0.0}, "eps 0 "),
        ({"out_dim": 100, "activation": "relu"}, "'relu'"),
        ({"out_dim": 100, "embed_dim": 6}, "embed_dim 6"),
        ({"out_dim": 100, "n_ref": 0}, "n_ref 0"),
        ({"out_dim": 16, "embed_dim": 2**31}, "embed_dim 2147483648"),  # that no machine holds
    ],
)
def test_wrong_head_settings_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        CPLearnHead(**{"in_dim": 8, "embed_dim": 16} | options)


@pytest.mark.parametrize("prior", ["reverse", "forward"])
def test_two_views_equal_the_written_out_loss(prior):
    """Acceptance check 3."""
    s1, s2 = logits_of()
    p1, p2, beta = s1.softmax(1), s2.softmax(1), 0.3
    u = torch.full((11,), 1 / 11, dtype=torch.float64)
    of_mean = {"reverse": lambda m: kl(m, u), "forward": lambda m: -m.log().mean()}[prior]
    expected = 0.5 * (beta * cross_entropy(p2, p1) + of_mean(p2.mean(0))) + 0.5 * (
        beta * cross_entropy(p1, p2) + of_mean(p1.mean(0))
    )
    loss, terms, usage = cplearn_loss([s1, s2], LossSpec(beta, prior=prior))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(terms["entropy"], 0.5 * (cross_entropy(p1, p1) + cross_entropy(p2, p2)))
    torch.testing.assert_close(usage, (p1 + p2).mean(0) / 2)


@pytest.mark.parametrize(("views", "n_global"), [(2, 2), (5, 2), (4, 1), (3, 3)])
def test_invariance_equals_a_loop_over_pairs(views, n_global):
    logits = logits_of(views)
    pairs = [(a, b) for a in range(n_global) for b in range(views) if a != b]
    expected = sum(cross_entropy(logits[a].softmax(1), logits[b].softmax(1)) for a, b in pairs) / len(pairs)
    torch.testing.assert_close(invariance([s.log_softmax(1) for s in logits], n_global), expected)


@pytest.mark.parametrize("prior", ["reverse", "forward"])
def test_gradcheck(prior):
    logits = [s.requires_grad_() for s in logits_of(3, n=4, c=5)]
    assert torch.autograd.gradcheck(lambda *s: cplearn_loss(list(s), LossSpec(0.4, prior=prior))[0], logits)


def test_gradient_equals_the_closed_form():
    """d CE(p, p') / ds' = p' - p;  d CE / ds = -p (log p' - t);  d KL / ds = p (g - u) / n."""
    s1, s2 = (s.requires_grad_() for s in logits_of(n=5, c=7))
    beta, n, c = 0.6, 5, 7
    loss, _, _ = cplearn_loss([s1, s2], LossSpec(beta))
    grads = torch.autograd.grad(loss, [s1, s2])
    lp = [s.detach().log_softmax(1) for s in (s1, s2)]
    for mine, other, grad in ((0, 1, grads[0]), (1, 0, grads[1])):
        p, q, lq = lp[mine].exp(), lp[other].exp(), lp[other]
        as_prediction = p - q
        as_target = -p * (lq - (p * lq).sum(1, keepdim=True))
        g = (c * p.mean(0)).log()
        prior = p * (g - (p * g).sum(1, keepdim=True)) / n
        torch.testing.assert_close(grad, beta / 2 * (as_prediction + as_target) / n + prior / 2)


def test_uniform_and_one_hot_values():
    """Acceptance check 4."""
    c = 32
    uniform = [torch.zeros(8, c).log_softmax(1)] * 2
    assert invariance(uniform).item() == pytest.approx(math.log(c), rel=1e-6)
    assert prior_reverse(log_mean_probs(uniform[0])).item() == pytest.approx(0, abs=1e-5)
    assert prior_forward(log_mean_probs(uniform[0])).item() == pytest.approx(math.log(c), rel=1e-6)
    one_hot = [(200 * torch.eye(c)[:8]).log_softmax(1)] * 2  # 8 images on 8 different codes
    assert invariance(one_hot).item() == pytest.approx(0, abs=1e-6)
    assert prior_reverse(log_mean_probs(one_hot[0])).item() == pytest.approx(math.log(c / 8), rel=1e-6)


@pytest.mark.parametrize("prior", ["reverse", "forward"])
def test_saturated_logits_stay_finite(prior):
    """Acceptance check 5: +-150, where softmax-then-log underflows."""
    sign = torch.sign(torch.randn(16, 200, generator=torch.Generator().manual_seed(0)))
    logits = [(150 * sign).requires_grad_(), (-150 * sign).requires_grad_()]
    loss, terms, _ = cplearn_loss(logits, LossSpec(0.25, prior=prior))
    loss.backward()
    assert all(torch.isfinite(value) for value in terms.values())
    assert all(torch.isfinite(s.grad).all() for s in logits)


def test_curvature_near_uniform():
    """Acceptance check 10: shared logits have curvature + (1 - beta), sample-specific ones - beta."""
    n, c, beta, size = 16, 24, 0.3, 1e-2
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(1, c, generator=generator, dtype=torch.float64).expand(n, c)
    own = torch.randn(n, c, generator=generator, dtype=torch.float64)
    own = own - own.mean(0, keepdim=True)
    base = cplearn_loss([torch.zeros(n, c, dtype=torch.float64)] * 2, LossSpec(beta))[0]
    for direction, factor in ((shared, 1 - beta), (own, -beta)):
        direction = direction - direction.mean(1, keepdim=True)
        loss = cplearn_loss([size * direction] * 2, LossSpec(beta))[0]
        variance = (size * direction).square().mean()
        assert ((loss - base) / (0.5 * variance)).item() == pytest.approx(factor, rel=0.02)


def test_half_precision_logits_are_raised_to_float32():
    assert cplearn_loss([s.half() for s in logits_of()], LossSpec(0.25))[0].dtype == torch.float32


def test_a_single_view_is_refused():
    with pytest.raises(ValueError, match="got 1"):
        cplearn_loss(logits_of(1), LossSpec(0.25))
