"""The Triton kernels: in Triton's interpreter against the plain form, compiled for GPUs, and on one if there is one."""

import os
import subprocess
import sys

import pytest
import torch
from helpers import ROOT

from cplearn.errors import UserError
from cplearn.loss import DICTIONARIES, triton_kernels
from cplearn.loss.codes import Dictionary
from cplearn.loss.prior_buffer import PriorBuffer
from cplearn.loss.spec import LossSpec
from cplearn.loss.streamed import streamed_loss
from cplearn_head import CPLearnHead, cplearn_loss

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # of masked lanes, in NumPy


def both_forms(views, n, width, c, scale, prior="reverse", kind="rademacher", precision="ieee", buffer=None, h=None):
    """(loss, terms, usage, gradients) by the kernels and, in float64, by definition."""
    dictionary = DICTIONARIES[kind](c, width, seed=1).to(DEVICE)
    generator = torch.Generator().manual_seed(0)
    if h is None:
        h = [torch.randn(n, width, generator=generator) / width**0.5 for _ in range(views)]
    results = []
    for exact in (False, True):
        x = [(v.double() if exact else v).to(DEVICE).requires_grad_() for v in h]
        options = {"prior": prior, "buffer": buffer}
        if exact:
            w = dictionary.codes(dtype=torch.float64)
            loss, terms, usage = cplearn_loss([scale * v @ w.T for v in x], LossSpec(0.4, **options))
        else:
            loss, terms, usage = streamed_loss(
                x, dictionary, scale, LossSpec(0.4, **options), form="triton", precision=precision
            )
        results.append((loss.detach(), terms, usage, torch.autograd.grad(loss, x)))
    return results


def assert_equal(ours, exact, tolerance=1e-5):
    largest = max(g.abs().max().item() for g in exact[3])
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=tolerance, atol=0)
    for name in exact[1]:
        torch.testing.assert_close(ours[1][name].double(), exact[1][name], rtol=10 * tolerance, atol=10 * tolerance)
    torch.testing.assert_close(ours[2].double(), exact[2], rtol=100 * tolerance, atol=tolerance)
    for got, want in zip(ours[3], exact[3], strict=True):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=10 * tolerance * largest)


@pytest.mark.parametrize("prior", ["reverse", "forward"])
@pytest.mark.parametrize(
    ("views", "n", "width", "c"),
    [
        (2, 6, 32, 300),  # c is not a multiple of the tile
        (5, 6, 32, 64),  # local crops
        (2, 1, 384, 100),  # one image
        (3, 20, 384, 130),
        (2, 16, 2048, 70),
        (2, 70, 20, 200),  # more than one tile of images, a width that fills no byte
    ],
)
def test_kernels_equal_the_plain_form(views, n, width, c, prior):
    assert_equal(*both_forms(views, n, width, c, 8.0, prior))


@pytest.mark.parametrize("prior", ["reverse", "forward"])
def test_saturated_logits(prior):
    """+-150: p and p-bar underflow in float32."""
    codes = Dictionary(200, 32, seed=1).codes()[:7]
    ours, exact = both_forms(2, 7, 32, 200, 150 / 32, prior, h=[codes, -codes])
    assert all(g.isfinite().all() for g in ours[3])
    assert_equal(ours, exact)


def test_many_chunks_and_the_other_dictionary(monkeypatch):
    monkeypatch.setattr(triton_kernels, "CHUNK_NUMBERS", 4096)
    assert_equal(*both_forms(4, 16, 24, 500, 8.0, kind="hadamard"))


def test_prior_buffer():
    buffer = PriorBuffer(2, 150).to(DEVICE)
    buffer.push(torch.rand(150, device=DEVICE) / 75)
    assert_equal(*both_forms(2, 5, 32, 150, 8.0, buffer=buffer), tolerance=3e-5)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="no GPU, and the interpreter has no bf16 products")
def test_bf16_inputs_keep_three_digits():
    """The codes are exact in bf16 and the embeddings lose bits: an error of the size of bf16's, 2^-9."""
    ours, exact = both_forms(2, 16, 64, 200, 8.0, precision="bf16")
    assert_equal(ours, exact, tolerance=2e-3)
    assert (ours[0] - exact[0]).abs() > 1e-5 * exact[0]


