"""Two real gloo processes against one process with the concatenated batch."""

import math

import pytest
import torch
from helpers import run_in_processes
from torch import nn

from cplearn import backbones
from cplearn.backbones import ResNet8
from cplearn.distributed import collectives
from cplearn.distributed.batch_norm import BatchNorm, convert_batch_norm, over_views, running_buffers
from cplearn.errors import UserError
from cplearn.loss.codes import Dictionary
from cplearn.loss.spec import LossSpec
from cplearn.loss.streamed import streamed_loss
from cplearn.methods.cplearn import CPLearn
from cplearn_head import cplearn_loss

pytestmark = pytest.mark.dist

CPU = torch.device("cpu")


def make_method(prior, prior_group="global", form="auto", steps=0):
    torch.manual_seed(0)
    return CPLearn(
        ResNet8(16), out_dim=300, embed_dim=32, activation="tanh", eps=1e-8, n_ref=4.0, beta=0.5,
        prior=prior, prior_group=prior_group, dictionary_seed=0, loss_form=form, prior_buffer=steps,
    ).double()  # fmt: skip


def make_views(n, views=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 3, 12, 12, generator=generator, dtype=torch.float64) for _ in range(views)]


def loss_and_gradients(method, model, views):
    loss, terms, *_ = model(views)
    loss.backward()
    # The batch norm after this bias makes its gradient 0: what there is of it is rounding, which nothing has to equal.
    nothing = method.head.linear.bias
    assert nothing.grad.abs().max() < 1e-11
    grads = torch.cat([p.grad.flatten() for p in method.parameters() if p is not nothing])
    return {
        "loss": collectives.mean_over_ranks(loss.detach()),
        "prior": collectives.mean_over_ranks(terms["prior"]),
        "grads": grads,
        "running": torch.cat([method.head.norm.running_mean, method.head.norm.running_var]),
    }


STREAMED = [(p, g, f) for p in ("reverse", "forward") for g in ("global", "local") for f in ("stored", "triton")]


def make_embeddings(form):
    generator = torch.Generator().manual_seed(1)
    dtype = torch.float32 if form == "triton" else torch.float64
    return [torch.randn(8, 32, generator=generator, dtype=dtype) / 6 for _ in range(3)]


def timm_images():
    return torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def half_batch(rank):
    """Every check that needs two processes, in one start-up."""
    out = {}
    for prior in ("reverse", "forward"):
        method = make_method(prior)
        model = collectives.wrap(method, torch.device("cpu"))
        views = [v[rank * 4 : rank * 4 + 4] for v in make_views(8)]
        out[prior] = loss_and_gradients(method, model, views)
        out[f"{prior}_has_dictionary"] = any(name.endswith("packed") for name, _ in method.named_buffers())
    method = make_method("reverse")
    packed = method.head.dictionary.packed
    packed ^= rank  # other bits on rank 1, which DDP would make those of rank 0 if it saw them
    mine = packed.clone()
    collectives.wrap(method, torch.device("cpu"))([v[rank * 4 : rank * 4 + 4] for v in make_views(8)])
    out["dictionary_stays"] = torch.equal(packed, mine)
    for form in ("plain", "recomputed"):
        method = make_method("reverse", form=form, steps=2)
        model = collectives.wrap(method, torch.device("cpu"))
        with torch.no_grad():
            model([v[rank * 4 : rank * 4 + 4] for v in make_views(8, seed=2)])  # fills the buffer
        out[f"{form}_buffer"] = loss_and_gradients(method, model, [v[rank * 4 : rank * 4 + 4] for v in make_views(8)])
        out[f"{form}_ring"] = method.buffer.ring
    real = torch.distributed.all_reduce

    def strict(x, *more, **options):  # as NCCL is, and gloo is not
        assert x.is_contiguous()
        return real(x, *more, **options)

    torch.distributed.all_reduce = strict
    for prior, group, form in STREAMED:
        h = [x[rank * 4 : rank * 4 + 4].clone().requires_grad_() for x in make_embeddings(form)]
        loss, terms, _ = streamed_loss(
            h, Dictionary(300, 32), 2.0, LossSpec(0.5, prior=prior, prior_group=group), form=form, block=77
        )
        loss.backward()
        out[f"{prior}_{group}_{form}"] = {"prior": terms["prior"], "grads": torch.stack([x.grad for x in h])}
    torch.distributed.all_reduce = real
    local = make_method("reverse", "local")
    _, terms, *_ = local([v[rank * 4 : rank * 4 + 4] for v in make_views(8)])
    out["local_prior"] = terms["prior"]
    out["checksum_equal"] = len(set(collectives.gather_objects(method.head.dictionary.checksum()))) == 1

    torch.manual_seed(0)
    norm = BatchNorm(3).double()
    x = (torch.randn(6, 3, 4, 5, dtype=torch.float64) * 2 + 100)[rank * 3 : rank * 3 + 3].requires_grad_()
    y = norm(x)
    (y * torch.arange(y.numel(), dtype=torch.float64).view_as(y) * (rank + 1)).sum().backward()
    out["norm"] = {"y": y.detach(), "x_grad": x.grad, "mean": norm.running_mean, "var": norm.running_var}

    norm = BatchNorm(3).double()
    x = views_of_rows()[:, rank * 3 : rank * 3 + 3].clone().requires_grad_()
    y = over_views([norm], list(x))
    (torch.stack(y) * weights_of(x.shape, rank)).sum().backward()
    out["views"] = {"y": torch.stack(y).detach(), "x_grad": x.grad, "running": torch.stack(running_buffers(norm)[:2])}

    torch.manual_seed(0)
    timm_model = backbones.build_backbone("timm:resnet10t", patch_size=16, image_size=32)
    out["timm"] = timm_model(timm_images()[rank * 4 : rank * 4 + 4]).detach()
    out["timm_running"] = torch.cat([b for name, b in timm_model.named_buffers() if "running" in name])

    rows = torch.arange(rank, 7, 2)[:, None] * torch.tensor([1.0, 10.0])
    out["rows"] = [collectives.gather_rows(rows, CPU, chunk) for chunk in (1, 2, 3, 4, 4096)]
    out["six_rows"] = collectives.gather_rows(rows[:3], CPU)
    out["six_equal_rows"] = collectives.gather_equal_rows(rows[:3])
    return out


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return run_in_processes(tmp_path_factory.mktemp("dist"), half_batch)


