"""Every --arch: the paper's ResNet-8 written out, ResNet-18 against torchvision's, sizes, wrong names."""

import pytest
import torch
from torch import nn

from cplearn import backbones
from cplearn.backbones import ResNet8, resnet18_cifar
from cplearn.errors import UserError


@pytest.mark.parametrize(
    ("arch", "parameters"),
    [("vit_tiny", 5_524_416), ("vit_small", 21_665_664), ("vit_base", 85_798_656), ("resnet18", 11_168_832)],
)
def test_parameter_counts(arch, parameters):
    model = backbones.build_backbone(arch, patch_size=16, image_size=224)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_resnet8_is_the_papers_table5():
    model = backbones.build_backbone("resnet8", patch_size=16, image_size=32)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert [tuple(m.kernel_size) for m in convolutions].count((3, 3)) == 8
    assert sum(p.numel() for p in model.parameters()) == (3 * 9 + 1 + 3 + 1) * 128 + 7 * (128 * 9 * 128 + 128)
    assert not any("norm" in type(m).__name__.lower() for m in model.modules())
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 128) and model.num_features == 128


def test_resnet8_equals_the_table_written_out():
    """Layers in the table's order; average pooling commutes with the 1x1 shortcut (paper: pool, then convolve)."""
    model = ResNet8(4)
    act, pool = nn.LeakyReLU(0.2), nn.AvgPool2d(2)
    x = torch.randn(2, 3, 16, 16)
    b1, b2, b3, b4 = model.blocks
    y = pool(b1.conv2(act(b1.conv1(x)))) + b1.shortcut(pool(x))
    y = pool(b2.conv2(act(b2.conv1(act(y))))) + pool(y)
    y = b3.conv2(act(b3.conv1(act(y)))) + y
    y = b4.conv2(act(b4.conv1(act(y)))) + y
    torch.testing.assert_close(model(x), y.mean((2, 3)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("arch", "width"),
    [
        ("resnet8_w256", 256),
        ("resnet8bn_w24", 24),
        ("resnet18", 512),
        ("timm:resnet10t", 512),
        ("timm:vit_tiny_patch16_224", 192),
        ("timm:xcit_nano_12_p16_224", 128),  # takes its size, but no other one later
    ],
)
def test_other_backbones(arch, width):
    model = backbones.build_backbone(arch, patch_size=16, image_size=32)
    assert model.num_features == width and model(torch.randn(2, 3, 32, 32)).shape == (2, width)


def test_dinos_names_of_other_networks_are_timms():
    kept = [backbones.arch_name(x) for x in ("resnet50", "xcit_small_12_p16", "resnet18", "vit_small", "timm:x", "foo")]
    assert kept == ["timm:resnet50", "timm:xcit_small_12_p16_224", "resnet18", "vit_small", "timm:x", "foo"]


@pytest.mark.parametrize(
    ("arch", "size", "words"),
    [
        ("vit_huge", 224, "--arch vit_huge"),
        ("timm:vit_smal_patch16", 224, "--arch timm:vit_smal_patch16"),
        ("timm:vit_tiny_patch16_224.nobody", 224, "_224.nobody .* timm:vit_tiny_patch16_224"),
        ("vit_small", 100, "--image_size 100 .* 96"),
        ("resnet8_w999999999", 32, "--arch resnet8_w999999999"),  # what no machine holds
        ("resnet8_w" + "9" * 30, 32, "--arch resnet8_w9{30}"),
        ("resnet8bn_w60000", 32, "--arch resnet8bn_w60000"),
    ],
)
def test_wrong_backbones(arch, size, words):
    with pytest.raises(UserError, match=words):
        backbones.build_backbone(arch, patch_size=16, image_size=size)


def test_an_image_that_no_memory_holds_is_refused():
    with pytest.raises(UserError, match="resnet8 .* 90000 pixels"):
        backbones.check_image_size(ResNet8(8), "resnet8", 90000)


@pytest.mark.parametrize(
    ("arch", "side"),
    [("vit_tiny", 8), ("timm:vit_tiny_patch16_224", 16), ("timm:xcit_nano_12_p16_224", 16), ("timm:mixer_s32_224", 8)],
)
def test_patches_are_as_large_as_the_network_says(arch, side):
    """XCiT says it with one number, a mixer not at all: then --patch_size stands."""
    with torch.device("meta"):
        backbone = backbones.build_backbone(arch, patch_size=8, image_size=224)
    assert backbones.patch_side(backbone, 8) == side


@pytest.mark.parametrize("arch", ["resnet8_w24", "timm:vit_tiny_patch16_224"])
def test_checks_draw_no_random_numbers(arch):
    torch.manual_seed(3)
    checked = backbones.build_backbone(arch, patch_size=16, image_size=32)
    torch.manual_seed(3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbones, "check_weights", lambda *_: None)
        plain = backbones.build_backbone(arch, patch_size=16, image_size=32)
    assert all(torch.equal(a, b) for a, b in zip(checked.parameters(), plain.parameters(), strict=True))


def test_batch_norm_of_resnet18_has_torchs_names_and_values():
    import torchvision

    ours, peer = resnet18_cifar(), torchvision.models.resnet18()
    peer.conv1, peer.maxpool, peer.fc = (nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity(), nn.Identity())
    peer.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(x), peer(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.bn1.running_var, peer.bn1.running_var)
