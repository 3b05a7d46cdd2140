"""The color half in Triton's kernels, in its interpreter, against the plain form."""

import contextlib
import os
import subprocess
import sys

import pytest
import torch
from data.plain_color import plain_color
from data.test_color import SIZES, drawn, params_of, smooth_image
from helpers import ROOT

from cplearn.data import color as color_module
from cplearn.data.augmentations import build_views
from cplearn.data.color import ORDERS

pytest.importorskip("triton")
from cplearn.data import color_kernels  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
pytestmark = pytest.mark.skipif(not CUDA and os.environ.get("TRITON_INTERPRET") != "1", reason="no GPU")


def by_kernels(pixels, params, noise_std=0.0, sigma_max=2.0, views=1):
    orders = ORDERS[params["order"].long().clamp(min=0)]
    target = torch.arange(len(pixels)).view(views, -1).T.flatten()
    of_pixels = color_module._normalization(DEVICE)
    x = color_kernels.color(pixels.to(DEVICE), params, orders, target, noise_std, sigma_max, *of_pixels)
    return x.cpu()


@pytest.mark.parametrize(
    ("recipe", "index", "block"),
    [("dino", 0, 1024), ("dino", 1, 256), ("cifar", 0, 1024), ("cifar_strong", 1, 1024), ("digits", 0, 1024)],
)
def test_kernels_equal_the_plain_form(monkeypatch, recipe, index, block):
    monkeypatch.setattr(color_kernels, "BLOCK", block)
    view = build_views(recipe, **SIZES)[index]
    noise = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels = torch.stack([smooth_image(32, i) for i in range(8)] + [noise] * 8)
    pixels[5], pixels[6], pixels[7] = 0, 128, 255  # no chroma; the edge of solarization
    params = drawn(view, 16)
    got = by_kernels(pixels, params, view.noise_std, view.blur_sigma[1])
    torch.testing.assert_close(got, plain_color(pixels, params, view), atol=2e-5, rtol=0)


def test_no_square_and_the_order_of_views():
    """Of two views of six images, in turn; a blur that reaches over the shorter side."""
    view = build_views("dino", **SIZES)[0]
    pixels = torch.stack([smooth_image(32, i)[:, :5, :23] for i in range(12)])
    params = {name: value.clone() for name, value in drawn(view, 12).items()}
    params["sigma"][:] = torch.linspace(0.1, 2.0, 12, dtype=torch.float64)
    expected = color_module.color(pixels, params, 0.0, 2.0, views=2)
    torch.testing.assert_close(by_kernels(pixels, params, views=2), expected, atol=2e-5, rtol=0)


def test_one_image_and_nothing_to_do():
    pixels = smooth_image(32, 0)[None]
    params = {name: torch.tensor([value], dtype=torch.float64) for name, value in params_of().items()}
    torch.testing.assert_close(by_kernels(pixels, params), color_module.color(pixels, params), atol=1e-6, rtol=0)


COMPILE = """
import re, subprocess, sys, tempfile
import triton
from triton.compiler import ASTSource, compile
from triton.backends.compiler import GPUTarget
from cplearn.data import color_kernels as kernels

target = int(sys.argv[1])
for name in ("gray_sums", "jitter", "blur", "finish"):
    kernel = getattr(kernels, name)
    kinds = {a: "i32" for a in ("size", "height", "width", "reach", "stride")} | {"BLOCK": "constexpr"}
    signature = {a: kinds.get(a, "*fp32") for a in kernel.arg_names}
    if name in ("gray_sums", "jitter"):
        signature["pixels"] = "*u8"
    known = {(kernel.arg_names.index("BLOCK"),): kernels.BLOCK}
    built = compile(ASTSource(kernel, signature, known), target=GPUTarget("cuda", target, 32))
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(built.asm["ptx"])
        file.flush()
        ptxas, arch = f"{triton.__path__[0]}/backends/nvidia/bin/ptxas", f"sm_{target}" + "a" * (target == 90)
        command = [ptxas, "-v", f"--gpu-name={arch}", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    print(name, sum(int(x) for x in re.findall("([0-9]+) bytes (?:stack frame|spill)", said)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("target", ["80", "90"])
def test_kernels_compile_for_gpus_that_are_not_here(tmp_path, target):
    """For A100 (sm_80) and H100 (sm_90), and nothing spills. Compiled is not run."""
    pytest.importorskip("triton.backends.nvidia")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILE, target]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["gray_sums", "0", "jitter", "0", "blur", "0", "finish", "0"], done.stdout


def test_where_triton_does_not_work_colors_take_the_plain_path(monkeypatch, capsys):
    """Without a C compiler, say: one line, and the same views."""
    color_module._kernels.cache_clear()
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    color_kernels.try_out(DEVICE)
    monkeypatch.setattr(color_kernels, "color", lambda *args: 1 / 0)
    assert color_module._kernels(DEVICE) is None and "ZeroDivisionError" in capsys.readouterr().out
    color_module._kernels.cache_clear()
