"""Loss and gradient for two views: time, and peak memory beyond the embeddings and the packed dictionary.

    python benchmarks/loss.py [--device cuda] [--n 64 512] [--embed_dim 384 2048] [--out_dim 4096 ...] [--json FILE]

Rows of the tables, each in a process of its own, one after the other:

    plain         autograd through the (n, c) logits and a float dictionary that is unpacked once, beforehand
    compiled      torch.compile of the same
    stored, recomputed, triton     the forms of cplearn/loss/streamed.py (triton: on a GPU), products in
                  float32, or on a GPU with inputs in tf32 or bf16 where the name says so
    hadamard      stored, with the Hadamard dictionary's fast transform
    products      the peer: torch's bare products h W^T and G W for each view, with the same float dictionary
    stacked       the same products for both views in one, code-major as in cplearn/loss: the fastest way found
    dino          lightly's DINO head (hidden 2048, bottleneck 256) and loss: two teacher and two student views, and the
                  gradient of the student's; what DINO pays for the same out_dim

Times are medians, in milliseconds; a first call of over 20 s is not repeated and counts itself. A cell that would not
fit into memory is left out with an estimate of what it needs.
"""

import argparse
import itertools
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from measure import machine, peak_memory, run_cell, seconds, start_memory

from cplearn import errors
from cplearn.files import check_output_dir, write_text
from cplearn.flags import ArgumentParser, nonnegative, positive
from cplearn.loss import DICTIONARIES
from cplearn.loss.spec import LossSpec
from cplearn.loss.streamed import streamed_loss
from cplearn.text import format_table
from cplearn_head import cplearn_loss

FORMS = ("stored", "stored_tf32", "recomputed", "recomputed_tf32", "triton", "triton_tf32", "triton_bf16", "hadamard")
KINDS = ("plain", "compiled", *FORMS, "products", "stacked", "products_bf16", "dino")
GPU_ONLY = tuple(kind for kind in KINDS if kind.startswith("triton") or kind.endswith(("tf32", "bf16")))
SCALE, BETA = 0.9, 0.25


def build(kind: str, n: int, f: int, c: int, device: torch.device) -> Callable[[], Callable[[], object]]:
    """Make embeddings and dictionary; return what prepares the step, called later so that its own memory counts."""
    torch.manual_seed(0)
    h = [F.normalize(torch.randn(n, f, device=device)).requires_grad_() for _ in range(2)]
    dictionary = DICTIONARIES["hadamard" if kind == "hadamard" else "rademacher"](c, f).to(device)

    def prepare():
        if kind == "dino":
            return dino_step(h, f, c, device)
        if kind in FORMS:
            form, _, precision = ("stored" if kind == "hadamard" else kind).partition("_")
            options = {"form": form, "precision": precision or "ieee"}
            return lambda: streamed_loss(h, dictionary, SCALE, LossSpec(BETA), **options)[0].backward()
        w = dictionary.codes()
        if kind.startswith("products"):
            dtype = torch.bfloat16 if kind.endswith("bf16") else torch.float32
            x, g, v = h[0].detach().to(dtype), torch.randn(n, c, device=device, dtype=dtype), w.to(dtype)

            def products():
                for _ in h:
                    x @ v.T
                    g @ v

            return products
        if kind == "stacked":
            x, g = torch.cat(h).detach().T.contiguous(), torch.randn(c, 2 * n, device=device)
            return lambda: (w @ x, w.T @ g)

        def loss(*x):
            return cplearn_loss([SCALE * v @ w.T for v in x], LossSpec(BETA))[0]

        if kind == "compiled":
            loss = torch.compile(loss, dynamic=False)
        return lambda: loss(*h).backward()

    return prepare


def dino_step(h: list[Tensor], f: int, c: int, device: torch.device) -> Callable[[], None]:
    """Return a step of lightly's DINO head and loss."""
    from lightly.loss import DINOLoss
    from lightly.models.modules import DINOProjectionHead

    student, teacher = (DINOProjectionHead(f, 2048, 256, c).to(device) for _ in range(2))
    criterion = DINOLoss(output_dim=c).to(device)

    def step():
        with torch.no_grad():
            targets = [teacher(x) for x in h]
        criterion(targets, [student(x) for x in h], epoch=5).backward()
        student.zero_grad()

    return step