@pytest.mark.parametrize("prior", ["reverse", "forward"])
def test_two_processes_equal_one(two, prior):
    """Loss, all-reduced prior, gradient of every parameter, running statistics."""
    method = make_method(prior)
    expected = loss_and_gradients(method, method, make_views(8))
    for rank in range(2):
        for name in ("loss", "prior", "grads", "running"):
            torch.testing.assert_close(two[rank][prior][name], expected[name], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(("prior", "group", "form"), STREAMED)
def test_streamed_forms_over_several_blocks_and_two_processes(two, prior, group, form):
    """Gradient of each rank's rows: with a global prior, twice (DDP averages) that of the whole batch."""
    w = Dictionary(300, 32).codes(dtype=torch.float64)
    tolerance = 1e-4 if form == "triton" else 1e-10
    for rank in range(2):
        mine = slice(rank * 4, rank * 4 + 4)
        h = [x.double() if group == "global" else x[mine].double() for x in make_embeddings(form)]
        h = [x.requires_grad_() for x in h]
        loss, terms, _ = cplearn_loss([2.0 * x @ w.T for x in h], LossSpec(0.5, prior=prior))
        grads = torch.stack(torch.autograd.grad(loss, h))
        if group == "global":
            grads = 2 * grads[:, mine]
        got = two[rank][f"{prior}_{group}_{form}"]
        torch.testing.assert_close(got["prior"].double(), terms["prior"], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(got["grads"].double(), grads, rtol=0, atol=tolerance * grads.abs().max().item())


@pytest.mark.parametrize("form", ["plain", "recomputed"])
def test_two_processes_share_one_prior_buffer(two, form):
    """Loss and gradient with an earlier step in the buffer, the same on all ranks; plain and streamed."""
    method = make_method("reverse", form=form, steps=2)
    with torch.no_grad():
        method(make_views(8, seed=2))
    expected = loss_and_gradients(method, method, make_views(8))
    for rank in range(2):
        for name in ("loss", "prior", "grads"):
            torch.testing.assert_close(two[rank][f"{form}_buffer"][name], expected[name], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(two[rank][f"{form}_ring"], method.buffer.ring, rtol=1e-9, atol=1e-12)


def test_the_prior_is_not_just_the_mean_of_local_ones(two):
    global_prior = two[0]["reverse"]["prior"]
    assert (two[0]["local_prior"] + two[1]["local_prior"]) / 2 - global_prior > 1e-3


def test_local_prior_sees_this_rank_only(two):
    """Batch statistics are global either way, so compare with the loss on the half batches of global features."""
    method = make_method("reverse")
    h = [method.head(z) for z in [method.backbone(v) for v in make_views(8)]]
    for rank in range(2):
        logits = [method.head.logits(x)[rank * 4 : rank * 4 + 4] for x in h]
        torch.testing.assert_close(two[rank]["local_prior"], cplearn_loss(logits, LossSpec(0.5))[1]["prior"])


def test_the_dictionary_is_the_same_everywhere_and_ddp_never_sees_it(two):
    for rank in range(2):
        assert two[rank]["checksum_equal"]
        assert two[rank]["reverse_has_dictionary"] and two[rank]["dictionary_stays"]


def test_batch_norm_equals_torch_on_the_whole_batch(two):
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(3).double()
    x = (torch.randn(6, 3, 4, 5, dtype=torch.float64) * 2 + 100).requires_grad_()
    y = norm(x)
    weight = torch.cat([torch.arange(180, dtype=torch.float64).view(3, 3, 4, 5) * (r + 1) for r in range(2)])
    (y * weight).sum().backward()
    close = torch.testing.assert_close
    close(torch.cat([two[r]["norm"]["y"] for r in range(2)]), y.detach(), rtol=1e-9, atol=1e-10)
    close(torch.cat([two[r]["norm"]["x_grad"] for r in range(2)]), x.grad, rtol=1e-8, atol=1e-8)
    for rank in range(2):
        close(two[rank]["norm"]["mean"], norm.running_mean)
        close(two[rank]["norm"]["var"], norm.running_var)


def views_of_rows():
    """Four views of six rows, far from zero: E[x^2] - E[x]^2 would lose half of the digits."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(4, 6, 3, dtype=torch.float64, generator=generator) + 1e6


def weights_of(shape, rank):
    return torch.arange(math.prod(shape), dtype=torch.float64).view(shape) * (rank + 1)


def test_batch_norm_of_all_views_at_once_equals_torch_view_by_view(two):
    norm, x = nn.BatchNorm1d(3).double(), views_of_rows().requires_grad_()
    y = torch.stack([norm(view) for view in x])
    (y * torch.cat([weights_of((4, 3, 3), r) for r in range(2)], dim=1)).sum().backward()
    close = torch.testing.assert_close
    close(torch.cat([two[r]["views"]["y"] for r in range(2)], dim=1), y.detach(), rtol=1e-8, atol=1e-9)
    close(torch.cat([two[r]["views"]["x_grad"] for r in range(2)], dim=1), x.grad, rtol=1e-7, atol=1e-7)
    for rank in range(2):
        close(two[rank]["views"]["running"], torch.stack([norm.running_mean, norm.running_var]))


def test_batch_norms_of_timm_models_share_their_statistics(two):
    torch.manual_seed(0)
    model = backbones.build_backbone("timm:resnet10t", patch_size=16, image_size=32)
    y = model(timm_images()).detach()
    running = torch.cat([b for name, b in model.named_buffers() if "running" in name])
    torch.testing.assert_close(torch.cat([two[r]["timm"] for r in range(2)]), y, rtol=1e-3, atol=1e-4)
    for rank in range(2):
        torch.testing.assert_close(two[rank]["timm_running"], running, rtol=1e-3, atol=1e-5)


def test_a_converted_batch_norm_keeps_its_parameters_type_and_mode():
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Sequential(nn.BatchNorm1d(3, affine=False))).double().eval()
    net[0].weight.requires_grad_(False)
    weight, mean = net[0].weight, net[0].running_mean
    convert_batch_norm(net)
    assert type(net[0]) is BatchNorm is type(net[1][0]) and net[0].weight is weight and net[0].running_mean is mean
    assert not weight.requires_grad and not net[0].training and not net[1][0].training
    assert net[1][0].weight is None and net(torch.rand(2, 3, dtype=torch.float64)).dtype == torch.float64


def test_gather_rows_restores_the_order(two):
    expected = torch.arange(7)[:, None] * torch.tensor([1.0, 10.0])
    for rank in range(2):
        assert all(torch.equal(rows, expected) for rows in two[rank]["rows"])
        assert torch.equal(two[rank]["six_rows"], expected[:6])
        assert torch.equal(two[rank]["six_equal_rows"], expected[:6])


def test_one_process_is_a_normal_case():
    x = torch.randn(5)
    assert collectives.world_size() == 1 and collectives.is_main()
    assert torch.equal(collectives.log_mean_over_ranks(x), x)
    assert torch.equal(collectives.gather_rows(x, CPU), x) and torch.equal(collectives.gather_equal_rows(x), x)
    module = nn.Linear(2, 2)
    assert collectives.wrap(module, CPU) is module


def _fail_on_main(rank):
    def fail():
        raise UserError("wrong") if rank == 0 else AssertionError("only rank 0 may run this")

    try:
        collectives.on_main(fail)
    except UserError as error:
        return [str(error), collectives.on_main(lambda: rank + 5)]


def test_an_error_on_rank_0_reaches_all(tmp_path):
    assert run_in_processes(tmp_path, _fail_on_main) == [["wrong", 5], ["wrong", 5]]


def _raise_together(rank, bad_rank):
    try:
        with collectives.raise_on_all_ranks():
            if rank == bad_rank:
                raise UserError("no such folder")
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("bad_rank", [0, 1])
def test_an_error_of_one_rank_is_told_by_all(tmp_path, bad_rank):
    told = run_in_processes(tmp_path, _raise_together, bad_rank)
    assert told[0] == told[1] and told[0].endswith("no such folder")
    assert told[0].startswith("rank 1 on ") == (bad_rank == 1)


def _compare(rank):
    collectives.check_same({"--lr": 0.1})
    try:
        collectives.check_same({"--lr": 0.1, "data": f"{48 + rank} images"})
    except UserError as error:
        return str(error)


def test_ranks_with_other_data_are_refused(tmp_path):
    told = run_in_processes(tmp_path, _compare)
    assert told[0] == told[1] and "rank 1 on" in told[0] and "has data 49 images, rank 0 on" in told[0]
