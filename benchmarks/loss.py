"""Loss and gradient for two views: time, and peak memory beyond the embeddings and the packed dictionary.

    python benchmarks/loss.py [--device cuda] [--n 64 512] [--embed_dim 384 2048] [--out_dim 4096 ...] [--json FILE]

Rows of the tables, every one in a process of its own, one after the other:

    plain         autograd through the (n, c) logits and a float dictionary that is unpacked once, beforehand
    compiled      torch.compile of the same
    stored, recomputed, triton     the forms of dictionary_attention.py (triton: on a GPU)
    hadamard      stored, with the Hadamard dictionary's fast transform
    products      the peer: torch's bare products h W^T and G W for each view, with the same float dictionary
    stacked       the same products for both views in one, code-major as in dictionaries.py: the fastest way found
    dino          lightly's DINO head (hidden 2048, bottleneck 256) and loss: two teacher and two student views, and the
                  gradient of the student's; what DINO pays for the same out_dim

Times are medians, in milliseconds; a first call of over 20 s is not repeated and counts itself. A cell that would not
fit into memory is left out with an estimate of what it needs.
"""

import argparse
import ctypes
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from cplearn.dictionary import DICTIONARIES
from cplearn.dictionary.streamed_loss import streamed_loss
from cplearn.dictionary.terms import LossSpec
from cplearn.host import git_commit
from cplearn.text import format_table
from cplearn_head import cplearn_loss

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


KINDS = ("plain", "compiled", "stored", "recomputed", "triton", "triton_bf16", "hadamard", "products", "stacked",
         "products_bf16", "dino")  # fmt: skip
GPU_ONLY = ("triton", "triton_bf16", "products_bf16")
SCALE, BETA = 0.9, 0.25


def build(kind: str, n: int, f: int, c: int, device: torch.device):
    """(step, what it starts from). The step is built later, so that its own memory is counted."""
    torch.manual_seed(0)
    h = [F.normalize(torch.randn(n, f, device=device)).requires_grad_() for _ in range(2)]
    dictionary = DICTIONARIES["hadamard" if kind == "hadamard" else "rademacher"](c, f).to(device)

    def prepare():
        if kind == "dino":
            return dino_step(h, f, c, device)
        if kind in ("stored", "recomputed", "triton", "triton_bf16", "hadamard"):
            form = "stored" if kind == "hadamard" else kind.split("_")[0]
            precision = "bf16" if kind.endswith("bf16") else "ieee"
            return lambda: streamed_loss(h, dictionary, SCALE, LossSpec(BETA), form=form, precision=precision)[
                0
            ].backward()
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


def dino_step(h, f, c, device):
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
    """Rough: the float dictionary (or DINO's last layers and their gradient), and copies of the logits."""
    copies = {"plain": 10, "compiled": 10, "stored": 3, "hadamard": 3, "recomputed": 0, "dino": 16}.get(kind, 2)
    width = {"dino": 4 * 256, "stored": f / 32, "hadamard": f / 32, "recomputed": f / 32}.get(kind, f)
    return (width + copies * n) * c * 4 / 2**30


def memory_in_process(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")


def measure(kind: str, n: int, f: int, c: int, device: torch.device, repeats: int) -> dict[str, float]:
    """Median milliseconds and peak extra MiB of one cell."""
    cuda = device.type == "cuda"
    prepare = build(kind, n, f, c, device)
    warm = torch.randn(4096, f, device=device)
    (warm @ torch.randn(f, 2 * n, device=device)).logsumexp(0)  # libraries' own memory
    warm.T @ torch.randn(4096, 2 * n, device=device)
    del warm
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed is not there to be used again unseen
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before = memory_in_process("VmRSS")
    step = prepare()

    def timed() -> float:
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    first = timed()
    if kind == "compiled":
        first = timed()  # the first call compiles
    times = [first] if first > 20 else [timed() for _ in range(repeats if first < 5 else 2)]
    peak = torch.cuda.max_memory_allocated() if cuda else memory_in_process("VmHWM")
    return {"ms": 1e3 * statistics.median(times), "mib": (peak - before) / 2**20, "repeats": len(times)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--n", type=int, nargs="+", default=[64])
    parser.add_argument("--embed_dim", type=int, nargs="+", default=[384, 2048])
    parser.add_argument("--out_dim", type=int, nargs="+", default=[4096, 16384, 131072, 1048576])
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--limit_gib", type=float, default=18.0, help="Leave out what would need more memory")
    parser.add_argument("--json", default=None, help="Also write the cells to this file")
    parser.add_argument("--cell", nargs=4, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        kind, n, f, c = args.cell[0], *map(int, args.cell[1:])
        print(json.dumps(measure(kind, n, f, c, torch.device(args.device), args.repeats)))
        return

    kinds = [k for k in args.kinds if k not in GPU_ONLY or args.device != "cpu"]
    name = torch.cuda.get_device_name() if args.device != "cpu" else f"cpu, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {name}, float32, up to {args.repeats} repeats, commit {git_commit()}\n")
    cells = []
    for f in args.embed_dim:
        for n in args.n:
            for c in args.out_dim:
                found = {kind: run_cell(args, kind, n, f, c) for kind in kinds}
                plain, bare = (found.get(k, {}).get("ms", math.nan) for k in ("plain", "products"))
                rows = []
                for kind, cell in found.items():
                    cells.append({"kind": kind, "n": n, "embed_dim": f, "out_dim": c, **cell})
                    if "ms" in cell:
                        ratios = [f"{cell['ms'] / x:.2f}" if x == x else "" for x in (plain, bare)]
                        rows.append((kind, f"{cell['ms']:.1f}", *ratios, f"{cell['mib']:.0f}"))
                    else:
                        rows.append((kind, cell["left_out"], "", "", ""))
                header = (f"n = {n}, f_h = {f}, c = {c}", "ms", "/ plain", "/ products", "extra MiB")
                print(format_table(rows, header) + "\n", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(cells, indent=1) + "\n")


def run_cell(args, kind: str, n: int, f: int, c: int) -> dict:
    needed = gigabytes_needed(kind, n, f, c)
    if needed > args.limit_gib:
        return {"left_out": f"needs {needed:.0f} GiB"}
    command = [sys.executable, __file__, "--device", args.device, "--repeats", str(args.repeats), "--cell", kind]
    done = subprocess.run([*command, str(n), str(f), str(c)], capture_output=True, text=True)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        return {"left_out": f"failed ({(done.stderr.strip().splitlines() or ['no message'])[-1][:60]})"}
    return json.loads(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    main()
