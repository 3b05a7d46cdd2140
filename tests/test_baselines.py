"""The compared methods against formulas written out, against lightly's code, and two processes against one."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import run_in_processes
from lightly.loss import BarlowTwinsLoss, DINOLoss, SwaVLoss
from lightly.loss.swav_loss import sinkhorn as lightly_sinkhorn
from lightly.models.modules.heads import DINOProjectionHead
from test_main import log_of, same_state, same_weights, spoil, train, without_time
from torch import nn

import eval_cluster
import eval_knn
import main_cplearn
from cplearn import checkpoints
from cplearn.data import augmentations
from cplearn.dictionary.terms import LossSpec
from cplearn.distributed import collectives
from cplearn.errors import UserError
from cplearn.methods import base as base
from cplearn.methods import build_method
from cplearn.methods.barlow_twins import BarlowTwins, barlow_loss, barlow_loss_explicit
from cplearn.methods.dino import DINOHead, dino_loss, teacher_targets
from cplearn.methods.gedi import GEDI, gedi_loss_as_published
from cplearn.methods.self_classifier import self_classifier_loss
from cplearn.methods.soft_targets import soft_target_loss
from cplearn.methods.swav import SwAV, sinkhorn
from cplearn_head import cplearn_loss

BASELINES = ("dino", "swav", "barlow_twins", "gedi", "gedi_gen", "self_classifier")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def arguments(method, *more):
    small = ["--image_size", "16", "--sgld_buffer", "40", "--sgld_steps", "2"] if method == "gedi_gen" else []
    return main_cplearn.parse_args(["--method", method, "--arch", "resnet8_w16", "--out_dim", "30", *small, *more])


def make(method, *more):
    torch.manual_seed(0)
    return build_method(arguments(method, *more)).double()


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, tensors, retain_graph=True)


def same(got, expected, tolerance=1e-10):
    return all(torch.allclose(a, b, rtol=tolerance, atol=tolerance) for a, b in zip(got, expected, strict=True))


# --- cross-entropy to soft targets ---------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_soft_target_loss_is_the_plain_one(scale):
    x, y, weight = (randn(n, 7, seed=n).requires_grad_() for n in (5, 5, 11))
    targets = [randn(5, 11, seed=s).softmax(1) * torch.arange(5)[:, None] for s in (2, 3)]  # rows of any sum
    plain = -sum((t * (scale * v @ weight.T).log_softmax(1)).sum() for v, t in zip((x, y), targets, strict=True))
    fast = soft_target_loss([x, y], weight, iter(targets), scale)
    assert torch.allclose(plain, fast, rtol=1e-12)
    assert same(gradients(3 * fast, x, y, weight), gradients(3 * plain, x, y, weight))
    assert torch.autograd.gradcheck(lambda x, y, w: soft_target_loss([x, y], w, targets, scale), (x, y, weight))


# --- DINO ------------------------------------------------------------------------------------------------


def naive_dino(students, teachers, center, student_temp, teacher_temp):
    terms = []
    for a, t in enumerate(teachers):
        q = ((t - center) / teacher_temp).softmax(1)
        for b, s in enumerate(students):
            if a != b:
                terms.append(-(q * (s / student_temp).log_softmax(1)).sum(1).mean())
    return sum(terms) / len(terms)


@pytest.mark.parametrize("views", [2, 5])
def test_dino_loss_and_centre_equal_lightly_and_the_formula(views):
    n, d, c = 4, 6, 9
    x = [randn(n, d, seed=v).requires_grad_() for v in range(views)]
    prototypes = randn(c, d, seed=50).requires_grad_()
    teachers, center = randn(2, n, c, seed=60), randn(c, seed=70)
    ours = dino_loss(x, prototypes, teacher_targets(teachers, center, 0.04))
    students = [z @ prototypes.T for z in x]
    written_out = naive_dino(students, teachers, center, 0.1, 0.04)
    theirs = DINOLoss(output_dim=c, teacher_temp=0.04, student_temp=0.1).double()
    theirs.center = center[None, None].clone()
    peer = theirs(list(teachers), students, teacher_temp=0.04)
    assert torch.allclose(ours, written_out, rtol=1e-12) and torch.allclose(ours, peer, rtol=1e-6)  # a float32 0.04
    assert same(gradients(ours, *x, prototypes), gradients(written_out, *x, prototypes))
    expected = 0.9 * center + 0.1 * teachers.mean((0, 1))
    assert torch.allclose(theirs.center.flatten(), expected)


def test_dino_head_is_lightlys_and_has_the_specified_size():
    torch.manual_seed(0)
    head, z = DINOHead(384, 500), torch.randn(3, 384)
    peer = DINOProjectionHead(384, 2048, 256, 500)
    ours = [p for p in head.mlp.parameters()]
    theirs = [p for name, p in peer.named_parameters() if not name.startswith("last_layer")]
    for mine, other in zip(ours, theirs, strict=True):
        other.data.copy_(mine.data)
    peer.last_layer.weight_v.data.copy_(head.last_layer.weight_v.data)
    assert torch.allclose(head.logits(z), peer(z), atol=1e-6)
    learned = sum(p.numel() for p in head.parameters() if p.requires_grad)
    assert learned == 5_509_376 + 256 * 500
    assert {k for k in head.state_dict() if "last" in k} == {"last_layer.weight_g", "last_layer.weight_v"}  # DINO's


def test_dino_step_moves_teacher_and_centre_by_the_rule_unless_it_is_skipped():
    method = make("dino", "--momentum_teacher", "0.9")
    method.begin()
    before = [p.clone() for p in method.teacher.parameters()]
    views = [randn(4, 3, 16, 16, seed=v) for v in range(2)] + [randn(4, 3, 8, 8, seed=9)]
    method.before_step(30, 10, 10)  # a cosine from 0.9 to 1: at 0.3 of it
    momentum = 1 - (1 - 0.9) * 0.5 * (1 + math.cos(math.pi * 0.3))
    assert math.isclose(method.momentum, momentum)
    loss, _, *_ = method(views)
    loss.backward()
    with torch.no_grad():
        for p in method.parameters():
            if p.grad is not None:
                p -= p.grad
        logits = method.teacher["head"].logits(method.teacher["backbone"](torch.cat(views[:2])))
    method.after_step(None, torch.tensor(True))
    assert same(method.teacher.parameters(), before) and not method.center.any()
    method.after_step(None, torch.tensor(False))
    students = [*method.backbone.parameters(), *method.head.parameters()]
    assert same(method.teacher.parameters(), [momentum * t + (1 - momentum) * s
                                              for t, s in zip(before, students, strict=True)])  # fmt: skip
    assert torch.allclose(method.center, 0.1 * logits.mean(0))
    assert not any(p.requires_grad for p in method.teacher.parameters())


def has_gradient(method, weight, *, step: int) -> bool:
    """Whether this step would change the weight; 10 steps an epoch."""
    method.zero_grad()
    method.before_step(step, 10, 20)
    method([randn(6, 3, 16, 16, seed=v) for v in range(2)])[0].backward()
    method.after_backward()
    return weight.grad is not None


def test_dino_schedules_and_the_frozen_last_layer():
    method = make(
        "dino", "--warmup_teacher_temp", "0.04", "--teacher_temp", "0.07", "--warmup_teacher_temp_epochs", "4"
    )
    temperatures = []
    for epoch in range(6):
        method.before_step(10 * epoch + 9, 10, 20)
        temperatures.append(round(method.teacher_temp, 6))
    assert temperatures == [0.04, 0.05, 0.06, 0.07, 0.07, 0.07]  # numpy.linspace(0.04, 0.07, 4), then 0.07
    last = method.head.last_layer
    assert not has_gradient(method, last.weight_v, step=9)
    assert has_gradient(method, last.weight_v, step=10)
    assert not has_gradient(method, last.weight_g, step=10)  # gains stay 1
    learned = make("dino", "--norm_last_layer", "false")
    assert has_gradient(learned, learned.head.last_layer.weight_g, step=10)


def test_dino_evaluates_the_teacher_or_the_student():
    method = make("dino")
    with torch.no_grad():
        for p in method.teacher.parameters():
            p.mul_(1.5).add_(0.01)
    z = randn(6, method.backbone.num_features)
    assert method.evaluated is method.teacher["backbone"]
    assert torch.equal(method.predict(z), method.teacher["head"].logits(z).argmax(1))
    method.use("student")
    assert method.evaluated is method.backbone
    assert torch.equal(method.predict(z), method.head.logits(z).argmax(1))
    with pytest.raises(UserError, match="--checkpoint_key tutor is unknown"):
        method.use("tutor")


def test_the_teacher_has_no_drop_path():
    method = build_method(arguments("dino", "--arch", "vit_tiny", "--drop_path_rate", "0.3"))
    assert max(getattr(m, "drop_prob", 0) or 0 for m in method.backbone.modules()) > 0
    assert max(getattr(m, "drop_prob", 0) or 0 for m in method.teacher.modules()) == 0


# --- SwAV ------------------------------------------------------------------------------------------------


def test_sinkhorn_equals_the_linear_form_and_lightly():
    scores = randn(8, 5) / 5
    q = (scores / 0.05).exp()
    for _ in range(3):
        q = q / (5 * q.sum(0))
        q = q / (8 * q.sum(1, keepdim=True))
    assert torch.allclose(sinkhorn(scores / 0.05), 8 * q, atol=1e-14)
    assert torch.allclose(sinkhorn(scores / 0.05), lightly_sinkhorn(scores), atol=1e-12)
    many = sinkhorn(scores / 0.05, 500)
    assert torch.allclose(many.sum(1), torch.ones(8).double()) and many.max() <= 8 / 5 + 1e-9
    assert torch.allclose(many.sum(0), torch.full((5,), 8 / 5).double(), atol=1e-6)  # equipartition
    assert sinkhorn(torch.tensor([[2000.0, 0.0], [0.0, 2000.0]])).isfinite().all()  # no overflow


@pytest.mark.parametrize("local", [0, 3])
def test_swav_loss_equals_lightly(local):
    method = make("swav", "--queue_length", "0")
    views = [randn(6, 3, 16, 16, seed=v) for v in range(2)] + [randn(6, 3, 8, 8, seed=5 + v) for v in range(local)]
    loss, _, *_ = method(views)
    scores = [method.embed(method.backbone(v)) @ method.prototypes.weight.T for v in views]
    # lightly has local views predict too, as here; its mean runs over the same pairs.
    theirs = SwaVLoss(temperature=0.1, sinkhorn_epsilon=0.05)(scores[:2], scores[2:])
    assert torch.allclose(loss, theirs, rtol=1e-9)
    wanted = [method.prototypes.weight, *method.projector.parameters(), *method.backbone.parameters()]
    assert same(gradients(loss, *wanted), gradients(theirs, *wanted), 1e-8)


def test_swav_queue_is_used_when_full_and_changes_the_targets_only():
    method = make("swav", "--queue_length", "16", "--epoch_queue_starts", "1")
    batch = [[randn(8, 3, 16, 16, seed=10 * i + v) for v in range(2)] for i in range(4)]
    with pytest.raises(UserError, match="--epoch_queue_starts -1 must not be negative"):
        make("swav", "--epoch_queue_starts", "-1")
    method.before_step(5, 1, 10)  # steps alone, skipped or of another process, fill nothing
    assert not method._queue_is_full
    embeddings, used = [], []
    for i, views in enumerate(batch):
        method.before_step(i + 1, 1, 10)  # one step an epoch: the queue starts at once
        embeddings.append([method.embed(method.backbone(v)).detach() for v in views])
        q = method.targets(0, embeddings[-1][0])
        alone = sinkhorn(embeddings[-1][0] @ method.prototypes.weight.T / 0.05)
        used.append(not torch.equal(q, alone))
        if used[-1]:
            rows = torch.cat([embeddings[i][0], embeddings[i - 1][0], embeddings[i - 2][0]])
            assert torch.allclose(q, sinkhorn(rows @ method.prototypes.weight.T / 0.05)[:8], atol=1e-10)
        method(views)
        method.after_step(None, torch.tensor(False))
    assert used == [False, False, True, True]
    kept = method.queue.clone()
    method.after_step(None, torch.tensor(True))
    assert torch.equal(method.queue, kept)


def test_swav_prototypes_are_unit_and_frozen_at_first():
    method = make("swav", "--freeze_prototypes_epochs", "2")
    assert not has_gradient(method, method.prototypes.weight, step=19)
    assert has_gradient(method, method.prototypes.weight, step=20)
    with torch.no_grad():
        method.prototypes.weight.mul_(3)
    method.after_step(None, torch.tensor(False))
    assert torch.allclose(method.prototypes.weight.norm(dim=1), torch.ones(30).double())
    parameters = sum(p.numel() for p in SwAV(FakeBackbone(384), out_dim=70).parameters())
    assert parameters == 1_054_848 + 128 * 70


class FakeBackbone(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.num_features = width


# --- Barlow Twins -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "c"), [(12, 7), (6, 50)])
def test_the_gram_form_is_the_explicit_one_and_lightlys(n, c):
    raw = [randn(n, c, seed=v).requires_grad_() for v in range(2)]
    z = [F.batch_norm(x, None, None, training=True, eps=1e-5) for x in raw]
    gram, _ = barlow_loss(z, 0.0051)
    explicit = barlow_loss_explicit(*z, 0.0051)
    theirs = BarlowTwinsLoss(lambda_param=0.0051)(*raw)
    assert torch.allclose(gram, explicit, rtol=1e-12) and torch.allclose(gram, theirs, rtol=1e-12)
    assert same(gradients(gram, *raw), gradients(explicit, *raw))
    assert same(gradients(gram, *raw), gradients(theirs, *raw))


def test_barlow_multi_crop_is_the_mean_over_pairs():
    z = [randn(8, 6, seed=v) for v in range(4)]
    pairs = [(a, b) for a in range(2) for b in range(4) if a != b]
    expected = sum(barlow_loss_explicit(z[a], z[b], 0.01) for a, b in pairs) / len(pairs)
    assert torch.allclose(barlow_loss(z, 0.01)[0], expected)


def test_barlow_reference_losses():
    method = BarlowTwins(FakeBackbone(4), out_dim=400, projector_width=8)
    refs = method.references(100)
    draws = [barlow_loss_explicit(*(F.batch_norm(randn(100, 400, seed=2 * i + v), None, None, training=True)
                                    for v in range(2)), 0.0051) for i in range(20)]  # fmt: skip
    assert abs(torch.stack(draws).mean().item() / refs.uniform - 1) < 0.03
    z = torch.linalg.qr(randn(400, 100))[0].T * math.sqrt(400)  # the best that 100 rows can do is not below the floor
    assert 0 < refs.floor <= barlow_loss_explicit(z, z, 0.0051)


def test_barlow_parameters_as_specified():
    def count(out_dim):
        return sum(p.numel() for p in BarlowTwins(FakeBackbone(384), out_dim=out_dim).parameters())

    assert [round(count(c) / 1e6) for c in (32768, 65536, 131072)] == [72, 139, 273]


# --- GEDI, Self-Classifier --------------------------------------------------------------------------------


def test_gedi_in_both_readings():
    logits = [randn(6, 9, seed=v).requires_grad_() for v in range(2)]
    p1, p2 = (x.softmax(1) for x in logits)
    ce = -(p2 * p1.log()).sum(1).mean()
    back = -(p1 * p2.log()).sum(1).mean()
    published = 0.5 * -p1.mean(0).log().sum() + 0.5 * 0.1 * ce
    ours, terms, usage = gedi_loss_as_published(logits, 0.1)
    assert torch.allclose(ours, published) and same(gradients(ours, *logits), gradients(published, *logits))
    assert torch.allclose(terms["invariance"], ce) and torch.allclose(usage, p1.mean(0))
    assert torch.allclose(terms["entropy"], -(p1 * p1.log()).sum(1).mean())
    equations = 0.25 * (ce + back) / 2 - (p1.mean(0).log().mean() + p2.mean(0).log().mean()) / 2
    assert torch.allclose(cplearn_loss(logits, LossSpec(0.25, prior="forward"))[0], equations)
    views = [randn(6, 3, 16, 16, seed=v) for v in range(2)]
    for reduction, loss in (("mean", lambda x: cplearn_loss(x, LossSpec(0.25, prior="forward"))[0]),
                            ("sum", lambda x: gedi_loss_as_published(x, 0.25)[0])):  # fmt: skip
        method = make("gedi", "--gedi_prior_reduction", reduction)
        expected = loss([method.projector(method.backbone(v)) / 0.1 for v in views])
        assert torch.allclose(method(views)[0], expected)
        uniform = loss([torch.zeros(6, 30).double()] * 2).item()
        assert math.isclose(method.references(6).uniform, uniform, rel_tol=1e-9)
    parameters = sum(p.numel() for p in GEDI(FakeBackbone(384), out_dim=50, beta=1.0).parameters())
    assert parameters == 792_576 + 2_049 * 50


def naive_self_classifier(logits, n_global, row=0.1, col=0.05, eps=1e-12):
    terms = []
    n, c = logits[0].shape
    for a in range(len(logits)):
        for b in range(len(logits)):
            if a == b or (a >= n_global and b >= n_global):
                continue
            target = (logits[a] / col).softmax(0)
            target = target / target.sum(1, keepdim=True)
            prediction = (logits[b] / row).softmax(1)
            prediction = prediction / prediction.sum(0)
            terms.append(-(target * (n / c * prediction + eps).log()).sum() / n)
    return sum(terms) / len(terms)


@pytest.mark.parametrize("views", [2, 4])
def test_self_classifier_loss_is_the_formula(views):
    logits = [(randn(7, 5, seed=v) / 3).requires_grad_() for v in range(views)]
    (ours, terms, usage), expected = self_classifier_loss(logits), naive_self_classifier(logits, 2)
    rows = torch.cat([(x / 0.1).softmax(1) for x in logits[:2]])
    assert torch.allclose(usage, rows.mean(0)) and torch.allclose(
        terms["entropy"], torch.special.entr(rows).sum(1).mean()
    )
    assert torch.allclose(ours, expected) and same(gradients(ours, *logits), gradients(expected, *logits), 1e-8)
    same_for_all = [randn(1, 5).expand(7, 5)] * 2
    assert math.isclose(self_classifier_loss(same_for_all)[0].item(), math.log(5), rel_tol=1e-9)
    perfect = [100 * torch.eye(5, dtype=torch.float64).repeat(2, 1)] * 2
    assert abs(self_classifier_loss(perfect)[0]) < 1e-9


def test_self_classifier_on_either_head():
    z = randn(6, 16)
    own, borrowed = make("self_classifier"), make("self_classifier", "--head", "cplearn")
    for method in (own, borrowed):
        cosines = method.logits(z)
        assert cosines.shape == (6, 30) and cosines.abs().max() <= 1 + 1e-9
        assert torch.equal(method.predict(z), cosines.argmax(1))
    codes = borrowed.frozen_head.dictionary.codes(dtype=torch.float64)
    h = borrowed.frozen_head(z)
    assert torch.allclose(borrowed.logits(z), F.normalize(h, dim=1) @ F.normalize(codes, dim=1).T)
    assert not any("packed" in k for k in borrowed.state_dict())


# --- GEDI's generative term ---------------------------------------------------------------------------------


GEN = ["--out_dim", "6"]


def test_sgld_goes_down_the_energy_from_uniform_pixels():
    still = make("gedi_gen", *GEN, "--sgld_step_size", "0", "--sgld_noise", "0", "--sgld_restart", "1")
    moving = make("gedi_gen", *GEN, "--sgld_step_size", "0.5", "--sgld_noise", "0", "--sgld_restart", "1")
    like = randn(8, 3, 16, 16)
    start, noise = still.sample(like)
    pixels = augmentations.normalise(torch.zeros(1, 3, 1, 1)), augmentations.normalise(torch.ones(1, 3, 1, 1))
    assert (start >= pixels[0]).all() and (start <= pixels[1]).all() and start.std() > 1
    assert abs(noise.std() - 1) < 0.05
    x = start
    for _ in range(2):
        x = x.detach().requires_grad_()
        energy = -(moving.backbone(x) @ moving.energy.weight[0]).sum()
        x = x - 0.5 * torch.autograd.grad(energy, x)[0]
    assert torch.allclose(moving.sample(like)[0], x.detach(), atol=1e-12)
    noisy = make("gedi_gen", *GEN, "--sgld_step_size", "0", "--sgld_noise", "0.3", "--sgld_restart", "1")
    assert abs((noisy.sample(like)[0] - start).std() / (0.3 * math.sqrt(2)) - 1) < 0.05  # two steps


def test_gedi_gen_loss_replay_and_limit():
    method, plain = make("gedi_gen", *GEN), make("gedi", "--out_dim", "6")
    plain.load_state_dict({k: v for k, v in method.state_dict().items() if k in plain.state_dict()})
    views = [randn(8, 3, 16, 16, seed=v) for v in range(2)]
    loss, terms, *_ = method(views)
    samples, noise = method.sample(views[0])  # of the same step: the same
    noise = 0.03 * noise / torch.tensor(augmentations.STD).double().view(1, 3, 1, 1)
    energy = [-(method.backbone(x) @ method.energy.weight[0]).mean() for x in (views[0] + noise, samples)]
    assert torch.allclose(loss, plain(views)[0] + 0.02 * 0.25 * (energy[0] - energy[1]))
    assert torch.allclose(terms["generative"], energy[0] - energy[1])
    assert not method.replay.any()
    method.after_step(None, torch.tensor(True))
    assert not method.replay.any()
    method.after_step(None, torch.tensor(False))
    written = method.replay.flatten(1).any(1)
    assert written.sum() == 8 and torch.equal(method.replay[method._drawn[0]], samples)
    method.gen_limit = 0.0
    assert method(views)[0].isnan()
    with pytest.raises(UserError, match="--sgld_buffer 40 is smaller than a batch of 48 images"):
        method([randn(48, 3, 16, 16)] * 2)
    with pytest.raises(UserError, match="gedi_gen samples images .* use --arch resnet8"):
        make("gedi_gen", "--arch", "resnet8bn_w16")


# --- all of them ------------------------------------------------------------------------------------------


def step(rank, world, method_name, more):
    """Two steps on this rank's share of 8 images; what must not depend on the number of processes."""
    method = make(method_name, *more)
    model = collectives.wrap(method, torch.device("cpu"))
    losses = []
    for i in range(2):
        views = [randn(8, 3, s, s, seed=10 * i + v) for v, s in enumerate((16, 16, 8))]
        method.zero_grad()
        method.before_step(i + 1, 1, 10)
        loss, _, *_ = model([v[rank::world] for v in views])
        loss.backward()
        losses.append(collectives.mean_over_ranks(loss.detach()))
        with torch.no_grad():
            for p in method.parameters():
                if p.grad is not None:
                    p -= 0.1 * p.grad
        method.after_step(None, torch.tensor(False))
    state = {k: v for k, v in method.state_dict().items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    grads = [p.grad for p in method.parameters() if p.grad is not None]
    queue = state.pop("queue", state.pop("replay", None))  # hold the same rows in another order
    return {"losses": torch.stack(losses), "grads": torch.cat([g.flatten() for g in grads]), "state": state,
            "queue": None if queue is None else queue.sum(1)}  # fmt: skip


@pytest.mark.dist
@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("dino", ["--use_bn_in_head", "true", "--freeze_last_layer", "0"]),
        ("swav", ["--queue_length", "8", "--epoch_queue_starts", "1", "--freeze_prototypes_epochs", "0"]),
        ("barlow_twins", ["--projector_width", "40"]),
        ("gedi", []),
        ("self_classifier", []),
        ("self_classifier", ["--head", "cplearn"]),
        ("gedi_gen", GEN),
    ],
)
def test_two_processes_equal_one(tmp_path, name, more):
    one = step(0, 1, name, more)
    two = run_in_processes(tmp_path, step, 2, name, more)
    for rank in two:
        assert torch.allclose(rank["losses"], one["losses"], rtol=1e-10)
        assert torch.allclose(rank["grads"], one["grads"], rtol=1e-7, atol=1e-10)
        assert rank["state"].keys() == one["state"].keys()
        assert all(torch.allclose(v, one["state"][k], rtol=1e-7, atol=1e-9) for k, v in rank["state"].items())
        if one["queue"] is not None:
            assert torch.allclose(rank["queue"], one["queue"], atol=1e-9)
    assert all(torch.equal(v, two[1]["state"][k]) for k, v in two[0]["state"].items())


