"""Pre-train on the bundled digits, evaluate against random initialization, and draw what happened (`make demo`).

python demo.py [--output_dir output/demo]
"""

import contextlib
import io
import json
import time
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from sklearn.metrics.cluster import contingency_matrix

import eval_cluster
import eval_collapse
import eval_knn
import eval_linear
import main_cplearn
from cplearn import checkpoints, errors
from cplearn.flags import ArgumentParser
from cplearn.host import ROOT
from cplearn.text import format_table

matplotlib.use("Agg")


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Train, evaluate, plot. Returns the closing table's rows."""
    parser = ArgumentParser(prog="demo.py", description=__doc__)
    parser.add_argument("--output_dir", default="output/demo", help="Checkpoint, log.txt, plots")
    parser.add_argument("--max_steps", type=int, default=None, help="Stop training early, for a smoke test")
    args = parser.parse_args(argv)
    out = Path(args.output_dir)
    start = time.perf_counter()
    train_flags = [f"@{ROOT}/recipes/digits.txt", "--output_dir", args.output_dir]
    if args.max_steps:
        train_flags += ["--max_steps", str(args.max_steps)]
    main_cplearn.main(train_flags)

    print("\nEvaluating: trained, and the same backbone at random initialization ...", flush=True)
    rows = {name: evaluate(out, name) for name in ("trained", "random")}
    plot_losses(out)
    plot_code_usage(out)
    plot_confusion(out)
    analyze_collapse(out)
    print(f"\nDigits held out from training, {out}/checkpoint.pth, {time.perf_counter() - start:.0f} s in all:\n")
    columns = list(rows["trained"])
    print(format_table([(c, rows["trained"][c], rows["random"][c]) for c in columns], ("", "trained", "random init")))
    print(f"\nPlots: {out}/losses.png, code_usage.png, confusion.png; of collapse: {out}/collapse/*.png")
    return rows


def evaluate(out: Path, name: str) -> dict[str, float]:
    """20-NN, linear and cluster evaluation; their own output goes to eval_NAME.txt."""
    common = ["--pretrained_weights", f"{out}/checkpoint.pth", "--dump_features", f"{out}/features_{name}"]
    common += ["--random_init"] if name == "random" else []
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        knn = eval_knn.main([*common, "--nb_knn", "20"])
        linear = eval_linear.main([*common, "--augment", "false", "--optimizer", "adam", "--epochs", "50"])
        cluster = eval_cluster.main(common)
    (out / f"eval_{name}.txt").write_text(said.getvalue())
    return {
        "20-NN top-1": knn["knn20_top1"],
        "linear top-1 (last epoch)": linear["linear_last_top1"],
        "k-means AMI": cluster["kmeans"]["ami"],
        "codes AMI": cluster["codes"]["ami"],
        "codes NMI": cluster["codes"]["nmi"],
        "codes NMI, labels shuffled": cluster["codes_shuffled"]["nmi"],
        "codes used": cluster["codes"]["used_codes"],
    }


def analyze_collapse(out: Path) -> None:
    """The figures of eval_collapse.py on the training images; its own output goes to eval_collapse.txt."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        eval_collapse.main(
            ["--pretrained_weights", f"{out}/checkpoint.pth", "--output_dir", f"{out}/collapse", "--labels", "trained",
             "--split", "train", "--components", "10", "20", "50", "100", "--mc_samples", "2000",
             "--tsne_images", "1000"]
        )  # fmt: skip
    (out / "eval_collapse.txt").write_text(said.getvalue())


def plot_losses(out: Path) -> None:
    """Loss and its terms by epoch, against the reference values of this batch size."""
    log = [json.loads(line) for line in (out / "log.txt").read_text().splitlines()]
    args = json.loads((out / "args.json").read_text())
    epochs = [r["epoch"] + 1 for r in log]
    log_c, beta = np.log(args["args"]["out_dim"]), args["args"]["beta"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    left.plot(epochs, [r["train_loss"] for r in log], "o-", ms=3, label="loss")
    for name, style in (("uniform", "--"), ("floor", ":")):
        left.axhline(log[0][f"loss_{name}"], color="0.4", ls=style, label=f"{name}: {log[0][f'loss_{name}']:.2f}")
    left.set(title=f"Loss = {beta:g} x invariance + prior", xlabel="epoch", ylabel="nats")
    for name in ("invariance", "entropy", "prior"):
        right.plot(epochs, [r[f"train_{name}"] for r in log], "o-", ms=3, label=name)
    right.axhline(log_c, color="0.4", ls="--", label=f"log c = {log_c:.2f}")
    right.set(title="Terms, and mean entropy of the assignments", xlabel="epoch", ylabel="nats", ylim=(0, None))
    for axis in (left, right):
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    figure.savefig(out / "losses.png", dpi=120)
    plt.close(figure)


def plot_code_usage(out: Path) -> None:
    """How often each code is used on the training images, most used first."""
    figure, axis = plt.subplots(figsize=(6, 3.8), layout="constrained")
    for name in ("trained", "random"):
        codes = checkpoints.load(out / f"features_{name}" / "features_train_last1.pth")
        counts = np.sort(np.bincount(codes["codes"].numpy(), minlength=codes["out_dim"]))[::-1]
        used = int((counts > 0).sum())
        label = {"trained": "trained", "random": "random initialization"}[name]
        axis.step(
            np.arange(1, used + 1),
            counts[:used],
            where="mid",
            label=f"{label}: {used} of {len(counts)} codes",
        )
    axis.axhline(counts.sum() / len(counts), color="0.4", ls="--", label="all codes equally often")
    axis.set(xscale="log", yscale="log", xlabel="code, most used first", ylabel="training images")
    axis.set_title("Use of the codes")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3, which="both")
    figure.savefig(out / "code_usage.png", dpi=120)
    plt.close(figure)


def plot_confusion(out: Path, most: int = 80) -> None:
    """Share of each class in the most used codes, ordered by their main class (training images)."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained", sharey=True)
    for axis, name in zip(axes, ("trained", "random"), strict=True):
        data = checkpoints.load(out / f"features_{name}" / "features_train_last1.pth")
        table = contingency_matrix(data["labels"].numpy(), data["codes"].numpy())
        kept = table[:, np.argsort(-table.sum(0), kind="stable")[:most]]
        kept = kept[:, np.lexsort((-kept.sum(0), kept.argmax(0)))]
        image = axis.imshow(kept / kept.sum(0), aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
        covered = kept.sum() / table.sum()
        title = {"trained": "Trained", "random": "Random"}[name]
        axis.set(
            title=f"{title}: {kept.shape[1]} top codes, {covered:.0%} of images",
            xlabel="code, by main class",
        )
        axis.set_yticks(range(len(data["classes"])), data["classes"])
    axes[0].set_ylabel("digit")
    figure.colorbar(image, ax=axes, label="share of the code's images")
    figure.savefig(out / "confusion.png", dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    errors.run_script(main)
