"""Each transform against torchvision's, and each random draw against its probability."""

import hashlib
import os
import subprocess
import sys
from importlib import resources

import numpy as np
import pytest
import torch
import torchvision.transforms.v2 as v2
import torchvision.transforms.v2.functional as tvf
from helpers import ROOT
from PIL import Image

from cplearn.data import augmentations
from cplearn.data.augmentations import (
    COLOR,
    View,
    build_views,
    by_size,
    color_params,
    color_views,
    crop,
    crop_boxes,
    cut_views,
    draw,
    empty_views,
    eval_pixels,
    reduction,
    to_pixels,
)
from cplearn.data.color import ORDERS, color
from cplearn.errors import UserError

SIZES = dict(size=32, local_size=16, n_local=2, global_scale=(0.4, 1.0), local_scale=(0.05, 0.4))
BOX = ("left", "top", "width", "height", "flip")


def smooth_image(width=50, height=40, seed=0) -> Image.Image:
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def draws(view, count=1000, seed=0, epoch=0, width=60, height=50) -> dict[str, np.ndarray]:
    """Parameters of one view of `count` images, by name."""
    u = draw(seed, epoch, list(range(count)), 1)
    boxes = crop_boxes([view], u, np.full(count, width), np.full(count, height))[:, 0]
    colors = color_params([view], u)[:, 0].numpy()
    return dict(zip((*BOX, *COLOR), [*boxes.T, *colors.T], strict=True))


def box_of(left, top, width, height, flip=0):
    return np.array([left, top, width, height, flip])


# --- frequencies --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "index"),
    [("dino", 0), ("dino", 1), ("dino", 2), ("cifar", 0), ("cifar_strong", 1), ("digits", 1)],
)
def test_frequency_of_each_transform_equals_its_probability(recipe, index):
    view = build_views(recipe, **SIZES)[index]
    drawn = draws(view)
    events = {
        "flip": (drawn["flip"], view.flip_p),
        "jitter": (drawn["order"] >= 0, view.jitter_p),
        "gray": (drawn["gray"], view.gray_p),
        "blur": (drawn["sigma"] > 0, view.blur_p),
        "solarize": (drawn["solarize"], view.solarize_p),
    }
    for name, (happened, p) in events.items():
        tolerance = 4 * (p * (1 - p) / 1000) ** 0.5
        assert abs(np.mean(happened) - p) <= tolerance, name


def test_probabilities_of_the_dino_recipe():
    first, second, local, _ = build_views("dino", **SIZES)
    assert [v.blur_p for v in (first, second, local)] == [1.0, 0.1, 0.5]
    assert [v.solarize_p for v in (first, second, local)] == [0.0, 0.2, 0.0]
    assert {(v.flip_p, v.jitter_p, v.gray_p, v.jitter) for v in (first, second, local)} == {
        (0.5, 0.8, 0.2, (0.4, 0.4, 0.2, 0.1))
    }
    assert (first.scale, local.scale, local.size) == ((0.4, 1.0), (0.05, 0.4), 16)


def test_probabilities_of_the_cifar_recipe():
    """The paper's Table 6."""
    view = build_views("cifar", **SIZES)[0]
    assert (view.jitter_p, view.gray_p, view.noise_std, view.flip_p, view.pad) == (0.1, 0.1, 0.03, 0.5, 4)
    assert build_views("svhn", **SIZES)[0].flip_p == 0


def test_ranges_and_spread_of_the_strengths():
    view = View(32, jitter_p=1.0, blur_p=1.0)
    drawn = draws(view)
    for name, low, high in (
        ("brightness", 0.6, 1.4),
        ("contrast", 0.6, 1.4),
        ("saturation", 0.8, 1.2),
        ("hue", -0.1, 0.1),
        ("sigma", 0.1, 2.0),
    ):
        values = drawn[name]
        assert low <= values.min() and values.max() <= high
        quartiles = (np.quantile(values, [0.25, 0.5, 0.75]) - low) / (high - low)
        np.testing.assert_allclose(quartiles, [0.25, 0.5, 0.75], atol=0.06)
    counts = np.bincount(drawn["order"].astype(int), minlength=24)
    assert counts.min() > 15 and len(counts) == 24 == len(ORDERS)


def test_crop_boxes_follow_torchvisions_distribution():
    view = View(32, scale=(0.1, 0.9))
    p = draws(view, 4000)
    ours = np.array([p["width"] * p["height"] / 3000, p["width"] / p["height"], p["left"], p["top"]]).T
    torch.manual_seed(0)
    peer = v2.RandomResizedCrop(32, scale=(0.1, 0.9))
    boxes = [peer.make_params([torch.zeros(3, 50, 60)]) for _ in range(4000)]
    theirs = np.array([[b["width"] * b["height"] / 3000, b["width"] / b["height"], b["left"], b["top"]] for b in boxes])
    quantiles = [0.1, 0.25, 0.5, 0.75, 0.9]
    difference = np.abs(np.quantile(ours, quantiles, axis=0) - np.quantile(theirs, quantiles, axis=0)).max(0)
    assert (difference <= [0.05, 0.06, 2, 2]).all(), difference


