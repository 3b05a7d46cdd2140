"""The streamed loss against the plain form: values, gradients, memory; under autocast, compile and loss scaling."""

import pytest
import torch
import torch.nn.functional as F
from helpers import run_script
from torch.utils._python_dispatch import TorchDispatchMode

from cplearn.backbones import ResNet8
from cplearn.errors import UserError
from cplearn.loss import DICTIONARIES
from cplearn.loss.codes import DenseBlock, Dictionary
from cplearn.loss.hadamard import HadamardDictionary
from cplearn.loss.prior_buffer import PriorBuffer
from cplearn.loss.spec import LossSpec
from cplearn.loss.streamed import block_size, pick_form, streamed_loss
from cplearn.methods.cplearn import CPLearn
from cplearn.precision import tf32_products
from cplearn_head import CPLearnHead, cplearn_loss


def embeddings(views=2, n=6, width=32, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, width, generator=generator, dtype=dtype).requires_grad_() for _ in range(views)]


def gradients_close(loss, expected, h, rtol=1e-10, atol=1e-13):
    for got, want in zip(torch.autograd.grad(loss, h), torch.autograd.grad(expected, h), strict=True):
        assert got.isfinite().all()
        torch.testing.assert_close(got, want, rtol=rtol, atol=atol)


def plain(h, dictionary, scale, beta, **options):
    """By definition, on the whole matrix of logits, in float64."""
    w = dictionary.codes(dtype=torch.float64)
    return cplearn_loss([scale * x.double() @ w.T for x in h], LossSpec(beta, **options))


@pytest.mark.parametrize("kind", DICTIONARIES)
@pytest.mark.parametrize("prior", ["reverse", "forward"])
@pytest.mark.parametrize(("views", "n_global"), [(2, 2), (5, 2), (3, 1), (3, 3)])
@pytest.mark.parametrize("form", ["stored", "recomputed"])
def test_equals_the_plain_form(form, views, n_global, prior, kind):
    """Loss, terms, usage and gradient of every view; c is not a multiple of the block."""
    dictionary = DICTIONARIES[kind](1000, 32, seed=1)
    h = embeddings(views)
    options, block = {"prior": prior, "n_global": n_global}, 128 + (kind == "rademacher")
    loss, terms, usage = streamed_loss(h, dictionary, 1.3, LossSpec(0.4, **options), form=form, block=block)
    expected, expected_terms, expected_usage = plain(h, dictionary, 1.3, 0.4, **options)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    gradients_close(loss, expected, h)
    assert terms.keys() == expected_terms.keys()
    for name, value in terms.items():
        torch.testing.assert_close(value, expected_terms[name], rtol=1e-11, atol=1e-13)
        assert not value.requires_grad
    torch.testing.assert_close(usage, expected_usage, rtol=1e-11, atol=1e-15)


