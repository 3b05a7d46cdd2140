"""How one image becomes views, first half: random numbers, crops and flips, in the loader's worker, on uint8 pixels.

Every random number of a view is drawn from (seed, epoch, sample, view) by `draw` and from nothing else, so a view does
not depend on which worker made it, or when. What this half makes is made of integers, and is the same on every machine.
The second half, color, is `color.py`.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cplearn.data.color import ORDERS, color
from cplearn.data.images import MAX_PIXELS, ImageError
from cplearn.errors import UserError
from cplearn.host import physical_memory
from cplearn.random_streams import FOR_VIEWS, random_bits, seed_of

BICUBIC = Image.Resampling.BICUBIC


@dataclass(frozen=True)
class View:
    """One kind of view: size in pixels, ranges and probabilities of its random transforms."""

    size: int
    scale: tuple[float, float] = (0.4, 1.0)  # of the crop's area
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    pad: int = 0  # > 0: pad (reflecting) and crop at native size, instead of a random resized crop
    flip_p: float = 0.5
    jitter_p: float = 0.0
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)  # brightness, contrast, saturation, hue
    gray_p: float = 0.0
    blur_p: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels
    solarize_p: float = 0.0
    noise_std: float = 0.0  # of pixels in 0..1
    interpolation: str = "bicubic"  # or bilinear; both antialiased


def dino_views(size, local_size, n_local, global_scale, local_scale) -> list[View]:
    """Return DINO's views: blur on view 1, rarely on 2, half the time on local crops; solarization on view 2."""
    color = View(size, scale=global_scale, jitter_p=0.8, gray_p=0.2)
    local = replace(color, size=local_size, scale=local_scale, blur_p=0.5)
    return [replace(color, blur_p=1.0), replace(color, blur_p=0.1, solarize_p=0.2), *[local] * n_local]


def cifar_views(size, local_size, n_local, global_scale, local_scale, flip_p=0.5) -> list[View]:
    """Return the paper's views for CIFAR and SVHN (Table 6): pad 4 and crop, rare jitter and gray, noise 0.03."""
    view = View(size, pad=4, flip_p=flip_p, jitter_p=0.1, jitter=(0.4, 0.4, 0.4, 0.1), gray_p=0.1, noise_std=0.03)
    local = replace(view, size=local_size, pad=0, scale=local_scale)
    return [view, view, *[local] * n_local]


def cifar_strong_views(size, local_size, n_local, global_scale, local_scale) -> list[View]:
    """Return stronger views for 32 x 32: random resized crops and DINO's colors, no blur; solarization on view 2."""
    view = View(size, scale=global_scale, jitter_p=0.8, gray_p=0.2)
    local = replace(view, size=local_size, scale=local_scale)
    return [view, replace(view, solarize_p=0.2), *[local] * n_local]


def digits_views(size, local_size, n_local, global_scale, local_scale) -> list[View]:
    """Return random crops with a little blur and noise: handwriting has no color and must not be mirrored."""
    view = View(size, scale=global_scale, flip_p=0.0, blur_p=0.5, blur_sigma=(0.1, 1.5), noise_std=0.05)
    return [view, view, *[replace(view, size=local_size, scale=local_scale)] * n_local]


RECIPES = {
    "dino": dino_views,
    "cifar": cifar_views,
    "cifar_strong": cifar_strong_views,
    "svhn": partial(cifar_views, flip_p=0.0),  # a mirrored digit is another one (Table 6)
    "digits": digits_views,
}


def build_views(recipe: str, **sizes) -> list[View]:
    """Build the views of a recipe, global crops first.

    Raises `UserError` for an unknown recipe, and for views that are too small, too large or too many.
    """
    if recipe not in RECIPES:
        raise UserError(f"--augmentation {recipe} is unknown: {', '.join(RECIPES)}")
    check_size("--image_size", sizes["size"])
    check_size("--local_image_size", sizes["local_size"])
    # Of one image: float32, once more beside each other, 8 bits; and the numbers that each view is drawn from.
    need = 27 * 2 * sizes["size"] ** 2 + sizes["n_local"] * (27 * sizes["local_size"] ** 2 + 8 * NUMBERS)
    if need > (have := physical_memory()):
        raise UserError(
            f"--local_crops_number {sizes['n_local']}: the views of one image take {need / 1e9:,.0f} GB, this machine "
            f"has {have / 1e9:.0f} GB: use fewer, or a smaller --image_size and --local_image_size"
        )
    views = RECIPES[recipe](**sizes)
    for view in views:
        if view.size <= view.pad:
            raise UserError(f"--augmentation {recipe} pads by {view.pad} pixels: --image_size {view.size} is too small")
    return views


