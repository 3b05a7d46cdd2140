"""hubconf.py through torch.hub itself: networks and heads of checkpoints, new ones, wrong files."""

import pytest
import torch
from helpers import ROOT, train

import hubconf
from cplearn import backbones, checkpoints, load_backbone
from cplearn.errors import UserError


def hub(name, *args, **options):
    return torch.hub.load(str(ROOT), name, *args, source="local", **options)


def test_every_name_that_torch_would_list_is_explained():
    names = [name for name in dir(hubconf) if callable(getattr(hubconf, name)) and not name.startswith("_")]
    assert names == ["backbone", "cplearn_head", "resnet18", "resnet8", "vit_base", "vit_small", "vit_tiny"]
    assert all(getattr(hubconf, name).__doc__ for name in names)


@pytest.mark.parametrize(
    ("name", "width"), [("resnet8", 128), ("resnet18", 512), ("vit_tiny", 192), ("vit_small", 384), ("vit_base", 768)]
)
def test_new_networks(name, width):
    with torch.device("meta"):
        model = hub(name)
    assert model.num_features == width and not model.training
    assert f"{width} features" in getattr(hubconf, name).__doc__


def test_a_vit_of_a_file_of_weights(tmp_path):
    torch.manual_seed(2)
    weights = backbones.build_backbone("vit_tiny", patch_size=16, image_size=32).state_dict()
    torch.save({"teacher": {f"module.backbone.{k}": v for k, v in weights.items()}}, tmp_path / "dino.pth")
    model = hub("vit_tiny", pretrained_weights=str(tmp_path / "dino.pth"), image_size=32)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert not model.training and all(p.requires_grad for p in model.parameters())
    model(torch.zeros(1, 3, 48, 32)).sum().backward()


def test_network_and_head_of_a_checkpoint(run):
    weights = run / "checkpoint.pth"
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model, head = hub("backbone", pretrained_weights=weights), hub("cplearn_head", pretrained_weights=weights)
    features = model(images)
    assert torch.equal(features, load_backbone(weights).model(images)) and features.requires_grad
    state = checkpoints.load(weights)["model"]
    h = head.eval()(features)
    a = (features @ state["head.linear.weight"].T + state["head.linear.bias"] - state["head.norm.running_mean"]) / (
        state["head.norm.running_var"] + 1e-5
    ).sqrt() * state["head.norm.weight"] + state["head.norm.bias"]
    torch.testing.assert_close(h, a / a.norm(dim=1, keepdim=True), rtol=1e-4, atol=1e-5)
    assert torch.equal(head.assign(h), head.logits(h).argmax(1)) and head.dictionary.out_dim == 40


def test_a_new_head():
    head = hub("cplearn_head", in_dim=8, out_dim=64)
    assert head(torch.randn(4, 8)).shape == (4, 8)


def test_self_classifier_may_have_the_head(tmp_path, image_folder):
    flags = ["--data_path", str(image_folder), "--max_steps", "1", "--method", "self_classifier", "--embed_dim", "16"]
    train(tmp_path, *flags, "--head", "cplearn")
    assert hub("cplearn_head", pretrained_weights=tmp_path / "checkpoint.pth").dictionary.embed_dim == 16


def test_wrong_files(run, tmp_path, image_folder):
    torch.save(checkpoints.backbone_weights(checkpoints.load(run / "checkpoint.pth")), tmp_path / "plain.pth")
    train(tmp_path, "--data_path", str(image_folder), "--max_steps", "1", "--method", "dino")
    for name, options, named in (
        ("cplearn_head", {"pretrained_weights": tmp_path / "plain.pth", "arch": "resnet8_w8"}, "plain.pth"),
        ("vit_small", {"pretrained_weights": run / "checkpoint.pth"}, "--arch vit_small.* resnet8_w8"),
        ("backbone", {}, "arch"),
        ("cplearn_head", {"pretrained_weights": tmp_path / "checkpoint.pth"}, "checkpoint.pth .* DINO"),
    ):
        with pytest.raises(UserError, match=named):
            hub(name, **options)
