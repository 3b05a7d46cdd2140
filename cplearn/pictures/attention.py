"""What a ViT looks at: the attention of its CLS token in the last block, its patch tokens, and views of any shape."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cplearn.data.augmentations import aspect_pixels, eval_pixels, eval_resize
from cplearn.errors import UserError

WITH_ATTENTION = "vit_tiny, vit_small, vit_base and timm's ViTs that have one (timm:vit_*, deit*, beit*, eva*)"

# --- views --------------------------------------------------------------------------------------------


class View(NamedTuple):
    """What a network sees of an image."""

    pixels: Tensor  # uint8 (3, H, W)
    region: tuple[float, float, float, float]  # left, top, right and bottom of it, in pixels of the image itself


def view_of(image: Image.Image, size: int, patch: tuple[int, int], *, keep_aspect: bool = False) -> View:
    """Return the square view of every evaluation, or the whole image in whole patches (height, width)."""
    pixels = aspect_pixels(image, size, math.lcm(*patch)) if keep_aspect else eval_pixels(image, size)
    shorter = size if keep_aspect else eval_resize(size)
    if shorter is None:  # the whole image, made square
        return View(pixels, (0, 0, *image.size))
    scale = min(image.size) / shorter  # what is missing was cut around the center
    width, height = min(image.width, pixels.shape[2] * scale), min(image.height, pixels.shape[1] * scale)
    left, top = (image.width - width) / 2, (image.height - height) / 2
    return View(pixels, (left, top, left + width, top + height))


# --- attention ----------------------------------------------------------------------------------------


class LastBlock(NamedTuple):
    """What the last block of a ViT makes of n images with h x w patches."""

    attention: Tensor  # float32 (n, heads, h, w): of the CLS token to each patch
    prefix: Tensor  # float32 (n, heads, p): to itself, then to registers and the like; with `attention` it sums to 1
    tokens: Tensor  # (n, h, w, f): the patches after the last norm

    @property
    def heads(self) -> int:
        return self.attention.shape[-3]


class _QueriesAndKeys(TorchFunctionMode):
    """Records what attention is computed from, and does not compute it."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor, Tensor | None, float]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        named = {**dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)), **kwargs}
        query = named["query"]
        scale = query.shape[-1] ** -0.5 if named.get("scale") is None else named["scale"]
        self.calls.append((query, named["key"], named.get("attn_mask"), scale))
        return named["value"]


def check_attention(backbone: nn.Module, arch: str) -> None:
    """Raise `UserError` for a network without a CLS token that attends to patches in its last block."""
    blocks = getattr(backbone, "blocks", None)
    if (
        getattr(backbone, "cls_token", None) is None
        or not getattr(backbone, "num_prefix_tokens", 0)
        or not (isinstance(blocks, (nn.Sequential, nn.ModuleList)) and len(blocks))
        or not hasattr(blocks[-1], "attn")
        or not hasattr(getattr(backbone, "patch_embed", None), "dynamic_feat_size")
    ):
        raise UserError(f"--arch {arch} has no CLS token that attends to patches: {WITH_ATTENTION}")


def patch_of(backbone: nn.Module) -> tuple[int, int]:
    """Return height and width of a patch in pixels."""
    return tuple(backbone.patch_embed.feat_ratio(as_scalar=False))


@torch.no_grad()
def last_block(backbone: nn.Module, x: Tensor, arch: str = "of this network") -> LastBlock:
    """Run a ViT of ours or timm's, and return the attention of the CLS token in its last block and the patch tokens.

    The network computes what it always does. The attention is that of the CLS token alone, from queries and keys as the
    block itself makes them (with norms, rotary positions and biases): memory grows with the patches, not their square.
    Shape: x float32 (n, 3, H, W), normalized. Raises `UserError` for a network whose last block is of another kind.
    """
    check_attention(backbone, arch)
    attn, inputs = backbone.blocks[-1].attn, []
    hook = attn.register_forward_pre_hook(lambda _, args, kwargs: inputs.append((args, kwargs)), with_kwargs=True)
    try:
        tokens = backbone.forward_features(x)
    finally:
        hook.remove()
    h, w = backbone.patch_embed.dynamic_feat_size(tuple(x.shape[-2:]))
    p = backbone.num_prefix_tokens
    calls = _calls(attn, *inputs[0]) if len(inputs) == 1 else []
    if len(calls) != 1 or calls[0][0].shape[-2] != p + h * w or calls[0][1].shape[-2] != p + h * w:
        raise UserError(f"--arch {arch} attends in another way than a plain ViT in its last block: {WITH_ATTENTION}")
    row = _first_row(*calls[0])
    return LastBlock(row[..., p:].unflatten(-1, (h, w)), row[..., :p], tokens[:, p:].unflatten(1, (h, w)))


