"""Head and loss against formulas written out; acceptance checks 1-5, 9 and 10 of the specification."""

import math

import pytest
import torch
import torch.nn.functional as F
from scipy.linalg import hadamard

from cplearn.backbones import ResNet8
from cplearn.dictionary.terms import LossSpec
from cplearn.errors import UserError
from cplearn.methods.base import forward_by_size
from cplearn.methods.cplearn import CPLearn, forward_prior_warning, reference_losses
from cplearn_head import CPLearnHead, cplearn_loss, invariance, log_mean_probs, prior_forward, prior_reverse


def cross_entropy(p, q):
    return -(p * q.log()).sum(1).mean()


def kl(p, q):
    return (p * (p / q).log()).sum()


# --- dictionary in the head ------------------------------------------------------------------------


def test_dictionary_is_neither_trained_nor_saved():
    head = CPLearnHead(8, 50, 16)
    tensors = {k for k, v in head.state_dict().items() if isinstance(v, torch.Tensor)}
    assert tensors == {
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


def test_head_parameter_count():
    """f * f_h + 3 f_h, whatever c (specification 1.1)."""
    for out_dim in (10, 5000):
        head = CPLearnHead(384, out_dim, 2048)
        assert sum(p.numel() for p in head.parameters()) == 792_576


# --- head ----------------------------------------------------------------------------------------------


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


def test_assign_is_the_argmax_in_blocks():
    head = CPLearnHead(6, 1000, 48)
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
        ({"out_dim": 1}, "at least 2"),
        ({"out_dim": 100, "eps": 0.01}, "eps 0.01 must lie between"),
        ({"out_dim": 100, "eps": 0.0}, "eps 0 must lie"),
        ({"out_dim": 100, "activation": "relu"}, "'relu' is unknown"),
        ({"out_dim": 100, "embed_dim": 6}, "64 sign patterns"),
        ({"out_dim": 100, "n_ref": 0}, "n_ref 0 must be positive"),
    ],
)
def test_wrong_head_settings_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        CPLearnHead(**{"in_dim": 8, "embed_dim": 16} | options)


# --- loss ----------------------------------------------------------------------------------------------


def logits_of(views=2, n=6, c=11, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(n, c, generator=generator, dtype=torch.float64) for _ in range(views)]


def test_two_views_equal_the_written_out_loss():
    """Acceptance check 3."""
    s1, s2 = logits_of()
    p1, p2, beta = s1.softmax(1), s2.softmax(1), 0.3
    u = torch.full((11,), 1 / 11, dtype=torch.float64)
    expected = 0.5 * (beta * cross_entropy(p2, p1) + kl(p2.mean(0), u)) + 0.5 * (
        beta * cross_entropy(p1, p2) + kl(p1.mean(0), u)
    )
    loss, terms, usage = cplearn_loss([s1, s2], LossSpec(beta))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(terms["entropy"], 0.5 * (cross_entropy(p1, p1) + cross_entropy(p2, p2)))
    torch.testing.assert_close(usage, (p1 + p2).mean(0) / 2)


def test_forward_prior_equals_the_written_out_loss():
    s1, s2 = logits_of(seed=1)
    p1, p2, beta = s1.softmax(1), s2.softmax(1), 0.7
    prior = -0.5 * (p1.mean(0).log().mean() + p2.mean(0).log().mean())
    expected = beta * 0.5 * (cross_entropy(p1, p2) + cross_entropy(p2, p1)) + prior
    torch.testing.assert_close(cplearn_loss([s1, s2], LossSpec(beta, prior="forward"))[0], expected)


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


