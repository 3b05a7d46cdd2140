"""Cut runs, resumed, against undisturbed ones; checkpoints that do not fit or are damaged."""

import os
import pickle

import pytest
import torch
from helpers import log_of, model_of, same_state, same_weights, train, without_time

from cplearn import checkpoints
from cplearn.errors import UserError
from cplearn.files import append_json_line


@pytest.mark.parametrize("dictionary", ["rademacher", "hadamard"])
def test_resuming_with_a_prior_buffer_is_bit_identical(tmp_path, image_folder, dictionary):
    """The code usage of the last five steps reaches over the cut."""
    common = ("--data_path", str(image_folder), "--epochs", "4", "--prior_buffer", "5", "--dictionary", dictionary)
    common += ("--embed_dim", "12")
    train(tmp_path / "whole", *common)
    train(tmp_path / "cut", *common, "--max_steps", "6")
    train(tmp_path / "cut", *common)
    assert same_weights(model_of(tmp_path / "whole"), model_of(tmp_path / "cut"))
    assert model_of(tmp_path / "cut")["buffer.pushed"] == 12
    train(tmp_path / "none", *common, "--prior_buffer", "0")
    assert not torch.equal(
        model_of(tmp_path / "none")["head.linear.weight"], model_of(tmp_path / "cut")["head.linear.weight"]
    )


def test_a_checkpoint_from_before_a_flag_existed_goes_on_with_its_default(tmp_path, image_folder):
    common = ("--data_path", str(image_folder), "--epochs", "2")
    train(tmp_path, *common, "--max_steps", "3")
    state = checkpoints.load(tmp_path / "checkpoint.pth")
    del state["args"]["dictionary"], state["args"]["prior_buffer"]
    checkpoints.save(tmp_path / "checkpoint.pth", state)
    with pytest.raises(UserError, match="prior_buffer 0 there, 2 here"):
        train(tmp_path, *common, "--prior_buffer", "2")
    assert train(tmp_path, *common)["epoch"] == 1


@pytest.mark.parametrize("more", [(), ("--arch", "vit_tiny", "--drop_path_rate", "0.5", "--num_workers", "2")])
def test_resuming_is_bit_identical(tmp_path, image_folder, more):
    """Cut by --max_steps after each of six steps but the last; drop path, workers, the averages of the log line."""
    common = ("--data_path", str(image_folder), "--epochs", "2", "--print_freq", "2", "--optimizer", "adam", *more)
    train(tmp_path / "whole", *common)
    for steps in ("1", "2", "3", "4", "5"):
        assert train(tmp_path / "cut", *common, "--max_steps", steps)["step"] == int(steps)
        assert checkpoints.load(tmp_path / "cut" / "checkpoint.pth")["epoch"] == int(steps) // 3
        assert len(log_of(tmp_path / "cut")) == 1 + int(steps) // 4
    train(tmp_path / "cut", *common)
    assert same_state(tmp_path / "whole", tmp_path / "cut")
    assert without_time(log_of(tmp_path / "whole")) == without_time(log_of(tmp_path / "cut"))
    assert train(tmp_path / "cut", *common) == {}  # nothing left to do


def test_a_damaged_checkpoint_costs_one_checkpoint(tmp_path, image_folder, capsys):
    common = ("--data_path", str(image_folder), "--epochs", "4")
    train(tmp_path / "whole", *common)
    train(tmp_path / "cut", *common, "--max_steps", "7")
    path = tmp_path / "cut" / "checkpoint.pth"
    path.write_bytes(path.read_bytes()[:-100])
    train(tmp_path / "cut", *common)
    said = capsys.readouterr()
    assert "WARNING:" in said.err and "checkpoint.pth is truncated" in said.err
    assert "Resuming the one before it" in said.err and "after epoch 2\n" in said.out
    assert same_state(tmp_path / "whole", tmp_path / "cut")
    assert without_time(log_of(tmp_path / "whole")) == without_time(log_of(tmp_path / "cut"))


def test_forced_differences(tmp_path, image_folder, capsys):
    common = ("--data_path", str(image_folder), "--epochs", "2")
    train(tmp_path, *common, "--max_steps", "4")
    with pytest.raises(UserError, match="beta 0.25 there, 0.5 here.* --resume_force beta$"):
        train(tmp_path, *common, "--lr", "0.1", "--beta", "0.5", "--resume_force", "lr")
    record = train(tmp_path, *common, "--lr", "0.1", "--beta", "0.5", "--resume_force", "lr", "beta")
    assert record["step"] == 6 and "forced although different: beta was 0.25, lr was 0.0005" in capsys.readouterr().out
    with pytest.raises(UserError, match="--resume_force bata"):
        train(tmp_path, *common, "--resume_force", "bata")


def test_another_batch_restarts_the_epoch(tmp_path, image_folder, capsys):
    common = ("--data_path", str(image_folder), "--epochs", "3")
    train(tmp_path, *common, "--max_steps", "5")  # one epoch of three steps, and two
    train(tmp_path, *common, "--batch_size_per_gpu", "8", "--resume_force", "batch_size_per_gpu", "--max_steps", "18")
    assert "after epoch 1\n" in capsys.readouterr().out
    assert [(r["epoch"], r["step"]) for r in log_of(tmp_path)] == [(0, 3), (1, 12), (2, 18)]


