"""How far one or more networks are from collapse: numbers, and the paper's analysis figures with their data.

    python eval_collapse.py --pretrained_weights output/digits/checkpoint.pth
    python eval_collapse.py --checkpoints output/a/checkpoint.pth output/b/checkpoint.pth --labels "c = 128" "c = 16384"

Evaluation mode, all images of the split; the first network at random initialisation is drawn beside them. Into
--output_dir go one line a network in results.jsonl, and

    spectrum.png   singular values of the covariance of embeddings and representations (Fig. 6a, 13a, 14)
    mixture.png    entropy of a Gaussian mixture fitted to the representations (Fig. 6b, 13b, 15)
    matrices.png   covariance of the embedding, and cosines of images in the order of their codes (Fig. 4, 8, 9)
    codes.png      use of the codes, and alignment of embeddings to their codes (Theorem 1)
    tsne.png       t-SNE of the representations, coloured by class, or by code where there are no classes (Fig. 12c)

each with a .csv of the same name (of the matrices: one for each network and matrix). Covariances are centred and
nothing is padded; the published scripts take second moments as they are, of vectors padded with zeros to one width.
"""

import argparse
import copy
import csv
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import collapse
import distributed
import errors
import evaluation
import utils
from errors import UserError


def get_args_parser() -> argparse.ArgumentParser:
    parser = utils.ArgumentParser(prog="eval_collapse.py", description=__doc__)
    # fmt: off
    parser.add_argument("--checkpoints", nargs="+", default=None, help="Several networks in one figure, instead of --pretrained_weights")
    parser.add_argument("--labels", nargs="+", default=None, help="Their names in figures and results (default: their folders)")
    parser.add_argument("--baseline", type=utils.bool_flag, default=True, help="Also the first network at random initialisation")
    parser.add_argument("--split", default="val", choices=("val", "train"), help="Images to look at")
    parser.add_argument("--components", type=int, nargs="*", default=[10, 20, 50, 100, 200, 500, 1000], help="Sizes of the mixtures; none to leave them out")
    parser.add_argument("--mc_samples", type=int, default=10_000, help="Samples of each mixture, for its entropy")
    parser.add_argument("--shown_images", type=int, default=500, help="Images in the drawn matrix of cosines (numbers are of all)")
    parser.add_argument("--tsne_images", type=int, default=2000, help="Images in the t-SNE; 0 to leave it out")
    # fmt: on
    evaluation.add_flags(parser)
    return parser


@dataclass
class Network:
    """What is known of one network on one split, on the CPU."""

    label: str
    data: evaluation.Features
    embedding: Tensor | None  # (n, d)
    alignment: Tensor | None  # cosine of each embedding with its code (n,)
    chance_alignment: float | None  # the same of random directions, mean


# --- numbers -------------------------------------------------------------------------------------------


def off_diagonal_energy(x: Tensor) -> tuple[float, float]:
    """Share of the covariance's squared entries that lie off its diagonal: 0 if decorrelated. And what independent
    dimensions of equal variance would show on so many images, (d - 1) / (n + d - 1). Shape: (n, d)."""
    covariance = covariance_of(x)
    total = covariance.square().sum().item()
    n, d = x.shape
    off = 1 - covariance.diagonal().square().sum().item() / total if total else 0.0
    return off, (d - 1) / (n + d - 1)


def covariance_of(x: Tensor, rows: int = 4096) -> Tensor:
    """In float64, a few rows at a time. Shape: (n, d) -> (d, d)."""
    mean = x.mean(0, dtype=torch.float64)
    total = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    for part in x.split(rows):
        centred = part.double() - mean
        total.addmm_(centred.T, centred)
    return total / max(1, len(x) - 1)


def block_energy(x: Tensor, codes: Tensor) -> dict[str, float | None]:
    """Mean squared cosine of two different images of the same code, and of different codes; never an n x n matrix.

    sum_ij (u_i . u_j)^2 = |U^T U|^2, for all images and for each code. None where there is no such pair. Shape: (n, d),
    int64 (n,).
    """
    u = F.normalize(x.double(), dim=1)

    def energy(rows: Tensor) -> float:  # sum over ordered pairs of different rows
        gram = rows @ rows.T if len(rows) < rows.shape[1] else rows.T @ rows
        return gram.square().sum().item() - rows.square().sum(1).square().sum().item()

    order = codes.argsort(stable=True)
    counts = codes.unique(return_counts=True)[1]
    inside = sum(energy(part) for part in u[order].split(counts.tolist()))
    pairs = (counts * (counts - 1)).sum().item()
    others = len(x) * (len(x) - 1) - pairs
    return {
        "same_code_cos2": inside / pairs if pairs else None,
        "other_code_cos2": (energy(u) - inside) / others if others else None,
    }


