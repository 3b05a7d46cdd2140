"""`load_backbone`: the features of the evaluations for one image, from every kind of weights, in anyone's folder."""

import os
import random
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from helpers import ROOT
from PIL import Image

import eval_knn
import vision_transformer
from cplearn import checkpoints, load_backbone
from cplearn.data.datasets import Folder
from cplearn.errors import UserError
from cplearn.features.cli import request_of
from cplearn.features.splits import extract_features
from cplearn.load import load_model


def expected_features(tmp_path, image_folder, weights, *more):
    """What the evaluations have of the first images of val."""
    flags = ["--pretrained_weights", str(weights), "--data_path", str(image_folder), "--num_workers", "0", "--device",
             "cpu", "--output_dir", str(tmp_path), *more]  # fmt: skip
    args = eval_knn.get_args_parser().parse_args(flags)
    cpu = torch.device("cpu")
    return extract_features(
        load_model(request_of(args, "digits"), cpu), Folder(image_folder / "val"), args, cpu
    ).features


def features_of(pretrained, image_folder):
    """A user's own loop: open, transform, run."""
    model, transform, width = pretrained
    paths = sorted((image_folder / "val").rglob("*.jpg"))
    found = torch.cat([model(transform(Image.open(path))[None]) for path in paths])
    assert found.shape == (len(paths), width) and not found.requires_grad and not model.training
    return found


def test_our_checkpoint(run, tmp_path, image_folder):
    expected = expected_features(tmp_path, image_folder, run / "checkpoint.pth")
    found = features_of(load_backbone(run / "checkpoint.pth"), image_folder)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    small = expected_features(tmp_path, image_folder, run / "checkpoint.pth", "--image_size", "16")
    found = features_of(load_backbone(run / "checkpoint.pth", image_size=16), image_folder)
    torch.testing.assert_close(found, small, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(small, expected)


def test_a_checkpoint_as_dino_writes_it(tmp_path, image_folder):
    """Teacher and student differ; keys are DINO's of a model below DDP, with a head beside the backbone."""
    networks = {}
    for seed, key in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        weights = vision_transformer.vit_tiny(16, image_size=32).state_dict()
        networks[key] = {f"module.backbone.{k}": v for k, v in weights.items()}
        networks[key]["module.head.mlp.0.weight"] = torch.zeros(2, 2)
    torch.save({**networks, "epoch": 3}, tmp_path / "dino.pth")
    common = {"arch": "vit_tiny", "patch_size": 16, "image_size": 32}
    flags = [x for name, value in common.items() for x in (f"--{name}", str(value))]
    found = {}
    for key in networks:
        found[key] = features_of(load_backbone(tmp_path / "dino.pth", **common, checkpoint_key=key), image_folder)
        expected = expected_features(tmp_path, image_folder, tmp_path / "dino.pth", *flags, "--checkpoint_key", key)
        torch.testing.assert_close(found[key], expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found["student"], found["teacher"], atol=1e-2)
    assert torch.equal(features_of(load_backbone(tmp_path / "dino.pth", **common), image_folder), found["teacher"])
    assert load_backbone(tmp_path / "dino.pth", arch="vit_tiny").transform.size == 224  # as such weights are trained


@pytest.mark.parametrize("size", [160, 64])
def test_weights_of_timm(tmp_path, image_folder, size):
    """Against timm's model itself, which has a classifier that is left out, and resamples its position embeddings."""
    torch.manual_seed(3)
    theirs = timm.create_model("test_vit", num_classes=5, dynamic_img_size=True).eval()
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    pretrained = load_backbone(tmp_path / "timm.pth", arch="timm:test_vit", image_size=size)
    found = features_of(pretrained, image_folder)
    paths = sorted((image_folder / "val").rglob("*.jpg"))
    with torch.no_grad():
        x = torch.stack([pretrained.transform(Image.open(path)) for path in paths])
        own = theirs.forward_head(theirs.forward_features(x), pre_logits=True)
    torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-5)
    flags = ("--arch", "timm:test_vit", "--image_size", str(size))
    expected = expected_features(tmp_path, image_folder, tmp_path / "timm.pth", *flags)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.save(timm.create_model("test_vit3", num_classes=0).state_dict(), tmp_path / "other.pth")
    with pytest.raises(UserError, match="other.pth"):
        load_backbone(tmp_path / "other.pth", arch="timm:test_vit", image_size=size)


