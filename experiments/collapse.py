"""The collapse monitor on runs that are meant to learn, and on runs made to collapse.

    python experiments/collapse.py verdicts --output_dir output/verdicts

All train on the bundled digits, or on --data_path. Every run stays in --output_dir and is not repeated. Printed are
what was forced, the verdict at the end, and the epoch of the first alarm; also the rank correlation, over the epochs of
all runs and over their ends, of label-free numbers with 20-NN among the probe's images.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from shared import rank_correlation, run_script

from cplearn import errors
from cplearn.errors import UserError
from cplearn.files import read_json_lines
from cplearn.flags import ArgumentParser, nonnegative, positive
from cplearn.host import git_commit
from cplearn.probe import verdict
from cplearn.text import format_table

COMMON = "--image_size 32 --batch_size_per_gpu 64 --warmup_epochs 1 --optimizer adam --lr 0.004 --min_lr 1e-5 "
COMMON += "--weight_decay 0 --weight_decay_end 0 --saveckp_freq 0 --num_workers 0 --knn_freq 1 --arch timm:resnet10t"

LEARNING = {
    "cplearn": "--out_dim 1024 --beta 0.25 --n_ref 4",
    "cplearn again": "--out_dim 1024 --beta 0.25 --n_ref 4",
    "cplearn once more": "--out_dim 1024 --beta 0.25 --n_ref 4",
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
          "probe_embedding_dimensions", "probe_codes_perplexity", "probe_within_code", "probe_agreement",
          "probe_score", "probe_view_nearness", "information")  # fmt: skip


def train(args: argparse.Namespace, name: str, flags: str, seed: int) -> list[dict]:
    """Train, resume, or leave alone a run that is there already; return its log."""
    out = Path(args.output_dir, "".join(x if x.isalnum() else "_" for x in name)).absolute()
    data = ["--data_path", args.data_path, "--augmentation", "cifar_strong"] if args.data_path else []
    print(f"{name} ...", file=sys.stderr, flush=True)
    try:
        run_script("main_cplearn.py", *COMMON.split(), *flags.split(), *data, "--epochs", args.epochs, "--seed", seed,
                   "--output_dir", out)  # fmt: skip
    except UserError as error:  # a run that was forced to fail has a verdict too
        print(error, file=sys.stderr)
    return read_json_lines(out / "log.txt")


def verdicts(args: argparse.Namespace) -> None:
    """Train every run, forced to collapse or meant to learn; print their verdicts, and which numbers follow k-NN."""
    rows, epochs, ends = [], [], []
    for group, settings in (("forced", FORCED), ("meant to learn", LEARNING)):
        for name, flags in settings.items():
            log = train(args, name, flags, args.seeds[0] + len(rows))  # each run its own
            # From the numbers of the log, so that new thresholds need no new runs.
            out_dim = int(flags.split("--out_dim ")[1].split()[0])
            judged = [(r["epoch"] + 1, verdict.judge(r, out_dim)) for r in log if "verdict" in r]
            seen = [(epoch, judgment.name) for epoch, judgment in judged if judgment] or [(0, "")]
            alarms = [epoch for epoch, name in seen if name in verdict.ALARMS]
            last = log[-1]
            epochs += log
            ends.append(last)
            rows.append((group, name, seen[-1][1], alarms[0] if alarms else None, len(alarms),
                         *(last.get(k) for k in ("probe_knn20", "probe_features_cosine", "probe_embedding_dimensions",
                                                 "probe_codes_perplexity", "probe_within_code", "probe_agreement",
                                                 "probe_agreement_chance", "information"))))  # fmt: skip
    header = ("", "run", "verdict", "first alarm", "alarms", "20-NN", "cosine", "dimensions", "perplexity",
              "within code", "agreement", "chance", "information")  # fmt: skip
    print(f"{args.epochs} epochs, {args.data_path or 'digits'}, commit {git_commit()}\n")
    print(format_table(rows, header))
    print("\nRank correlation with 20-NN among the probe's images:\n")
    table = [(key, *correlation(epochs, key), *correlation(ends, key)) for key in SCORES]
    print(format_table(table, ("", "all epochs", "n", "ends of runs", "n")))


def correlation(records: list[dict], key: str) -> tuple[float, int]:
    """Return the rank correlation of a number with 20-NN among the probe's images, and over how many records."""
    pairs = [(r[key], r["probe_knn20"]) for r in records if r.get(key) is not None and "probe_knn20" in r]
    return rank_correlation(pairs), len(pairs)


def main(argv: Sequence[str] | None = None) -> None:
    """Train and print."""
    parser = ArgumentParser(prog="experiments/collapse.py", description=__doc__)
    parser.add_argument("what", choices=("verdicts",))
    parser.add_argument("--data_path", default=None)
    parser.add_argument("--epochs", type=positive(int), default=10)
    parser.add_argument("--seeds", type=nonnegative(int), nargs=1, default=[0], help="Of the first run")
    parser.add_argument("--output_dir", default="output/collapse")
    args = parser.parse_args(argv)
    verdicts(args)


if __name__ == "__main__":
    errors.run_script(main)