def numbers(network: Network) -> dict[str, float | int | None]:
    """Of one network; the names that `monitor.py` logs mean the same here."""
    x, h, codes = network.data.features, network.embedding, network.data.codes
    found: dict[str, float | int | None] = {
        "images": len(x),
        "features_dim": x.shape[1],
        "features_rank": collapse.rankme(x),
        "features_dimensions": collapse.dimensions(collapse.covariance_spectrum(x)),
        "features_cosine": collapse.mean_cosine(x),
        "features_off_diagonal": off_diagonal_energy(x)[0],
    }
    if h is None or codes is None:
        return found
    used, perplexity = collapse.code_usage(codes)
    off, chance = off_diagonal_energy(h)
    largest = codes.unique(return_counts=True)[1].max().item()
    return found | {
        "embedding_dim": h.shape[1],
        "embedding_rank": collapse.rankme(h),
        "embedding_dimensions": collapse.dimensions(collapse.covariance_spectrum(h)),
        "embedding_cosine": collapse.mean_cosine(h),
        "embedding_off_diagonal": off,
        "embedding_off_diagonal_chance": chance,
        **block_energy(h, codes),
        "out_dim": network.data.out_dim,
        "codes_used": used,
        "codes_perplexity": perplexity,
        "block_mean": len(x) / used,
        "block_max": largest,
        "within_code": collapse.within_code_share(x, codes),
        "code_cosine": None if network.alignment is None else network.alignment.abs().mean().item(),
        "code_cosine_chance": network.chance_alignment,
    }


