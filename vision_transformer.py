"""ViT-Ti/S/B with DINO's names and state-dict keys, on timm's VisionTransformer."""

from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

SIZES = {  # name: (embed_dim, heads); depth 12 and MLP ratio 4 throughout
    "vit_tiny": (192, 3),
    "vit_small": (384, 6),
    "vit_base": (768, 12),
}


# Added to the new number of patches per side: DINO's guard against rounding. It shifts all but the first patches a
# little, so weights trained with it give their features with it only.
OFFSET = 0.1


def resample_positions(pos_embed: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Interpolate position embeddings for another number of patches as DINO does: bicubic, not antialiased.

    The first is the CLS token's and stays. `old`, `new`: rows and columns of patches.
    Shape: (1, 1 + old patches, f) -> (1, 1 + new patches, f).
    """
    if tuple(old) == tuple(new):
        return pos_embed
    patches = pos_embed[:, 1:].unflatten(1, tuple(old)).permute(0, 3, 1, 2).float()
    factors = [(there + OFFSET) / here for here, there in zip(old, new, strict=True)]
    patches = F.interpolate(patches, scale_factor=factors, mode="bicubic").flatten(2).transpose(1, 2)
    return torch.cat([pos_embed[:, :1], patches.to(pos_embed.dtype)], dim=1)


class ViT(VisionTransformer):
    """The CLS token after the last LayerNorm is the feature; any image size that the patch size divides.

    Position embeddings are learned for `image_size` and interpolated (`resample_positions`) for other sizes, such as
    local crops. Initialized as DINO's: truncated normal of std 0.02 for linear layers, positions and CLS token (where
    timm has 1e-6), biases 0, torch's default for the patches' convolution.
    """

    def __init__(self, arch: str, *, patch_size: int, image_size: int, drop_path_rate: float = 0.0):
        embed_dim, heads = SIZES[arch]
        super().__init__(
            img_size=image_size,
            patch_size=patch_size,
            embed_dim=embed_dim,
            depth=12,
            num_heads=heads,
            num_classes=0,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            drop_path_rate=drop_path_rate,
            dynamic_img_size=True,
        )
        trunc_normal_(self.cls_token, std=0.02)

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Put the CLS token first and add positions: timm's method, which would interpolate with antialiasing.

        Shape: (n, rows, columns, f) -> (n, 1 + rows * columns, f).
        """
        positions = resample_positions(self.pos_embed, self.patch_embed.grid_size, (x.shape[1], x.shape[2]))
        cls_token = self.cls_token.expand(x.shape[0], -1, -1)  # len(x) would fix the batch in an export
        x = torch.cat([cls_token, x.flatten(1, 2)], dim=1)
        return self.pos_drop(x + positions)

    def get_intermediate_layers(self, x: Tensor, n: int = 1) -> list[Tensor]:
        """Return all tokens of the last n blocks, the CLS token first, each after the final LayerNorm, as DINO does.

        timm's method of this name leaves out norm and CLS token; its `forward_intermediates` is here as it is there.
        Shape: x (images, 3, H, W) -> n times (images, 1 + patches, f), last block last.
        """
        layers = super().get_intermediate_layers(x, n, return_prefix_tokens=True, norm=True)
        return [torch.cat([prefix, patches], dim=1) for patches, prefix in layers]

    def get_last_selfattention(self, x: Tensor) -> Tensor:
        """Return the attention of the last block, as DINO does: each token's (row's) shares in all tokens.

        Shape: x (images, 3, H, W) -> (images, heads, 1 + patches, 1 + patches).
        """
        x, last = self._pos_embed(self.patch_embed(x)), self.blocks[-1]
        for block in self.blocks[:-1]:
            x = block(x)
        q, k, _ = last.attn.qkv(last.norm1(x)).unflatten(2, (3, last.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return (q @ k.transpose(-2, -1) * last.attn.scale).softmax(dim=-1)

    def last_tokens(self, x: Tensor, n: int, average: bool = False) -> Tensor:
        """Return the CLS tokens of the last n blocks, each after the final LayerNorm (DINO's linear probe).

        `average`: and the mean of the last block's patch tokens, after the same LayerNorm (--avgpool_patchtokens).
        Shape: x (images, 3, H, W) -> (images, (n + average) * embed_dim), last block last, then the mean.
        """
        layers = self.get_intermediate_layers(x, n)
        tokens = [layer[:, 0] for layer in layers]
        return torch.cat([*tokens, layers[-1][:, 1:].mean(1)] if average else tokens, dim=1)


def vit_tiny(patch_size: int = 16, *, image_size: int = 224, drop_path_rate: float = 0.0) -> ViT:
    """Build a ViT-Ti with random weights: 192 features, 3 heads."""
    return ViT("vit_tiny", patch_size=patch_size, image_size=image_size, drop_path_rate=drop_path_rate)


def vit_small(patch_size: int = 16, *, image_size: int = 224, drop_path_rate: float = 0.0) -> ViT:
    """Build a ViT-S with random weights: 384 features, 6 heads."""
    return ViT("vit_small", patch_size=patch_size, image_size=image_size, drop_path_rate=drop_path_rate)


def vit_base(patch_size: int = 16, *, image_size: int = 224, drop_path_rate: float = 0.0) -> ViT:
    """Build a ViT-B with random weights: 768 features, 12 heads."""
    return ViT("vit_base", patch_size=patch_size, image_size=image_size, drop_path_rate=drop_path_rate)
