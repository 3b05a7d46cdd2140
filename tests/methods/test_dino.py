"""DINO against the formula and against lightly's code."""

import math

import pytest
import torch
from helpers import all_close, arguments, gradients, has_gradient, make, randn, train
from lightly.loss import DINOLoss
from lightly.models.modules.heads import DINOProjectionHead

import eval_knn
from cplearn import checkpoints
from cplearn.errors import UserError
from cplearn.methods import build_method
from cplearn.methods.dino import DINOHead, teacher_targets
from cplearn.methods.soft_targets import loss_over_pairs


def naive_dino(students, teachers, center, student_temp, teacher_temp):
    terms = []
    for a, t in enumerate(teachers):
        q = ((t - center) / teacher_temp).softmax(1)
        for b, s in enumerate(students):
            if a != b:
                terms.append(-(q * (s / student_temp).log_softmax(1)).sum(1).mean())
    return sum(terms) / len(terms)


@pytest.mark.parametrize("views", [2, 5])
def test_dino_loss_and_center_equal_lightly_and_the_formula(views):
    n, d, c = 4, 6, 9
    x = [randn(n, d, seed=v).requires_grad_() for v in range(views)]
    prototypes = randn(c, d, seed=50).requires_grad_()
    teachers, center = randn(2, n, c, seed=60), randn(c, seed=70)
    ours = loss_over_pairs(x, prototypes, teacher_targets(teachers, center, 0.04), 1 / 0.1)
    students = [z @ prototypes.T for z in x]
    written_out = naive_dino(students, teachers, center, 0.1, 0.04)
    theirs = DINOLoss(output_dim=c, teacher_temp=0.04, student_temp=0.1).double()
    theirs.center = center[None, None].clone()
    peer = theirs(list(teachers), students, teacher_temp=0.04)
    assert torch.allclose(ours, written_out, rtol=1e-12) and torch.allclose(ours, peer, rtol=1e-6)  # a float32 0.04
    assert all_close(gradients(ours, *x, prototypes), gradients(written_out, *x, prototypes))
    expected = 0.9 * center + 0.1 * teachers.mean((0, 1))
    assert torch.allclose(theirs.center.flatten(), expected)


def test_dino_head_is_lightlys_and_has_the_specified_size():
    torch.manual_seed(0)
    head, z = DINOHead(384, 500), torch.randn(3, 384)
    peer = DINOProjectionHead(384, 2048, 256, 500)
    theirs = [p for name, p in peer.named_parameters() if not name.startswith("last_layer")]
    for own, other in zip(head.mlp.parameters(), theirs, strict=True):
        other.data.copy_(own.data)
    peer.last_layer.weight_v.data.copy_(head.last_layer.weight_v.data)
    assert torch.allclose(head.logits(z), peer(z), atol=1e-6)
    learned = sum(p.numel() for p in head.parameters() if p.requires_grad)
    assert learned == 5_509_376 + 256 * 500
    assert {k for k in head.state_dict() if "last" in k} == {"last_layer.weight_g", "last_layer.weight_v"}  # DINO's


def test_dino_step_moves_teacher_and_center_by_the_rule_unless_it_is_skipped():
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
    assert all_close(method.teacher.parameters(), before) and not method.center.any()
    method.after_step(None, torch.tensor(False))
    students = [*method.backbone.parameters(), *method.head.parameters()]
    assert all_close(method.teacher.parameters(), [momentum * t + (1 - momentum) * s
                                              for t, s in zip(before, students, strict=True)])  # fmt: skip
    assert torch.allclose(method.center, 0.1 * logits.mean(0))
    assert not any(p.requires_grad for p in method.teacher.parameters())


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
    with pytest.raises(UserError, match="tutor"):
        method.use("tutor")


def test_the_teacher_has_no_drop_path():
    method = build_method(arguments("dino", "--arch", "vit_tiny", "--drop_path_rate", "0.3"))
    assert max(getattr(m, "drop_prob", 0) or 0 for m in method.backbone.modules()) > 0
    assert max(getattr(m, "drop_prob", 0) or 0 for m in method.teacher.modules()) == 0


def test_kept_features_say_which_network_they_are_of(tmp_path, image_folder):
    train(tmp_path / "run", "--method", "dino", "--data_path", str(image_folder), "--epochs", "1")
    weights = ["--pretrained_weights", str(tmp_path / "run" / "checkpoint.pth"), "--num_workers", "0", "--nb_knn", "3"]
    kept = ["--dump_features", str(tmp_path / "kept")]
    eval_knn.main([*weights, *kept, "--checkpoint_key", "student"])
    assert checkpoints.load(tmp_path / "kept/features_val_last1.pth")["source"]["network"] == "student"
    with pytest.raises(UserError, match="--checkpoint_key"):
        eval_knn.main(["--load_features", str(tmp_path / "kept"), "--checkpoint_key", "teacher"])
    state = checkpoints.load(tmp_path / "run" / "checkpoint.pth")
    teacher = {
        k.removeprefix("teacher.backbone."): v for k, v in state["model"].items() if k.startswith("teacher.backb")
    }
    found = checkpoints.backbone_weights(state)
    assert found.keys() == teacher.keys() and all(torch.equal(v, teacher[k]) for k, v in found.items())
