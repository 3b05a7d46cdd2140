"""The linear probe: separable features, resuming, what it trains on."""

import shutil
import types

import pytest
import torch
from helpers import copy_with_broken, eval_flags, last_result
from PIL import Image
from torchvision import transforms

import eval_linear
import main_cplearn
import vision_transformer
from cplearn import checkpoints
from cplearn.data import augmentations
from cplearn.data.augmentations import eval_pixels
from cplearn.data.color import network_input
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
    data = copy_with_broken(image_folder, tmp_path / "data", "bee/004.jpg")
    common = ("--epochs", "1", "--augment", augment, "--batch_size_per_gpu", "16", "--data_path", data)
    with pytest.raises(UserError, match="bee/004.jpg"):
        eval_linear.main(eval_flags(run, tmp_path / "out", *common))


def test_a_finished_probe_is_not_taken_for_other_images_or_seeds(run, tmp_path, image_folder):
    """Nor for other training images of the same names in the same place."""
    data = tmp_path / "data"
    shutil.copytree(image_folder, data)
    cached = eval_flags(run, tmp_path, "--epochs", "1", "--augment", "false")
    augmented = eval_flags(run, tmp_path, "--epochs", "1", "--augment", "true", "--data_path", str(data))
    for count, flags in ((1, cached), (2, [*cached, "--data_path", str(data)]), (3, [*cached, "--seed", "1"])):
        eval_linear.main(flags)
        assert len(list(tmp_path.glob("linear_*.pth"))) == count
    for _ in range(2):  # as it is, it is taken
        eval_linear.main(augmented)
        assert len(list(tmp_path.glob("linear_*.pth"))) == 4
    (data / "train" / "ant").rename(data / "swap")
    (data / "train" / "bee").rename(data / "train" / "ant")
    (data / "swap").rename(data / "train" / "bee")
    eval_linear.main(augmented)
    assert len(list(tmp_path.glob("linear_*.pth"))) == 5
    with pytest.raises(UserError, match="--dump_features"):
        eval_linear.main([*augmented, "--dump_features", str(tmp_path / "kept")])


def test_vit_small_probe_takes_four_blocks(tmp_path, image_folder):
    out = tmp_path / "vit"
    common = ["--num_workers", "0", "--device", "cpu"]
    main_cplearn.main(["--data_path", str(image_folder), "--arch", "vit_small", "--image_size", "32", "--out_dim", "64",
                       "--batch_size_per_gpu", "8", "--max_steps", "1", "--output_dir", str(out), *common])  # fmt: skip
    eval_linear.main(eval_flags(out, out, "--epochs", "1", "--augment", "false"))
    record = last_result(out)
    assert record["flags"]["n_last_blocks"] == 4 and record["flags"]["standardise"] is False
    state = checkpoints.load(next(out.glob("linear_*.pth")))
    assert state["classifier"]["1.weight"].shape == (3, 1536)


def test_tokens_of_a_resnet(run, tmp_path, capsys):
    with pytest.raises(UserError, match="--n_last_blocks 4"):
        eval_linear.main(eval_flags(run, tmp_path, "--n_last_blocks", "4", "--augment", "false"))
    for augment in ("false", "true"):
        with pytest.raises(UserError, match="--avgpool_patchtokens true"):
            eval_linear.main(eval_flags(run, tmp_path, "--avgpool_patchtokens", "true", "--augment", augment))
    assert "Extracting" not in capsys.readouterr().out