def views_of(args: argparse.Namespace) -> list[View]:
    """Return the views that the flags of main_cplearn.py ask for. Raises `UserError` as `build_views` does."""
    return build_views(
        args.augmentation,
        size=args.image_size,
        local_size=args.local_image_size,
        n_local=args.local_crops_number,
        global_scale=tuple(args.global_crops_scale),
        local_scale=tuple(args.local_crops_scale),
    )


def check_size(flag: str, size: int) -> None:
    """Raise `UserError` for views that are larger than any image can be."""
    if size**2 > MAX_PIXELS:
        raise UserError(
            f"{flag} {size} is more than any image may have ({MAX_PIXELS:,} pixels): {int(MAX_PIXELS**0.5)} at most"
        )


# --- random numbers ----------------------------------------------------------------------------------

TRIES = 10  # of a random resized crop, before it takes the center
# Uniform numbers of each view: all are drawn, used or not, so that changing one probability leaves the rest alone.
NUMBERS = 16 + 4 * TRIES
# Which of them decides what. 14 and 15 are free.
NUMBER = {"jitter": 0, "flip": 1, "strengths": slice(2, 6), "order": 6, "gray": 7, "sigma": 8, "blur": 9,
          "solarize": 10, "noise": 11, "shift_left": 12, "shift_top": 13, "tries": slice(16, NUMBERS)}  # fmt: skip


def draw(seed: int, epoch: int, samples: list[int], views: int) -> np.ndarray:
    """Draw uniform numbers in [0, 1): a stream of its own for each sample. Shape: -> float64 (n, views, NUMBERS)."""
    streams = random_bits(seed_of(FOR_VIEWS, seed, epoch), torch.tensor(samples, dtype=torch.int64))
    bits = random_bits(streams[:, None], torch.arange(views * NUMBERS)[None])
    return (bits >> 11 & (1 << 53) - 1).numpy().reshape(len(samples), views, NUMBERS) * 2.0**-53


# What the color half needs of each view of an image, by its place in `color_params`.
COLOR = ("brightness", "contrast", "saturation", "hue", "order", "gray", "sigma", "solarize", "noise_seed")


def _each(views: list[View], name: str) -> np.ndarray:
    """Shape: -> float64 (V,), or (V, k) for a range or the strengths of a jitter."""
    return np.array([getattr(view, name) for view in views], dtype=np.float64)


def color_params(views: list[View], u: np.ndarray) -> Tensor:
    """Return the parameters of the color half. Shape: u (n, V, NUMBERS) -> float64 (n, V, len(COLOR)), by `COLOR`."""
    u = np.moveaxis(u, -1, 0)
    number = {name: u[place] for name, place in NUMBER.items()}
    jitter, strength = number["jitter"] < _each(views, "jitter_p"), _each(views, "jitter").T
    low = np.array([1 - strength[0], 1 - strength[1], 1 - strength[2], -strength[3]])[:, None]
    strengths = low + 2 * strength[:, None] * number["strengths"]
    sigma_low, sigma_high = _each(views, "blur_sigma").T
    sigma = sigma_low + (sigma_high - sigma_low) * number["sigma"]
    columns = [
        *np.where(jitter, strengths, np.array([1.0, 1.0, 1.0, 0.0])[:, None, None]),
        np.where(jitter, np.floor(number["order"] * len(ORDERS)), -1),  # -1: no jitter
        number["gray"] < _each(views, "gray_p"),
        np.where(number["blur"] < _each(views, "blur_p"), sigma, 0.0),
        number["solarize"] < _each(views, "solarize_p"),
        np.where(_each(views, "noise_std") > 0, np.floor(number["noise"] * 2**52), -1),
    ]
    return torch.from_numpy(np.stack(columns, axis=-1))


