"""Pre-train on the bundled digits, evaluate against random initialization, and plot the results (`make demo`).

python demo.py [--output_dir output/demo] [--seed 0]
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

import eval_cluster
import eval_collapse
import eval_knn
import eval_linear
import main_cplearn
from cplearn import checkpoints, errors
from cplearn.files import read_json, read_json_lines
from cplearn.host import ROOT
from cplearn.pictures import runs, runs_picture
from cplearn.pictures.style import pyplot, save_figure
from utils import ArgumentParser, expand_paths, format_table, positive


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Train, evaluate, plot; return the metrics of the trained and the random network."""
    parser = ArgumentParser(prog="demo.py", description=__doc__)
    parser.add_argument("--output_dir", default="output/demo", help="Checkpoint, log.txt, plots")
    parser.add_argument("--seed", type=int, default=0, help="Of weights, order and views")
    parser.add_argument("--max_steps", type=positive(int), default=None, help="Stop training early, for a smoke test")
    args = parser.parse_args(argv)
    expand_paths(args, "output_dir")
    out = Path(args.output_dir)
    start = time.perf_counter()
    train_flags = [f"@{ROOT}/recipes/digits.txt", "--output_dir", args.output_dir, "--seed", str(args.seed)]
    if args.max_steps:
        train_flags += ["--max_steps", str(args.max_steps)]
    main_cplearn.main(train_flags)

    print("\nEvaluating: trained, and the same backbone at random initialization ...", flush=True)
    metrics = {name: evaluate(out, name) for name in ("trained", "random")}
    features = {name: checkpoints.load(out / f"features_{name}" / "features_train_last1.pth") for name in metrics}
    plot_losses(out)
    plot_verdict(out)
    plot_code_usage(out, features)
    plot_confusion(out, features)
    analyze_collapse(out)
    print(f"\nDigits held out from training, {out}/checkpoint.pth, {time.perf_counter() - start:.0f} s in all:\n")
    rows = [(name, value, metrics["random"][name]) for name, value in metrics["trained"].items()]
    print(format_table(rows, ("", "trained", "random init")))
    print(f"\nPlots: {out}/losses.png, verdict.png, code_usage.png, confusion.png; of collapse: {out}/collapse/*.png")
    return metrics


def evaluate(out: Path, name: str) -> dict[str, float]:
    """Run the 20-NN, linear and cluster evaluations of `trained` or `random`; their output goes to eval_NAME.txt."""
    common = ["--pretrained_weights", f"{out}/checkpoint.pth", "--dump_features", f"{out}/features_{name}"]
    common += ["--random_init"] if name == "random" else []
    with output_in(out / f"eval_{name}.txt"):
        knn = eval_knn.main([*common, "--nb_knn", "20"])
        linear = eval_linear.main([*common, "--augment", "false", "--optimizer", "adam", "--epochs", "50"])
        cluster = eval_cluster.main(common)
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
    """Draw the figures of eval_collapse.py for the training images; its output goes to eval_collapse.txt."""
    with output_in(out / "eval_collapse.txt"):
        eval_collapse.main(
            ["--pretrained_weights", f"{out}/checkpoint.pth", "--output_dir", f"{out}/collapse", "--labels", "trained",
             "--split", "train", "--components", "10", "20", "50", "100", "--mc_samples", "2000",
             "--tsne_images", "1000"]
        )  # fmt: skip


@contextlib.contextmanager
def output_in(path: Path) -> Iterator[None]:
    """Write what is printed meanwhile to a file instead."""
    with open(path, "w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        yield


def plot_losses(out: Path) -> None:
    """Plot loss and terms per epoch, with the reference values of this batch size."""
    log, args = read_json_lines(out / "log.txt"), read_json(out / "args.json")["args"]
    epochs = [r["epoch"] + 1 for r in log]
    log_c, beta = np.log(args["out_dim"]), args["beta"]
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    left.plot(epochs, [r["train_loss"] for r in log], "o-", ms=3, label="loss")
    for word, name, style in (("uniform", "loss_uniform", "--"), ("bound", "loss_floor", ":")):
        left.axhline(log[0][name], color="0.4", ls=style, label=f"{word}: {log[0][name]:.2f}")
    left.set(title=f"Loss = {beta:g} x invariance + prior", xlabel="epoch", ylabel="nats")
    for name in ("invariance", "entropy", "prior"):
        right.plot(epochs, [r[f"train_{name}"] for r in log], "o-", ms=3, label=name)
    right.axhline(log_c, color="0.4", ls="--", label=f"log c = {log_c:.2f}")
    right.set(title="Terms, and mean entropy of the assignments", xlabel="epoch", ylabel="nats", ylim=(0, None))
    for axis in (left, right):
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    save_figure(figure, out, "losses")


def plot_verdict(out: Path) -> None:
    """Plot the verdict of each epoch, and the numbers that it is built on beside those before the first step."""
    figure = runs_picture.draw(runs.read_runs([str(out)]), "epochs", only_verdict=True)
    save_figure(figure, out, "verdict", dpi=runs_picture.DPI)


def plot_code_usage(out: Path, features: dict[str, dict]) -> None:
    """Plot how often each code is used on the training images, most used first."""
    figure, axis = pyplot().subplots(figsize=(6, 3.8), layout="constrained")
    for name, data in features.items():
        counts = np.sort(np.bincount(data["codes"].numpy(), minlength=data["out_dim"]))[::-1]
        used = int((counts > 0).sum())
        label = {"trained": "trained", "random": "random initialization"}[name]
        label = f"{label}: {used} of {len(counts)} codes"
        axis.step(np.arange(1, used + 1), counts[:used], where="mid", label=label)
    axis.axhline(counts.sum() / len(counts), color="0.4", ls="--", label="all codes equally often")
    axis.set(xscale="log", yscale="log", xlabel="code, most used first", ylabel="training images")
    axis.set_title("Use of the codes")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3, which="both")
    save_figure(figure, out, "code_usage")


def plot_confusion(out: Path, features: dict[str, dict], most: int = 80) -> None:
    """Plot the share of each class in the most used codes, ordered by their main class (training images)."""
    from sklearn.metrics.cluster import contingency_matrix

    figure, axes = pyplot().subplots(1, 2, figsize=(10, 3.8), layout="constrained", sharey=True)
    for axis, (name, data) in zip(axes, features.items(), strict=True):
        table = contingency_matrix(data["labels"].numpy(), data["codes"].numpy())
        kept = table[:, np.argsort(-table.sum(0), kind="stable")[:most]]
        kept = kept[:, np.lexsort((-kept.sum(0), kept.argmax(0)))]
        image = axis.imshow(kept / kept.sum(0), aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
        covered = kept.sum() / table.sum()
        title = f"{name.capitalize()}: {kept.shape[1]} top codes, {covered:.0%} of images"
        axis.set(title=title, xlabel="code, by main class")
        axis.set_yticks(range(len(data["classes"])), data["classes"])
    axes[0].set_ylabel("digit")
    figure.colorbar(image, ax=axes, label="share of the code's images")
    save_figure(figure, out, "confusion")


if __name__ == "__main__":
    errors.run_script(main)