def test_the_transform_takes_images_of_any_mode(run):
    transform = load_backbone(run / "checkpoint.pth", image_size=100).transform
    gray = np.random.default_rng(0).integers(0, 256, (120, 150), dtype=np.uint8)
    plain = transform(Image.fromarray(gray).convert("RGB"))
    assert plain.shape == (3, 100, 100) and plain.dtype == torch.float32
    for image in (Image.fromarray(gray), Image.fromarray(gray).convert("RGBA"), Image.fromarray(gray * np.uint16(257))):
        assert torch.equal(transform(image), plain)
    assert repr(transform) == "EvalTransform(size=100)"


def test_random_numbers_of_the_caller_are_left_alone(run, tmp_path):
    """Loading builds a network at random first."""

    def draw():
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()

    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(11)
    expected = draw()
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(11)
    load_backbone(run / "checkpoint.pth")
    torch.save(checkpoints.backbone_weights(checkpoints.load(run / "checkpoint.pth")), tmp_path / "plain.pth")
    load_backbone(tmp_path / "plain.pth", arch="resnet8_w8")
    assert draw() == expected


def test_wrong_files(run, tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "plain.pth")
    for weights, options, named in (
        ("/nowhere.pth", {}, "/nowhere.pth"),
        (run / "checkpoint.pth", {"arch": "resnet18"}, "--arch resnet18.* resnet8_w8"),
        (run / "checkpoint.pth", {"patch_size": 8}, "--patch_size 8.* 16"),
        (run / "checkpoint.pth", {"checkpoint_key": "student"}, "--checkpoint_key student"),
        (tmp_path / "plain.pth", {}, "plain.pth .*--arch"),
    ):
        with pytest.raises(UserError, match=named):
            load_backbone(weights, **options)


def without(state, *names):
    return {name: value for name, value in state.items() if name not in names}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda state: without(state, "epoch"), "epoch"),
        (lambda state: state | {"model": None}, "model"),
        (lambda state: state | {"args": "vit_tiny"}, ""),
        (lambda state: state | {"args": without(state["args"], "seed")}, "seed"),
        (lambda state: state | {"args": without(state["args"], "out_dim")}, "out_dim"),
        (lambda state: state | {"args": state["args"] | {"image_size": "32"}}, "image_size"),
    ],
)
def test_a_checkpoint_that_no_run_wrote_is_refused(run, tmp_path, change, named):
    checkpoints.write(tmp_path / "other.pth", change(checkpoints.load(run / "checkpoint.pth")))
    with pytest.raises(UserError, match=f"other.pth .*{named}"):
        load_backbone(tmp_path / "other.pth")


ELSEWHERE = """
import sys
import torch
import datasets, errors, utils  # the user's own

weights, repository = sys.argv[1:]
hub = lambda name, **options: torch.hub.load(repository, name, source="local", **options)
again = hub("backbone", pretrained_weights=weights)
head = hub("cplearn_head", pretrained_weights=weights)
images = torch.rand(2, 3, 32, 32)
assert hub("vit_tiny", image_size=32)(images).shape == (2, 192)
assert repository not in sys.path

import cplearn
from cplearn import load_backbone, load_pretrained
assert cplearn.__file__.startswith(repository + "/")
model, transform, width = load_backbone(weights)
assert torch.equal(model(images), again(images))
assert torch.equal(head.assign(head(again(images))), load_pretrained(weights).method.predict(model(images)))
for module in (datasets, errors, utils):
    assert module.OWNER == "user" and sys.modules[module.__name__] is module, module.__file__
print("fine", width)
"""


def test_in_a_folder_with_modules_of_the_same_names(run, tmp_path):
    """In Python and through torch.hub, which finds the checkout by its path alone."""
    for name in ("utils", "errors", "datasets"):
        (tmp_path / f"{name}.py").write_text("OWNER = 'user'\n")
    (tmp_path / "own.py").write_text(ELSEWHERE)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    env.pop("PYTHONPATH")
    command = [sys.executable, "own.py", str(run / "checkpoint.pth"), str(ROOT)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "fine 8\n", done.stdout + done.stderr
