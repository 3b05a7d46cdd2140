"""Weight decay, gradient clipping, and memory that will not do."""

import pytest
import torch
from helpers import SMALL

import main_cplearn
from cplearn.methods import build_method
from cplearn.training.optimizer import build_optimizer, clip_gradients, set_schedules


def test_weight_decay_spares_biases_and_norms():
    args = main_cplearn.parse_args([*SMALL, "--arch", "vit_tiny"])
    method = build_method(args)
    optimizer = build_optimizer(method, args)
    names = {id(p): name for name, p in method.named_parameters()}
    decayed, exempt = ({names[id(p)] for p in g["params"]} for g in optimizer.param_groups)
    assert decayed | exempt == set(names.values()) and not decayed & exempt
    assert {"backbone.norm.weight", "head.linear.bias", "head.norm.weight"} <= exempt
    assert {"head.linear.weight", "backbone.blocks.0.attn.qkv.weight", "backbone.pos_embed"} <= decayed
    set_schedules(optimizer, 1, 10, args)
    assert optimizer.param_groups[0]["weight_decay"] > 0 and optimizer.param_groups[1]["weight_decay"] == 0


def test_gradients_are_clipped_one_parameter_at_a_time():
    module = torch.nn.Linear(4, 3)
    module.weight.grad, module.bias.grad = 5 * torch.ones(3, 4), 0.1 * torch.ones(3)
    norms = torch.stack([p.grad.norm() for p in module.parameters()])
    norm = clip_gradients(module, norms, 3.0)
    assert norm.item() == pytest.approx((12 * 25 + 0.03) ** 0.5)
    assert module.weight.grad.norm().item() == pytest.approx(3.0) and module.bias.grad[0].item() == pytest.approx(0.1)
    clip_gradients(module, norms, 0)
    assert module.weight.grad.norm().item() == pytest.approx(3.0)


def test_lars_adapts_matrices_without_weight_decay():
    """You et al. 2017 as in DINO: g * 0.001 |w| / |g| for matrices, plain momentum for vectors."""
    args = main_cplearn.parse_args([*SMALL, "--optimizer", "lars", "--weight_decay", "0", "--weight_decay_end", "0"])
    torch.manual_seed(0)
    method = torch.nn.Linear(5, 3)
    optimizer = build_optimizer(method, args)
    own = {name: p.detach().clone() for name, p in method.named_parameters()}
    momentum = {name: torch.zeros_like(p) for name, p in own.items()}
    for step in range(3):
        lr = set_schedules(optimizer, step, 10, args)
        for name, p in method.named_parameters():
            p.grad = torch.randn_like(p)
            ratio = 0.001 * own[name].norm() / p.grad.norm() if name == "weight" else 1.0
            momentum[name] = 0.9 * momentum[name] + ratio * p.grad
            own[name] -= lr * momentum[name]
        optimizer.step()
    for name, p in method.named_parameters():
        torch.testing.assert_close(p.detach(), own[name], rtol=1e-6, atol=1e-8)
    assert lr > 0