def test_forms_agree_to_the_bit_and_on_the_block():
    h = embeddings(4, 9, 48, torch.float32)
    dictionary = Dictionary(3000, 48)
    results = []
    for form in ("stored", "recomputed"):
        loss, _, usage = streamed_loss(h, dictionary, 2.0, LossSpec(0.25), form=form, block=700)
        results.append((loss, usage, *torch.autograd.grad(loss, h)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("prior", ["reverse", "forward"])
def test_buffer_equals_the_plain_form(prior):
    dictionary, buffer = Dictionary(500, 32), PriorBuffer(2, 500).double()
    for step in range(4):
        h = embeddings(3, seed=step)
        loss, terms, usage = streamed_loss(h, dictionary, 1.3, LossSpec(0.4, prior=prior, buffer=buffer), block=77)
        expected, expected_terms, _ = plain(h, dictionary, 1.3, 0.4, prior=prior, buffer=buffer)
        torch.testing.assert_close(terms["prior"], expected_terms["prior"])
        gradients_close(loss, expected, h, rtol=1e-9)
        buffer.push(usage)


@pytest.mark.parametrize("prior", ["reverse", "forward"])
@pytest.mark.parametrize("kind", DICTIONARIES)
def test_gradcheck(prior, kind):
    dictionary = DICTIONARIES[kind](37, 8)
    h = embeddings(3, 4, 8)
    assert torch.autograd.gradcheck(
        lambda *x: streamed_loss(list(x), dictionary, 0.9, LossSpec(0.4, prior=prior), block=16)[0], h
    )


@pytest.mark.parametrize("form", ["stored", "recomputed"])
@pytest.mark.parametrize("prior", ["reverse", "forward"])
@pytest.mark.parametrize("n", [1, 16])
def test_saturated_logits(n, prior, form):
    """Logits up to +-150 in float32, where p and p-bar underflow: finite, and equal to the plain form."""
    dictionary = Dictionary(300, 32)
    codes = dictionary.codes()
    h = [codes[:n].clone().requires_grad_(), (-codes[:n]).clone().requires_grad_()]
    loss, terms, _ = streamed_loss(h, dictionary, 150 / 32, LossSpec(0.25, prior=prior), form=form, block=64)
    expected, expected_terms, _ = plain(h, dictionary, 150 / 32, 0.25, prior=prior)
    torch.testing.assert_close(loss, expected.float(), rtol=1e-5, atol=0)
    torch.testing.assert_close(terms["prior"], expected_terms["prior"].float(), rtol=1e-5, atol=1e-6)
    gradients_close(loss, expected, h, rtol=1e-4, atol=1e-4)


# --- as part of a training step -------------------------------------------------------------------------


def test_half_precision_and_autocast_are_raised_to_float32():
    dictionary, spec = Dictionary(500, 32), LossSpec(0.3)
    h = embeddings(dtype=torch.float32)
    exact = streamed_loss(h, dictionary, 1.0, spec)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = streamed_loss(h, dictionary, 1.0, spec)[0]
        loss.backward()
    assert torch.equal(loss, exact) and loss.dtype == torch.float32
    half = [x.detach().bfloat16().requires_grad_() for x in h]
    loss = streamed_loss(half, dictionary, 1.0, spec)[0]
    loss.backward()
    assert loss.dtype == torch.float32 and half[0].grad.dtype == torch.bfloat16


def test_gradient_follows_what_is_done_with_the_loss():
    """Loss scaling, a sum with another loss, one view in two roles, a view without gradient."""
    dictionary, h = Dictionary(500, 32), embeddings()

    def loss_of(*views):
        return streamed_loss(list(views), dictionary, 1.0, LossSpec(0.3))[0]

    g = torch.autograd.grad(loss_of(*h), h)
    scaled = torch.autograd.grad(65536 * loss_of(*h) + h[0].sum(), h)
    torch.testing.assert_close(scaled[0], 65536 * g[0] + 1)
    torch.testing.assert_close(scaled[1], 65536 * g[1])
    gradients_close(loss_of(h[0], h[0]), plain([h[0], h[0]], dictionary, 1.0, 0.3)[0], [h[0]])
    (one,) = torch.autograd.grad(loss_of(h[0], h[1].detach()), [h[0]])
    torch.testing.assert_close(one, g[0])
    with torch.no_grad():
        assert not loss_of(*h).requires_grad


def test_differentiable_once():
    h = embeddings()
    loss = streamed_loss(h, Dictionary(50, 32), 1.0, LossSpec(0.3))[0]
    (g,) = torch.autograd.grad(loss.square(), [h[0]], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


def test_not_a_number_is_passed_on():
    h = embeddings()
    h[0].data[2, 3] = float("nan")
    loss, _, _ = streamed_loss(h, Dictionary(500, 32), 1.0, LossSpec(0.3), block=100)
    assert loss.isnan() and torch.autograd.grad(loss, h)[0].isnan().any()


def make_method(**options):
    torch.manual_seed(0)
    return CPLearn(ResNet8(8), **{"out_dim": 300, "embed_dim": 32} | options)


def test_compiled_methods_break_the_graph_and_go_on():
    views = [torch.randn(4, 3, 16, 16) for _ in range(3)]
    results = []
    for compiled in (False, True):
        method = make_method()
        loss, *_ = (torch.compile(method, backend="eager") if compiled else method)(views)
        loss.backward()
        results.append((loss.detach(), *[p.grad for p in method.parameters()]))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("form", ["stored", "recomputed"])
def test_two_hundred_steps_follow_the_plain_form(form):
    """Same seed, same images, float64: the loss curves differ by rounding alone."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(64, 3, 8, 8, generator=generator, dtype=torch.float64)
    curves = []
    for kind in ("plain", form):
        method = make_method(loss_form=kind).double()
        optimizer = torch.optim.AdamW(method.parameters(), lr=1e-3)
        noise = torch.Generator().manual_seed(1)
        curve = []
        for step in range(200):
            x = images[(16 * step) % 64 :][:16]
            views = [x + 0.3 * torch.randn(x.shape, generator=noise, dtype=x.dtype) for _ in range(2)]
            loss, _, *_ = method(views)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(method.parameters(), 3.0)
            optimizer.step()
            curve.append(loss.detach())
        curves.append(torch.stack(curve))
    torch.testing.assert_close(curves[0], curves[1], rtol=1e-8, atol=0)
    assert curves[0][-20:].mean() < curves[0][:20].mean() - 0.05


def float32_errors(c, near, seed, n=64, f=384):
    """Relative errors against float64 of loss and gradient with respect to the embeddings, for each form."""
    head, generator = CPLearnHead(f, c, seed=seed), torch.Generator().manual_seed(seed)
    codes = head.dictionary.codes(dtype=torch.float64)
    noise = [torch.randn(n, f, generator=generator, dtype=torch.float64) for _ in range(3)]
    center = codes[torch.randperm(c, generator=generator)[:n]] if near else noise[2]
    apart = 0.1 if near else 0.5
    views = [F.normalize(center + apart * x, dim=1).float() for x in noise[:2]]
    scale, spec, found = head.scale * head.kappa, LossSpec(0.25), {}
    for form in ("exact", "plain", "stored", "recomputed"):
        h = [(x.double() if form == "exact" else x).clone().requires_grad_() for x in views]
        if form == "exact":
            loss, *_ = cplearn_loss([x @ codes.T * scale for x in h], spec)
        elif form == "plain":
            loss, *_ = cplearn_loss([head.logits(x) for x in h], spec)
        else:
            loss, *_ = streamed_loss(h, head.dictionary, scale, spec, form=form)
        found[form] = loss.item(), torch.cat(torch.autograd.grad(loss, h)).double()
    loss, gradient = found.pop("exact")
    return {k: (abs(a / loss - 1), float((g - gradient).norm() / gradient.norm())) for k, (a, g) in found.items()}


@pytest.mark.parametrize("near", [False, True])
def test_float32_rounds_least_in_the_streamed_forms(near):
    """The table of docs/losses.md, of which this is the line for c = 16384 (largest of three seeds)."""
    seeds = [float32_errors(16384, near, seed) for seed in range(3)]
    worst = {form: [max(x[form][i] for x in seeds) for i in range(2)] for form in seeds[0]}
    print(worst)
    for form in ("stored", "recomputed"):
        assert worst[form][0] < 1e-6 and worst[form][1] < (2e-3 if near else 4e-6)
        assert worst["plain"][1] > (20 if near else 1.5) * worst[form][1]
    assert worst["plain"][1] < (0.2 if near else 1e-5)


# --- memory ---------------------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """Most numbers in any floating-point tensor that an operation hands out."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                self.size = max(self.size, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize("kind", DICTIONARIES)
@pytest.mark.parametrize("form", ["stored", "recomputed"])
def test_no_tensor_is_larger_than_a_block(form, kind):
    """Training step and assignment of a large dictionary never hold all codes as numbers."""
    n, c, width = 4, 200_000, 256
    method = make_method(out_dim=c, embed_dim=width, loss_form=form, dictionary=kind)
    block = block_size(2 * n, method.head.dictionary, torch.device("cpu"))
    assert 4 * block < c
    with LargestTensor() as largest:
        method([torch.randn(n, 3, 8, 8) for _ in range(2)])[0].backward()
        method.eval()
        method.predict(torch.randn(n, method.backbone.num_features))
    assert width * 500 < largest.size <= block * width  # far below c * width = 51 million
    with LargestTensor() as largest:  # the definition does unpack it all: the watch sees such things
        method.head.logits(torch.randn(n, width))
    assert largest.size >= c * width


def test_recomputed_keeps_no_logits():
    """What is alive between the passes: with 40 blocks, `stored` keeps 40 of them, `recomputed` one."""
    dictionary = Dictionary(8000, 16)
    h = [torch.randn(16, 16, requires_grad=True) for _ in range(2)]
    seen = {}
    for form in ("stored", "recomputed"):
        with torch.profiler.profile(profile_memory=True) as profile:
            streamed_loss(h, dictionary, 1.0, LossSpec(0.3), form=form, block=200)[0].backward()
        alive = peak = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                alive += event.nbytes()
                peak = max(peak, alive)
        seen[form] = peak
    logits = 2 * 16 * 8000 * 4
    assert seen["stored"] > logits and seen["recomputed"] < logits / 2


def test_auto_is_by_size():
    sizes = [("auto", 128, 131072), ("auto", 128, 10_000_000), ("recomputed", 2, 2)]
    assert [pick_form(*size) for size in sizes] == ["stored", "recomputed", "recomputed"]


def test_blocks_of_hadamard_are_whole():
    for width in (12, 384, 2048):
        assert block_size(128, HadamardDictionary(100, width), torch.device("cpu")) % width == 0


def test_wrong_arguments():
    with pytest.raises(ValueError, match="got 1"):
        streamed_loss(embeddings(1), Dictionary(50, 32), 1.0, LossSpec(0.3))
    with pytest.raises(ValueError, match="prior 'kl'"):
        LossSpec(0.3, prior="kl")
    with pytest.raises(UserError, match="'fast'"):
        pick_form("fast", 2, 2)


def test_checkpoints_do_not_grow_with_the_dictionary(tmp_path):
    sizes = []
    for out_dim in (10, 131072):
        path = tmp_path / f"{out_dim}.pth"
        torch.save(make_method(out_dim=out_dim).state_dict(), path)
        sizes.append(path.stat().st_size)
    assert abs(sizes[1] - sizes[0]) < 4096


def test_the_error_of_tf32_products_is_that_of_docs_losses(monkeypatch):
    """On the CPU, with the inputs of all products rounded as a GPU does: 10 bits of mantissa, to the nearest."""

    def rounded(x):
        return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    scores, combine = DenseBlock.scores, DenseBlock.combine
    monkeypatch.setattr(DenseBlock, "scores", lambda self, h, out: scores(self, rounded(h), out))
    monkeypatch.setattr(DenseBlock, "combine", lambda self, weights, out: combine(self, rounded(weights), out))
    head = CPLearnHead(384, 16384)
    for seed, spread in ((0, 0.0), (1, 3.0)):  # unrelated views; views of one image near each other
        common = spread * embeddings(1, n=64, width=384, seed=9)[0].detach()
        exact_h = [F.normalize(x + common, dim=1).detach().requires_grad_() for x in embeddings(2, 64, 384, seed=seed)]
        h = [x.detach().float().requires_grad_() for x in exact_h]
        scale = head.scale * head.kappa
        loss, _, _ = streamed_loss(h, head.dictionary, scale, LossSpec(0.25), form="stored")
        exact, _, _ = plain(exact_h, head.dictionary, scale, 0.25)
        loss.backward()
        exact.backward()
        assert abs(loss.item() / exact.item() - 1) < 2e-5
        for x, y in zip(h, exact_h, strict=True):
            error = ((x.grad - y.grad).norm() / y.grad.norm()).item()
            print(f"relative error of the gradient {error:.1e}, of the loss {abs(loss.item() / exact.item() - 1):.1e}")
            assert 1e-5 < error < 1e-3


def test_tf32_is_switched_on_inside_and_off_again():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    with tf32_products(True), tf32_products(False):  # the inner one leaves what the user chose
        assert matmul.fp32_precision == "tf32"
    assert matmul.fp32_precision == before


def test_the_newer_switch_of_tf32_may_have_been_used():
    code = """
import torch
from cplearn_head import CPLearnHead
torch.backends.cuda.matmul.fp32_precision = "tf32"
loss, _ = CPLearnHead(in_dim=8, out_dim=16).loss([torch.randn(4, 8), torch.randn(4, 8)])
print(torch.backends.cuda.matmul.fp32_precision, loss.item() > 0)
"""
    ended = run_script("-c", code)
    assert ended.stdout == "tf32 True\n", ended.stderr