def gigabytes_needed(kind: str, n: int, f: int, c: int) -> float:
    """Estimate roughly: the float dictionary (or DINO's last layers and their gradient), and copies of the logits."""
    copies = {"plain": 10, "compiled": 10, "stored": 3, "hadamard": 3, "recomputed": 0, "triton": 0, "dino": 16}
    width = 4 * 256 if kind == "dino" else f / 32 if kind in FORMS else f
    copies = copies.get(kind.partition("_")[0], 2)
    return (width + copies * n) * c * 4 / 2**30


def measure(kind: str, n: int, f: int, c: int, device: torch.device, repeats: int) -> dict[str, float]:
    """Return median milliseconds and peak extra MiB of one cell."""
    prepare = build(kind, n, f, c, device)
    warm = torch.randn(4096, f, device=device)
    (warm @ torch.randn(f, 2 * n, device=device)).logsumexp(0)  # libraries' own memory
    warm.T @ torch.randn(4096, 2 * n, device=device)
    del warm
    before = start_memory(device)
    step = prepare()
    first = seconds(step, device)
    if kind == "compiled":
        first = seconds(step, device)  # the first call compiles
    times = [first] if first > 20 else [seconds(step, device) for _ in range(repeats if first < 5 else 2)]
    extra = peak_memory(device) - before
    return {"ms": 1e3 * statistics.median(times), "mib": extra / 2**20, "repeats": len(times)}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every cell and print one table per size."""
    parser = ArgumentParser(prog="benchmarks/loss.py", description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--n", type=positive(int), nargs="+", default=[64], help="Images")
    parser.add_argument("--embed_dim", type=positive(int), nargs="+", default=[384, 2048])
    parser.add_argument("--out_dim", type=positive(int), nargs="+", default=[4096, 16384, 131072, 1048576])
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--repeats", type=positive(int), default=7)
    parser.add_argument("--limit_gib", type=nonnegative(float), default=18.0, help="Leave out what needs more memory")
    parser.add_argument("--json", default=None, help="Also write the cells to this file")
    parser.add_argument("--cell", nargs=4, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.cell:
        kind, n, f, c = args.cell[0], *map(int, args.cell[1:])
        print(json.dumps(measure(kind, n, f, c, torch.device(args.device), args.repeats)))
        return
    print(f"{machine(torch.device(args.device))}, float32, up to {args.repeats} repeats\n")
    if args.json:
        check_output_dir(str(Path(args.json).parent), "--json: the folder")
    cells = []
    for f, n, c in itertools.product(args.embed_dim, args.n, args.out_dim):
        cells += print_table(args, n, f, c)
    if args.json:
        write_text(Path(args.json), json.dumps(cells, indent=1) + "\n")


def print_table(args: argparse.Namespace, n: int, f: int, c: int) -> list[dict]:
    """Measure all kinds at one size, print their table, and return the cells."""
    kinds = [kind for kind in args.kinds if kind not in GPU_ONLY or args.device != "cpu"]
    cells = {kind: measure_apart(args, kind, n, f, c) for kind in kinds}
    peers = [cells.get(kind, {}).get("ms", math.nan) for kind in ("plain", "products")]
    rows = []
    for kind, cell in cells.items():
        if "ms" in cell:
            ratios = ["" if math.isnan(x) else f"{cell['ms'] / x:.2f}" for x in peers]
            rows.append((kind, f"{cell['ms']:.1f}", *ratios, f"{cell['mib']:.0f}"))
        else:
            rows.append((kind, cell["left_out"], "", "", ""))
    header = (f"n = {n}, f_h = {f}, c = {c}", "ms", "/ plain", "/ products", "extra MiB")
    print(format_table(rows, header) + "\n", flush=True)
    return [{"kind": kind, "n": n, "embed_dim": f, "out_dim": c, **cell} for kind, cell in cells.items()]


def measure_apart(args: argparse.Namespace, kind: str, n: int, f: int, c: int) -> dict[str, float | str]:
    """Run `measure` in a process of its own; return its result, or why the cell is left out."""
    needed = gigabytes_needed(kind, n, f, c)
    if needed > args.limit_gib:
        return {"left_out": f"needs {needed:.0f} GiB"}
    flags = ("--device", args.device, "--repeats", args.repeats)
    cell, error = run_cell(__file__, *flags, "--cell", kind, n, f, c)
    return cell or {"left_out": f"failed ({error[:60]})"}


if __name__ == "__main__":
    errors.run_script(main)
