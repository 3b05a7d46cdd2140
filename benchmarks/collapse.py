"""What the collapse monitor says of runs that are healthy, and of runs made to collapse; and what it costs.

    python benchmarks/collapse.py verdicts --output_dir output/verdicts
    python benchmarks/collapse.py cost --data_path ~/cifar10k

`verdicts`: short runs on the bundled digits (or --data_path), one after the other; the table says what was forced,
what the verdict was at the end, and in which epoch the first alarm came. Every run is left in --output_dir and not
repeated. Also the rank correlation, over all runs, of label-free numbers with 20-NN among the probe's images.
`cost`: share of an epoch's time that the monitor takes.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from scipy.stats import spearmanr

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from monitor import CodeUse  # noqa: E402
from utils import format_table, git_commit  # noqa: E402

COMMON = "--image_size 32 --batch_size_per_gpu 64 --warmup_epochs 1 --optimizer adam --lr 0.004 --min_lr 1e-5 "
COMMON += "--weight_decay 0 --weight_decay_end 0 --saveckp_freq 0 --num_workers 0 --knn_freq 1 --arch timm:resnet10t"

HEALTHY = {
    "cplearn": "--out_dim 1024 --beta 0.25 --n_ref 4",
    "cplearn, seed 1": "--out_dim 1024 --beta 0.25 --n_ref 4 --seed 1",
    "cplearn, seed 2": "--out_dim 1024 --beta 0.25 --n_ref 4 --seed 2",
    "cplearn, c = 128": "--out_dim 128 --beta 0.5",
    "cplearn, c = 16384": "--out_dim 16384 --beta 0.25 --n_ref 4",
    "cplearn, tanh": "--out_dim 1024 --beta 0.25 --n_ref 4 --activation tanh",
    "cplearn, beta 1": "--out_dim 1024 --beta 1 --n_ref 4",
    "cplearn, resnet8": "--out_dim 1024 --beta 0.25 --n_ref 4 --arch resnet8_w32 --lr 0.002",
    "cplearn, vit_tiny": "--out_dim 1024 --beta 0.25 --arch vit_tiny --patch_size 8 --lr 0.001",
    "dino": "--method dino --out_dim 1024 --momentum_teacher 0.98",
    "swav": "--method swav --out_dim 128 --epoch_queue_starts 100",
    "barlow_twins": "--method barlow_twins --out_dim 512",
    "gedi": "--method gedi --out_dim 128 --beta 0.5",
    "self_classifier": "--method self_classifier --out_dim 128",
}
FORCED = {
    "beta 10": "--out_dim 1024 --beta 10 --n_ref 4",
    "beta 10, c = 10": "--out_dim 10 --beta 10",
    "beta 2": "--out_dim 1024 --beta 2 --n_ref 4",
    "beta 0": "--out_dim 1024 --beta 0 --n_ref 4",
    "c = 10": "--out_dim 10 --beta 0.5",
    "c = 2": "--out_dim 2 --beta 0.5",
    "barlow_twins, lambd 0": "--method barlow_twins --out_dim 512 --lambd 1e-12",
    "self_classifier, c = 2": "--method self_classifier --out_dim 2",
    "gedi, beta 10": "--method gedi --out_dim 128 --beta 10",
    "logits of nothing": "--out_dim 1024 --beta 0.25 --n_ref 0.0001",
    "learning rate x 500": "--out_dim 1024 --beta 0.25 --arch resnet8_w32 --lr 2 --clip_grad 0",
    "dino, hot teacher": "--method dino --out_dim 1024 --warmup_teacher_temp 1 --teacher_temp 1",
    "dino, sharp teacher": "--method dino --out_dim 1024 --warmup_teacher_temp 0.001 --teacher_temp 0.001",
}

SCORES = ("probe_features_rank", "probe_features_dimensions", "probe_features_std", "probe_embedding_rank",
          "probe_embedding_dimensions", "probe_codes_perplexity", "probe_within_code", "probe_agreement", "information")  # fmt: skip


def verdicts(args) -> None:
    data = ["--data_path", args.data_path, "--augmentation", "cifar_strong"] if args.data_path else []
    rows, pairs = [], {}
    for group, settings in (("forced", FORCED), ("healthy", HEALTHY)):
        for name, flags in settings.items():
            out = Path(args.output_dir, "".join(x if x.isalnum() else "_" for x in name))
            command = ["main_cplearn.py", *COMMON.split(), *flags.split(), *data, "--epochs", str(args.epochs),
                       "--output_dir", str(out)]  # fmt: skip
            print(f"{name} ...", file=sys.stderr, flush=True)
            done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                print(f"{name}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
            log = [json.loads(line) for line in (out / "log.txt").read_text().splitlines()]
            seen = [r["verdict"] for r in log if "verdict" in r]
            alarms = [r["epoch"] + 1 for r in log if r.get("verdict", "healthy") != "healthy"]
            last = log[-1]
            rows.append((group, name, seen[-1] if seen else "", alarms[0] if alarms else None,
                         last["probe_knn20"], last["probe_features_cosine"], last["probe_features_rank"],
                         last["probe_embedding_dimensions"], last["probe_codes_perplexity"], last["probe_within_code"],
                         last["probe_agreement"], last.get("information")))  # fmt: skip
            for r in log:
                for key in SCORES:
                    if r.get(key) is not None:
                        pairs.setdefault(key, []).append((r[key], r["probe_knn20"]))
    header = ("", "run", "verdict", "first alarm", "20-NN", "cosine", "rank", "dimensions", "perplexity",
              "within code", "agreement", "information")  # fmt: skip
    print(f"{args.epochs} epochs, {args.data_path or 'digits'}, commit {git_commit()}\n")
    print(format_table(rows, header))
    print("\nRank correlation with 20-NN over epochs of all runs:")
    for key, found in pairs.items():
        print(f"  {key}: {spearmanr(*zip(*found, strict=True)).statistic:.2f} (n = {len(found)})")


def cost(args) -> None:
    rows = []
    for name, flags in (
        ("resnet10t, c = 16384", "--out_dim 16384"),
        ("vit_tiny, c = 131072", "--out_dim 131072 --arch vit_tiny --patch_size 8"),
    ):
        out = Path(args.output_dir, "".join(x if x.isalnum() else "_" for x in name))
        data = ["--data_path", args.data_path, "--augmentation", "cifar_strong"] if args.data_path else []
        command = ["main_cplearn.py", *COMMON.split(), *flags.split(), *data, "--knn_freq", "0", "--epochs", str(args.epochs),
                   "--output_dir", str(out)]  # fmt: skip
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        log = [json.loads(line) for line in (out / "log.txt").read_text().splitlines()]
        probed = [r for r in log if "probe_images" in r]
        rows.append((name, probed[0]["probe_images"], f"{len(probed)} of {len(log)}", sum(r["seconds"] for r in log),
                     sum(r["monitor_seconds"] for r in log), time_of_a_step(int(flags.split()[1]), log[-1]["steps"] * len(log)),
                     ))  # fmt: skip
    header = ("", "probe", "in epochs", "training, s", "probe, s", "windows, s")
    print(f"{args.epochs} epochs, {args.data_path or 'digits'}, commit {git_commit()}\n")
    print(format_table([(*row, f"{(row[4] + row[5]) / row[3]:.2%}") for row in rows], (*header, "share")))


def time_of_a_step(out_dim: int, steps: int) -> float:
    """Seconds that so many steps of `CodeUse.add` take."""
    use, usage, skipped = CodeUse(), torch.full((out_dim,), 1 / out_dim), torch.tensor(False)
    start = time.perf_counter()
    for _ in range(steps):
        use.add(usage, 64, skipped)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("verdicts", "cost"))
    parser.add_argument("--data_path", default=None)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--output_dir", default="output/verdicts")
    args = parser.parse_args()
    (verdicts if args.what == "verdicts" else cost)(args)


if __name__ == "__main__":
    main()
