"""State-dict names and shapes of DINO's ViT, its start, its features, other image sizes."""

import pytest
import torch
from torch import nn

from cplearn import backbones, checkpoints
from vision_transformer import ViT, resample_positions


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
    """All tokens of a ViT after each block and the last norm, written out in plain tensor operations."""
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
        layers.append(norm(x, "norm"))
    return layers


def dino_positions(w, rows, columns):
    """What DINO adds to the tokens of an image of so many patches, from embeddings of a square."""
    cls, patches = w["pos_embed"][:, :1], w["pos_embed"][:, 1:]
    side, dim = int(patches.shape[1] ** 0.5), patches.shape[2]
    image = torch.zeros(1, dim, side, side)
    for k in range(side * side):
        image[0, :, k // side, k % side] = patches[0, k]
    factors = ((rows + 0.1) / side, (columns + 0.1) / side)
    image = nn.functional.interpolate(image, scale_factor=factors, mode="bicubic", antialias=False)
    assert image.shape == (1, dim, rows, columns)
    tokens = [image[0, :, i, j] for i in range(rows) for j in range(columns)]
    return torch.cat([cls, torch.stack(tokens)[None]], dim=1)


def test_a_dino_vit_small_loads_with_every_key_and_gives_its_features():
    state = dino_state_dict()
    model = ViT("vit_small", patch_size=16, image_size=224).eval()
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == {k: tuple(v.shape) for k, v in state.items()}
    checkpoints.load_into(model, state, "dino.pth")
    x = torch.randn(2, 3, 224, 224)
    layers = reference_forward(state, x, heads=6)
    cls = [tokens[:, 0] for tokens in layers]
    average = sum(layers[-1][:, k] for k in range(1, 197)) / 196
    with torch.no_grad():
        torch.testing.assert_close(model(x), cls[-1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model.last_tokens(x, 4), torch.cat(cls[-4:], 1), rtol=1e-4, atol=1e-4)
        for found, expected in zip(model.get_intermediate_layers(x, 4), layers[-4:], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        both = model.last_tokens(x, 1, average=True)
        torch.testing.assert_close(both, torch.cat([cls[-1], average], 1), rtol=1e-4, atol=1e-4)


def test_a_start_is_dinos():
    torch.manual_seed(0)
    model = ViT("vit_small", patch_size=16, image_size=224)
    state = model.state_dict()
    linear = [n for n, x in state.items() if x.dim() == 2 or n in ("cls_token", "pos_embed")]
    assert len(linear) == 2 + 4 * 12
    for name in linear:
        x = state[name].flatten()
        far = x.abs() > 0.15  # in DINO too: where torch's uniform number is -1 exactly, the truncation makes it -2
        assert far.sum() <= 2 and (x[far] == -2).all(), name
        x = x[~far]
        assert x.mean().abs() < 4 * 0.02 / x.numel() ** 0.5, name
        assert x.std().item() == pytest.approx(0.02, rel=4 / (2 * x.numel()) ** 0.5), name
    plain = nn.Conv2d(3, 384, 16).weight  # torch's default: uniform within 1 / sqrt(fan-in)
    assert state["patch_embed.proj.weight"].std() == pytest.approx(plain.std().item(), rel=0.02)
    assert state["patch_embed.proj.weight"].abs().max() <= 1 / (3 * 16 * 16) ** 0.5
    for name, x in state.items():
        if name.endswith("bias") and name != "patch_embed.proj.bias":
            assert not x.any(), name
        if "norm" in name and name.endswith("weight"):
            assert (x == 1).all(), name


@pytest.mark.parametrize("patch", [4, 8, 16])
def test_other_image_sizes(patch):
    model = ViT("vit_tiny", patch_size=patch, image_size=32)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 192)
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 192)
    assert model(torch.randn(1, 3, 48, 32)).shape == (1, 192)


@pytest.mark.parametrize("grid", [(6, 6), (14, 6), (5, 9), (30, 20), (7, 28)])
def test_position_embeddings_are_interpolated_as_dinos(grid):
    state = dino_state_dict()
    found = resample_positions(state["pos_embed"], (14, 14), grid)
    torch.testing.assert_close(found, dino_positions(state, *grid), rtol=0, atol=1e-7)


def test_position_embeddings_of_local_crops_keep_their_size():
    """Averaged over the patches that a new one covers, as with antialiasing, they would shrink to a std of 0.0072."""
    torch.manual_seed(0)
    positions = ViT("vit_small", patch_size=16, image_size=224).pos_embed.detach()
    local = resample_positions(positions, (14, 14), (6, 6))[:, 1:]
    assert positions[:, 1:].std() == pytest.approx(0.02, rel=0.01) and local.std() == pytest.approx(0.0172, rel=0.02)


@pytest.mark.parametrize("size", [(96, 96), (64, 160), (112, 448)])  # the last has as many patches as a square of 224
def test_features_of_other_sizes_are_dinos(size):
    state = dino_state_dict()
    model = ViT("vit_small", patch_size=16, image_size=224).eval()
    checkpoints.load_into(model, state, "dino.pth")
    x = torch.randn(1, 3, *size)
    there = {**state, "pos_embed": dino_positions(state, size[0] // 16, size[1] // 16)}
    with torch.no_grad():
        torch.testing.assert_close(model(x), reference_forward(there, x, heads=6)[-1][:, 0], rtol=1e-4, atol=1e-4)


def test_loading_for_another_size_is_what_a_forward_pass_of_that_size_does():
    state = dino_state_dict()
    small, large = (ViT("vit_small", patch_size=16, image_size=size).eval() for size in (96, 224))
    adapted = backbones.resample_positions(small, state)
    torch.testing.assert_close(adapted["pos_embed"], dino_positions(state, 6, 6), rtol=0, atol=1e-7)
    checkpoints.load_into(small, adapted, "dino.pth")
    checkpoints.load_into(large, state, "dino.pth")
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        assert torch.equal(small(x), large(x))
    same = backbones.resample_positions(large, state)
    assert same["pos_embed"] is state["pos_embed"]


def test_position_embeddings_of_timms_networks_stay_timms():
    from timm.layers import resample_abs_pos_embed

    model = backbones.build_backbone("timm:vit_tiny_patch16_224", patch_size=16, image_size=96)
    weights = {"pos_embed": torch.randn(1, 197, 192)}
    expected = resample_abs_pos_embed(weights["pos_embed"], [6, 6])
    assert torch.equal(backbones.resample_positions(model, weights)["pos_embed"], expected)


def test_gradients_reach_the_position_embeddings_from_local_crops():
    model = ViT("vit_tiny", patch_size=16, image_size=64)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert (model.pos_embed.grad.abs().sum(2) > 0).sum() >= 10 and model.cls_token.grad.abs().sum() > 0


def test_drop_path_grows_with_depth():
    model = ViT("vit_tiny", patch_size=16, image_size=32, drop_path_rate=0.1)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx([0.1 * i / 11 for i in range(12)])


def test_the_batch_stays_free_in_an_exported_graph():
    network = ViT("vit_tiny", patch_size=8, image_size=32).eval()
    batch = torch.export.Dim("batch")
    program = torch.export.export(network, (torch.zeros(2, 3, 32, 32),), dynamic_shapes=({0: batch},))
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), network(x))