def test_crop_of_an_extreme_image_falls_back_to_the_center():
    box = draws(View(32, scale=(0.9, 1.0)), 1, width=4000, height=10)
    assert box["height"] == 10 and box["width"] == 13 and box["left"] == (4000 - 13) // 2


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (20, 30)])
def test_every_box_lies_in_its_image(size):
    view = View(32, scale=(0.05, 1.0))
    p = draws(view, 500, width=size[0], height=size[1])
    assert (p["left"] >= 0).all() and (p["top"] >= 0).all() and (p["width"] >= 1).all() and (p["height"] >= 1).all()
    assert (p["left"] + p["width"] <= size[0]).all() and (p["top"] + p["height"] <= size[1]).all()


def test_draws_depend_on_seed_epoch_sample_and_view_and_on_nothing_else():
    base = draw(1, 2, [3], 2)
    torch.manual_seed(99)
    np.random.seed(99)
    assert np.array_equal(draw(1, 2, [7, 3, 5], 2)[1:2], base)  # in another batch
    assert np.array_equal(draw(1, 2, [3], 5)[:, :2], base)  # beside more views
    others = [draw(*key)[0, 0] for key in ((2, 2, [3], 1), (1, 3, [3], 1), (1, 2, [4], 1), (1, 2, [2**31 + 3], 1))]
    for other in (*others, base[0, 1]):
        assert len(np.intersect1d(other, base[0, 0])) == 0
    many = draw(0, 0, list(range(2000)), 2)
    assert 0 <= many.min() and many.max() < 1 and len(np.unique(many)) == many.size
    assert abs(many.mean() - 0.5) < 0.002 and abs(np.corrcoef(many[:, 0].ravel(), many[:, 1].ravel())[0, 1]) < 0.01


# --- geometry -------------------------------------------------------------------------------------------


def test_crop_equals_torchvisions_resized_crop():
    image = smooth_image()
    expected = tvf.resized_crop(image, 3, 7, 30, 20, [16, 16], interpolation=v2.InterpolationMode.BICUBIC)  # Pillow's
    got = crop(to_pixels(image), View(16), box_of(7, 3, 20, 30))
    assert got.dtype == torch.uint8 and got.shape == (3, 16, 16)
    assert (got.int() - tvf.pil_to_tensor(expected).int()).abs().max() <= 1
    assert torch.equal(crop(to_pixels(image), View(16), box_of(7, 3, 20, 30, 1)), got.flip(2))


def test_crop_is_torchs_own_interpolation():
    pixels = to_pixels(smooth_image())
    expected = torch.nn.functional.interpolate(pixels[None, :, 3:33, 7:27], (16, 16), mode="bicubic", antialias=True)[0]
    assert torch.equal(crop(pixels, View(16), box_of(7, 3, 20, 30)), expected)


@pytest.mark.parametrize("name", ["china.jpg", "flower.jpg"])
def test_bilinear_crops_are_those_of_torchvisions_random_resized_crop(name):
    """Of photos, as the linear probe takes them: torchvision's default, which Pillow antialiases."""
    with Image.open(resources.files("sklearn.datasets.images") / name) as file:
        photo = file.convert("RGB")
    peer, pixels, apart = v2.RandomResizedCrop(224), to_pixels(photo), []
    torch.manual_seed(0)
    for _ in range(6):
        box = peer.make_params([photo])
        theirs = tvf.pil_to_tensor(peer.transform(photo, box)).int()
        where = box_of(*(box[side] for side in ("left", "top", "width", "height")))
        assert (crop(pixels, View(224, interpolation="bilinear"), where).int() - theirs).abs().max() <= 1
        apart.append(int((crop(pixels, View(224), where).int() - theirs).abs().max()))
    assert max(apart) > 8  # bicubic is something else


def test_padded_crop_shifts_the_image():
    image = smooth_image(32, 32)
    pixels = tvf.pil_to_tensor(image)
    view = View(32, pad=4)
    assert torch.equal(crop(to_pixels(image), view, box_of(4, 4, 32, 32)), pixels)
    assert torch.equal(crop(to_pixels(image), view, box_of(4, 4, 32, 32, 1)), pixels.flip(2))
    shifted = crop(to_pixels(image), view, box_of(6, 1, 32, 32))
    assert torch.equal(shifted[:, 3:, :-2], pixels[:, :-3, 2:])
    assert torch.equal(shifted[:, 2], shifted[:, 4])  # reflected at the border


CUT = """
import hashlib, sys
sys.path[:0] = [{root!r}, {tests!r}]
import torch
from data.test_augmentations import cut_some
print(torch.backends.cpu.get_cpu_capability(), hashlib.sha256(cut_some()).hexdigest())
"""


