"""The paper's analysis figures of one or several networks, each with its numbers as CSV beside it."""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from cplearn.evaluation.collapse_numbers import Network, covariance_of
from cplearn.files import write_csv

FIGURES = ("spectrum", "mixture", "matrices", "codes", "tsne")


def draw_figures(
    out: Path,
    networks: list[Network],
    results: dict[str, dict],
    *,
    components: list[int],
    shown_images: int,
    tsne_images: int,
    seed: int,
) -> list[str]:
    """Draw all figures for which there are numbers; return their names.

    `results`: the numbers of each network by its label, as printed.
    """
    for name in FIGURES:  # of an earlier call
        (out / f"{name}.png").unlink(missing_ok=True)
    plot_spectrum(out, networks, results)
    if components:
        plot_mixture(out, components, results)
    with_codes = [n for n in networks if n.embedding is not None]
    if with_codes:
        plot_matrices(out, with_codes, shown_images, seed)
        plot_codes(out, with_codes)
    if tsne_images:
        plot_tsne(out, networks, tsne_images, seed)
    return sorted(f"{name}.png" for name in FIGURES if (out / f"{name}.png").exists())


def plot_spectrum(out: Path, networks: list[Network], results: dict[str, dict]) -> None:
    """Plot the singular values of the covariance of embeddings and representations."""
    figure, axes = pyplot().subplots(1, 2, figsize=(10, 4), layout="constrained")
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
            label = f"{as_text(network.label)} (rank {results[network.label][rank]:.0f} of {x.shape[1]})"
            axis.plot(range(1, len(share) + 1), share, label=label, **style(network.label, i))
        axis.set(xscale="log", yscale="log", ylim=(1e-9, 2), xlabel="index", title=f"Covariance of the {kind}s")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    axes[0].set_ylabel("singular value / largest")
    save_figure(figure, out, "spectrum")
    write_csv(out / "spectrum.csv", ("network", "of", "index", "singular value"), rows)


def plot_mixture(out: Path, components: list[int], results: dict[str, dict]) -> None:
    """Plot the entropy of Gaussian mixtures of the representations against their number of components."""
    figure, axis = pyplot().subplots(figsize=(6, 4), layout="constrained")
    rows = []
    for i, (label, metrics) in enumerate(results.items()):
        entropies = [metrics[f"mixture{k}_entropy"] for k in components]
        rows += [(label, k, e, metrics[f"mixture{k}_fit"]) for k, e in zip(components, entropies, strict=True)]
        drawn = [math.nan if e is None else e for e in entropies]
        axis.plot(components, drawn, marker="o", ms=4, label=as_text(label), **style(label, i))
    axis.set(xscale="log", xlabel="components of the mixture", ylabel="entropy (nats a dimension)")
    axis.set_title("Gaussian mixture of the representations")
    axis.set_xticks(components, [str(k) for k in components], minor=False)
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    save_figure(figure, out, "mixture")
    write_csv(out / "mixture.csv", ("network", "components", "nats a dimension", "fit"), rows)


