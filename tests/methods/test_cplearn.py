"""CPLearn's method: reference losses, gradients, warnings, the trap of the forward prior."""

import pytest
import torch
import torch.nn.functional as F
from helpers import logits_of

from cplearn.backbones import ResNet8
from cplearn.loss.spec import LossSpec
from cplearn.methods.base import forward_by_size
from cplearn.methods.cplearn import CPLearn, forward_prior_threshold, forward_prior_warning, reference_losses, regime
from cplearn_head import cplearn_loss


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


def make_method(**options):
    torch.manual_seed(0)
    return CPLearn(ResNet8(16), **{"out_dim": 64} | options)


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


def test_warnings_name_the_remedy():
    for options, name in (({"n_ref": 64.0}, "--n_ref"), ({"beta": 2.0}, "--beta 2 "), ({"beta": 0.0}, "--beta 0 ")):
        assert any(name in line for line in make_method(**options).warnings())
    assert not any("--beta" in line for line in make_method().warnings())
    with pytest.raises(ValueError, match="beta -0.5"):
        make_method(beta=-0.5)


@pytest.mark.parametrize(
    "c, beta, trap", [(128, 0.39, True), (128, 0.34, False), (4096, 0.25, True), (4096, 0.17, False)]
)
def test_the_forward_prior_has_a_trap_and_the_reverse_prior_has_none(c, beta, trap):
    """The same assignment for every image: a share on one code, the rest even."""

    def loss(share, prior):
        p = torch.full((4, c), (1 - share) / (c - 1), dtype=torch.float64)
        p[:, 0] = share
        return cplearn_loss([p.log()] * 2, LossSpec(beta, prior=prior))[0].item()

    shares = [k / 100 for k in range(5, 96)]
    assert (min(loss(x, "forward") for x in shares) < loss(1 / c, "forward") - 1e-4) == trap
    assert (forward_prior_warning(beta, c) is not None) == trap
    assert min(loss(x, "reverse") for x in shares) > loss(1 / c, "reverse")


@pytest.mark.parametrize("c, known", [(128, 0.368), (512, 0.272), (4096, 0.188), (16384, 0.154), (131072, 0.120)])
def test_where_the_trap_of_the_forward_prior_begins(c, known):
    assert forward_prior_threshold(c) == pytest.approx(known, abs=6e-4)


def aligned_loss(n, c, beta):
    """The loss of n images on a code each, in equal use."""
    p = torch.full((n, c), 1e-300, dtype=torch.float64)
    p[torch.arange(n), torch.arange(n) % c] = 1
    return cplearn_loss([p.log()] * 2, LossSpec(beta))[0].item()


@pytest.mark.parametrize(
    ("n", "c", "beta"), [(8, 64, 0.25), (40, 64, 0.25), (8, 64, 0.6), (64, 64, 0.25), (128, 64, 0.1)]
)
def test_aligned_against_uniform(n, c, beta):
    """The reference is what the loss gives, and the regime says which of the two states is lower."""
    refs = reference_losses(beta, c, n)
    assert refs.aligned == pytest.approx(aligned_loss(n, c, beta), abs=1e-9)
    assert regime(beta, c, n).startswith("clustered" if refs.aligned <= refs.uniform else "spread")
    assert reference_losses(beta, c, n, "forward").aligned is None


def test_the_regime_names_what_would_change_it():
    line = regime(0.25, 131072, 512)
    assert "c^(1 - beta) = 6889" in line and "--beta above 0.47, a batch of 6,889 or --prior_buffer 13" in line
    assert regime(0.48, 131072, 512).startswith("clustered") and regime(0.46, 131072, 512).startswith("spread")
    assert regime(0.25, 131072, 6889).startswith("clustered") and regime(0.25, 131072, 512 * 14).startswith("clustered")
    assert regime(0.25, 131072, 512 * 13).startswith("spread") and regime(2.0, 128, 4).startswith("clustered")
    described = make_method(beta=0.25).describe(2)
    assert described["loss_aligned"] == reference_losses(0.25, make_method().out_dim, 2).aligned and described["regime"]
    assert "regime" not in make_method(prior="forward").describe(2)