def crop_boxes(views: list[View], u: np.ndarray, widths: np.ndarray, heights: np.ndarray) -> np.ndarray:
    """Return left, top, width, height in pixels, and whether to mirror; of a padded crop in the padded image.

    Shape: u (n, V, NUMBERS), widths and heights int (n,) -> int64 (n, V, 5).
    """
    width, height = (side.reshape(-1, 1).astype(np.float64) for side in (widths, heights))
    boxes, fits = _random_boxes(views, u, width[..., None], height[..., None])
    boxes = np.where(fits, boxes, _center_boxes(views, width, height))
    pad, size = _each(views, "pad"), _each(views, "size")
    shifts = [np.floor(u[..., NUMBER[name]] * (2 * pad + 1)) for name in ("shift_left", "shift_top")]
    boxes = np.where(pad > 0, np.stack(np.broadcast_arrays(*shifts, size, size)), boxes)
    flip = u[..., NUMBER["flip"]] < _each(views, "flip_p")
    return np.stack([*boxes, flip], axis=-1).astype(np.int64)


def _random_boxes(views: list[View], u: np.ndarray, width: np.ndarray, height: np.ndarray):
    """Return the first of ten random boxes that is no larger than its image, and whether there is one.

    Area and log aspect ratio are uniform in their ranges, and so is the place.
    Shape: u (n, V, NUMBERS), width and height (n, 1, 1) -> left, top, width, height (4, n, V); bool (n, V).
    """
    area_u, ratio_u, left_u, top_u = np.moveaxis(u[..., NUMBER["tries"]].reshape(*u.shape[:2], TRIES, 4), -1, 0)
    (small, large), (narrow, wide) = _each(views, "scale").T[..., None], np.log(_each(views, "ratio")).T[..., None]
    area = width * height * (small + (large - small) * area_u)
    aspect = np.exp(narrow + (wide - narrow) * ratio_u)
    w, h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    left, top = np.floor(left_u * (width - w + 1)), np.floor(top_u * (height - h + 1))
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.argmax(-1)[None, ..., None]
    return np.take_along_axis(np.stack([left, top, w, h]), first, -1)[..., 0], fits.any(-1)