def test_what_the_kernels_cannot_do_is_refused(monkeypatch):
    h = [torch.randn(3, 32, device=DEVICE) for _ in range(2)]
    dictionary = Dictionary(50, 32).to(DEVICE)
    with pytest.raises(UserError, match="not 1 in torch.float32"):
        streamed_loss(h, dictionary, 1.0, LossSpec(0.3, n_global=1), form="triton")
    with pytest.raises(UserError, match="not 2 in torch.float64"):
        streamed_loss([x.double() for x in h], dictionary, 1.0, LossSpec(0.3), form="triton")
    if DEVICE == "cpu":
        with pytest.raises(UserError, match="bf16"):
            streamed_loss(h, dictionary, 1.0, LossSpec(0.3), form="triton", precision="bf16")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(UserError, match="--loss_form auto"):
        streamed_loss([x.cpu() for x in h], dictionary.cpu(), 1.0, LossSpec(0.3), form="triton")


COMPILE = """
import re, subprocess, sys, tempfile
import triton
from triton.compiler import ASTSource, compile
from triton.backends.compiler import GPUTarget
from cplearn.loss import triton_kernels as kernels

tiles = {"BI": 64, "BJ": 64}
numbers = ("n", "f", "c", "n_bytes", "per_split", "views", "first", "chunk", "rows")
target, precision = int(sys.argv[1]), sys.argv[2]
for name in ("row_norms", "column_means", "row_sums", "coefficients", "gradient"):
    kernel = getattr(kernels, name)
    kinds = {a: "i32" for a in numbers} | {"bits": "*u8", "alpha": "fp32", "weight": "fp32"}
    kinds |= {a: "constexpr" for a in (*tiles, "BK", "PRECISION", "LOCAL", "FORWARD")}
    signature = {a: kinds.get(a, "*fp32") for a in kernel.arg_names}
    values = tiles | {"BK": kernels.DEPTH[precision], "PRECISION": precision, "LOCAL": True, "FORWARD": False}
    known = {(i,): values[a] for i, a in enumerate(kernel.arg_names) if a in values}
    # As at launch: pointers and these sizes are multiples of 16.
    whole = {(i,): [["tt.divisibility", 16]] for i, a in enumerate(kernel.arg_names)
             if signature[a].startswith("*") or a in numbers and a != "views"}
    built = compile(ASTSource(kernel, signature, known, whole), target=GPUTarget("cuda", target, 32),
                    options={"num_warps": kernels.WARPS})
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(built.asm["ptx"])
        file.flush()
        ptxas, arch = f"{triton.__path__[0]}/backends/nvidia/bin/ptxas", f"sm_{target}" + "a" * (target == 90)
        command = [ptxas, "-v", f"--gpu-name={arch}", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = [int(x) for x in re.findall("([0-9]+) bytes (?:stack frame|spill)", said)]
    print(name, sum(spilled), built.metadata.shared, re.search("Used ([0-9]+) registers", said)[1])
"""


@pytest.mark.slow
@pytest.mark.parametrize("target", ["80", "90"])
@pytest.mark.parametrize("precision", ["ieee", "tf32", "bf16"])
def test_kernels_compile_for_gpus_that_are_not_here(tmp_path, target, precision):
    """For A100 (sm_80) and H100 (sm_90): nothing spills, and shared memory is enough. Compiled is not run."""
    pytest.importorskip("triton.backends.nvidia")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILE, target, precision]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    kernels = [line.split() for line in done.stdout.splitlines()]
    assert len(kernels) == 5 and all(int(spilled) == 0 for _, spilled, _, _ in kernels), done.stdout
    assert all(int(shared) <= 160 * 1024 for _, _, shared, _ in kernels), done.stdout


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="no GPU")
@pytest.mark.parametrize("precision", ["ieee", "tf32", "bf16"])
def test_on_a_gpu_at_full_size(precision):
    """64 images, 131072 codes of 2048 entries, beside the stored form on the same GPU."""
    head = CPLearnHead(8, 131072, 2048).cuda()
    h = [torch.nn.functional.normalize(torch.randn(64, 2048, device="cuda")).requires_grad_() for _ in range(2)]
    results = []
    for form in ("triton", "stored"):
        loss, _, _ = streamed_loss(
            h, head.dictionary, head.scale * head.kappa, LossSpec(0.25), form=form, precision=precision
        )
        results.append((loss.detach(), torch.autograd.grad(loss, h)))
    tolerance = {"ieee": 1e-4, "tf32": 5e-3, "bf16": 3e-2}[precision]
    torch.testing.assert_close(results[0][0], results[1][0], rtol=tolerance, atol=0)
    for got, want in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=tolerance * want.abs().max().item())