@pytest.mark.parametrize("name", BASELINES)
def test_half_precision_features_give_float32_losses(name):
    method = build_method(arguments(name))
    views = [torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(v)) for v in range(2)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, terms, *_ = method(views)
    assert loss.dtype == torch.float32 and all(t.dtype == torch.float32 for t in terms.values())


@pytest.mark.parametrize("name", BASELINES)
def test_reference_losses_are_finite_and_ordered(name):
    refs = make(name).references(8)
    assert math.isfinite(refs.uniform) and math.isfinite(refs.floor) and refs.floor < refs.uniform


@pytest.mark.slow
@pytest.mark.parametrize("name", BASELINES)
def test_interrupted_equals_uninterrupted_and_all_evaluations_read_it(tmp_path, image_folder, name, capsys):
    small = ("--image_size", "32", "--sgld_buffer", "40", "--sgld_steps", "2") if name == "gedi_gen" else ()
    more = {"dino": ("--momentum_teacher", "0.9", "--warmup_teacher_temp_epochs", "3", "--teacher_temp", "0.07"),
            "swav": ("--queue_length", "20", "--epoch_queue_starts", "1")}.get(name, ())  # fmt: skip
    common = ("--method", name, "--data_path", str(image_folder), "--epochs", "4", *small, *more)
    train(tmp_path / "whole", *common)
    train(tmp_path / "cut", *common, "--max_steps", "7")
    train(tmp_path / "cut", *common)
    assert same_state(tmp_path / "whole", tmp_path / "cut")
    assert without_time(log_of(tmp_path / "whole")) == without_time(log_of(tmp_path / "cut"))
    weights = ["--pretrained_weights", str(tmp_path / "whole" / "checkpoint.pth"), "--num_workers", "0"]
    rows = eval_cluster.main([*weights, "--shuffles", "2"])
    assert {"codes", "codes_shuffled", "kmeans"} <= rows.keys() and rows["codes"]["used_codes"] >= 1
    assert 0 <= eval_knn.main([*weights, "--nb_knn", "3"])["knn3_top1"] <= 1


