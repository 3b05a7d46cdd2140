"""The paper's analysis figures of one or several networks, each with its numbers as CSV beside it."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from cplearn.files import check_replaceable, write_csv
from cplearn.metrics.analysis import Network, covariance_of
from cplearn.pictures.matrices import Drawn, draw_cosines, draw_covariances, groups_of, write_matrix
from cplearn.pictures.style import (
    COLORS,
    MARKERS,
    OTHER,
    as_text,
    finish,
    panels,
    png_mark,
    save_figure,
    style,
)

MOST_LOOKS = len(COLORS) * len(MARKERS)  # classes or codes with a look of their own


class Analysis(NamedTuple):
    """What the figures show."""

    networks: list[Network]
    results: dict[str, dict]  # the numbers of each network by its label, as printed
    components: list[int]  # of the mixtures
    shown_images: int  # of the matrix of cosines
    tsne_images: int
    seed: int

    def some_images(self, most: int) -> np.ndarray:
        """Return at most so many rows, in their order: the same ones for every network."""
        n = len(self.networks[0].data.features)
        return np.sort(np.random.default_rng(self.seed).permutation(n)[:most])


def check_figures(out: Path) -> None:
    """Raise `UserError` if a figure or its table would replace a file that is no earlier one."""
    for name, (_, header) in FIGURES.items():
        check_replaceable(out / f"{name}.png", png_mark(), "--output_dir")
        if header:
            check_replaceable(out / f"{name}.csv", ",".join(header).encode(), "--output_dir")


def draw_figures(out: Path, analysis: Analysis) -> list[str]:
    """Draw all figures for which there are numbers, in place of those of an earlier call; return their names."""
    names = []
    for name, (draw, header) in FIGURES.items():
        for suffix in (".png", ".csv") if header else (".png",):
            (out / f"{name}{suffix}").unlink(missing_ok=True)
        drawn = draw(analysis)
        if drawn is None:
            continue
        names.append(f"{name}.png")
        save_figure(drawn.figure, out, name)
        if header:
            write_csv(out / f"{name}.csv", header, drawn.rows)
        for matrix, values in drawn.matrices.items():
            write_matrix(out / f"{matrix}.csv", values)
    return sorted(names)


# --- curves -------------------------------------------------------------------------------------------


def draw_spectrum(analysis: Analysis) -> Drawn:
    """Draw the singular values of the covariance of embeddings and representations."""
    figure, (axes,) = panels(2)
    rows = []
    kinds = {"embedding": "embedding_rank", "representation": "features_rank"}
    for axis, (kind, rank) in zip(axes, kinds.items(), strict=True):
        for i, network in enumerate(analysis.networks):
            x = network.vectors(kind)
            if x is None:
                continue
            values = torch.linalg.eigvalsh(covariance_of(x)).flip(0).clamp(min=0)
            rows += [(network.label, kind, k + 1, f"{v:.6g}") for k, v in enumerate(values.tolist())]
            share = (values / values[0].clamp(min=1e-300)).clamp(min=1e-12)  # below the axis, which has no 0
            label = f"{as_text(network.label)} (rank {analysis.results[network.label][rank]:.0f} of {x.shape[1]})"
            axis.plot(range(1, len(share) + 1), share, label=label, **style(network.label, i))
        axis.set(xscale="log", yscale="log", ylim=(1e-9, 2))
        finish(axis, xlabel="index", ylabel="singular value / largest", title=f"Covariance of the {kind}s")
    return Drawn(figure, rows)


def draw_mixture(analysis: Analysis) -> Drawn | None:
    """Draw the entropy of Gaussian mixtures of the representations against their number of components."""
    if not analysis.components:
        return None
    figure, ((axis,),) = panels(1, width=6)
    rows = [
        (label, k, metrics[f"mixture{k}_entropy"], metrics[f"mixture{k}_fit"])
        for label, metrics in analysis.results.items()
        for k in analysis.components
    ]
    for i, label in enumerate(analysis.results):
        fitted = [(k, entropy, fit) for owner, k, entropy, fit in rows if owner == label and entropy is not None]
        look = style(label, i)
        axis.plot([k for k, *_ in fitted], [entropy for _, entropy, _ in fitted], label=as_text(label), **look)
        for k, entropy, fit in fitted:
            axis.plot(k, entropy, "o", ms=5, color=look["color"], mfc=look["color"] if fit == "ok" else "white")
    ticks = sorted({k for _, k, entropy, _ in rows if entropy is not None})
    axis.set_xscale("log")
    axis.set_xticks(ticks, map(str, ticks))
    axis.minorticks_off()
    finish(
        axis,
        xlabel="components of the mixture (hollow: poor fit)",
        ylabel="entropy (nats per dimension)",
        title="Gaussian mixture of the representations",
    )
    return Drawn(figure, rows)


def draw_codes(analysis: Analysis) -> Drawn | None:
    """Draw how often each code is used, and how well embeddings align with their codes."""
    networks = [network for network in analysis.networks if network.embedding is not None]
    if not networks:
        return None
    figure, ((left, right),) = panels(2)
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
    left.set(xscale="log", yscale="log")
    finish(left, xlabel="code, most used first", ylabel="images", title="Use of the codes")
    right.set_xlim(0, 1)
    finish(right, xlabel="|cosine| of embedding and its code", ylabel="density", title="Alignment to the codes")
    return Drawn(figure, rows)


# --- t-SNE --------------------------------------------------------------------------------------------


def draw_tsne(analysis: Analysis) -> Drawn | None:
    """Draw a t-SNE of the representations, colored by class, or by code where there are no classes."""
    from sklearn.manifold import TSNE

    if not analysis.tsne_images:
        return None
    figure, (axes,) = panels(len(analysis.networks), width=4.6, height=5.6)
    rows, some = [], analysis.some_images(analysis.tsne_images)
    for axis, network in zip(axes, analysis.networks, strict=True):
        axis.set(xticks=[], yticks=[])
        axis.set_title(as_text(network.label), fontsize=11)
        x = F.normalize(network.data.features[some], dim=1).numpy()
        if min(x.shape) < 5 or np.ptp(x, axis=0).max() < 1e-6:
            axis.set_xlabel("too few images, or all with the same features")
            continue
        place = TSNE(random_state=analysis.seed, perplexity=min(30, (len(x) - 1) / 3), init="pca").fit_transform(x)
        draw_points(axis, place, network, some)
        points = zip(some, place, strict=True)
        rows += [(network.label, network.data.names[i], f"{a:.4g}", f"{b:.4g}") for i, (a, b) in points]
    return Drawn(figure, rows)


def draw_points(axis, place: np.ndarray, network: Network, some: np.ndarray) -> None:
    """Draw these images at their places, in the look of their class, or else of their code; what is rare is gray."""
    data = network.data
    common = {"s": float(np.clip(16_000 / len(some), 8, 40)), "lw": 0}
    axis.set_xlabel(f"{len(some):,} images")
    if not data.classes and data.codes is None:
        axis.scatter(*place.T, color=COLORS[0], **common)
        return
    groups, names, _ = groups_of(network)
    groups, names = groups.numpy()[some], names[:MOST_LOOKS]
    rare = (groups < 0) | (groups >= len(names))
    if rare.any():
        axis.scatter(*place[rare].T, color=OTHER, label="all others", **common)
    for k, name in enumerate(names):
        look = {"color": COLORS[k % len(COLORS)], "marker": MARKERS[k // len(COLORS)], "label": as_text(name)}
        axis.scatter(*place[groups == k].T, **look, **common)
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.06)}
    columns = max(1, 60 // (6 + max(map(len, names))))
    axis.legend(title=f"{'classes' if data.classes else 'codes'} (images)", ncols=columns, fontsize=8, title_fontsize=8,
                frameon=False, **below)  # fmt: skip


FIGURES = {  # by name: how each is drawn, and the header of its table
    "spectrum": (draw_spectrum, ("network", "of", "index", "singular value")),
    "mixture": (draw_mixture, ("network", "components", "nats per dimension", "fit")),
    "matrices": (lambda analysis: draw_covariances(analysis.networks), None),
    "cosines": (lambda analysis: draw_cosines(analysis.networks, analysis.some_images(analysis.shown_images)), None),
    "codes": (draw_codes, ("network", "of", "x", "y")),
    "tsne": (draw_tsne, ("network", "image", "x", "y")),
}
