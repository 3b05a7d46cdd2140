"""One training step of every method beside CPLearn's: time and peak memory.

    python benchmarks/methods.py cost --arch vit_small --out_dim 128 16384

Forward, backward and optimizer on random images, each cell in a process of its own, one after the other;
medians, and the highest resident (on a GPU: allocated) memory beyond that before the method was built. Columns are
ratios to CPLearn's cell of the same run.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from measure import peak_memory, run_cell, seconds, start_memory
from steps import TrainingStep

from cplearn import errors
from cplearn.flags import ArgumentParser, positive
from cplearn.host import git_commit
from cplearn.methods import METHODS
from cplearn.text import format_table


def measure(args: argparse.Namespace, method: str, out_dim: int) -> dict[str, float]:
    """Train some steps in this process; return milliseconds per step, MiB, and millions of weights in the head."""
    device = torch.device(args.device)
    flags = ["--method", method, "--arch", args.arch, "--out_dim", str(out_dim), "--image_size", str(args.image_size),
             *["--sgld_buffer", "1000"] * (method == "gedi_gen"), "--batch_size_per_gpu", str(args.n),
             "--local_crops_number", str(args.views - 2)]  # fmt: skip
    images = [torch.randn(args.n, 3, args.image_size, args.image_size, device=device) for _ in range(args.views)]
    before = start_memory(device)
    step = TrainingStep(flags, device, images)
    times = [1e3 * seconds(step, device) for _ in range(args.repeats + 1)]
    model = step.method
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    backbone = sum(p.numel() for p in model.backbone.parameters())
    return {
        "ms": statistics.median(times[1:]),  # after a warm-up
        "mib": (peak_memory(device) - before) / 2**20,
        "head": (parameters - backbone) / 1e6,
    }


def cost(args: argparse.Namespace) -> None:
    """Measure every method at every --out_dim and print the table."""
    rows = []
    flags = ("--arch", args.arch, "--n", args.n, "--views", args.views, "--image_size", args.image_size,
             "--device", args.device, "--repeats", args.repeats)  # fmt: skip
    for c in args.out_dim:
        reference = None
        for method in args.methods:
            x, error = run_cell(__file__, "cell", "--methods", method, "--out_dim", c, *flags)
            if not x:
                rows.append((c, method, None, None, None, None, None, error))
                continue
            reference = reference or x  # cplearn comes first
            rows.append((c, method, f"{x['head']:.2f}", round(x["ms"]), f"{x['ms'] / reference['ms']:.2f}",
                         round(x["mib"]), f"{x['mib'] / reference['mib']:.2f}", ""))  # fmt: skip
            print(".", end="", file=sys.stderr, flush=True)
    header = ("out_dim", "method", "head, M weights", "ms per step", "time / CPLearn", "peak MiB", "memory / CPLearn",
              "")  # fmt: skip
    print(f"\n{args.arch}, {args.views} views of {args.n} images, {args.image_size} pixels, {args.device}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}, commit {git_commit()}\n")  # fmt: skip
    print(format_table(rows, header))


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table, or measure one cell of it for the process that prints."""
    parser = ArgumentParser(prog="benchmarks/methods.py", description=__doc__)
    parser.add_argument("what", choices=("cost", "cell"))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--out_dim", type=positive(int), nargs="+", default=[128, 16384])
    parser.add_argument("--arch", default="vit_small")
    parser.add_argument("--n", type=positive(int), default=64, help="Images")
    parser.add_argument("--views", type=positive(int), default=2)
    parser.add_argument("--image_size", type=positive(int), default=32)
    parser.add_argument("--repeats", type=positive(int), default=5)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    if args.what == "cell":
        print(json.dumps(measure(args, args.methods[0], args.out_dim[0])))
    else:
        cost(args)


if __name__ == "__main__":
    errors.run_script(main)
