"""Pictures of attention: overlays, masks and components of one image, and a sheet of many."""

from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

from cplearn.pictures.sheet import Cell, draw_sheet
from cplearn.pictures.style import drawn
from cplearn.text import printable

COLORS = "inferno"  # of attention: black is none
SCALE = 3.0  # even shares of attention that the brightest color stands for at least: noise must not look like structure
COLOR_SHARE = 0.7  # of an overlay; the rest is the photo in gray
LEVELS = 2.0  # standard deviations of a component from gray to a full color
OUTSIDE = (0.17, 0.04, 0.27)  # of a mask: a color that photos rarely have
ROWS = 12  # of a sheet; more images make more sheets
DPI = 100  # of a sheet


class Seen(NamedTuple):
    """One image and what the network makes of it."""

    name: str
    photo: Image.Image  # the part that the network sees
    maps: dict[str, Tensor]  # (h, w) by name (mean, head1, head2 ...), in even shares
    masks: dict[str, Tensor]  # bool (h, w) by the same names; {} without a threshold
    components: Tensor | None  # (h, w, 3) in standard deviations; NaN for what is background


# --- one image ----------------------------------------------------------------------------------------


def photo_of(image: Image.Image, region: tuple[float, float, float, float], side: int) -> Image.Image:
    """Return a region of an image (left, top, right, bottom), its longer side of this length."""
    left, top, right, bottom = region
    scale = side / max(right - left, bottom - top)
    size = (max(1, round((right - left) * scale)), max(1, round((bottom - top) * scale)))
    return image.resize(size, Image.Resampling.LANCZOS, box=region)


def overlay(photo: Image.Image, shares: Tensor) -> Image.Image:
    """Lay attention over a photo in gray; its largest value, `SCALE` at least, has the brightest color.

    Shape: shares (h, w), attention as multiples of an even share.
    """
    import matplotlib

    values = _enlarged(shares / shares.max().clamp(min=SCALE), photo.size, Image.Resampling.BICUBIC)
    colors = matplotlib.colormaps[COLORS](values.clip(0, 1))[..., :3]
    return _image(COLOR_SHARE * colors + (1 - COLOR_SHARE) * _gray(photo))


def cut_out(photo: Image.Image, mask: Tensor) -> Image.Image:
    """Show what is inside a mask; outside, the photo is dark and violet. Shape: mask bool (h, w)."""
    inside = _enlarged(mask, photo.size, Image.Resampling.NEAREST)[..., None] > 0.5
    return _image(np.where(inside, np.asarray(photo) / 255, 0.3 * _gray(photo) + OUTSIDE))


def component_colors(scores: Tensor, size: tuple[int, int]) -> Image.Image:
    """Show three components as red, green and blue, patch by patch; what has none is white. Shape: (h, w, 3)."""
    levels = (0.5 + scores / (2 * LEVELS)).clamp(0, 1).nan_to_num(1.0)
    return _image(levels.double().numpy()).resize(size, Image.Resampling.NEAREST)


def _enlarged(values: Tensor, size: tuple[int, int], how: Image.Resampling) -> np.ndarray:
    return np.asarray(Image.fromarray(values.float().cpu().numpy()).resize(size, how))


def _gray(photo: Image.Image) -> np.ndarray:
    return np.asarray(photo.convert("L"))[..., None] / 255


def _image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray((255 * pixels).round().astype(np.uint8))


def by_name(attention: Tensor) -> dict[str, Tensor]:
    """Return the maps by name, the mean of all heads first. Shape: (heads, h, w) -> (h, w) each."""
    return dict(zip(map_names(len(attention)), [attention.mean(0), *attention], strict=True))


def map_names(heads: int) -> list[str]:
    return ["mean", *(f"head{i + 1}" for i in range(heads))]


def pictures(seen: Seen) -> dict[str, Image.Image]:
    """Return all pictures of one image by their names: image, mean, head1 ..., mask_mean, mask_head1 ..., pca."""
    named = {"image": seen.photo}
    named |= {name: overlay(seen.photo, shares) for name, shares in seen.maps.items()}
    named |= {f"mask_{name}": cut_out(seen.photo, mask) for name, mask in seen.masks.items()}
    if seen.components is not None:
        named["pca"] = component_colors(seen.components, seen.photo.size)
    return named


def picture_names(heads: int, masks: bool, pca: bool) -> list[str]:
    """Return the names of `pictures`."""
    names = map_names(heads)
    return ["image", *names, *(f"mask_{name}" for name in names if masks), *(["pca"] if pca else [])]


def folder_name(number: int, name: str) -> str:
    """Return a short name for an image's pictures, of letters and digits: 0001_cat_003."""
    stem = str(PurePosixPath(name).with_suffix("")) if PurePosixPath(name).name else name
    return f"{number:04}_" + "".join(c if c.isalnum() or c in "-_." else "_" for c in stem)[-50:]


# --- many images --------------------------------------------------------------------------------------


def sheet_rows(seen: Seen, named: dict[str, Image.Image], tile: int, threshold: float | None) -> list[list[Cell]]:
    """Return the rows of an image in a sheet: its `pictures`, `tile` pixels long, and below them its masks, if any."""
    tiles = {name: ImageOps.contain(picture, (tile, tile)) for name, picture in named.items()}
    captions = {name: f"{float(shares.max()):.1f}×" for name, shares in seen.maps.items()}
    captions["image"] = printable(seen.name)
    rows = [[Cell(captions.get(name, ""), tiles[name]) for name in headings(named)]]
    if seen.masks:
        label = Cell(f"{100 * threshold:g}% of the\nattention")
        rows.append([label, *(Cell("", tiles[f"mask_{name}"]) for name in seen.masks)])
    return rows


def sheet_names(images: int) -> list[str]:
    """Return the files of so many images' sheets."""
    count = -(-images // ROWS)
    return ["sheet.png"] if count == 1 else [f"sheet_{k + 1:02}.png" for k in range(count)]


def headings(names: Iterable[str]) -> list[str]:
    """Return the names of a sheet's columns: masks are below what they are masks of."""
    return [name for name in names if not name.startswith("mask_")]


def draw(rows: list[list[Cell]], names: list[str], tile: int, threshold: float | None, title: str) -> Image.Image:
    """Return a sheet of `sheet_rows`; names: those of `pictures`."""
    foot = [f"0 to the picture's largest (N×), at least {SCALE:.0f}×; 1× is an even share of all tokens"]
    if threshold:
        foot.append(f"{100 * threshold:g}% of the attention: the fewest patches that hold it")
    if "pca" in names:
        foot.append("pca: the first three components of all patch tokens, in red, green, blue")
    points = max(9, tile // 13) * 72 / DPI
    return drawn(
        draw_sheet(rows, tile / DPI, points=points, head=headings(names), foot=[*foot, title], bar=COLORS), DPI
    )
