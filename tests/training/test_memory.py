"""Batches in parts, checkpointed blocks: the same numbers. Memory: counted, measured."""

import ctypes
from pathlib import Path

import pytest
import torch
from helpers import SMALL, make, randn, run_in_processes, same_state, train, views_of

import main_cplearn
from cplearn import backbones
from cplearn.distributed import collectives
from cplearn.methods import METHODS, build_method
from cplearn.methods.base import forward_by_size
from cplearn.training import memory
from cplearn.training.memory import activation_bytes, expected_memory

VIT = ("--arch", "vit_tiny", "--patch_size", "8", "--image_size", "32", "--drop_path_rate", "0")
LARGE = ("--arch", "vit_small", "--image_size", "96", "--batch_size_per_gpu", "16")
CPU = torch.device("cpu")


def loss_and_gradient(method, views):
    method.zero_grad()
    method.before_step(1, 1, 10)
    output = method(views)
    output.loss.backward()
    return output.loss.detach(), torch.cat([p.grad.flatten() for p in method.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", [name for name in METHODS if name != "gedi_gen"])
def test_a_batch_in_parts_has_the_same_loss_and_gradient(name):
    """For every method: head, batch norm of the head, prior and teacher see the whole batch."""
    method = make(name, *VIT)
    method.begin()
    views = [randn(8, 3, s, s, seed=v) for v, s in enumerate((32, 32, 16, 16))]
    one = loss_and_gradient(method, views)
    method.accum = 4
    four = loss_and_gradient(method, views)
    torch.testing.assert_close(four[0], one[0], rtol=1e-10, atol=0)
    largest = one[1].abs().max()
    assert largest > 0
    torch.testing.assert_close(four[1], one[1], rtol=1e-7, atol=1e-8 * float(largest))


def test_parts_count_their_images_once_in_running_statistics():
    torch.manual_seed(0)
    one, parts = (backbones.ResNet8(8, norm=True) for _ in range(2))
    parts.load_state_dict(one.state_dict())
    x = torch.randn(8, 3, 16, 16)
    for chunk in x.chunk(2):
        one(chunk)
    (z,) = forward_by_size(parts, [x], parts=2)
    z.square().sum().backward()
    for a, b in zip(one.buffers(), parts.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def _step_of_two(rank, accum):
    method = make("cplearn", *VIT)
    method.accum = accum
    model = collectives.wrap(method, CPU)
    views = [randn(8, 3, 32, 32, seed=v)[rank::2] for v in range(2)]
    method.zero_grad()
    model(views).loss.backward()
    return torch.cat([p.grad.flatten() for p in method.parameters() if p.grad is not None])


@pytest.mark.dist
def test_parts_in_two_processes(tmp_path):
    whole, parts = run_in_processes(tmp_path, _step_of_two, 1), run_in_processes(tmp_path, _step_of_two, 2)
    torch.testing.assert_close(parts[0], whole[0], rtol=1e-7, atol=1e-10)
    assert torch.equal(parts[0], parts[1])


def test_checkpointed_blocks_come_to_the_same_bits(tmp_path, image_folder):
    """With drop path, which backward has to draw again as it was."""
    common = ("--data_path", str(image_folder), "--epochs", "2", *VIT[:-1], "0.3")
    train(tmp_path / "plain", *common)
    train(tmp_path / "checkpointed", *common, "--grad_checkpointing")
    assert same_state(tmp_path / "plain", tmp_path / "checkpointed")


def test_a_run_in_parts_is_saved_and_resumed(tmp_path, image_folder):
    common = ("--data_path", str(image_folder), "--epochs", "3", "--accum", "4")
    train(tmp_path / "whole", *common)
    train(tmp_path / "cut", *common, "--max_steps", "4")
    train(tmp_path / "cut", *common)
    assert same_state(tmp_path / "whole", tmp_path / "cut")


# --- the estimate -------------------------------------------------------------------------------------------


def test_activations_of_a_known_network():
    """Linear layers keep their inputs, GELU its input, in the precision of the pass; copies of weights do not count."""
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 100), torch.nn.GELU(), torch.nn.Linear(100, 7))
    for precision, width in (("fp32", 4), ("bf16", 2), ("fp16", 2)):
        assert activation_bytes(net, 4, precision) == width * (48 + 100 + 100)
    assert net.training


def test_half_precision_takes_less():
    need = {}
    for precision in ("fp32", "bf16"):
        args, method, views = settings("--arch", "vit_tiny", "--image_size", "96", "--precision", precision)
        need[precision] = expected_memory(method, args, views)["activations"]
    assert 0.4 < need["bf16"] / need["fp32"] < 0.75


def settings(*flags):
    args = main_cplearn.parse_args(["--device", "cpu", "--precision", "fp32", *flags])
    method = build_method(args)
    if args.grad_checkpointing:
        backbones.checkpoint_blocks(method.backbone, args.arch)
    views = views_of(args.image_size, args.local_image_size, args.local_crops_number)
    method.accum = args.accum
    return args, method, views


def _peak(rank, *flags):
    """Peak memory of a step beyond what was there before the method was built, and the estimate."""
    torch.set_num_threads(1)
    build_method(main_cplearn.parse_args(list(flags)))  # what is imported counts before
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")

    def status(name):
        return next(int(x.split()[1]) * 1024 for x in Path("/proc/self/status").read_text().splitlines() if name in x)

    before = status("VmRSS")
    args, method, views = settings(*flags)
    need = expected_memory(method, args, views)
    images = [torch.rand(args.batch_size_per_gpu, 3, view.size, view.size) for view in views]
    optimizer = torch.optim.AdamW(method.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        method(images).loss.backward()
        optimizer.step()
    return [float(status("VmHWM") - before), float(need.total)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        (*LARGE, "--local_crops_number", "2"),
        (*LARGE, "--local_crops_number", "2", "--accum", "4"),
        (*LARGE, "--local_crops_number", "2", "--grad_checkpointing"),
        ("--arch", "resnet8bn_w64", "--image_size", "64", "--local_crops_number", "0", "--batch_size_per_gpu", "16"),
        ("--arch", "timm:resnet10t", "--image_size", "64", "--local_crops_number", "0", "--batch_size_per_gpu", "64"),
    ],
)
def test_the_estimate_is_near_what_a_step_takes(tmp_path, flags):
    ((peak, expected),) = run_in_processes(tmp_path, _peak, *flags, world=1)
    assert 0.65 < peak / expected < 1.35, (peak / 1e9, expected / 1e9)


def test_the_loss_is_counted_by_its_form():
    flags = [*SMALL, "--out_dim", "131072", "--embed_dim", "64", "--local_crops_number", "0"]
    for form, matrices in (("plain", 6 * 2), ("stored", 2), ("recomputed", 0), ("auto", 2)):
        args, method, views = settings(*flags, "--loss_form", form)
        assert method.loss_matrices(64, 2) == matrices
        assert expected_memory(method, args, views)["head and loss"] == 4 * 16 * 131072 * matrices
    assert method.loss_matrices(1025, 2) == 0  # above 1 GiB of logits auto computes them twice


def test_samples_of_gedi_gen_are_counted():
    gen = ("--arch", "resnet8_w8", "--method", "gedi_gen", "--sgld_buffer", "100")
    args, method, views = settings(*SMALL, *gen, "--local_crops_number", "0")
    _, plain, _ = settings(*SMALL, "--method", "gedi", "--local_crops_number", "0")
    of_views = expected_memory(plain, args, views)["activations"]
    assert expected_memory(method, args, views)["activations"] == pytest.approx(2 * of_views, rel=0.01)


def test_more_than_is_free_is_warned_of(capsys, monkeypatch):
    args, method, views = settings(*SMALL, "--arch", "vit_tiny", "--image_size", "96", "--local_crops_number", "0")
    need = memory.check_memory(method, args, views, CPU)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(memory, "available_memory", lambda: need.total - 1)
    assert memory.check_memory(method, args, views, CPU) == need
    warning = capsys.readouterr().err
    assert str(need) in warning and "--accum N" in warning and warning.count("\n") == 1


def test_the_peak_is_at_least_what_is_held():
    held = torch.ones(2**26)
    assert memory.peak_memory(CPU) > held.nbytes