def mixture_entropy(x: np.ndarray, components: int, *, samples: int, seed: int) -> tuple[float | None, str]:
    """Entropy, in nats a dimension, of a Gaussian mixture with diagonal covariances fitted to x, by Monte Carlo; and
    what is to be said of the fit. None where there is no usable one. Shape: (n, f)."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    if components > len(x):
        return None, f"more components than the {len(x)} images"
    if (x == x[0]).all():
        return None, "all images have the same features"
    model = GaussianMixture(components, covariance_type="diag", random_state=seed, max_iter=200)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # k-means that starts it, and what is asked for below
        try:
            model.fit(x)
            entropy = -float(model.score_samples(model.sample(samples)[0]).mean()) / x.shape[1]
        except ValueError as error:
            return None, str(error).strip().splitlines()[0]
    if not math.isfinite(entropy):
        return None, "entropy not finite"
    if not model.converged_:
        return entropy, "stopped before it converged"
    return entropy, "ok" if len(x) >= 10 * components else f"only {len(x) / components:.1f} images a component"


def scaled(features: Tensor) -> np.ndarray:
    """To 0..1 by one minimum and one maximum over all entries, so that entropies of networks can be compared."""
    low, high = features.min(), features.max()
    return ((features - low) / (high - low).clamp(min=1e-30)).double().numpy()


# --- the run -------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> dict[str, dict]:
    """Evaluate; returns the numbers of each network on rank 0, {} elsewhere."""
    args = get_args_parser().parse_args(argv)
    check(args)
    paths = [os.path.expanduser(path) for path in args.checkpoints or [args.pretrained_weights]]
    for path in paths:
        if not os.path.isfile(path):
            raise UserError(f"{path} does not exist")
    args.pretrained_weights = paths[0]
    device = evaluation.start(args)
    labels = args.labels or names_of(paths)
    todo = [(label, path, args.random_init) for label, path in zip(labels, paths, strict=True)]
    if args.baseline and not args.random_init:
        todo.append(("random init", paths[0], True))
    networks, flags = [], []
    for label, path, random_init in todo:  # before the slow part, in which the other ranks have nothing to wait for
        own = copy.copy(args)  # evaluation.features fills in what the checkpoint says
        own.pretrained_weights, own.random_init = path, random_init
        own.dump_features = None if networks else args.dump_features
        networks.append(look_at(own, label, device))
        flags.append(own)
        if networks[-1].data.source["data"] != networks[0].data.source["data"]:
            raise UserError(f"{label} was trained on other data than {labels[0]}: name one with --data_path")
    if not distributed.is_main():
        return {}
    results = {}
    for network, own in zip(networks, flags, strict=True):
        label, found = network.label, numbers(network)
        for components in args.components:
            print(f"{label}: mixture of {components} ...", flush=True)
            entropy, status = mixture_entropy(
                scaled(network.data.features), components, samples=args.mc_samples, seed=args.seed
            )
            found[f"mixture{components}_entropy"], found[f"mixture{components}_fit"] = entropy, status
        results[label] = found
        evaluation.write_result(own, "eval_collapse", {"label": label, **found}, network.data, args.split)
    draw(args, networks, results)
    report(args, results)
    return results


def check(args: argparse.Namespace) -> None:
    """Flags that belong to this evaluation. Raises `UserError`."""
    if not args.checkpoints and not args.pretrained_weights:
        raise UserError("--pretrained_weights is missing: give a checkpoint, or several with --checkpoints")
    if args.dump_features and len(args.checkpoints or ()) > 1:
        raise UserError("--dump_features keeps one network's features: name one")
    if args.load_features:
        raise UserError("--load_features has no embeddings: name the weights")
    if args.checkpoints and args.pretrained_weights:
        raise UserError("--checkpoints and --pretrained_weights: give one of them")
    if args.labels and len(args.labels) != len(args.checkpoints or [0]):
        raise UserError(f"--labels names {len(args.labels)} networks, there are {len(args.checkpoints or [0])}")
    if args.labels and len({*args.labels, "random init"}) <= len(args.labels):
        raise UserError(f"--labels {' '.join(args.labels)}: they must differ, and from 'random init'")
    for name in ("shown_images", "mc_samples"):
        if getattr(args, name) < 2:
            raise UserError(f"--{name} {getattr(args, name)} must be at least 2")
    if args.components and min(args.components) < 1:
        raise UserError(f"--components {min(args.components)} must be positive")
    if args.tsne_images and args.tsne_images < 5:
        raise UserError(f"--tsne_images {args.tsne_images} must be at least 5, or 0 for none")


def names_of(paths: list[str]) -> list[str]:
    """The folder of each checkpoint, with as much of its path as tells them apart."""
    parts = [Path(path).expanduser().absolute().parts for path in paths]
    for depth in range(2, max(map(len, parts)) + 1):
        names = ["/".join(p[-depth:-1]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{i + 1}: {Path(path).name}" for i, path in enumerate(paths)]


@torch.inference_mode()
def look_at(args: argparse.Namespace, label: str, device: torch.device) -> Network:
    (data,), model = evaluation.features(args, device, (args.split,))
    if model.method is None:
        return Network(label, data, None, None, None)
    method, embeddings, cosines = model.method, [], []
    for start in range(0, len(data.features), 1024):
        h = method.embed(data.features[start : start + 1024].to(device))
        vectors = method.code_vectors(data.codes[start : start + 1024].to(device))
        embeddings.append(h.float().cpu())
        if vectors is not None:
            cosines.append(F.cosine_similarity(h, vectors, dim=1).cpu())
    embedding = torch.cat(embeddings)
    chance = None
    if cosines:
        generator = torch.Generator().manual_seed(args.seed)
        anywhere = torch.randn(1000, embedding.shape[1], generator=generator).to(device)
        vectors = method.code_vectors(method.assign(F.normalize(anywhere, dim=1)))
        chance = F.cosine_similarity(anywhere, vectors, dim=1).abs().mean().item()
    return Network(label, data, embedding, torch.cat(cosines) if cosines else None, chance)


def report(args: argparse.Namespace, results: dict[str, dict]) -> None:
    """The numbers, a column a network, and where the figures are."""
    names = list(dict.fromkeys(name for found in results.values() for name in found))
    shown = [name for name in names if not name.endswith("_fit")]
    print(utils.format_table([(name, *(r.get(name) for r in results.values())) for name in shown], ("", *results)))
    for label, found in results.items():
        for components in args.components:
            fit = found[f"mixture{components}_fit"]
            if fit != "ok":
                print(f"{label}: mixture of {components}: {fit}")
    files = sorted(path.name for path in Path(args.output_dir).glob("*.png") if path.stem in FIGURES)
    print(f"Figures in {args.output_dir}: {', '.join(files)}")


# --- figures, and the same numbers as files -------------------------------------------------------------

FIGURES = ("spectrum", "mixture", "matrices", "codes", "tsne")


def draw(args: argparse.Namespace, networks: list[Network], results: dict[str, dict]) -> None:
    out = Path(args.output_dir)
    for name in FIGURES:  # of an earlier call
        (out / f"{name}.png").unlink(missing_ok=True)
    plot_spectrum(out, networks, results)
    if args.components:
        plot_mixture(out, args.components, results)
    with_codes = [n for n in networks if n.embedding is not None]
    if with_codes:
        plot_matrices(out, with_codes, args.shown_images, args.seed)
        plot_codes(out, with_codes)
    if args.tsne_images:
        plot_tsne(out, networks, args.tsne_images, args.seed)


def style(network_label: str, i: int) -> dict:
    """The baseline is grey and dashed in all figures."""
    return {"color": "0.45", "ls": "--"} if network_label == "random init" else {"color": f"C{i % 10}", "ls": "-"}


def write_csv(path: Path, header: Sequence[str], rows) -> None:
    with open(path, "w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f)
        writer.writerow(header)
        writer.writerows(rows)


def plot_spectrum(out: Path, networks: list[Network], results: dict[str, dict]) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    rows = []
    for axis, kind, rank in zip(
        axes, ("embedding", "representation"), ("embedding_rank", "features_rank"), strict=True
    ):
        for i, network in enumerate(networks):
            x = network.embedding if kind == "embedding" else network.data.features
            if x is None:
                continue
            values = torch.linalg.eigvalsh(covariance_of(x)).flip(0).clamp(min=0)
            rows += [(network.label, kind, k + 1, f"{v:.6g}") for k, v in enumerate(values.tolist())]
            share = values / values[0].clamp(min=1e-300)
            axis.plot(range(1, len(share) + 1), share, label=f"{network.label} (rank {results[network.label][rank]:.0f} of {x.shape[1]})",
                      **style(network.label, i))  # fmt: skip
        axis.set(xscale="log", yscale="log", ylim=(1e-9, 2), xlabel="index", title=f"Covariance of the {kind}s")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    axes[0].set_ylabel("singular value / largest")
    save(figure, out, "spectrum")
    write_csv(out / "spectrum.csv", ("network", "of", "index", "singular value"), rows)


def plot_mixture(out: Path, components: list[int], results: dict[str, dict]) -> None:
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    rows = []
    for i, (label, found) in enumerate(results.items()):
        entropies = [found[f"mixture{k}_entropy"] for k in components]
        rows += [(label, k, e, found[f"mixture{k}_fit"]) for k, e in zip(components, entropies, strict=True)]
        axis.plot(components, [math.nan if e is None else e for e in entropies], marker="o", ms=4, label=label,
                  **style(label, i))  # fmt: skip
    axis.set(xscale="log", xlabel="components of the mixture", ylabel="entropy (nats a dimension)")
    axis.set_title("Gaussian mixture of the representations")
    axis.set_xticks(components, [str(k) for k in components], minor=False)
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    save(figure, out, "mixture")
    write_csv(out / "mixture.csv", ("network", "components", "nats a dimension", "fit"), rows)


def plot_matrices(out: Path, networks: list[Network], shown: int, seed: int) -> None:
    """Covariance with its largest entry at 1, and cosines of some images; both from -1 to 1."""
    figure, axes = plt.subplots(
        2, len(networks), figsize=(3.3 * len(networks) + 1, 6.6), layout="constrained", squeeze=False
    )
    for i, (column, network) in enumerate(zip(axes.T, networks, strict=True)):
        covariance = covariance_of(network.embedding)
        covariance /= covariance.abs().max().clamp(min=1e-300)
        some = np.sort(np.random.default_rng(seed).permutation(len(network.embedding))[:shown])
        some = some[np.argsort(network.data.codes.numpy()[some], kind="stable")]
        u = F.normalize(network.embedding[some], dim=1)
        cosines = u @ u.T
        for axis, matrix in zip(column, (covariance, cosines), strict=True):
            image = axis.imshow(matrix.numpy(), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
        column[0].set_title(network.label, fontsize=9)
        column[0].set_xlabel("embedding dimension")
        column[1].set_xlabel(f"{len(some)} images, by code")
        name = f"{i + 1}_" + "".join(x if x.isalnum() else "_" for x in network.label)
        np.savetxt(out / f"matrices_{name}_covariance.csv", covariance.numpy(), fmt="%.4g", delimiter=",")
        np.savetxt(out / f"matrices_{name}_cosines.csv", cosines.numpy(), fmt="%.4g", delimiter=",")
    axes[0, 0].set_ylabel("covariance / largest entry")
    axes[1, 0].set_ylabel("cosine of embeddings")
    figure.colorbar(image, ax=axes, shrink=0.6)
    save(figure, out, "matrices")


def plot_codes(out: Path, networks: list[Network]) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    rows = []
    for i, network in enumerate(networks):
        counts = network.data.codes.unique(return_counts=True)[1].sort(descending=True)[0].tolist()
        rows += [(network.label, "images of a code", k + 1, count) for k, count in enumerate(counts)]
        left.step(range(1, len(counts) + 1), counts, where="mid",
                  label=f"{network.label}: {len(counts):,} of {network.data.out_dim:,} codes", **style(network.label, i))  # fmt: skip
        if network.alignment is None:
            continue
        density, edges = np.histogram(network.alignment.abs().numpy(), bins=50, range=(0, 1), density=True)
        middle = (edges[1:] + edges[:-1]) / 2
        rows += [(network.label, "density of |cosine|", f"{x:.3g}", f"{y:.6g}") for x, y in zip(middle, density, strict=True)]  # fmt: skip
        right.plot(middle, density, label=f"{network.label} (mean {network.alignment.abs().mean():.2f})", **style(network.label, i))  # fmt: skip
        if not i:
            right.axvline(network.chance_alignment, color="0.7", ls=":", label="random directions (mean)")
    left.set(xscale="log", yscale="log", xlabel="code, most used first", ylabel="images", title="Use of the codes")
    right.set(
        xlabel="|cosine| of embedding and its code", ylabel="density", title="Alignment to the codes", xlim=(0, 1)
    )
    for axis in (left, right):
        axis.grid(alpha=0.3, which="both")
        if axis.lines:
            axis.legend(fontsize=8)
    save(figure, out, "codes")
    write_csv(out / "codes.csv", ("network", "of", "x", "y"), rows)


def plot_tsne(out: Path, networks: list[Network], images: int, seed: int) -> None:
    from sklearn.manifold import TSNE

    figure, axes = plt.subplots(1, len(networks), figsize=(4.2 * len(networks), 4.2), layout="constrained", squeeze=False)  # fmt: skip
    rows = []
    for axis, network in zip(axes[0], networks, strict=True):
        data = network.data
        some = np.sort(np.random.default_rng(seed).permutation(len(data.features))[:images])
        axis.set(xticks=[], yticks=[])
        axis.set_title(network.label, fontsize=9)
        x = F.normalize(data.features[some], dim=1).numpy()
        if min(x.shape) < 5 or np.ptp(x, axis=0).max() < 1e-6:
            axis.set_xlabel("too few images, or all with the same features")
            continue
        place = TSNE(random_state=seed, perplexity=min(30, (len(x) - 1) / 3), init="pca").fit_transform(x)
        of = data.labels if data.classes else data.codes
        colour = np.zeros(len(some)) if of is None else of.numpy()[some]
        axis.scatter(*place.T, c=colour, cmap="tab10" if len(set(colour)) <= 10 else "nipy_spectral", s=3)
        axis.set_xlabel(f"{len(some)} images, by {'class' if data.classes else 'code'}")
        rows += [(network.label, data.names[i], f"{a:.4g}", f"{b:.4g}") for i, (a, b) in zip(some, place, strict=True)]
    save(figure, out, "tsne")
    write_csv(out / "tsne.csv", ("network", "image", "x", "y"), rows)


def save(figure, out: Path, name: str) -> None:
    figure.savefig(out / f"{name}.png", dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    errors.run_script(main)
