"""The CLS token's attention against what timm writes out and DINO's formula; masks, views, components."""

import inspect

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA
from timm.models.cait import Cait
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from timm.models.xcit import Xcit

from cplearn.backbones import build_backbone
from cplearn.errors import UserError
from cplearn.pictures import attention

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 0}
EVA = {"qk_norm": True} if "qk_norm" in inspect.signature(Eva).parameters else {}  # later versions of timm have it
NETWORKS = {
    "plain": lambda: VisionTransformer(**SMALL, dynamic_img_size=True),
    "qk_norm": lambda: VisionTransformer(**SMALL, dynamic_img_size=True, qk_norm=True),
    "registers": lambda: VisionTransformer(**SMALL, dynamic_img_size=True, reg_tokens=3, no_embed_class=True),
    "distilled": lambda: VisionTransformerDistilled(**SMALL, dynamic_img_size=True),
    "rotary": lambda: Eva(**SMALL, dynamic_img_size=True, use_rot_pos_emb=True, num_reg_tokens=2, **EVA),
    "ours": lambda: build_backbone("vit_tiny", patch_size=8, image_size=32),
}


def lively(network):
    """Enlarge random weights, so that attention is far from even, with norms that are not the identity."""
    torch.manual_seed(0)
    for parameter in network.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=parameter.shape[-1] ** -0.5)
        else:
            parameter.data.add_(0.3 * torch.randn(parameter.shape))
    return network.eval().requires_grad_(False)


def images(n=2, height=32, width=32):
    return torch.randn(n, 3, height, width, generator=torch.Generator().manual_seed(1))


def written_out(network, x):
    """What the last block multiplies its values with, where timm writes attention out: (n, heads, N, N)."""
    module, found = network.blocks[-1].attn, []
    fused, module.fused_attn = module.fused_attn, False
    hook = module.attn_drop.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    network.forward_features(x)
    hook.remove()
    module.fused_attn = fused
    return found[0]


@pytest.mark.parametrize("shape", [(32, 32), (40, 64)])
@pytest.mark.parametrize("name", NETWORKS)
def test_attention_is_the_one_that_the_block_uses(name, shape):
    network, x = lively(NETWORKS[name]()), images(2, *shape)
    before = network(x)
    seen = attention.last_block(network, x)
    expected = written_out(network, x)[:, :, 0]
    whole = torch.cat([seen.prefix, seen.attention.flatten(2)], dim=-1)
    prefix = {"registers": 4, "distilled": 2, "rotary": 3}.get(name, 1)
    assert seen.prefix.shape[-1] == prefix and seen.attention.shape[2:] == (shape[0] // 8, shape[1] // 8)
    assert torch.allclose(whole, expected, atol=1e-6) and expected.std() > 0.02
    assert torch.allclose(whole.sum(-1), torch.ones(2, whole.shape[1]), atol=1e-5)
    assert torch.equal(seen.tokens.flatten(1, 2), network.forward_features(x)[:, prefix:])
    assert torch.equal(network(x), before)


def test_attention_is_dinos():
    """DINO's get_last_selfattention: softmax of q k / sqrt(d) from the last block's normed input."""
    network, x = lively(NETWORKS["ours"]()), images()
    block, found = network.blocks[-1], []
    network.blocks[-2].register_forward_hook(lambda _, args, output: found.append(output))
    network(x)
    y = block.norm1(found[0])
    q, k, _ = block.attn.qkv(y).reshape(2, 17, 3, 3, 64).permute(2, 0, 3, 1, 4)
    expected = torch.softmax(torch.einsum("bhid,bhjd->bhij", q, k) / 64**0.5, dim=-1)
    seen = attention.last_block(network, x)
    assert torch.allclose(seen.attention.flatten(2), expected[:, :, 0, 1:], atol=1e-6)
    assert torch.allclose(network.get_last_selfattention(x), expected, atol=1e-6)


def test_a_network_with_its_attention_written_out_stays_so():
    network, x = lively(NETWORKS["plain"]()), images()
    expected = attention.last_block(network, x).attention
    network.blocks[-1].attn.fused_attn = False
    assert torch.equal(attention.last_block(network, x).attention, expected)
    assert network.blocks[-1].attn.fused_attn is False
    assert not network.blocks[-1].attn._forward_pre_hooks


SWIN = {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 16, "depths": (2,), "num_heads": (2,)}
REFUSED = {
    "resnet8_w8": lambda: build_backbone("resnet8_w8", patch_size=8, image_size=32),
    "timm:resnet10t": lambda: build_backbone("timm:resnet10t", patch_size=8, image_size=32),
    "pooled": lambda: VisionTransformer(**SMALL, class_token=False, global_pool="avg", reg_tokens=2),
    "swin": lambda: SwinTransformer(**SWIN, num_classes=0),
    "xcit": lambda: Xcit(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=0),
    "cait": lambda: Cait(**SMALL),
}


@pytest.mark.parametrize("arch", REFUSED)
def test_networks_without_a_cls_token_that_attends(arch):
    network = REFUSED[arch]().eval()
    network(images())  # it is in order, but of another kind
    with pytest.raises(UserError, match=f"--arch {arch} .*vit_tiny"):
        attention.last_block(network, images(), arch)


# --- masks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.1, 0.6, 0.95])
def test_masks_are_dinos(share):
    maps = torch.rand(3, 5, 7, generator=torch.Generator().manual_seed(0)) ** 4
    masks = attention.mass_mask(maps, share)
    for one, mask in zip(maps.flatten(1), masks.flatten(1), strict=True):
        values, order = torch.sort(one.double() / one.double().sum())
        kept = torch.cumsum(values, 0) > 1 - share
        assert torch.equal(mask[order], kept)
        assert one[mask].sum() >= share * one.sum()
        assert one[mask].sum() - one[mask].min() < share * one.sum()


def test_masks_of_all_and_of_even_attention():
    attended = torch.tensor([[0.5, 0.0], [0.25, 0.25]])
    assert attention.mass_mask(attended, 1.0).tolist() == [[True, False], [True, True]]
    assert attention.mass_mask(torch.full((2, 4, 4), 1 / 17), 0.5).sum((1, 2)).tolist() == [8, 8]


# --- views ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "keep_aspect"), [(224, False), (32, False), (64, True)])
@pytest.mark.parametrize("shape", [(300, 200), (201, 333), (50, 50)])
def test_the_region_of_a_view_is_what_its_pixels_show(shape, size, keep_aspect):
    """On an image whose red grows from left to right and whose green grows downward."""
    ramps = np.zeros((*shape[::-1], 3), dtype=np.uint8)
    ramps[..., 0], ramps[..., 1] = np.linspace(0, 255, shape[0]), np.linspace(0, 255, shape[1])[:, None]
    pixels, (left, top, right, bottom) = attention.view_of(
        Image.fromarray(ramps), size, (8, 8), keep_aspect=keep_aspect
    )
    red, green = pixels[0].float().mean(0), pixels[1].float().mean(1)
    edges = [red[0], green[0], red[-1], green[-1]]
    expected = [255 * x / shape[k % 2] for k, x in enumerate((left, top, right, bottom))]
    assert np.allclose(edges, expected, atol=255 / min(min(shape), size))


@pytest.mark.parametrize(
    ("shape", "size", "keep_aspect", "region"),
    [
        ((400, 200), 32, False, (0, 0, 400, 200)),
        ((512, 256), 224, False, (144, 16, 368, 240)),
        ((512, 256), 64, True, (0, 0, 512, 256)),
        ((100, 330), 100, True, (2, 5, 98, 325)),
    ],
)
def test_regions(shape, size, keep_aspect, region):
    view = attention.view_of(Image.new("RGB", shape), size, (16, 16), keep_aspect=keep_aspect)
    assert view.region == region


# --- components -------------------------------------------------------------------------------------------


def blocks(n=3, width=10, seed=0):
    """Patch tokens of n images with few strong directions, and attention that follows the first of them."""
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=rng) * torch.tensor([5.0, 3.0, 2.0, *[0.3] * (width - 3)])[:, None]
    found = []
    for _ in range(n):
        raw = torch.randn(4, 6, width, generator=rng)
        weights = torch.softmax(raw[..., 0].flatten(), 0).view(1, 4, 6)
        found.append(attention.LastBlock(weights, torch.zeros(1, 1), raw @ mix + 7))
    return found


