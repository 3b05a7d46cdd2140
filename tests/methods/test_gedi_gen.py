"""GEDI's generative term: sampling, loss, replay."""

import math

import pytest
import torch
from helpers import GEN, make, randn

from cplearn.data import color
from cplearn.errors import UserError


def test_sgld_goes_down_the_energy_from_uniform_pixels():
    still = make("gedi_gen", *GEN, "--sgld_step_size", "0", "--sgld_noise", "0", "--sgld_restart", "1")
    moving = make("gedi_gen", *GEN, "--sgld_step_size", "0.5", "--sgld_noise", "0", "--sgld_restart", "1")
    like = randn(8, 3, 16, 16)
    start, noise = still.sample(like)
    pixels = color.normalize(torch.zeros(1, 3, 1, 1)), color.normalize(torch.ones(1, 3, 1, 1))
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


@pytest.mark.parametrize(("views", "noise"), [("cifar", 0), ("svhn", 0), ("digits", 0), ("dino", 0.03)])
def test_noise_is_added_once(views, noise):
    assert make("gedi_gen", *GEN, "--augmentation", views).input_noise == noise


def test_the_backbone_takes_views_in_the_precision_of_the_run_and_chains_in_float32():
    method, seen = make("gedi_gen", *GEN).float(), []
    method.backbone.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        loss = method([randn(8, 3, 16, 16, seed=v).float() for v in range(2)]).loss
    assert seen[0] == torch.bfloat16 and set(seen[1:]) == {torch.float32} and loss.dtype == torch.float32


def test_gedi_gen_loss_replay_and_limit():
    method, plain = make("gedi_gen", *GEN, "--input_noise", "0.03"), make("gedi", "--out_dim", "6")
    plain.load_state_dict({k: v for k, v in method.state_dict().items() if k in plain.state_dict()})
    views = [randn(8, 3, 16, 16, seed=v) for v in range(2)]
    loss, terms, *_ = method(views)
    samples, noise = method.sample(views[0])  # of the same step: the same
    noise = 0.03 * noise / torch.tensor(color.STD).double().view(1, 3, 1, 1)
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
    with pytest.raises(UserError, match="--sgld_buffer 40 .* 48"):
        method([randn(48, 3, 16, 16)] * 2)
    with pytest.raises(UserError, match="gedi_gen .* --arch resnet8"):
        make("gedi_gen", "--arch", "resnet8bn_w16")