@pytest.fixture(scope="module")
def vit_weights(tmp_path_factory):
    """Weights of a ViT-Ti for images of 32 pixels, as DINO's files hold them."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vit") / "weights.pth"
    torch.save(vision_transformer.vit_tiny(16, image_size=32).state_dict(), path)
    return path


def vit_flags(weights, images, *more):
    return ["--pretrained_weights", str(weights), "--arch", "vit_tiny", "--image_size", "32", "--num_workers", "0",
            "--device", "cpu", "--data_path", str(images), "--batch_size_per_gpu", "16", "--n_last_blocks", "1",
            *more]  # fmt: skip


def test_the_mean_of_patch_tokens(vit_weights, tmp_path, image_folder):
    """Beside the CLS token, in both protocols; kept under a name of its own, and honored from there."""
    common = vit_flags(vit_weights, image_folder, "--epochs", "2", "--output_dir", str(tmp_path))
    both = ["--avgpool_patchtokens", "true"]
    found = eval_linear.main([*common, *both, "--augment", "false", "--dump_features", str(tmp_path / "kept")])
    assert last_result(tmp_path)["flags"]["avgpool_patchtokens"] is True
    kept = checkpoints.load(tmp_path / "kept/features_val_last1_avgpool.pth")
    model = vision_transformer.vit_tiny(16, image_size=32).eval()
    model.load_state_dict(torch.load(vit_weights))
    pixels = [eval_pixels(Image.open(image_folder / "val" / name), 32) for name in kept["names"]]
    with torch.no_grad():
        tokens = model.forward_features(network_input(torch.stack(pixels), torch.device("cpu")))
    expected = torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], dim=1)
    torch.testing.assert_close(kept["features"], expected, rtol=1e-4, atol=1e-5)
    assert kept["codes"] is None

    load = ["--load_features", str(tmp_path / "kept"), "--epochs", "2", "--batch_size_per_gpu", "16", "--device", "cpu"]
    with pytest.raises(UserError, match="features_train_last1.pth"):
        eval_linear.main(load)
    assert eval_linear.main([*load, *both]) == found
    eval_linear.main([*common, *both, "--augment", "true"])
    eval_linear.main(common)
    widths = {checkpoints.load(p)["classifier"]["1.weight"].shape[1] for p in tmp_path.glob("linear_*.pth")}
    assert widths == {192, 384} and last_result(tmp_path)["flags"]["avgpool_patchtokens"] is False


def test_the_training_view_is_torchvisions_default():
    peer = transforms.RandomResizedCrop(224)
    for dataset, flip_p in (("folder", 0.5), ("digits", 0.0)):
        view = eval_linear.training_view(types.SimpleNamespace(image_size=224, dataset=dataset))
        assert (view.scale, view.flip_p, view.interpolation) == (peer.scale, flip_p, peer.interpolation.value)
        assert view.ratio == pytest.approx(peer.ratio)
        plain = augmentations.View(224, view.scale, flip_p=flip_p, interpolation="bilinear")  # and nothing else
        assert view == plain


def seen_labels(monkeypatch):
    """Watch which labels each step learns from."""
    steps, loss = [], torch.nn.functional.cross_entropy
    monkeypatch.setattr(eval_linear.F, "cross_entropy", lambda x, y: steps.append(y.tolist()) or loss(x, y))
    return steps


@pytest.mark.parametrize("augment", ["true", "false"])
def test_every_epoch_ends_with_a_smaller_batch(vit_weights, tmp_path, image_folder, augment, monkeypatch):
    steps = seen_labels(monkeypatch)
    common = vit_flags(vit_weights, image_folder, "--epochs", "2", "--output_dir", str(tmp_path), "--augment", augment)
    eval_linear.main([*common, "--batch_size_per_gpu", "20"])
    assert [len(step) for step in steps] == [20, 20, 8] * 2
    for epoch in (steps[:3], steps[3:]):
        assert sorted(sum(epoch, [])) == [0] * 16 + [1] * 16 + [2] * 16


@pytest.mark.parametrize("augment", ["true", "false"])
def test_batch_norm_leaves_out_a_last_batch_of_one_image(run, tmp_path, augment, monkeypatch):
    steps = seen_labels(monkeypatch)
    common = eval_flags(run, tmp_path, "--epochs", "1", "--augment", augment)
    eval_linear.main([*common, "--batch_size_per_gpu", "47"])
    assert [len(step) for step in steps] == [47]
    state = checkpoints.load(next(tmp_path.glob("linear_*.pth")))["classifier"]
    assert state["0.running_var"].isfinite().all() and state["0.num_batches_tracked"] == 1
    eval_linear.main([*common, "--batch_size_per_gpu", "47", "--standardise", "false"])
    assert [len(step) for step in steps] == [47, 47, 1]
    with pytest.raises(UserError, match="--standardise true"):
        eval_linear.main([*common, "--batch_size_per_gpu", "1"])


def test_a_folder_that_is_removed_meanwhile_is_named(run, tmp_path, monkeypatch):
    measure = eval_linear.accuracy

    def accuracy(*args):
        shutil.rmtree(tmp_path / "out")
        return measure(*args)

    monkeypatch.setattr(eval_linear, "accuracy", accuracy)  # called after each epoch, before it is saved
    with pytest.raises(WriteError, match=str(tmp_path / "out")):
        eval_linear.main(eval_flags(run, tmp_path / "out", "--epochs", "2", "--augment", "false"))
