"""One training step of every method beside CPLearn's: time and peak memory, and the comparison on real images.

    python benchmarks/methods.py cost --arch vit_small --out_dim 128 16384
    python benchmarks/methods.py compare --data_path ~/cifar10k --out_dim 128 16384 --seeds 0 1

`cost`: forward, backward and optimiser on random images, each cell in a process of its own, one after the other;
medians, and the highest resident (on a GPU: allocated) memory beyond that before the method was built. Columns are
ratios to CPLearn's cell of the same run.

`compare`: the same data, views, backbone, optimiser, budget and seeds for all; the methods' own flags are their
defaults, or those in FLAGS below. Every run is left in --output_dir and taken from there the next time.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "benchmarks"))

import torch  # noqa: E402
from loss import memory_in_process  # noqa: E402

import main_cplearn  # noqa: E402
import models  # noqa: E402
from utils import format_table, git_commit  # noqa: E402

# Of the comparison, by method; beta follows the paper's Table 7 in direction, as in RESULTS.md's CPLearn runs.
FLAGS = {
    "cplearn": lambda c: ["--beta", "0.5" if c <= 128 else "0.25"],
    "gedi": lambda c: ["--beta", "0.15" if c <= 128 else "0.1"],  # below 1 / log c, or it falls to one code
    "gedi_gen": lambda c: ["--beta", "0.15" if c <= 128 else "0.1"],
    "dino": lambda c: ["--momentum_teacher", "0.99"],  # 12 epochs are too few for 0.996
    "swav": lambda c: ["--epoch_queue_starts", "3", "--queue_length", "960"],  # 15 batches
}


# --- cost ---------------------------------------------------------------------------------------------------


def one_cell(args, method: str, out_dim: int) -> dict[str, float]:
    """In this process. Milliseconds a step, and MiB."""
    device = torch.device(args.device)
    size = [] if method != "gedi_gen" else ["--sgld_buffer", "1000"]
    flags = main_cplearn.parse_args(
        ["--method", method, "--arch", args.arch, "--out_dim", str(out_dim), "--image_size", str(args.image_size),
         *size, "--batch_size_per_gpu", str(args.n), "--device", args.device]
    )  # fmt: skip
    torch.manual_seed(0)
    images = [torch.randn(args.n, 3, args.image_size, args.image_size, device=device) for _ in range(args.views)]
    before = memory_now(device)
    model = models.build_method(flags).to(device)
    model.begin()
    optimizer = main_cplearn.build_optimizer(model, flags, device)
    skipped = torch.tensor(False, device=device)
    times = []
    for i in range(args.repeats + 1):
        start = time.perf_counter()
        model.before_step(10_000 + i, 100, 1000)
        loss, _ = model(images)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        model.after_backward()
        optimizer.step()
        model.after_step(skipped)
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


# --- comparison -------------------------------------------------------------------------------------------------


def compare(args) -> None:
    fixed = "--image_size 32 --augmentation cifar_strong --batch_size_per_gpu 64 --warmup_epochs 1 --optimizer adam"
    fixed += " --min_lr 1e-5 --weight_decay 0 --weight_decay_end 0 --saveckp_freq 0 --num_workers 0"
    budget = [*fixed.split(), "--data_path", args.data_path, "--arch", args.arch, "--epochs", str(args.epochs)]
    budget += ["--lr", args.lr]
    table = {}
    for seed in args.seeds:
        for c in args.out_dim:
            for method in args.methods:
                out = Path(args.output_dir, f"{method}_c{c}_lr{args.lr}_s{seed}")
                own = FLAGS.get(method, lambda c: [])(c)
                command = [
                    "main_cplearn.py",
                    *budget,
                    "--method",
                    method,
                    "--out_dim",
                    str(c),
                    "--seed",
                    str(seed),
                    *own,
                ]
                if not run(out, "train", [*command, "--output_dir", str(out)]):
                    continue
                for name, more in (("trained", []), ("random init", ["--random_init"])):
                    results = evaluate(out, name, more)
                    table.setdefault((c, method, name), []).append(results)
    names = ("20-NN", "linear", "codes NMI", "shuffled", "codes AMI", "codes used", "k-means AMI")
    rows = []
    for (c, method, name), found in table.items():
        cells = []
        for column in names:
            values = [x[column] for x in found if column in x]
            middle = statistics.mean(values) if values else 0.0
            spread = max((abs(v - middle) for v in values), default=0.0)
            digits = 0 if column == "codes used" else 3
            cells.append(f"{middle:,.{digits}f} ± {spread:,.{digits}f}" if values else "")
        rows.append((c, method, name, len(found), *cells))
    print(format_table(rows, ("c", "method", "", "n", *names)))


def run(out: Path, name: str, command: list[str]) -> str:
    """Output of a script, or of its earlier run with the same command. Empty if it failed."""
    out.mkdir(parents=True, exist_ok=True)
    kept = out / f"{name}.json"
    if kept.exists() and (before := json.loads(kept.read_text()))["command"] == command:
        return before["stdout"]
    print(f"{out.name}: {name} ...", file=sys.stderr, flush=True)
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        print(f"{out.name}: {name} failed: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return ""
    kept.write_text(json.dumps({"command": command, "stdout": done.stdout, "commit": git_commit()}))
    return done.stdout or " "


def evaluate(out: Path, name: str, more: list[str]) -> dict[str, float]:
    results_of = out / name.replace(" ", "_")
    common = ["--pretrained_weights", str(out / "checkpoint.pth"), "--output_dir", str(results_of), *more]
    run(out, f"{name} knn", ["eval_knn.py", *common, "--nb_knn", "20"])
    run(
        out,
        f"{name} linear",
        ["eval_linear.py", *common, "--augment", "false", "--optimizer", "adam", "--epochs", "30"],
    )
    run(out, f"{name} cluster", ["eval_cluster.py", *common])
    lines = [json.loads(line) for line in (results_of / "results.jsonl").read_text().splitlines()]
    found = {line["script"]: line["metrics"] for line in lines}
    clusters = found["eval_cluster"]
    return {
        "20-NN": found["eval_knn"]["knn20_top1"],
        "linear": found["eval_linear"]["linear_last_top1"],
        "codes NMI": clusters["codes"]["nmi"],
        "shuffled": clusters["codes_shuffled"]["nmi"],
        "codes AMI": clusters["codes"]["ami"],
        "codes used": clusters["codes"]["used_codes"],
        "k-means AMI": clusters["kmeans"]["ami"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("cost", "compare", "cell"))
    parser.add_argument("--methods", nargs="+", default=list(models.METHODS), choices=models.METHODS)
    parser.add_argument("--out_dim", type=int, nargs="+", default=[128, 16384])
    parser.add_argument("--arch", default=None, help="Default: vit_small for cost, timm:resnet10t for compare")
    parser.add_argument("--n", type=int, default=64, help="Images of cost")
    parser.add_argument("--views", type=int, default=2)
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--data_path", default=None)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--lr", default="0.004")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--output_dir", default="output/compare")
    args = parser.parse_args()
    args.arch = args.arch or ("timm:resnet10t" if args.what == "compare" else "vit_small")
    if args.what == "cell":
        print(json.dumps(one_cell(args, args.methods[0], args.out_dim[0])))
    elif args.what == "cost":
        cost(args)
    else:
        compare(args)


if __name__ == "__main__":
    main()
