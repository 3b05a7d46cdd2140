"""Where beta turns from telling images apart to grouping them: training on both sides of beta* = 1 - log N / log c.

    python experiments/beta_edge.py --data_path ~/cifar10 --output_dir output/beta_edge --figure figures/beta_edge.png

With N images in the batch mean and c codes, and free embeddings, giving every image one code (loss log(c/N)) is worse
than learning nothing (loss beta log c) for beta below beta*; there the minimum spreads every image over codes of its
own (docs/losses.md). Does a network on real images change at beta*? For three pairs of N and c, six betas and every
seed: pre-train, then 20-NN, linear, codes against classes (AMI), and the numbers of eval_collapse.py, all on test
images; random initialization beside them. DIR has train/ and test/ class folders. What is done is kept: the same
command continues. One thread per training; `--jobs` side by side.

Columns: share of log(c/N) that the mean entropy of an assignment reaches in training (1: spread, 0: one code each),
|cos| of embeddings and their codes (random directions), mean cos^2 of two images of one code, codes used and their
perplexity on the test images, AMI, 20-NN and linear top-1; mean over seeds, and the largest distance from it.
Below the table: where the AMI of the codes bends, by two straight lines through the means that meet there.
"""

import json
import math
import shutil
import statistics
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from shared import run_script

from cplearn import errors
from cplearn.files import read_json, read_json_lines, write_text
from cplearn.flags import ArgumentParser, nonnegative, positive
from cplearn.host import ROOT, git_commit
from cplearn.methods.cplearn import aligned_from
from cplearn.pictures.style import COLORS, pyplot, save_figure
from cplearn.tables.measures import in_text, mean_and_spread
from cplearn.text import format_table

BETAS = {  # by (N, c); three below beta* and three above it
    (64, 256): (0.05, 0.1, 0.2, 0.35, 0.6, 0.9),
    (64, 16384): (0.1, 0.3, 0.5, 0.65, 0.8, 0.95),
    (256, 4096): (0.05, 0.15, 0.28, 0.4, 0.6, 0.9),
}
COMMON = [f"@{ROOT}/recipes/small_comparison.txt", "--num_workers", "0", "--saveckp_freq", "2"]


def do_job(kind: str, out: Path, train: list[str]) -> dict:
    """Train ("trained"), or take the untrained network of that training ("random_init"), and evaluate, unless it is
    done. Return the numbers. Raises `UserError` if a script fails; the same command tries it again."""
    kept = out / f"{kind}.json"
    if not kept.exists():
        output = out.parent / f"{out.name}.txt"
        if kind == "trained":
            run_script("main_cplearn.py", *train, "--output_dir", out, output=output, OMP_NUM_THREADS="1")
        numbers = evaluate(out / kind, out / "checkpoint.pth", ["--random_init"] * (kind == "random_init"), output)
        if kind == "trained":
            log = read_json_lines(out / "log.txt")
            numbers |= {"entropy": log[-1].get("train_entropy"), "seconds": sum(x["seconds"] for x in log)}
        write_text(kept, json.dumps(numbers | {"commit": git_commit()}) + "\n")
        print(f"{out.name} ({kind}) is done", flush=True)
    return read_json(kept)


def evaluate(place: Path, checkpoint: Path, more: list[str], output: Path) -> dict[str, float]:
    """Run the four evaluations on the test images and return their numbers."""
    (place / "results.jsonl").unlink(missing_ok=True)  # of a job that was killed
    features, where = place / "features", ["--output_dir", place]
    network = ["--pretrained_weights", checkpoint, *more, "--num_workers", "0"]
    scripts = {
        "eval_knn": [*network, "--nb_knn", "20", "--dump_features", features],
        "eval_linear": ["--load_features", features, *"--n_last_blocks 1 --optimizer adam --epochs 30".split()],
        "eval_cluster": ["--load_features", features, "--shuffles", "5"],
        "eval_collapse": [*network, *"--baseline false --components --tsne_images 0".split()],
    }
    for script, flags in scripts.items():
        run_script(f"{script}.py", *flags, *where, output=output, OMP_NUM_THREADS="1")
    shutil.rmtree(features)
    metrics = {x["script"]: x["metrics"] for x in read_json_lines(place / "results.jsonl")}
    numbers = {k: v for k, v in metrics["eval_collapse"].items() if isinstance(v, int | float)}
    return numbers | {
        "knn": metrics["eval_knn"]["knn20_top1"],
        "linear": metrics["eval_linear"]["linear_last_top1"],
        "ami": metrics["eval_cluster"]["codes"]["ami"],
        "kmeans_ami": metrics["eval_cluster"]["kmeans"]["ami"],
    }


# --- table and figure -------------------------------------------------------------------------------------

COLUMNS = {"spread": 2, "code_cosine": 3, "same_code_cos2": 3, "codes_used": 0, "codes_perplexity": 0, "ami": 3,
           "kmeans_ami": 3, "knn": 3, "linear": 3}  # fmt: skip
Runs = dict[tuple[int, int, float | None], list[dict]]  # by N, c and beta (None: untrained), one for each seed


def with_spread(numbers: dict, n: int, c: int) -> dict:
    """Add the share of log(c/N) that the mean entropy of an assignment reaches."""
    entropy = numbers.get("entropy")
    return numbers | {"spread": None if entropy is None else entropy / math.log(c / n)}


def mean_in_text(values: Iterable[float | None], form: str) -> str:
    """Return the mean of what is there, and the largest distance from it where there are several; "" for nothing."""
    numbers = [x for x in values if x is not None]
    return in_text(*mean_and_spread(numbers), len(numbers), form) if numbers else ""


def of_pair(runs: Runs, n: int, c: int) -> dict[float, list[dict]]:
    """Return the trained runs of one N and c, by beta."""
    return {beta: group for (m, d, beta), group in runs.items() if (m, d) == (n, c) and beta is not None}


