"""State-dict names and shapes of DINO, features, image sizes; ResNets of the paper."""

import pytest
import torch
from torch import nn

from cplearn import backbones, checkpoints
from cplearn.backbones import ResNet8
from cplearn.errors import UserError
from cplearn.methods import method_class
from vision_transformer import ViT


def dino_state_dict(dim=384, depth=12, patch=16, positions=197):
    """Names and shapes of DINO's ViT, written out from its published checkpoints; random values."""
    shapes = {
        "cls_token": (1, 1, dim),
        "pos_embed": (1, positions, dim),
        "patch_embed.proj.weight": (dim, 3, patch, patch),
        "patch_embed.proj.bias": (dim,),
        "norm.weight": (dim,),
        "norm.bias": (dim,),
    }
    for i in range(depth):
        block = {
            "norm1.weight": (dim,), "norm1.bias": (dim,),
            "attn.qkv.weight": (3 * dim, dim), "attn.qkv.bias": (3 * dim,),
            "attn.proj.weight": (dim, dim), "attn.proj.bias": (dim,),
            "norm2.weight": (dim,), "norm2.bias": (dim,),
            "mlp.fc1.weight": (4 * dim, dim), "mlp.fc1.bias": (4 * dim,),
            "mlp.fc2.weight": (dim, 4 * dim), "mlp.fc2.bias": (dim,),
        }  # fmt: skip
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    generator = torch.Generator().manual_seed(0)
    return {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def reference_forward(w, x, heads, patch=16):
    """The CLS token of a ViT written out in plain tensor operations, with its last four blocks."""
    dim = w["cls_token"].shape[-1]
    x = nn.functional.conv2d(x, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=patch)
    x = torch.cat([w["cls_token"].expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1) + w["pos_embed"]

    def norm(y, name):
        return nn.functional.layer_norm(y, (dim,), w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-6)

    def linear(y, name):
        return y @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    layers = []
    for i in range(12):
        b = f"blocks.{i}"
        qkv = linear(norm(x, f"{b}.norm1"), f"{b}.attn.qkv").unflatten(2, (3, heads, dim // heads))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-1, -2) / (dim // heads) ** 0.5).softmax(-1) @ v
        x = x + linear(attention.transpose(1, 2).flatten(2), f"{b}.attn.proj")
        x = x + linear(nn.functional.gelu(linear(norm(x, f"{b}.norm2"), f"{b}.mlp.fc1")), f"{b}.mlp.fc2")
        layers.append(norm(x, "norm")[:, 0])
    return layers


def test_a_dino_vit_small_loads_with_every_key_and_gives_its_features():
    state = dino_state_dict()
    model = ViT("vit_small", patch_size=16, image_size=224).eval()
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == {k: tuple(v.shape) for k, v in state.items()}
    checkpoints.load_into(model, state, "dino.pth")
    x = torch.randn(2, 3, 224, 224)
    layers = reference_forward(state, x, heads=6)
    with torch.no_grad():
        torch.testing.assert_close(model(x), layers[-1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model.last_cls_tokens(x, 4), torch.cat(layers[-4:], 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arch", "parameters"), [("vit_tiny", 5_524_416), ("vit_small", 21_665_664), ("vit_base", 85_798_656)]
)
def test_parameter_counts(arch, parameters):
    model = backbones.build_backbone(arch, patch_size=16, image_size=224)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("patch", [4, 8, 16])
def test_other_image_sizes(patch):
    model = ViT("vit_tiny", patch_size=patch, image_size=32)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 192)
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 192)
    assert model(torch.randn(1, 3, 48, 32)).shape == (1, 192)


def test_position_embeddings_are_resampled_for_another_size():
    model = ViT("vit_small", patch_size=16, image_size=96)
    state = dino_state_dict()
    adapted = model.adapt_state_dict(state)
    assert adapted["pos_embed"].shape == (1, 37, 384)
    assert torch.equal(adapted["pos_embed"][:, 0], state["pos_embed"][:, 0])
    checkpoints.load_into(model, adapted, "dino.pth")


def test_drop_path_grows_with_depth():
    model = ViT("vit_tiny", patch_size=16, image_size=32, drop_path_rate=0.1)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx([0.1 * i / 11 for i in range(12)])


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
    ],
)
def test_other_backbones(arch, width):
    model = backbones.build_backbone(arch, patch_size=16, image_size=32)
    assert model.num_features == width and model(torch.randn(2, 3, 32, 32)).shape == (2, width)


def test_resnet18_has_the_known_size():
    model = backbones.build_backbone("resnet18", patch_size=16, image_size=32)
    assert sum(p.numel() for p in model.parameters()) == 11_168_832


@pytest.mark.parametrize(
    ("arch", "size", "words"),
    [
        ("vit_huge", 224, "--arch vit_huge is unknown: vit_tiny, vit_small"),
        ("timm:vit_smal_patch16", 224, "unknown to timm"),
        ("vit_small", 100, "--image_size 100 is not a multiple of --patch_size 16: use 96"),
    ],
)
def test_wrong_backbones(arch, size, words):
    with pytest.raises(UserError, match=words):
        backbones.build_backbone(arch, patch_size=16, image_size=size)


def test_unknown_method():
    with pytest.raises(UserError, match="--method simclr is unknown: cplearn"):
        method_class("simclr")