def plot_matrices(out: Path, networks: list[Network], shown: int, seed: int) -> None:
    """Draw the covariance with its largest entry at 1, and the cosines of some images; both from -1 to 1."""
    size = (3.3 * len(networks) + 1, 6.6)
    figure, axes = pyplot().subplots(2, len(networks), figsize=size, layout="constrained", squeeze=False)
    for i, (column, network) in enumerate(zip(axes.T, networks, strict=True)):
        covariance = covariance_of(network.embedding)
        covariance /= covariance.abs().max().clamp(min=1e-300)
        some = sample_rows(len(network.embedding), shown, seed)
        some = some[np.argsort(network.data.codes.numpy()[some], kind="stable")]
        u = F.normalize(network.embedding[some], dim=1)
        cosines = u @ u.T
        for axis, matrix in zip(column, (covariance, cosines), strict=True):
            image = axis.imshow(matrix.numpy(), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
        column[0].set_title(as_text(network.label), fontsize=9)
        column[0].set_xlabel("embedding dimension")
        column[1].set_xlabel(f"{len(some)} images, by code")
        name = f"{i + 1}_" + "".join(x if x.isalnum() else "_" for x in network.label[:40])
        np.savetxt(out / f"matrices_{name}_covariance.csv", covariance.numpy(), fmt="%.4g", delimiter=",")
        np.savetxt(out / f"matrices_{name}_cosines.csv", cosines.numpy(), fmt="%.4g", delimiter=",")
    axes[0, 0].set_ylabel("covariance / largest entry")
    axes[1, 0].set_ylabel("cosine of embeddings")
    figure.colorbar(image, ax=axes, shrink=0.6)
    save_figure(figure, out, "matrices")


def plot_codes(out: Path, networks: list[Network]) -> None:
    """Plot how often each code is used, and how well embeddings align with their codes."""
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(10, 4), layout="constrained")
    rows = []
    for i, network in enumerate(networks):
        look = style(network.label, i)
        counts = network.data.codes.unique(return_counts=True)[1].sort(descending=True)[0].tolist()
        rows += [(network.label, "images of a code", k + 1, count) for k, count in enumerate(counts)]
        label = f"{as_text(network.label)}: {len(counts):,} of {network.data.out_dim:,} codes"
        left.step(range(1, len(counts) + 1), counts, where="mid", label=label, **look)
        if network.alignment is None:
            continue
        alignment = network.alignment.abs()
        density, edges = np.histogram(alignment.numpy(), bins=50, range=(0, 1), density=True)
        middle = (edges[1:] + edges[:-1]) / 2
        points = zip(middle, density, strict=True)
        rows += [(network.label, "density of |cosine|", f"{x:.3g}", f"{y:.6g}") for x, y in points]
        right.plot(middle, density, label=f"{as_text(network.label)} (mean {alignment.mean():.2f})", **look)
        if not i:
            right.axvline(network.chance_alignment, color="0.7", ls=":", label="random directions (mean)")
    left.set(xscale="log", yscale="log", xlabel="code, most used first", ylabel="images", title="Use of the codes")
    right.set(xlabel="|cosine| of embedding and its code", ylabel="density", title="Alignment to the codes")
    right.set_xlim(0, 1)
    for axis in (left, right):
        axis.grid(alpha=0.3, which="both")
        if axis.lines:
            axis.legend(fontsize=8)
    save_figure(figure, out, "codes")
    write_csv(out / "codes.csv", ("network", "of", "x", "y"), rows)


def plot_tsne(out: Path, networks: list[Network], images: int, seed: int) -> None:
    """Draw a t-SNE of the representations, colored by class, or by code where there are no classes."""
    from sklearn.manifold import TSNE

    size = (4.2 * len(networks), 4.2)
    figure, axes = pyplot().subplots(1, len(networks), figsize=size, layout="constrained", squeeze=False)
    rows = []
    for axis, network in zip(axes[0], networks, strict=True):
        data = network.data
        some = sample_rows(len(data.features), images, seed)
        axis.set(xticks=[], yticks=[])
        axis.set_title(as_text(network.label), fontsize=9)
        x = F.normalize(data.features[some], dim=1).numpy()
        if min(x.shape) < 5 or np.ptp(x, axis=0).max() < 1e-6:
            axis.set_xlabel("too few images, or all with the same features")
            continue
        place = TSNE(random_state=seed, perplexity=min(30, (len(x) - 1) / 3), init="pca").fit_transform(x)
        of = data.labels if data.classes else data.codes
        color = np.zeros(len(some)) if of is None else of.numpy()[some]
        axis.scatter(*place.T, c=color, cmap="tab10" if len(set(color)) <= 10 else "nipy_spectral", s=3)
        axis.set_xlabel(f"{len(some)} images, by {'class' if data.classes else 'code'}")
        rows += [(network.label, data.names[i], f"{a:.4g}", f"{b:.4g}") for i, (a, b) in zip(some, place, strict=True)]
    save_figure(figure, out, "tsne")
    write_csv(out / "tsne.csv", ("network", "image", "x", "y"), rows)


def pyplot():
    """Import matplotlib.pyplot, to draw without a display."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def style(network_label: str, i: int) -> dict[str, str]:
    """Return color and line of a network; the baseline is gray and dashed in all figures."""
    return {"color": "0.45", "ls": "--"} if network_label == "random init" else {"color": f"C{i % 10}", "ls": "-"}


def as_text(label: str) -> str:
    """Return a user's words for matplotlib, which takes $ for a formula and leaves out what begins with _."""
    label = label if len(label) <= 60 else f"{label[:57]}..."
    label = label.replace("$", r"\$")
    return f" {label}" if label.startswith("_") else label


def sample_rows(n: int, most: int, seed: int) -> np.ndarray:
    """Return at most so many of n row numbers, in their order: the same ones for every network."""
    return np.sort(np.random.default_rng(seed).permutation(n)[:most])


def save_figure(figure, out: Path, name: str) -> None:
    """Write a figure as PNG and forget it."""
    figure.savefig(out / f"{name}.png", dpi=120)
    pyplot().close(figure)