def test_flags_of_another_method_are_refused():
    for method in ("cplearn", "swav", "barlow_twins", "gedi", "self_classifier"):
        with pytest.raises(UserError, match=f"--teacher_temp makes no sense with --method {method}: only DINO"):
            arguments(method, "--teacher_temp", "0.07")
    with pytest.raises(SystemExit):
        arguments("dino", "--beta", "0.1")
    with pytest.raises(UserError, match="--method moco is unknown: cplearn, dino, swav, barlow_twins, gedi, gedi_gen"):
        arguments("moco")


@pytest.mark.parametrize(
    ("name", "more", "words"),
    [
        (
            "barlow_twins",
            ("--out_dim", "4000000"),
            "--out_dim 4000000 --projector_width 2048: 8,196,[0-9,]+ weights take 33 GB",
        ),
        ("dino", ("--out_dim", "100000000"), "--method dino --out_dim 100000000: 51,200,000,000 weights take 205 GB"),
    ],
)
def test_what_cannot_fit_is_refused_before_it_is_made(monkeypatch, name, more, words):
    monkeypatch.setattr(base, "physical_memory", lambda: 24 * 10**9)
    with pytest.raises(UserError, match=words):
        make(name, *more)


def test_what_cannot_fit_with_its_optimiser_is_refused_with_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr("cplearn.training.optimizer.physical_memory", lambda: 2 * 10**9)
    with pytest.raises(UserError, match="--out_dim 65536: weights, .* take 2.2 GB, head and loss 0.0 GB for 16"):
        train(tmp_path, "--method", "barlow_twins", "--out_dim", "65536")