def test_components_are_those_of_scikit_learn():
    seen = blocks()
    colors = attention.PatchColors(lambda: seen)
    tokens = torch.cat([x.tokens.flatten(0, 1) for x in seen]).double()
    expected = PCA(3, whiten=True, svd_solver="full").fit(tokens.numpy()).transform(tokens.numpy())
    expected *= np.sqrt(len(tokens) / (len(tokens) - 1))
    got = torch.cat([colors.of(x.tokens).flatten(0, 1) for x in seen]).numpy()
    assert np.allclose(got * np.sign((got * expected).sum(0)), expected, atol=1e-6)
    weights = torch.cat([x.attention.flatten() for x in seen]).double().numpy()
    assert (weights @ got > 0).all()  # what is attended to is positive


def test_signs_follow_attention_and_not_the_solver():
    seen = blocks()
    mirrored = [attention.LastBlock(x.attention, x.prefix, -x.tokens) for x in seen]
    a, b = (attention.PatchColors(lambda s=s: s).of(s[1].tokens) for s in (seen, mirrored))
    assert torch.allclose(a, b, atol=1e-6)


def test_the_foreground_has_components_of_its_own():
    seen = blocks()
    whole, front = attention.PatchColors(lambda: seen), attention.PatchColors(lambda: seen, foreground=True)
    tokens = torch.cat([x.tokens.flatten(0, 1) for x in seen])
    inside = whole.of(tokens)[:, 0] > 0
    assert 0 < inside.sum() < len(tokens) and torch.equal(front.of(tokens)[:, 0].isnan(), ~inside)
    expected = PCA(3, whiten=True).fit_transform(tokens[inside].double().numpy())
    got = front.of(tokens)[inside].numpy()
    assert np.allclose(np.abs(got), np.abs(expected) * np.sqrt(len(got) / (len(got) - 1)), atol=1e-5)


def test_tokens_that_are_all_alike_have_no_components():
    same = [attention.LastBlock(torch.full((1, 2, 2), 0.2), torch.zeros(1, 1), torch.full((2, 2, 5), 3.0))]
    assert torch.equal(attention.PatchColors(lambda: same).of(same[0].tokens), torch.zeros(2, 2, 3).double())
    narrow = [attention.LastBlock(torch.rand(1, 2, 2), torch.zeros(1, 1), torch.rand(2, 2, 2))]
    assert attention.PatchColors(lambda: narrow).of(narrow[0].tokens).shape == (2, 2, 3)
    assert torch.isfinite(attention.PatchColors(lambda: narrow).of(narrow[0].tokens)).all()
