"""Each transform against torchvision's, and each random draw against its probability."""

import numpy as np
import pytest
import torch
import torchvision.transforms.v2 as v2
import torchvision.transforms.v2.functional as tvf
from PIL import Image
from torch.utils.data import default_collate

from cplearn.data import augmentations
from cplearn.data.augmentations import MEAN, ORDERS, STD, View, build_views, color, crop, draw, eval_pixels, rng_for
from cplearn.errors import UserError

SIZES = dict(size=32, local_size=16, n_local=2, global_scale=(0.4, 1.0), local_scale=(0.05, 0.4))


def smooth_image(width=50, height=40, seed=0) -> Image.Image:
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def draws(view, count=1000, seed=0):
    return [draw(view, 60, 50, rng_for(seed, 0, i, 0)) for i in range(count)]


def params_of(**values) -> dict:
    neutral = dict(
        flip=0, brightness=1.0, contrast=1.0, saturation=1.0, hue=0.0, order=-1, gray=0, sigma=0.0,
        solarize=0, noise_seed=-1,
    )  # fmt: skip
    return neutral | values


def apply(pixels, view, *params):
    """color() on a batch of the same image under different parameters, before normalization."""
    batch = torch.stack([pixels] * len(params))
    out = color(batch, default_collate(list(params)), view)
    return out * torch.tensor(STD).view(1, 3, 1, 1) + torch.tensor(MEAN).view(1, 3, 1, 1)