def test_barlow_needs_no_square_of_the_width():
    """131072 outputs: the matrix C would take 69 GB."""
    z = [torch.randn(8, 131072, generator=torch.Generator().manual_seed(v)).requires_grad_() for v in range(2)]
    loss, _ = barlow_loss([F.batch_norm(x, None, None, training=True) for x in z], 0.0051)
    loss.backward()
    assert loss.isfinite() and z[0].grad.isfinite().all()
    assert loss > 0.0051 * (131072 - 8 + 1)  # the floor


@pytest.mark.parametrize("name", BASELINES)
def test_a_step_that_is_not_finite_is_as_if_it_had_not_been(tmp_path, image_folder, monkeypatch, name):
    common = ("--method", name, "--data_path", str(image_folder), "--epochs", "2", "--image_size", "32",
              *{"swav": ("--queue_length", "40", "--epoch_queue_starts", "0"), "dino": ("--momentum_teacher", "0.9"),
                "gedi_gen": ("--sgld_buffer", "40", "--sgld_steps", "2")}.get(name, ()))  # fmt: skip
    train(tmp_path / "two", *common, "--max_steps", "2")
    with monkeypatch.context() as patch:
        spoil(patch, {2})  # the third of three
        assert train(tmp_path / "three", *common, "--max_steps", "3")["skipped_steps"] == 1
    two, three = (checkpoints.load(tmp_path / x / "checkpoint.pth")["model"] for x in ("two", "three"))
    counters = {k for k in two if k.endswith("num_batches_tracked")}
    assert same_weights(*({k: v for k, v in x.items() if k not in counters} for x in (two, three)))
    assert train(tmp_path / "three", *common)["skipped_steps"] == 0  # and on it goes


