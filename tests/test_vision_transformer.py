"""State-dict names and shapes of DINO's ViT, its features, image sizes."""

import pytest
import torch
from torch import nn

from cplearn import backbones, checkpoints
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


@pytest.mark.parametrize("patch", [4, 8, 16])
def test_other_image_sizes(patch):
    model = ViT("vit_tiny", patch_size=patch, image_size=32)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 192)
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 192)
    assert model(torch.randn(1, 3, 48, 32)).shape == (1, 192)


def test_position_embeddings_are_resampled_for_another_size():
    model = ViT("vit_small", patch_size=16, image_size=96)
    state = dino_state_dict()
    adapted = backbones.resample_positions(model, state)
    assert adapted["pos_embed"].shape == (1, 37, 384)
    assert torch.equal(adapted["pos_embed"][:, 0], state["pos_embed"][:, 0])
    checkpoints.load_into(model, adapted, "dino.pth")


def test_drop_path_grows_with_depth():
    model = ViT("vit_tiny", patch_size=16, image_size=32, drop_path_rate=0.1)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx([0.1 * i / 11 for i in range(12)])
