"""--freeze_backbone_epochs: the head alone first, in one process and two, across a resume."""

import pytest
import torch
from helpers import SMALL, model_of, same_state, same_weights, train, under_torchrun

import main_cplearn

FLAGS = ("--arch", "resnet8bn_w8", "--epochs", "3", "--drop_path_rate", "0.2")


@pytest.fixture
def start(tmp_path, image_folder):
    """Weights of a backbone to go on from."""
    train(tmp_path / "start", "--data_path", str(image_folder), *FLAGS)
    return tmp_path / "start"


def parts(state):
    """The weights of the backbone, and all others."""
    backbone = {k: v for k, v in state.items() if k.startswith("backbone.")}
    return backbone, {k: v for k, v in state.items() if k not in backbone}


def test_the_backbone_stays_as_it_is_and_then_trains(tmp_path, image_folder, start):
    """48 images in batches of 16: three steps per epoch. Weights and batch norm's statistics."""
    common = ("--data_path", str(image_folder), *FLAGS, "--init_from", str(start / "checkpoint.pth"))
    frozen = ("--freeze_backbone_epochs", "2")
    train(tmp_path / "frozen", *common, *frozen, "--max_steps", "6")
    train(tmp_path / "whole", *common, *frozen, "--max_steps", "7")
    loaded, _ = parts(model_of(start))
    backbone, head = parts(model_of(tmp_path / "frozen"))
    assert same_weights(backbone, loaded)
    train(tmp_path / "one", *common, *frozen, "--max_steps", "3")
    assert not same_weights(head, parts(model_of(tmp_path / "one"))[1])  # the head trains all the while
    backbone, _ = parts(model_of(tmp_path / "whole"))
    changed = [k for k in loaded if not torch.equal(loaded[k], backbone[k])]
    assert len(changed) == len(loaded)  # weights, biases, statistics: all of them, in one step
    for steps in ("4", "6", "7"):  # within the frozen epochs, at their end, after it
        train(tmp_path / "parts", *common, *frozen, "--max_steps", steps)
    assert same_state(tmp_path / "whole", tmp_path / "parts")


def test_a_teacher_stays_as_it_is_too(tmp_path, image_folder, start):
    common = ("--data_path", str(image_folder), *FLAGS, "--init_from", str(start / "checkpoint.pth"))
    train(tmp_path / "dino", *common, "--freeze_backbone_epochs", "2", "--max_steps", "6", "--method", "dino")
    state = model_of(tmp_path / "dino")
    loaded, _ = parts(model_of(start))
    assert same_weights({k: state[k] for k in loaded}, loaded)
    assert same_weights({k: state[f"teacher.{k}"] for k in loaded}, loaded)


@pytest.mark.dist
@pytest.mark.slow
def test_two_processes_freeze_and_thaw(tmp_path, image_folder, start):
    flags = [*SMALL, *FLAGS, "--data_path", str(image_folder), "--init_from", str(start / "checkpoint.pth"),
             "--freeze_backbone_epochs", "1", "--max_steps", "5"]  # fmt: skip
    under_torchrun(tmp_path / "two", *flags, "--batch_size_per_gpu", "8")
    main_cplearn.main([*flags, "--output_dir", str(tmp_path / "one")])
    one, two = model_of(tmp_path / "one"), model_of(tmp_path / "two")
    for name, x in one.items():
        # Of the bias before batch norm the gradient is rounding alone, of which Adam makes steps of full length.
        if isinstance(x, torch.Tensor) and x.is_floating_point() and name != "head.linear.bias":
            torch.testing.assert_close(two[name], x, rtol=1e-3, atol=1e-4)