def _calls(attn: nn.Module, args: tuple, kwargs: dict) -> list[tuple[Tensor, Tensor, Tensor | None, float]]:
    """Return queries, keys, bias and scale of each attention that a module computes of its inputs."""
    fused = getattr(attn, "fused_attn", None)
    with _QueriesAndKeys() as recorded:
        try:
            if fused is not None:  # TIMM_FUSED_ATTN=0 would write the attention out
                attn.fused_attn = True
            attn(*args, **kwargs)
        finally:
            if fused is not None:
                attn.fused_attn = fused
    return recorded.calls


def _first_row(query: Tensor, key: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Return the first token's attention. Shape: (n, heads, N, d) twice -> float32 (n, heads, N)."""
    scores = (query[:, :, :1] * scale) @ key.transpose(-2, -1)
    if bias is not None:
        bias = bias.expand(*scores.shape[:2], query.shape[-2], scores.shape[-1])[:, :, :1]
        scores = scores.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else scores + bias
    return scores.float().softmax(-1)[:, :, 0]


def mass_mask(attention: Tensor, share: float) -> Tensor:
    """Return the smallest set of patches whose attention is at least this share of that to all patches (DINO).

    Shape: (..., h, w) -> bool (..., h, w).
    """
    values, order = attention.flatten(-2).double().sort(dim=-1, descending=True, stable=True)
    before = values.cumsum(-1) - values
    kept = before < share * values.sum(-1, keepdim=True)
    return torch.zeros_like(kept).scatter_(-1, order, kept).view(attention.shape)


# --- components of patch tokens -----------------------------------------------------------------------


class Components(NamedTuple):
    """The first principal components of patch tokens, and their standard deviations."""

    mean: Tensor  # float64 (f,)
    vectors: Tensor  # float64 (f, 3); zeros for those that the tokens do not have
    deviations: Tensor  # float64 (3,)

    def scores(self, tokens: Tensor) -> Tensor:
        """Return how far tokens lie along each component, in its standard deviations. Shape: (..., f) -> (..., 3)."""
        centered = tokens.cpu().double() - self.mean
        return centered @ self.vectors / self.deviations.clamp(min=torch.finfo(torch.float64).tiny)


def components_of(parts: Iterable[tuple[Tensor, Tensor]]) -> Components:
    """Return the first three components of tokens that come in parts, so that not all of them need be kept.

    The sign of each is such that what is attended to is positive.
    Shape: tokens (m, f), weights (m,) for how much each is attended to.
    """
    moments, weighted = 0, 0  # of the tokens with a 1 behind them: with their sum, and their number
    for tokens, weights in parts:
        extended = F.pad(tokens.cpu().double(), (0, 1), value=1)
        moments = moments + extended.T @ extended
        weighted = weighted + weights.cpu().double() @ extended
    mean = moments[-1, :-1] / moments[-1, -1].clamp(min=1)
    covariance = moments[:-1, :-1] / moments[-1, -1].clamp(min=1) - torch.outer(mean, mean)
    values, vectors = torch.linalg.eigh(covariance)
    width = min(3, len(values))
    values, vectors = values.flip(0)[:width], vectors.flip(1)[:, :width]
    toward = weighted[:-1] - mean * weighted[-1]
    vectors = vectors * torch.where(toward @ vectors < 0, -1.0, 1.0) * (values > 1e-9 * values[0].clamp(min=1e-30))
    return Components(mean, F.pad(vectors, (0, 3 - width)), F.pad(values.clamp(min=0).sqrt(), (0, 3 - width)))


class PatchColors:
    """Components of the patch tokens of all images, or of their foreground: what lies on the attended side of the
    first component."""

    def __init__(self, passes: Callable[[], Iterable[LastBlock]], *, foreground: bool = False):
        """`passes`: returns the last block of each image, one at a time; called once, or twice for the foreground.

        Shape: attention (heads, h, w), tokens (h, w, f).
        """
        self.whole = None
        self.components = components_of(map(self._part, passes()))
        if foreground:
            self.whole = self.components
            self.components = components_of(map(self._part, passes()))

    def _part(self, seen: LastBlock) -> tuple[Tensor, Tensor]:
        kept = self.is_foreground(seen.tokens)
        return seen.tokens[kept], seen.attention.mean(0)[kept]

    def is_foreground(self, tokens: Tensor) -> Tensor:
        """Shape: (h, w, f) -> bool (h, w), all True without a foreground."""
        if self.whole is None:
            return torch.ones(tokens.shape[:-1], dtype=torch.bool)
        return self.whole.scores(tokens)[..., 0] > 0

    def of(self, tokens: Tensor) -> Tensor:
        """Return standard deviations along each component, NaN for background. Shape: (h, w, f) -> (h, w, 3)."""
        return self.components.scores(tokens).masked_fill(~self.is_foreground(tokens)[..., None], torch.nan)