def test_kept_features_say_which_network_they_are_of(tmp_path, image_folder):
    train(tmp_path / "run", "--method", "dino", "--data_path", str(image_folder), "--epochs", "1")
    weights = ["--pretrained_weights", str(tmp_path / "run" / "checkpoint.pth"), "--num_workers", "0", "--nb_knn", "3"]
    kept = ["--dump_features", str(tmp_path / "kept")]
    eval_knn.main([*weights, *kept, "--checkpoint_key", "student"])
    assert checkpoints.load(tmp_path / "kept/features_val_last1.pth")["source"]["network"] == "student"
    with pytest.raises(UserError, match="--checkpoint_key cannot change kept features"):
        eval_knn.main(["--load_features", str(tmp_path / "kept"), "--checkpoint_key", "teacher"])
    state = checkpoints.load(tmp_path / "run" / "checkpoint.pth")
    teacher = {
        k.removeprefix("teacher.backbone."): v for k, v in state["model"].items() if k.startswith("teacher.backb")
    }
    found = checkpoints.backbone_weights(state)
    assert found.keys() == teacher.keys() and all(torch.equal(v, teacher[k]) for k, v in found.items())


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("dino", ("--freeze_last_layer", "-1")),
        ("dino", ("--warmup_teacher_temp_epochs", "500")),
        ("dino", ("--momentum_teacher", "1.5")),
        ("dino", ("--teacher_temp", "0")),
        ("swav", ("--freeze_prototypes_epochs", "-1")),
        ("swav", ("--epsilon", "0")),
        ("swav", ("--queue_length", "-1")),
        ("barlow_twins", ("--projector_width", "0")),
        ("barlow_twins", ("--lambd", "0")),
        ("gedi", ("--beta", "0")),
        ("gedi_gen", ("--gen_weight", "-1")),
        ("gedi_gen", ("--sgld_step_size", "-1")),
        ("gedi_gen", ("--gen_limit", "-5")),
        ("self_classifier", ("--row_temp", "0")),
        ("self_classifier", ("--out_dim", "1")),
    ],
)
def test_bad_values_are_refused_by_name(name, flags):
    with pytest.raises(UserError, match=flags[0]):
        make(name, *flags)


def test_references_at_lambda_above_one_and_gedis_warning():
    barlow = BarlowTwins(FakeBackbone(4), out_dim=40, projector_width=8, lambd=3.0)
    assert barlow.references(8).floor == 40 - 8 + 1  # min(1, lambda) times what rank N - 1 leaves
    assert "above 1" in make("gedi", "--beta", "5").warnings()[0] and not make("gedi").warnings()
    assert "forward prior" in make("gedi", "--beta", "5").warnings()[1]