def table(runs: Runs) -> str:
    rows = []
    for (n, c, beta), group in runs.items():
        name = "random init" if beta is None else f"{beta:g}"
        chance = mean_in_text([x.get("code_cosine_chance") for x in group], ".3f")
        cells = [mean_in_text([x.get(key) for x in group], f".{digits}f") for key, digits in COLUMNS.items()]
        rows.append((n, c, f"{aligned_from(c, n):.2f}", name, len(group), *cells[:2], chance, *cells[2:]))
    header = ("N", "c", "beta*", "beta", "n", "of log(c/N)", "|cos|", "random", "same-code cos^2", "codes",
              "perplexity", "AMI", "k-means AMI", "20-NN", "linear")  # fmt: skip
    return format_table(rows, header)


def bend(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """Return where two straight lines that meet, and fit best by least squares, do so, and their slopes."""
    x, y, best = np.asarray(x), np.asarray(y), None
    for place in np.linspace(min(x), max(x), 501)[1:-1]:
        terms = np.stack([np.ones_like(x), np.minimum(x - place, 0), np.maximum(x - place, 0)], axis=1)
        weights = np.linalg.lstsq(terms, y, rcond=None)[0]
        error = ((terms @ weights - y) ** 2).sum()
        if best is None or error < best[0]:
            best = (error, float(place), *map(float, weights[1:]))
    return best[1:]


def bends(runs: Runs) -> str:
    rows = []
    for n, c in BETAS:
        group = of_pair(runs, n, c)
        place, below, above = bend(list(group), [statistics.mean(x["ami"] for x in seeds) for seeds in group.values()])
        rows.append((n, c, f"{aligned_from(c, n):.2f}", f"{place:.2f}", f"{below:.3f}", f"{above:.3f}"))
    return format_table(rows, ("N", "c", "beta*", "AMI bends at", "slope below", "slope above"))


def figure(runs: Runs, path: Path) -> None:
    """Draw the numbers against beta - beta*: an edge would show at 0 in all pairs."""
    panels = {"spread": "mean entropy / log(c/N)", "code_cosine": "|cos| of embedding and code",
              "ami": "AMI of the codes", "knn": "20-NN top-1"}  # fmt: skip
    drawn, axes = pyplot().subplots(1, len(panels), figsize=(14, 3.6), layout="constrained")
    for axis, (name, title) in zip(axes, panels.items(), strict=True):
        for (n, c), color in zip(BETAS, COLORS, strict=False):
            points = [(b - aligned_from(c, n), [x[name] for x in seeds]) for b, seeds in of_pair(runs, n, c).items()]
            means = [statistics.mean(values) for _, values in points]
            axis.plot([x for x, _ in points], means, color=color, label=f"N = {n}, c = {c}")
            for x, values in points:
                axis.plot([x] * len(values), values, ".", color=color)
            untrained = [x[name] for x in runs.get((n, c, None), []) if x.get(name) is not None]
            if untrained:
                axis.axhline(statistics.mean(untrained), color=color, ls="--", lw=0.8)
        axis.axvline(0, color="0.6", lw=0.8)
        axis.set(xlabel="beta - beta*", title=title)
    axes[2].legend(frameon=False, loc="center right")
    save_figure(drawn, path.parent, path.stem)


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--data_path", required=True, help="Images in train/ and test/ class folders")
    parser.add_argument("--output_dir", required=True, help="One folder per training")
    parser.add_argument("--arch", default="timm:test_resnet")
    parser.add_argument("--epochs", type=positive(int), default=4)
    parser.add_argument("--seeds", type=nonnegative(int), nargs="+", default=[0, 1])
    parser.add_argument("--jobs", type=positive(int), default=1)
    parser.add_argument("--figure", type=Path, default=None, help="PNG to draw")
    args = parser.parse_args(argv)
    out = Path(args.output_dir).expanduser().absolute()
    out.mkdir(parents=True, exist_ok=True)
    data = ["--data_path", str(Path(args.data_path).expanduser().absolute())]
    jobs = {}
    for seed in args.seeds:
        for (n, c), betas in BETAS.items():
            for beta in betas:
                own = f"--arch {args.arch} --epochs {args.epochs} --batch_size_per_gpu {n} --out_dim {c} --beta {beta}"
                train = [*COMMON, *data, *own.split(), "--seed", str(seed)]
                jobs[n, c, beta, seed] = ("trained", out / f"n{n}_c{c}_beta{beta}_s{seed}", train)
            jobs[n, c, None, seed] = ("random_init", *jobs[n, c, betas[0], seed][1:])
    numbers = {}
    with ThreadPoolExecutor(args.jobs) as pool:
        for keys in ([k for k in jobs if k[2] is not None], [k for k in jobs if k[2] is None]):
            started = {key: pool.submit(do_job, *jobs[key]) for key in keys}
            numbers |= {key: future.result() for key, future in started.items()}
    runs: Runs = {}
    for n, c, beta, seed in sorted(jobs, key=lambda key: (*key[:2], key[2] or 0.0, key[3])):
        runs.setdefault((n, c, beta), []).append(with_spread(numbers[n, c, beta, seed], n, c))
    commits = sorted({x["commit"] for x in numbers.values()})
    seconds = sum(x.get("seconds", 0) for x in numbers.values())
    setting = f"{args.arch}, {args.epochs} epochs, seeds {args.seeds}, commit {', '.join(commits)}"
    print(f"{setting}, {seconds / 60:.0f} minutes of training")
    print(f"\n{table(runs)}\n\n{bends(runs)}")
    if args.figure:
        figure(runs, args.figure)


if __name__ == "__main__":
    errors.run_script(main)
