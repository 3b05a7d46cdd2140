"""ViT-Ti/S/B with DINO's names and state-dict keys, on timm's VisionTransformer."""

from functools import partial

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

SIZES = {  # name: (embed_dim, heads); depth 12 and MLP ratio 4 throughout
    "vit_tiny": (192, 3),
    "vit_small": (384, 6),
    "vit_base": (768, 12),
}


class ViT(VisionTransformer):
    """The CLS token after the last LayerNorm is the feature; any image size that the patch size divides.

    Position embeddings are learned for `image_size` and interpolated (bicubic) for other sizes, such as
    local crops.
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

    def last_cls_tokens(self, x: Tensor, n: int) -> Tensor:
        """Return the CLS tokens of the last n blocks, each after the final LayerNorm (DINO's linear probe).

        Shape: x (images, 3, H, W) -> (images, n * embed_dim), last block last.
        """
        layers = self.get_intermediate_layers(x, n, return_prefix_tokens=True, norm=True)
        return torch.cat([prefix[:, 0] for _, prefix in layers], dim=1)


def vit_tiny(patch_size: int = 16, *, image_size: int = 224, drop_path_rate: float = 0.0) -> ViT:
    """Build a ViT-Ti with random weights: 192 features, 3 heads."""
    return ViT("vit_tiny", patch_size=patch_size, image_size=image_size, drop_path_rate=drop_path_rate)


def vit_small(patch_size: int = 16, *, image_size: int = 224, drop_path_rate: float = 0.0) -> ViT:
    """Build a ViT-S with random weights: 384 features, 6 heads."""
    return ViT("vit_small", patch_size=patch_size, image_size=image_size, drop_path_rate=drop_path_rate)


def vit_base(patch_size: int = 16, *, image_size: int = 224, drop_path_rate: float = 0.0) -> ViT:
    """Build a ViT-B with random weights: 768 features, 12 heads."""
    return ViT("vit_base", patch_size=patch_size, image_size=image_size, drop_path_rate=drop_path_rate)