def cut_some() -> bytes:
    views = build_views("dino", **SIZES | dict(size=64, n_local=4)) + build_views("cifar", **SIZES)
    sizes = [(500, 375), (81, 200), (30, 20), (8, 8), (1, 300)]
    images = [to_pixels(smooth_image(*size, seed=i)) for i, size in enumerate(sizes)]
    out = empty_views(views, len(images))
    cut_views(images, draw(0, 0, range(len(images)), len(views)), views, out)
    return b"".join(x.numpy().tobytes() for x in out)


def test_pixels_are_the_same_with_every_instruction_set():
    """So that they are the same on every machine: torch chooses its kernels by these names."""
    found = {}
    for name in ("default", "avx2", "avx512"):
        code = CUT.format(root=str(ROOT), tests=str(ROOT / "tests"))
        environment = os.environ | {"ATEN_CPU_CAPABILITY": name}
        said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        capability, found[name] = said.stdout.split()
        assert name != "default" or capability == "DEFAULT"
    assert len(set(found.values())) == 1, found
    assert hashlib.sha256(cut_some()).hexdigest() == found["default"]


def test_views_of_equal_size_share_a_tensor():
    views = build_views("dino", **SIZES)
    assert by_size(views) == [slice(0, 2), slice(2, 4)]
    assert [tuple(x.shape) for x in empty_views(views, 5)] == [(5, 2, 3, 32, 32), (5, 2, 3, 16, 16)]
    crops = [torch.randint(0, 256, x.shape, dtype=torch.uint8) for x in empty_views(views, 5)]
    params = color_params(views, draw(0, 0, range(5), 4))
    images = color_views(crops, params, views, torch.device("cpu"))
    assert [tuple(x.shape) for x in images] == [(5, 3, 32, 32)] * 2 + [(5, 3, 16, 16)] * 2
    for v, (image, view) in enumerate(zip(images, views, strict=True)):
        alone = color(crops[v // 2][:, v % 2], dict(zip(COLOR, params[:, v].T, strict=True)), view.noise_std)
        torch.testing.assert_close(image, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["dino", "cifar"])
def test_a_reduced_image_has_pixels_enough_for_every_crop(name):
    views = build_views(name, **SIZES)
    for width, height in ((100, 80), (500, 375), (4000, 3000), (1000, 40), (33, 3000)):
        factor = reduction(views, width, height)
        small = (-(-width // factor), -(-height // factor))
        assert factor == 1 or min(small) >= 32
        for view in views:
            p = draws(view, 300, width=small[0], height=small[1])
            if factor > 1 and not view.pad:
                assert (p["width"] * p["height"] >= 0.98 * view.size**2).all()
    assert reduction(views, 4000, 3000) == 8 and reduction(views, 60, 60) == 1


def test_evaluation_view():
    large = eval_pixels(smooth_image(300, 200), 224)
    expected = v2.Compose([v2.Resize(256, interpolation=v2.InterpolationMode.BICUBIC), v2.CenterCrop(224)])
    assert torch.equal(large, tvf.pil_to_tensor(expected(smooth_image(300, 200))))
    small = smooth_image(32, 32)
    assert torch.equal(eval_pixels(small, 32), tvf.pil_to_tensor(small))


@pytest.mark.parametrize("size", [(96, 6), (6, 96), (33, 2), (500, 375), (224, 224), (3, 2)])
def test_evaluation_view_of_images_that_are_not_cut_is_torchvisions(size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    expected = v2.Compose([v2.Resize(256, interpolation=v2.InterpolationMode.BICUBIC), v2.CenterCrop(224)])
    assert torch.equal(eval_pixels(image, 224), tvf.pil_to_tensor(expected(image)))


@pytest.mark.parametrize("size", [(101, 1), (1, 64), (35, 2), (3, 90), (1999, 100), (501, 7)])
def test_evaluation_view_of_a_long_image_shows_the_same(size):
    """Without its far ends it may lie half a pixel apart, which moves smooth images by a few gray levels."""
    image = smooth_image(*size)
    expected = v2.Compose([v2.Resize(256, interpolation=v2.InterpolationMode.BICUBIC), v2.CenterCrop(224)])
    found, expected = eval_pixels(image, 224).int(), tvf.pil_to_tensor(expected(image)).int()
    assert (found - expected).abs().max() <= 3 and found.float().std() > 1


@pytest.mark.parametrize("shape", [(1, 5000), (5000, 1), (2, 1_000_000)])
def test_a_strip_is_not_resized_as_a_whole(shape, monkeypatch):
    resize, made = Image.Image.resize, []

    def noted(self, size, *args, **options):
        made.append(size)
        return resize(self, size, *args, **options)

    monkeypatch.setattr(Image.Image, "resize", noted)
    image = Image.fromarray(np.full((*shape, 3), 90, dtype=np.uint8))
    assert (eval_pixels(image, 224) == 90).all() and max(made[0]) <= 17 * 256


def test_unknown_recipe():
    with pytest.raises(UserError, match="--augmentation simclr is unknown: dino, cifar, cifar_strong, svhn, digits"):
        augmentations.build_views("simclr", **SIZES)
