"""The color half against its plain form, and each transform against torchvision's."""

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tvf
from data.plain_color import plain_color
from PIL import Image

from cplearn.data import color as color_module
from cplearn.data.augmentations import COLOR, build_views, color_params, draw
from cplearn.data.color import MEAN, ORDERS, STD, color

SIZES = dict(size=32, local_size=16, n_local=2, global_scale=(0.4, 1.0), local_scale=(0.05, 0.4))


def drawn(view, count, seed=0) -> dict[str, torch.Tensor]:
    params = color_params([view], draw(seed, 0, range(count), 1))[:, 0]
    return dict(zip(COLOR, params.T, strict=True))


def params_of(**values) -> dict:
    neutral = dict(
        brightness=1.0, contrast=1.0, saturation=1.0, hue=0.0, order=-1, gray=0, sigma=0.0, solarize=0, noise_seed=-1
    )
    return neutral | values


def apply(pixels, *params, noise_std=0.0):
    """color() on a batch of the same image under different parameters, before normalization."""
    batch = torch.stack([pixels] * len(params))
    columns = {name: torch.tensor([p[name] for p in params], dtype=torch.float64) for name in params[0]}
    out = color(batch, columns, noise_std)
    return out * torch.tensor(STD).view(1, 3, 1, 1) + torch.tensor(MEAN).view(1, 3, 1, 1)


def smooth_image(size, seed) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    return tvf.pil_to_tensor(small.resize((size, size), Image.Resampling.BICUBIC))


PIXELS = smooth_image(24, 3)
FLOAT = PIXELS.float() / 255


@pytest.mark.parametrize("cache", [1, 10_000, 2**22])
@pytest.mark.parametrize(
    ("recipe", "index"), [("dino", 0), ("dino", 1), ("cifar", 0), ("cifar_strong", 1), ("digits", 0)]
)
def test_color_equals_its_plain_form(monkeypatch, recipe, index, cache):
    """However many images are worked on at once."""
    monkeypatch.setattr(color_module, "CACHE", cache)
    view = build_views(recipe, **SIZES)[index]
    noise = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels = torch.stack([smooth_image(32, i) for i in range(20)] + [noise] * 20)  # the same noise on every call: where
    # a value lies on the edge of solarization, one rounding more would invert it
    pixels[5], pixels[6], pixels[7] = 0, 128, 255  # no chroma; the edge of solarization
    params = drawn(view, 40)
    got = color(pixels, params, view.noise_std, view.blur_sigma[1])
    torch.testing.assert_close(got, plain_color(pixels, params, view), atol=1e-5, rtol=0)


def test_large_views_equal_their_plain_form():
    """They are blurred one by one."""
    view = build_views("dino", **SIZES | {"size": 224})[0]
    pixels = torch.stack([smooth_image(224, i) for i in range(9)])
    params = drawn(view, 9)
    torch.testing.assert_close(color(pixels, params), plain_color(pixels, params, view), atol=1e-5, rtol=0)


def test_rows_that_are_views_in_turn_come_back_view_by_view():
    pixels = torch.stack([smooth_image(16, i) for i in range(6)])
    params = drawn(build_views("dino", **SIZES)[1], 6)
    torch.testing.assert_close(color(pixels, params, views=2), color(pixels, params)[[0, 2, 4, 1, 3, 5]])


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
    got = apply(PIXELS, params_of(order=0, **{name: value}))[0]
    torch.testing.assert_close(got, function(FLOAT, value), atol=2e-3, rtol=0)


def test_every_image_is_jittered_in_its_own_order():
    strengths = dict(brightness=1.4, contrast=0.6, saturation=1.2, hue=0.1)
    functions = (tvf.adjust_brightness, tvf.adjust_contrast, tvf.adjust_saturation, tvf.adjust_hue)
    orders = [0, 5, 11, 17, 23]
    got = apply(PIXELS, params_of(), *[params_of(order=k, **strengths) for k in orders])
    torch.testing.assert_close(got[0], FLOAT)
    for image, k in zip(got[1:], orders, strict=True):
        expected = FLOAT
        for j in ORDERS[k].tolist():
            expected = functions[j](expected, list(strengths.values())[j])
        torch.testing.assert_close(image, expected, atol=3e-3, rtol=0)


def test_gray_images_keep_their_hue():
    gray = torch.full((3, 8, 8), 77, dtype=torch.uint8)
    torch.testing.assert_close(apply(gray, params_of(order=0, hue=0.2))[0], gray.float() / 255)


def test_gray_blur_and_solarize_equal_torchvisions():
    got = apply(
        PIXELS,
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
    assert apply(PIXELS[:, :3, :3], params_of(sigma=2.0)).isfinite().all()


def test_noise_has_its_strength_and_its_seed():
    a, b, again = apply(PIXELS, *(params_of(noise_seed=s) for s in (1, 2, 1)), noise_std=0.03)
    assert torch.equal(a, again) and not torch.equal(a, b)
    assert (a - FLOAT).std().item() == pytest.approx(0.03, rel=0.05)
    assert abs(torch.corrcoef(torch.stack([(a - FLOAT).flatten(), (b - FLOAT).flatten()]))[0, 1]) < 0.1


def test_an_image_does_not_depend_on_its_batch():
    params = drawn(build_views("dino", **SIZES)[1], 12)
    whole = color(torch.stack([PIXELS] * 12), params)
    for i in range(12):
        alone = color(PIXELS[None], {name: value[i : i + 1] for name, value in params.items()})
        torch.testing.assert_close(alone[0], whole[i], atol=1e-5, rtol=0)