@pytest.mark.parametrize("beta", [0.25, 1.0, 2.0])
def test_floor_is_attained_and_never_passed(beta):
    """Each image on its own c/n codes (beta <= 1), or on one code of its own (beta > 1)."""
    n, c = 8, 64
    floor = reference_losses(beta, c, n).floor
    width = c // n if beta <= 1 else 1
    blocks = torch.zeros(n, c, dtype=torch.float64)
    for i in range(n):
        blocks[i, i * (c // n) : i * (c // n) + width] = 500.0
    assert cplearn_loss([blocks] * 2, LossSpec(beta))[0].item() == pytest.approx(floor, rel=1e-9)
    logits = logits_of(n=n, c=c, seed=4)
    free = torch.stack(logits).requires_grad_()
    optimizer = torch.optim.Adam([free], lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        loss = cplearn_loss(list(free), LossSpec(beta))[0]
        loss.backward()
        optimizer.step()
        assert loss.item() >= floor - 1e-9
    assert loss.item() < floor + 0.3


def test_reference_losses_are_the_losses_of_those_states():
    n, c, beta = 8, 64, 0.25
    refs = reference_losses(beta, c, n)
    assert cplearn_loss([torch.zeros(n, c)] * 2, LossSpec(beta))[0].item() == pytest.approx(refs.uniform, rel=1e-5)
    one = torch.zeros(n, c)
    one[:, 3] = 200
    assert cplearn_loss([one] * 2, LossSpec(beta))[0].item() == pytest.approx(refs.one_code, rel=1e-5)
    assert reference_losses(beta, 4, n).floor == 0


def test_half_precision_logits_are_raised_to_float32():
    logits = [s.half() for s in logits_of()]
    assert cplearn_loss(logits, LossSpec(0.25))[0].dtype == torch.float32


def test_a_single_view_is_refused():
    with pytest.raises(ValueError, match="two or more views"):
        cplearn_loss(logits_of(1), LossSpec(0.25))


# --- method --------------------------------------------------------------------------------------------


def make_method(**options):
    torch.manual_seed(0)
    defaults = dict(
        out_dim=64, embed_dim=None, activation="l2", eps=1e-8, n_ref=1.0, beta=0.25,
        prior="reverse", prior_group="global", dictionary_seed=0,
    )  # fmt: skip
    return CPLearn(ResNet8(16), **defaults | options)


def test_forward_by_size_equals_one_pass_a_view():
    backbone = ResNet8(16)
    views = [torch.randn(3, 3, s, s) for s in (16, 16, 8, 8, 8, 16)]
    for got, view in zip(forward_by_size(backbone, views), views, strict=True):
        torch.testing.assert_close(got, backbone(view), rtol=1e-4, atol=1e-6)


def test_batch_norm_sees_one_view_at_a_time():
    method = make_method()
    views = [torch.randn(8, 3, 16, 16), 3 * torch.randn(8, 3, 16, 16) + 1]
    loss, _, *_ = method(views)
    logits = []
    for view in views:
        a = method.head.linear(method.backbone(view))
        a = (a - a.mean(0)) / (a.var(0, unbiased=False) + 1e-5).sqrt()
        logits.append(method.head.scale * F.normalize(a, dim=1) @ method.head.dictionary.codes().T / 4)
    torch.testing.assert_close(loss, cplearn_loss(logits, LossSpec(0.25))[0], rtol=1e-4, atol=1e-5)


def test_every_trained_parameter_gets_a_gradient_through_both_views():
    method = make_method()
    views = [torch.randn(8, 3, 16, 16, requires_grad=True) for _ in range(2)]
    method(views)[0].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in method.parameters())
    assert all(view.grad.abs().sum() > 0 for view in views)  # no stop-gradient


def test_a_few_steps_lower_the_loss():
    method = make_method()
    views = [x := torch.randn(16, 3, 16, 16), x + 0.1 * torch.randn(16, 3, 16, 16)]
    optimizer = torch.optim.Adam(method.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss, _, *_ = method(views)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    floor = method.references(16).floor
    assert floor < losses[-1] < losses[0] - 0.3 * (losses[0] - floor)


def test_warnings_name_the_knob():
    assert make_method().warnings() == [] or "n_ref" in make_method().warnings()[0]
    assert "almost one-hot" in make_method(n_ref=64.0).warnings()[0]
    assert any("beta" in w for w in make_method(beta=2.0).warnings())
    assert any("no invariance term" in w for w in make_method(beta=0.0).warnings())
    with pytest.raises(UserError, match="beta -0.5 must not be negative"):
        make_method(beta=-0.5)


@pytest.mark.parametrize(
    "c, beta, trap", [(128, 0.5, True), (4096, 0.25, True), (128, 0.15, False), (4096, 0.1, False)]
)
def test_the_forward_prior_has_a_trap_and_the_reverse_prior_has_none(c, beta, trap):
    """The same assignment for every image: a share on one code, the rest even."""

    def loss(share, prior):
        p = torch.full((4, c), (1 - share) / (c - 1), dtype=torch.float64)
        p[:, 0] = share
        return cplearn_loss([p.log()] * 2, LossSpec(beta, prior=prior))[0].item()

    shares = [k / 100 for k in range(5, 96)]
    assert (min(loss(x, "forward") for x in shares) < loss(1 / c, "forward") - 1e-3) == trap
    assert (forward_prior_warning(beta, c) is not None) == trap
    assert min(loss(x, "reverse") for x in shares) > loss(1 / c, "reverse")