@pytest.mark.parametrize("epochs_done", [0, 1])
def test_another_batch_keeps_what_is_known_of_the_start(tmp_path, image_folder, capsys, epochs_done):
    common = ("--data_path", str(image_folder), "--epochs", "3", "--knn_freq", "1")
    train(tmp_path, *common, "--max_steps", str(3 * epochs_done + 2))
    start = checkpoints.load(tmp_path / "checkpoint.pth")["progress"]["start"]
    capsys.readouterr()
    train(tmp_path, *common, "--batch_size_per_gpu", "8", "--resume_force", "batch_size_per_gpu", "--max_steps", "12")
    assert "Before the first step" not in capsys.readouterr().out and start["view_nearness"] > 0
    assert checkpoints.load(tmp_path / "checkpoint.pth")["progress"]["start"] == start
    assert log_of(tmp_path)[-1]["start_knn20"] == start["knn20"]


def test_another_form_of_the_loss_is_said(tmp_path, image_folder, capsys):
    train(tmp_path, "--data_path", str(image_folder), "--max_steps", "4")
    train(tmp_path, "--data_path", str(image_folder), "--max_steps", "5", "--loss_form", "recomputed")
    assert "WARNING: saved with --loss_form auto, now it is recomputed: sums" in capsys.readouterr().out


def test_log_lines_of_an_epoch_without_checkpoint_are_written_once(tmp_path, image_folder):
    common = ("--data_path", str(image_folder), "--epochs", "3")
    train(tmp_path, *common, "--max_steps", "3")
    append_json_line(tmp_path / "log.txt", {"epoch": 1, "train_loss": float("nan")})  # died before its checkpoint
    train(tmp_path, *common)
    assert [r["epoch"] for r in log_of(tmp_path)] == [0, 1, 2] and log_of(tmp_path)[1]["train_loss"] > 0


def test_changed_images_are_refused_on_resume(tmp_path, image_folder):
    import shutil

    shutil.copytree(image_folder, tmp_path / "data")
    common = ("--data_path", str(tmp_path / "data"), "--epochs", "2")
    train(tmp_path / "out", *common, "--max_steps", "3")
    (tmp_path / "data/train/ant/000.jpg").rename(tmp_path / "data/train/ant/999.jpg")
    with pytest.raises(UserError, match="data: images gone: 1, new: 1 .the first: ant/999.jpg"):
        train(tmp_path / "out", *common)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--arch", "resnet8_w16"], "arch resnet8_w8 there, resnet8_w16 here"),
        (["--out_dim", "41"], "out_dim 40 there, 41 here"),
        (["--dictionary_seed", "3"], "dictionary_seed 0 there, 3 here"),
        (["--lr", "0.1", "--beta", "0.5"], "beta 0.25 there, 0.5 here, lr 0.0005 there, 0.1 here"),
        (["--epochs", "9"], "epochs 2 there, 9 here"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, image_folder, more, words):
    common = ("--data_path", str(image_folder), "--epochs", "2", "--max_steps", "1")
    train(tmp_path, *common)
    before = (tmp_path / "checkpoint.pth").read_bytes()
    with pytest.raises(UserError, match=words):
        train(tmp_path, *common, *more)
    assert (tmp_path / "checkpoint.pth").read_bytes() == before
    train(tmp_path, *common, "--num_workers", "1", "--print_freq", "3")  # what does not matter may differ


def test_damaged_and_malicious_checkpoints_are_refused_on_resume(tmp_path, image_folder):
    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/executed",)

    common = ("--data_path", str(image_folder), "--epochs", "2")
    for content in (b"", b"PK\x03\x04 not a checkpoint", pickle.dumps({"args": Attack()})):
        (tmp_path / "checkpoint.pth").write_bytes(content)
        with pytest.raises(UserError, match="checkpoint.pth is"):
            train(tmp_path, *common)
        assert (tmp_path / "checkpoint.pth").read_bytes() == content  # nothing is overwritten
    assert not (tmp_path / "executed").exists()


def test_another_number_of_threads_is_said(tmp_path, image_folder, capsys):
    train(tmp_path, "--data_path", str(image_folder))
    path = tmp_path / "checkpoint.pth"
    state = checkpoints.load(path)
    state["identity"]["threads"] += 1
    checkpoints.save(path, state)
    train(tmp_path, "--data_path", str(image_folder), "--max_steps", "13")
    said = capsys.readouterr().out
    n = torch.get_num_threads()
    assert f"WARNING: saved with {n + 1} threads per process, now there are {n}: on a CPU sums round" in said


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        (lambda s: s.update(args=[1]), True),
        (lambda s: s.update(step="many"), True),
        (lambda s: s.update(progress=None), True),
        (lambda s: s["progress"].pop("meter"), True),
        (lambda s: s["progress"].update(meter=7), True),
        (lambda s: s["model"].update({"head.linear.weight": "x"}), True),
        (lambda s: s["optimizer"].update(state=[]), True),
        (lambda s: s.pop("identity"), True),
        (lambda s: s.update(bad_images={1: 2}), False),  # no such image: none to look at
    ],
)
def test_a_checkpoint_with_foreign_fields_is_refused_in_one_line(tmp_path, image_folder, change, refused):
    train(tmp_path, "--data_path", str(image_folder))
    path = tmp_path / "checkpoint.pth"
    state = checkpoints.load(path)
    change(state)
    checkpoints.write(path, state)
    (tmp_path / "checkpoint_previous.pth").unlink(missing_ok=True)
    if not refused:
        assert train(tmp_path, "--data_path", str(image_folder), "--max_steps", "13")["step"] == 13
        return
    with pytest.raises(UserError, match=str(path)) as error:
        train(tmp_path, "--data_path", str(image_folder))
    assert "\n" not in str(error.value)
