"""One training step of every method beside CPLearn's: time and peak memory.

    python benchmarks/methods.py cost --arch vit_small --out_dim 128 16384

Forward, backward and optimizer on random images, each cell in a process of its own, one after the other;
medians, and the highest resident (on a GPU: allocated) memory beyond that before the method was built. Columns are
ratios to CPLearn's cell of the same run.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import main_cplearn
from cplearn.host import git_commit
from cplearn.methods import METHODS, build_method
from cplearn.text import format_table
from cplearn.training.optimizer import build_optimizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "benchmarks"))

import torch  # noqa: E402
from loss import memory_in_process  # noqa: E402


def one_cell(args, method: str, out_dim: int) -> dict[str, float]:
    """In this process. Milliseconds per step, and MiB."""
    device = torch.device(args.device)
    size = [] if method != "gedi_gen" else ["--sgld_buffer", "1000"]
    flags = main_cplearn.parse_args(
        ["--method", method, "--arch", args.arch, "--out_dim", str(out_dim), "--image_size", str(args.image_size),
         *size, "--batch_size_per_gpu", str(args.n), "--device", args.device]
    )  # fmt: skip
    torch.manual_seed(0)
    images = [torch.randn(args.n, 3, args.image_size, args.image_size, device=device) for _ in range(args.views)]
    before = memory_now(device)
    model = build_method(flags).to(device)
    model.begin()
    optimizer = build_optimizer(model, flags, device)
    skipped = torch.tensor(False, device=device)
    times = []
    for i in range(args.repeats + 1):
        start = time.perf_counter()
        model.before_step(10_000 + i, 100, 1000)
        loss, _, *_ = model(images)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        model.after_backward()
        optimizer.step()
        model.after_step(None, skipped)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    backbone = sum(p.numel() for p in model.backbone.parameters())
    return {
        "ms": statistics.median(times[1:]),
        "mib": peak_memory(device) - before,
        "head": (parameters - backbone) / 1e6,
    }


def memory_now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    return memory_in_process("VmRSS") / 2**20


def peak_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return memory_in_process("VmHWM") / 2**20


def cost(args) -> None:
    rows = []
    for c in args.out_dim:
        reference = None
        for method in args.methods:
            command = [sys.executable, __file__, "cell", "--methods", method, "--out_dim", str(c), "--arch", args.arch,
                       "--n", str(args.n), "--views", str(args.views), "--image_size", str(args.image_size),
                       "--device", args.device, "--repeats", str(args.repeats)]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                rows.append(
                    (c, method, None, None, None, None, None, (done.stderr.strip().splitlines() or ["killed"])[-1])
                )
                continue
            x = json.loads(done.stdout.splitlines()[-1])
            reference = reference or x  # cplearn comes first
            rows.append((c, method, f"{x['head']:.2f}", round(x["ms"]), f"{x['ms'] / reference['ms']:.2f}",
                         round(x["mib"]), f"{x['mib'] / reference['mib']:.2f}", ""))  # fmt: skip
            print(".", end="", file=sys.stderr, flush=True)
    header = ("out_dim", "method", "head, M weights", "ms a step", "time / CPLearn", "peak MiB", "memory / CPLearn", "")
    print(f"\n{args.arch}, {args.views} views of {args.n} images, {args.image_size} pixels, {args.device}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}, commit {git_commit()}\n")  # fmt: skip
    print(format_table(rows, header))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("cost", "cell"))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--out_dim", type=int, nargs="+", default=[128, 16384])
    parser.add_argument("--arch", default="vit_small")
    parser.add_argument("--n", type=int, default=64, help="Images")
    parser.add_argument("--views", type=int, default=2)
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.what == "cell":
        print(json.dumps(one_cell(args, args.methods[0], args.out_dim[0])))
    else:
        cost(args)


if __name__ == "__main__":
    main()