# --- frequencies --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "index"),
    [("dino", 0), ("dino", 1), ("dino", 2), ("cifar", 0), ("cifar_strong", 1), ("digits", 1)],
)
def test_frequency_of_each_transform_equals_its_probability(recipe, index):
    view = build_views(recipe, **SIZES)[index]
    drawn = draws(view)
    events = {
        "flip": ([p["flip"] for p in drawn], view.flip_p),
        "jitter": ([p["order"] >= 0 for p in drawn], view.jitter_p),
        "gray": ([p["gray"] for p in drawn], view.gray_p),
        "blur": ([p["sigma"] > 0 for p in drawn], view.blur_p),
        "solarize": ([p["solarize"] for p in drawn], view.solarize_p),
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
        values = np.array([p[name] for p in drawn])
        assert low <= values.min() and values.max() <= high
        quartiles = (np.quantile(values, [0.25, 0.5, 0.75]) - low) / (high - low)
        np.testing.assert_allclose(quartiles, [0.25, 0.5, 0.75], atol=0.06)
    counts = np.bincount([p["order"] for p in drawn], minlength=24)
    assert counts.min() > 15 and len(counts) == 24 == len(ORDERS)


def test_crop_boxes_follow_torchvisions_distribution():
    view = View(32, scale=(0.1, 0.9))
    ours = np.array(
        [[p["width"] * p["height"] / 3000, p["width"] / p["height"], p["left"], p["top"]] for p in draws(view, 4000)]
    )
    torch.manual_seed(0)
    peer = v2.RandomResizedCrop(32, scale=(0.1, 0.9))
    boxes = [peer.make_params([torch.zeros(3, 50, 60)]) for _ in range(4000)]
    theirs = np.array([[b["width"] * b["height"] / 3000, b["width"] / b["height"], b["left"], b["top"]] for b in boxes])
    quantiles = [0.1, 0.25, 0.5, 0.75, 0.9]
    difference = np.abs(np.quantile(ours, quantiles, axis=0) - np.quantile(theirs, quantiles, axis=0)).max(0)
    assert (difference <= [0.05, 0.06, 2, 2]).all(), difference


def test_crop_of_an_extreme_image_falls_back_to_the_center():
    box = draw(View(32, scale=(0.9, 1.0)), 4000, 10, rng_for(0, 0, 0, 0))
    assert box["height"] == 10 and box["width"] == 13 and box["left"] == (4000 - 13) // 2


def test_draws_depend_on_seed_epoch_sample_and_view_and_on_nothing_else():
    view = View(32, jitter_p=1.0)
    base = draw(view, 60, 50, rng_for(1, 2, 3, 0))
    torch.manual_seed(99)
    np.random.seed(99)
    assert draw(view, 60, 50, rng_for(1, 2, 3, 0)) == base
    for other in ((2, 2, 3, 0), (1, 3, 3, 0), (1, 2, 4, 0), (1, 2, 3, 1)):
        assert draw(view, 60, 50, rng_for(*other)) != base


# --- geometry -------------------------------------------------------------------------------------------


def test_crop_equals_torchvisions_resized_crop():
    image = smooth_image()
    box = dict(left=7, top=3, width=20, height=30)
    expected = tvf.resized_crop(
        tvf.pil_to_tensor(image), 3, 7, 30, 20, [16, 16], interpolation=v2.InterpolationMode.BICUBIC
    )
    got = crop(image, View(16), box | {"flip": 0})
    assert got.dtype == torch.uint8 and got.shape == (3, 16, 16)
    assert (got.int() - expected.int()).abs().max() <= 1
    assert torch.equal(crop(image, View(16), box | {"flip": 1}), got.flip(2))


def test_padded_crop_shifts_the_image():
    image = smooth_image(32, 32)
    pixels = tvf.pil_to_tensor(image)
    view = View(32, pad=4)
    assert torch.equal(crop(image, view, dict(left=4, top=4, width=32, height=32, flip=0)), pixels)
    shifted = crop(image, view, dict(left=6, top=1, width=32, height=32, flip=0))
    assert torch.equal(shifted[:, 3:, :-2], pixels[:, :-3, 2:])
    assert torch.equal(shifted[:, 2], shifted[:, 4])  # reflected at the border


def test_evaluation_view():
    large = eval_pixels(smooth_image(300, 200), 224)
    expected = v2.Compose([v2.Resize(256, interpolation=v2.InterpolationMode.BICUBIC), v2.CenterCrop(224)])
    assert torch.equal(large, tvf.pil_to_tensor(expected(smooth_image(300, 200))))
    small = smooth_image(32, 32)
    assert torch.equal(eval_pixels(small, 32), tvf.pil_to_tensor(small))


# --- color -----------------------------------------------------------------------------------------------

PIXELS = tvf.pil_to_tensor(smooth_image(24, 24, seed=3))
FLOAT = PIXELS.float() / 255
JITTER = View(24, jitter_p=1.0)


@pytest.mark.parametrize(
    ("name", "value", "function"),
    [
        ("brightness", 1.35, tvf.adjust_brightness),
        ("brightness", 0.6, tvf.adjust_brightness),
        ("contrast", 1.4, tvf.adjust_contrast),
        ("contrast", 0.6, tvf.adjust_contrast),
        ("saturation", 0.3, tvf.adjust_saturation),
        ("saturation", 1.8, tvf.adjust_saturation),
        ("hue", 0.1, tvf.adjust_hue),
        ("hue", -0.37, tvf.adjust_hue),
        ("hue", 0.5, tvf.adjust_hue),
    ],
)
def test_jitter_equals_torchvisions(name, value, function):
    got = apply(PIXELS, JITTER, params_of(order=0, **{name: value}))[0]
    torch.testing.assert_close(got, function(FLOAT, value), atol=2e-3, rtol=0)


def test_every_image_is_jittered_in_its_own_order():
    strengths = dict(brightness=1.4, contrast=0.6, saturation=1.2, hue=0.1)
    functions = (tvf.adjust_brightness, tvf.adjust_contrast, tvf.adjust_saturation, tvf.adjust_hue)
    orders = [0, 5, 11, 17, 23]
    got = apply(PIXELS, JITTER, params_of(), *[params_of(order=k, **strengths) for k in orders])
    torch.testing.assert_close(got[0], FLOAT)
    for image, k in zip(got[1:], orders, strict=True):
        expected = FLOAT
        for j in ORDERS[k].tolist():
            expected = functions[j](expected, list(strengths.values())[j])
        torch.testing.assert_close(image, expected, atol=3e-3, rtol=0)


def test_gray_images_keep_their_hue():
    gray = torch.full((3, 8, 8), 77, dtype=torch.uint8)
    torch.testing.assert_close(apply(gray, JITTER, params_of(order=0, hue=0.2))[0], gray.float() / 255)


def test_gray_blur_and_solarize_equal_torchvisions():
    view = View(24, gray_p=0.5, blur_p=0.5, solarize_p=0.5)
    got = apply(
        PIXELS,
        view,
        params_of(),
        params_of(gray=1),
        params_of(sigma=0.7),
        params_of(sigma=1.9),
        params_of(solarize=1),
    )
    torch.testing.assert_close(got[0], FLOAT)
    torch.testing.assert_close(got[1], tvf.rgb_to_grayscale(FLOAT, 3), atol=1e-3, rtol=0)
    for image, sigma in ((got[2], 0.7), (got[3], 1.9)):
        torch.testing.assert_close(image, tvf.gaussian_blur(FLOAT, [13, 13], [sigma, sigma]), atol=1e-4, rtol=0)
    torch.testing.assert_close(got[4], tvf.solarize(FLOAT, 128 / 255), atol=1e-6, rtol=0)


def test_blur_of_a_tiny_image():
    assert apply(PIXELS[:, :3, :3], View(3, blur_p=1.0), params_of(sigma=2.0)).isfinite().all()


def test_noise_has_its_strength_and_its_seed():
    view = View(24, noise_std=0.03)
    a, b, again = apply(PIXELS, view, *(params_of(noise_seed=s) for s in (1, 2, 1)))
    assert torch.equal(a, again) and not torch.equal(a, b)
    assert (a - FLOAT).std().item() == pytest.approx(0.03, rel=0.05)
    assert abs(torch.corrcoef(torch.stack([(a - FLOAT).flatten(), (b - FLOAT).flatten()]))[0, 1]) < 0.1


def test_an_image_does_not_depend_on_its_batch():
    view = build_views("dino", **SIZES)[1]
    drawn = [draw(view, 24, 24, rng_for(0, 0, i, 1)) for i in range(12)]
    whole = apply(PIXELS, view, *drawn)
    for i, params in enumerate(drawn):
        torch.testing.assert_close(apply(PIXELS, view, params)[0], whole[i], atol=1e-5, rtol=0)


def test_unknown_recipe():
    with pytest.raises(UserError, match="--augmentation simclr is unknown: dino, cifar, cifar_strong, svhn, digits"):
        augmentations.build_views("simclr", **SIZES)
