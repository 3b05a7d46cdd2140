"""--compile: the same numbers as without, on one process and two; nothing is compiled again while a run goes on."""

import argparse

import pytest
import torch
import torch._dynamo
from helpers import make, model_of, randn, train, under_torchrun

from cplearn import compiling
from cplearn.errors import UserError

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SHORT = ("--epochs", "1", "--image_size", "16", "--local_crops_number", "0")
VIEWS = ("--arch", "timm:test_vit", "--local_image_size", "16", "--local_crops_number", "2")


def chosen(wish, device):
    args = argparse.Namespace(compile=wish)
    compiling.choose_compile(args, device)
    return args.compile


def test_auto_compiles_on_gpus_where_it_can(monkeypatch):
    monkeypatch.setattr(compiling, "what_compiling_lacks", lambda device: "")
    with torch._dynamo.config.patch(suppress_errors=False):
        assert [chosen("true", CPU), chosen("auto", CPU), chosen("false", GPU)] == [True, False, False]
        assert not torch._dynamo.config.suppress_errors
        assert chosen("auto", GPU) is True and torch._dynamo.config.suppress_errors  # or else it runs as it stands
    monkeypatch.setattr(compiling, "what_compiling_lacks", lambda device: "a compiler")
    assert [chosen("auto", GPU), chosen("false", GPU)] == [False, False]
    with pytest.raises(UserError, match="--compile needs a compiler"):
        chosen("true", GPU)


def test_compiling_without_a_compiler_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match="--compile"):
        train(tmp_path / "out", "--compile")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cplearn", "dino", "gedi_gen"])
def test_loss_and_gradient_are_those_of_the_backbone_as_it_stands(name):
    """With global and local views, in float64."""
    method = make(name, *VIEWS, "--image_size", "32", "--drop_path_rate", "0")
    method.begin()
    views, found = [randn(6, 3, s, s, seed=v) for v, s in enumerate((32, 32, 16, 16))], []
    for compiled in (False, True):
        if compiled:
            torch._dynamo.reset()
            compiling.compile_backbone(method.backbone)
        method.zero_grad()
        method.before_step(1, 1, 10)
        output = method(views)
        output.loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in method.parameters() if p.grad is not None])
        found.append((output.loss.detach(), gradient))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-8, atol=0)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-6, atol=1e-8 * float(found[0][1].abs().max()))


def test_each_size_of_view_is_compiled_once(tmp_path, image_folder, monkeypatch):
    """Not again for the probe, the k-NN test, or the next epoch."""
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: _with_a_quick_compiler(self, how))
    flags = (*VIEWS, "--image_size", "32", "--compile", "--knn_freq", "1", "--data_path", str(image_folder))
    graphs = []
    for epochs in ("1", "3"):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        train(tmp_path / epochs, *flags, "--epochs", epochs)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs == [2, 2] and not torch._dynamo.utils.counters["graph_break"]


def _with_a_quick_compiler(module, how):
    module._compiled_call_impl = torch.compile(module._call_impl, backend="eager", **how)


@pytest.mark.slow
@pytest.mark.dist
def test_a_compiled_run_in_two_processes_goes_on_as_it_was(tmp_path, image_folder):
    """Its checkpoint is an ordinary one, which also goes on without --compile."""
    common = ("--data_path", str(image_folder), *SHORT)
    losses = []
    for name, more in (("plain", ()), ("compiled", ("--compile",))):
        out = under_torchrun(tmp_path / name, *common, "--batch_size_per_gpu", "8", *more)
        losses.append(train(out, *common, "--batch_size_per_gpu", "16", "--epochs", "2", "--resume_force", "epochs",
                            "batch_size_per_gpu", "processes")["train_loss"])  # fmt: skip
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert model_of(tmp_path / "plain").keys() == model_of(tmp_path / "compiled").keys()