def _center_boxes(views: list[View], width: np.ndarray, height: np.ndarray) -> np.ndarray:
    """Return the largest box around the center with an aspect ratio in its range. Shape: (n, 1) -> (4, n, V)."""
    low, high = _each(views, "ratio").T
    w = np.minimum(width, np.maximum(1, np.rint(height * high)))
    h = np.minimum(height, np.maximum(1, np.rint(width / low)))
    return np.stack([(width - w) // 2, (height - h) // 2, w, h])


# --- first half: geometry, one image, uint8 ----------------------------------------------------------


def to_pixels(image: Image.Image) -> Tensor:
    """Shape: RGB image -> uint8 (3, H, W), channels last in memory, which `crop` is fastest with."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def crop(pixels: Tensor, view: View, box: np.ndarray) -> Tensor:
    """Cut and mirror one view. Shape: uint8 (3, H, W), box (5,) as in `crop_boxes` -> uint8 (3, size, size)."""
    left, top, width, height, flip = box.tolist()
    if view.pad:
        if pixels.shape[1:] != (view.size, view.size):
            pixels = _resize(pixels, view)
        near = np.pad(np.arange(view.size), view.pad, mode="reflect")
        columns = near[left : left + width]
        return pixels[:, near[top : top + height][:, None], columns[::-1].copy() if flip else columns]
    cut = _resize(pixels[:, top : top + height, left : left + width], view)
    return cut.flip(-1) if flip else cut


# What F.interpolate(..., antialias=True) comes to; its checks take a third of a small image's time.
_RESIZE = {"bicubic": torch.ops.aten._upsample_bicubic2d_aa, "bilinear": torch.ops.aten._upsample_bilinear2d_aa}


def _resize(pixels: Tensor, view: View) -> Tensor:
    return _RESIZE[view.interpolation](pixels[None], (view.size, view.size), False)[0]


def by_size(views: list[View]) -> list[slice]:
    """Group neighboring views of equal size (and noise and blur), which are kept in one tensor."""
    kinds = [(view.size, view.noise_std, view.blur_sigma) for view in views]
    cuts = [0, *(i for i, (a, b) in enumerate(pairwise(kinds), 1) if a != b), len(views)]
    return [slice(a, b) for a, b in pairwise(cuts)]


def empty_views(views: list[View], n: int) -> list[Tensor]:
    """Return buffers for the views of n images: one uint8 (n, V_g, 3, size, size) for each group of `by_size`."""
    groups = [views[group] for group in by_size(views)]
    return [torch.empty(n, len(group), 3, group[0].size, group[0].size, dtype=torch.uint8) for group in groups]


def cut_views(images: list[Tensor], u: np.ndarray, views: list[View], out: list[Tensor]) -> None:
    """Cut all views of some images into `out`. Shape: n x uint8 (3, H, W), u (n, V, NUMBERS), out as `empty_views`."""
    heights, widths = np.array([image.shape[1:] for image in images]).T
    boxes = crop_boxes(views, u, widths, heights)
    for group, crops in zip(by_size(views), out, strict=True):
        for i, image in enumerate(images):
            for k, (view, box) in enumerate(zip(views[group], boxes[i, group], strict=True)):
                crops[i, k] = crop(image, view, box)


def reduction(views: list[View], width: int, height: int) -> int:
    """Return by how much (1, 2, 4 or 8) an image can be reduced when it is decoded, so that no crop lacks pixels.

    The smallest crop of each view has at least as many pixels as the view even then.
    """

    def suffices(factor: int, view: View) -> bool:
        smallest = width * height * view.scale[0] * min(view.ratio[0], 1 / view.ratio[1])
        side = factor * view.size
        return min(width, height) >= side and (view.pad > 0 or smallest >= side**2)

    return next((factor for factor in (8, 4, 2) if all(suffices(factor, view) for view in views)), 1)


LONGEST = 16  # times its shorter side: a longer image would be more pixels and patches than memory holds


def eval_resize(size: int) -> int | None:
    """Return the shorter side before the center crop of an evaluation; None where images are resized to a square."""
    return None if size < 96 else round(size * 256 / 224)


def eval_pixels(image: Image.Image, size: int) -> Tensor:
    """Make the fixed view of every evaluation: shorter side to 256/224 of `size`, center crop (DINO); small images
    (size below 96) are only resized, because their border matters. Shape: PIL image -> uint8 (3, size, size)."""
    from torchvision.transforms.v2 import functional as tvf  # takes a second, which --help does not need

    shorter_side = eval_resize(size)
    if shorter_side is None:
        image = tvf.resize(image, [size, size], interpolation=BICUBIC)
    else:
        image = tvf.resize(_without_far_ends(image), [shorter_side], interpolation=BICUBIC)
        image = tvf.center_crop(image, [size, size])
    return tvf.pil_to_tensor(image)


def _without_far_ends(image: Image.Image) -> Image.Image:
    """Cut a very long image around its center, evenly, to what a center crop can see: else 5000 x 1 pixels are resized
    to 1280000 x 256 before all but 224 of them are thrown away. Others stay as they are."""
    short = min(image.size)
    left, top = (max(0, (side - LONGEST * short) // 2) for side in image.size)
    return image.crop((left, top, image.width - left, image.height - top)) if left or top else image


def eval_view(size: int) -> Callable[[Image.Image], Tensor]:
    """Return `eval_pixels` of this size, as loaders send it to their processes."""
    return partial(eval_pixels, size=size)


def aspect_pixels(image: Image.Image, size: int, multiple: int = 1) -> Tensor:
    """Make a view of the whole image: shorter side `size`, both sides cut (around the center) to a multiple.

    Raises `ImageError` for a longer side of more than 16 times the shorter one.
    Shape: PIL image -> uint8 (3, H, W), of which the shorter is `size`, if that is a multiple.
    """
    from torchvision.transforms.v2 import functional as tvf

    if max(image.size) > LONGEST * min(image.size):
        raise ImageError(f"{image.width} x {image.height} pixels are more than {LONGEST} to 1, too long to keep")
    pixels = tvf.pil_to_tensor(tvf.resize(image, [size], interpolation=BICUBIC))
    return tvf.center_crop(pixels, [side - side % multiple for side in pixels.shape[1:]])


def color_views(crops: list[Tensor], params: Tensor, views: list[View], device: torch.device) -> list[Tensor]:
    """Apply the color half to a batch, views of equal size in one go.

    Shape: crops as `empty_views`, params (n, V, len(COLOR)) -> V x float32 (n, 3, H_v, W_v) on the device.
    """
    images: list[Tensor] = []
    for group, pixels in zip(by_size(views), crops, strict=True):
        count = pixels.shape[1]
        columns = dict(zip(COLOR, params[:, group].flatten(0, 1).unbind(1), strict=True))
        x = pixels.to(device, non_blocking=True).flatten(0, 1)
        kind = views[group][0]
        images += color(x, columns, kind.noise_std, kind.blur_sigma[1], count).chunk(count)
    return images
