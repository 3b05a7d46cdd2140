"""The linear probe: separable features, resuming, what it trains on."""

import shutil

import pytest
import torch
from helpers import eval_flags, last_result, write_images

import eval_linear
import main_cplearn
from cplearn import checkpoints
from cplearn.errors import UserError, WriteError


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_linear_probe_separates_what_is_separable(optimizer, tmp_path):
    labels = torch.arange(3).repeat(30)
    centers = torch.tensor([[0.0, 1.0], [0.9, -0.5], [-0.9, -0.5]])
    state = dict(features=centers[labels] + 0.05 * torch.randn(90, 2), labels=labels, codes=None, names=[""] * 90,
                 classes=["a", "b", "c"], out_dim=None, arch="resnet8", source={"weights": "none"})  # fmt: skip
    for split in ("train", "val"):
        checkpoints.save(tmp_path / f"features_{split}_last1.pth", state)
    lr = "1" if optimizer == "sgd" else "0.01"
    metrics = eval_linear.main(["--load_features", str(tmp_path), "--optimizer", optimizer, "--lr", lr,
                                "--epochs", "40", "--batch_size_per_gpu", "32", "--device", "cpu"])  # fmt: skip
    assert metrics["linear_last_top1"] > 0.97 and metrics["linear_best_top1"] >= metrics["linear_last_top1"]


@pytest.mark.parametrize("augment", ["true", "false"])
def test_linear_probe_resumes_to_the_same_result(run, tmp_path, augment, monkeypatch):
    common = ["--epochs", "4", "--augment", augment, "--batch_size_per_gpu", "16"]
    whole = eval_linear.main(eval_flags(run, tmp_path / "whole", *common))
    save, calls = checkpoints.save, []

    def dies_after_two(path, state):
        save(path, state)
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "save", dies_after_two)
    with pytest.raises(KeyboardInterrupt):
        eval_linear.main(eval_flags(run, tmp_path / "cut", *common))
    monkeypatch.undo()
    assert eval_linear.main(eval_flags(run, tmp_path / "cut", *common)) == whole
    (a,), (b,) = ((tmp_path / d).glob("linear_*.pth") for d in ("whole", "cut"))
    a, b = checkpoints.load(a), checkpoints.load(b)
    assert a["history"] == b["history"] and len(a["history"]) == 4
    assert all(torch.equal(v, b["classifier"][k]) for k, v in a["classifier"].items())


@pytest.mark.parametrize("augment", ["true", "false"])
def test_a_probe_never_trains_on_other_images_than_asked_for(run, tmp_path, image_folder, augment):
    shutil.copytree(image_folder, tmp_path / "data")
    (tmp_path / "data/train/bee/004.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="cannot read the image .*bee/004.jpg"):
        eval_linear.main(eval_flags(run, tmp_path / "out", "--epochs", "1", "--augment", augment,
                               "--batch_size_per_gpu", "16",
                               "--data_path", str(tmp_path / "data")))  # fmt: skip


def test_a_finished_probe_is_not_taken_for_another_data_set(run, tmp_path, image_folder):
    for split in ("train", "val"):
        for name in ("ant", "bee", "cat"):
            write_images(tmp_path / "noise" / split / name, 4, seed=7)  # the same images in every class
    common = eval_flags(run, tmp_path, "--epochs", "2", "--augment", "false")
    eval_linear.main(common)
    eval_linear.main([*common, "--data_path", str(tmp_path / "noise")])
    eval_linear.main([*common, "--seed", "1"])
    files = [checkpoints.load(p)["classifier"]["1.weight"] for p in tmp_path.glob("linear_*.pth")]
    assert len(files) == 3 and not any(torch.equal(files[i], files[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_vit_small_probe_takes_four_blocks(tmp_path, image_folder):
    out = tmp_path / "vit"
    common = ["--num_workers", "0", "--device", "cpu"]
    main_cplearn.main(["--data_path", str(image_folder), "--arch", "vit_small", "--image_size", "32", "--out_dim", "64",
                       "--batch_size_per_gpu", "8", "--max_steps", "1", "--output_dir", str(out), *common])  # fmt: skip
    eval_linear.main(
        ["--pretrained_weights", str(out / "checkpoint.pth"), "--epochs", "1", "--augment", "false", *common]
    )
    record = last_result(out)
    assert record["flags"]["n_last_blocks"] == 4 and record["flags"]["standardise"] is False
    state = checkpoints.load(next(out.glob("linear_*.pth")))
    assert state["classifier"]["1.weight"].shape == (3, 1536)


def test_blocks_of_a_resnet(run, tmp_path):
    with pytest.raises(UserError, match="--n_last_blocks 4 is for vit_tiny"):
        eval_linear.main(eval_flags(run, tmp_path, "--n_last_blocks", "4", "--augment", "false"))


def test_a_folder_that_is_removed_meanwhile_is_named(run, tmp_path, monkeypatch):
    measure = eval_linear.accuracy

    def accuracy(*args):
        shutil.rmtree(tmp_path / "out")
        return measure(*args)

    monkeypatch.setattr(eval_linear, "accuracy", accuracy)  # called after each epoch, before it is saved
    with pytest.raises(WriteError, match="out was removed meanwhile: run the same command again"):
        eval_linear.main(eval_flags(run, tmp_path / "out", "--epochs", "2", "--augment", "false"))
