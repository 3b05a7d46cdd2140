"""The paper's analysis figures of one or several networks, each with its numbers as CSV beside it."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from cplearn.errors import UserError
from cplearn.features.splits import Features
from cplearn.files import is_own_table, write_csv
from cplearn.metrics.analysis import Network, covariance_of
from cplearn.pictures.matrices import plot_cosines, plot_covariances
from cplearn.pictures.style import COLORS, MARKERS, OTHER, as_text, is_own_figure, pyplot, save_figure, shortened, style

FIGURES = ("spectrum", "mixture", "matrices", "cosines", "codes", "tsne")
TABLES = {  # beside figures of these names
    "spectrum": ("network", "of", "index", "singular value"),
    "mixture": ("network", "components", "nats per dimension", "fit"),
    "codes": ("network", "of", "x", "y"),
    "tsne": ("network", "image", "x", "y"),
}


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
        if name in TABLES:
            (out / f"{name}.csv").unlink(missing_ok=True)
    plot_spectrum(out, networks, results)
    if components:
        plot_mixture(out, components, results)
    with_codes = [n for n in networks if n.embedding is not None]
    plot_covariances(out, networks)
    some = sample_rows(len(networks[0].data.features), shown_images, seed)
    plot_cosines(out, networks, some)
    if with_codes:
        plot_codes(out, with_codes)
    if tsne_images:
        plot_tsne(out, networks, tsne_images, seed)
    return sorted(f"{name}.png" for name in FIGURES if (out / f"{name}.png").exists())


def check_figures(out: Path) -> None:
    """Raise `UserError` if a figure or its table would replace a file that is no earlier one."""
    for name in FIGURES:
        path = out / f"{name}.png"
        if os.path.lexists(path) and not is_own_figure(path):
            raise UserError(f"--output_dir {out}: {name}.png is no figure of this command: name another folder")
    for name, header in TABLES.items():
        path = out / f"{name}.csv"
        if os.path.lexists(path) and not is_own_table(path, header):
            raise UserError(f"--output_dir {out}: {name}.csv is no table of this command: name another folder")


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
            share = (values / values[0].clamp(min=1e-300)).clamp(min=1e-12)  # below the axis, which has no 0
            label = f"{as_text(network.label)} (rank {results[network.label][rank]:.0f} of {x.shape[1]})"
            axis.plot(range(1, len(share) + 1), share, label=label, **style(network.label, i))
        axis.set(xscale="log", yscale="log", ylim=(1e-9, 2), xlabel="index", title=f"Covariance of the {kind}s")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    axes[0].set_ylabel("singular value / largest")
    save_figure(figure, out, "spectrum")
    write_csv(out / "spectrum.csv", TABLES["spectrum"], rows)


def plot_mixture(out: Path, components: list[int], results: dict[str, dict]) -> None:
    """Plot the entropy of Gaussian mixtures of the representations against their number of components."""
    figure, axis = pyplot().subplots(figsize=(6, 4), layout="constrained")
    rows, fitted = [], set()
    for i, (label, metrics) in enumerate(results.items()):
        entropies = [metrics[f"mixture{k}_entropy"] for k in components]
        fits = [metrics[f"mixture{k}_fit"] for k in components]
        rows += [(label, k, e, fit) for k, e, fit in zip(components, entropies, fits, strict=True)]
        drawn = [(k, e, fit) for k, e, fit in zip(components, entropies, fits, strict=True) if e is not None]
        fitted |= {k for k, _, _ in drawn}
        look = style(label, i)
        axis.plot([k for k, _, _ in drawn], [e for _, e, _ in drawn], label=as_text(label), **look)
        for k, e, fit in drawn:
            axis.plot(k, e, "o", ms=5, color=look["color"], mfc=look["color"] if fit == "ok" else "white")
    axis.set(xscale="log", xlabel="components of the mixture (hollow: poor fit)", ylabel="entropy (nats per dimension)")
    axis.set_title("Gaussian mixture of the representations")
    axis.set_xticks(sorted(fitted), [str(k) for k in sorted(fitted)], minor=False)
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    save_figure(figure, out, "mixture")
    write_csv(out / "mixture.csv", TABLES["mixture"], rows)


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
    write_csv(out / "codes.csv", TABLES["codes"], rows)


def plot_tsne(out: Path, networks: list[Network], images: int, seed: int) -> None:
    """Draw a t-SNE of the representations, colored by class, or by code where there are no classes."""
    from sklearn.manifold import TSNE

    classes = networks[0].data.classes
    size = (4.6 * len(networks), 4.4 if classes and len(classes) > MOST_NAMES else 5.6)
    figure, axes = pyplot().subplots(1, len(networks), figsize=size, layout="constrained", squeeze=False)
    rows = []
    for axis, network in zip(axes[0], networks, strict=True):
        data = network.data
        some = sample_rows(len(data.features), images, seed)
        axis.set(xticks=[], yticks=[])
        axis.set_title(as_text(network.label), fontsize=11)
        x = F.normalize(data.features[some], dim=1).numpy()
        if min(x.shape) < 5 or np.ptp(x, axis=0).max() < 1e-6:
            axis.set_xlabel("too few images, or all with the same features")
            continue
        place = TSNE(random_state=seed, perplexity=min(30, (len(x) - 1) / 3), init="pca").fit_transform(x)
        draw_points(axis, place, data, some)
        rows += [(network.label, data.names[i], f"{a:.4g}", f"{b:.4g}") for i, (a, b) in zip(some, place, strict=True)]
    if classes:
        name_classes(figure, axes[0], classes)
    save_figure(figure, out, "tsne")
    write_csv(out / "tsne.csv", TABLES["tsne"], rows)


MOST_NAMES = len(COLORS) * len(MARKERS)  # classes that a legend names; more are on a color bar
MOST_CODES = len(COLORS)  # codes with a color of their own


def draw_points(axis, place: np.ndarray, data: Features, some: np.ndarray) -> None:
    """Draw these images at their places, colored by class, or else the most used codes with a legend."""
    size = float(np.clip(16_000 / len(some), 8, 40))
    if data.classes and len(data.classes) > MOST_NAMES:
        of = data.labels.numpy()[some]
        axis.scatter(*place.T, c=of, cmap="viridis", vmin=0, vmax=len(data.classes) - 1, s=size, lw=0)
        axis.set_xlabel(f"{len(some):,} images of {len(data.classes)} classes")
    elif data.classes:
        of = data.labels.numpy()[some]
        draw_groups(axis, place, of, size)
        axis.set_xlabel(f"{len(some):,} images of {len(data.classes)} classes")
    elif data.codes is None:
        axis.scatter(*place.T, s=size, lw=0, color=COLORS[0])
        axis.set_xlabel(f"{len(some):,} images, without classes and codes")
    else:
        of = data.codes.numpy()[some]
        codes, counts = np.unique(of, return_counts=True)
        most = [int(codes[k]) for k in np.argsort(-counts, kind="stable")[:MOST_CODES] if counts[k] > 1]
        other = ~np.isin(of, most)
        if other.any():
            label = f"{len(codes) - len(most)} other codes ({other.sum()})" if most else f"{len(codes)} codes"
            axis.scatter(*place[other].T, s=size, lw=0, color=OTHER, label=label)
        for k, code in enumerate(most):
            axis.scatter(*place[of == code].T, s=size, lw=0, label=f"code {code} ({(of == code).sum()})", **look_of(k))
        axis.set_xlabel(f"{len(some):,} images with {len(codes):,} codes (images of each)")
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=3, fontsize=8, frameon=False, markerscale=2)


def draw_groups(axis, place: np.ndarray, groups: np.ndarray, size: float) -> None:
    """Draw points in the look of their groups, in a random order: none lies on top of all others."""
    order = np.random.default_rng(0).permutation(len(groups))
    for marker in np.unique(groups // len(COLORS)):
        of_marker = order[groups[order] // len(COLORS) == marker]
        colors = [COLORS[k % len(COLORS)] for k in groups[of_marker]]
        axis.scatter(*place[of_marker].T, c=colors, marker=MARKERS[marker], s=size, lw=0)


def look_of(k: int) -> dict[str, str]:
    """Return color and marker of the k-th of at most `MOST_NAMES` groups."""
    return {"color": COLORS[k % len(COLORS)], "marker": MARKERS[k // len(COLORS) % len(MARKERS)]}


def name_classes(figure, axes: Sequence, classes: list[str]) -> None:
    """Add a legend of the classes, or a color bar with some of their names if they are many."""
    if len(classes) <= MOST_NAMES:
        from matplotlib.lines import Line2D

        names = [as_text(shortened(name, 16)) for name in classes]
        marks = [Line2D([], [], ls="", ms=7, label=name, **look_of(k)) for k, name in enumerate(names)]
        columns = min(len(names), 5 * len(axes) if max(map(len, names)) < 6 else 3 * len(axes))
        figure.legend(handles=marks, loc="outside lower center", ncols=columns, fontsize=9, frameon=False)
        return
    colors = pyplot().cm.ScalarMappable(pyplot().Normalize(0, len(classes) - 1), "viridis")
    some = np.linspace(0, len(classes) - 1, 6).round().astype(int)
    bar = figure.colorbar(
        colors, ax=list(axes), ticks=some, shrink=0.8, label=f"{len(classes)} classes, in their order"
    )
    bar.set_ticklabels([as_text(shortened(classes[k], 16)) for k in some], fontsize=8)


def sample_rows(n: int, most: int, seed: int) -> np.ndarray:
    """Return at most so many of n row numbers, in their order: the same ones for every network."""
    return np.sort(np.random.default_rng(seed).permutation(n)[:most])
