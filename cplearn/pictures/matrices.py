"""Matrices of networks as pictures: covariances of dimensions, and cosines of images, by class and code."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cplearn.metrics.analysis import Network, block_cosines, covariance_of, off_diagonal_energy
from cplearn.pictures.style import as_text, diverging, pyplot, save_figure, shortened

CELLS = 100  # along a side of the matrix of images
DIMENSIONS = 128  # drawn of a covariance
MOST_BLOCKS = 20  # that are named, and codes that are drawn
MOST_NUMBERS = 12  # blocks along a side with their number written


def plot_covariances(out: Path, networks: list[Network]) -> None:
    """Draw the covariance of embedding and representation, similar dimensions side by side, with its energy."""
    kinds = ["embedding", "representation"] if any(n.embedding is not None for n in networks) else ["representation"]
    size = (4.2 * len(networks) + 1, 4.4 * len(kinds))
    figure, axes = pyplot().subplots(len(kinds), len(networks), figsize=size, layout="constrained", squeeze=False)
    for row, kind in zip(axes, kinds, strict=True):
        for i, (axis, network) in enumerate(zip(row, networks, strict=True)):
            x = network.embedding if kind == "embedding" else network.data.features
            if x is None:
                axis.set_axis_off()
                continue
            covariance = covariance_of(x)
            write_matrix(out / f"matrices_{file_name(network.label, i)}_{kind}.csv", covariance)
            order = similar_together(covariance)
            drawn = order[:: -(-len(order) // DIMENSIONS)]  # not means, in which the diagonal would fade
            shares = (covariance / covariance.diagonal().mean().clamp(min=1e-300))[drawn][:, drawn]
            image = axis.imshow(shares.numpy(), cmap=diverging(), vmin=-1, vmax=1, interpolation="nearest")
            off, chance = off_diagonal_energy(x)
            energy = f"energy off the diagonal {off:.1%} (chance {chance:.1%}), on it {1 - off:.1%}"
            axis.set_title(f"{as_text(network.label)}\n{energy}", fontsize=9)
            some = f"{len(order)}" if len(drawn) == len(order) else f"{len(drawn)} of {len(order)}"
            axis.set_xlabel(f"{some} dimensions, similar ones together", fontsize=9)
            axis.set(xticks=[], yticks=[])
            if not i:
                axis.set_ylabel(kind, fontsize=11)
    bar = figure.colorbar(image, ax=axes, shrink=0.6, extend="both")
    bar.set_label("covariance / mean variance (colors end at ±1)", fontsize=9)
    save_figure(figure, out, "matrices")


def similar_together(covariance: Tensor) -> np.ndarray:
    """Return an order of the dimensions in which correlated ones are neighbors: leaves of average linkage.

    Shape: (d, d) -> int (d,).
    """
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    deviation = covariance.diagonal().sqrt()
    correlation = (covariance / deviation / deviation[:, None]).nan_to_num(0, 0, 0)  # of constant dimensions: none
    distance = (1 - correlation).clamp(0, 2).numpy()
    return (
        leaves_list(linkage(squareform(distance, checks=False), "average")) if len(distance) > 1 else np.zeros(1, int)
    )


def plot_cosines(out: Path, networks: list[Network], some: np.ndarray) -> None:
    """Draw cosines of embeddings (features without a head): of some images, and the means over classes or codes.

    Images are in the order of class, then code. Nothing is drawn where there are neither.
    """
    networks = [n for n in networks if n.data.classes or n.data.codes is not None]
    if not networks:
        return
    size = (4.6 * len(networks) + 1, 9.4)
    figure, axes = pyplot().subplots(2, len(networks), figsize=size, layout="constrained", squeeze=False)
    cells, blocks = [], []
    for i, network in enumerate(networks):
        x = network.data.features if network.embedding is None else network.embedding
        order = some[in_order(network, some)]
        u = F.normalize(x[order].double(), dim=1)
        name = file_name(network.label, i)
        write_matrix(out / f"cosines_{name}_images.csv", u @ u.T)
        cells.append((in_cells(u @ u.T, CELLS), order))
        groups, names, share = groups_of(network)
        means = block_cosines(x, groups, len(names))
        write_matrix(out / f"cosines_{name}_blocks.csv", means)
        blocks.append((means, groups, names, share))
    for row, draw, drawn in ((axes[0], draw_images, cells), (axes[1], draw_blocks, blocks)):
        limit = limit_of([first for first, *_ in drawn])
        for axis, network, what in zip(row, networks, drawn, strict=True):
            image = draw(axis, network, *what, limit)
        bar = figure.colorbar(image, ax=list(row), shrink=0.8, extend="both")
        bar.set_label(f"mean cosine (colors end at ±{limit:g})", fontsize=9)
    save_figure(figure, out, "cosines")


def in_order(network: Network, some: np.ndarray) -> np.ndarray:
    """Return the order of these images by class, then by code, each class's frequent codes first.

    Shape: int (m,) -> (m,).
    """
    labels = network.data.labels.numpy()[some]
    if network.data.codes is None:
        return np.argsort(labels, kind="stable")
    codes = network.data.codes.numpy()[some]
    pairs = labels * (codes.max() + 1) + codes
    _, which, counts = np.unique(pairs, return_inverse=True, return_counts=True)
    return np.lexsort((codes, -counts[which], labels))


def in_cells(matrix: Tensor, cells: int) -> Tensor:
    """Return means over square cells of equal size, not more than `cells` along a side; the rest at the end is left
    out. An image with itself does not count. Shape: (m, m) -> (k, k)."""
    m = len(matrix)
    size = -(-m // cells)
    if size == 1:
        return matrix
    k = m // size
    counted = matrix.clone().fill_diagonal_(float("nan"))[: k * size, : k * size]
    return counted.reshape(k, size, k, size).nanmean(dim=(1, 3))


def groups_of(network: Network) -> tuple[Tensor, list[str], float]:
    """Return the group of each image (-1: none), the names of the groups with their counts, and the share in groups.

    Groups are the classes, or the most used codes where there are no classes. Shape: int64 (n,).
    """
    data = network.data
    if data.classes:
        counts = data.labels.bincount(minlength=len(data.classes)).tolist()
        names = [f"{shortened(name, 14)} ({n})" for name, n in zip(data.classes, counts, strict=True)]
        return data.labels, names, 1.0
    codes, which, counts = data.codes.unique(return_inverse=True, return_counts=True)
    most = counts.argsort(descending=True, stable=True)[:MOST_BLOCKS]
    position = torch.full((len(codes),), -1).index_copy_(0, most, torch.arange(len(most)))
    names = [f"{codes[k]} ({counts[k]})" for k in most]
    return position[which], names, counts[most].sum().item() / len(which)


def limit_of(matrices: list[Tensor]) -> float:
    """Return where colors end: the largest of nearly all magnitudes, in one digit."""
    values = torch.cat([m.abs().flatten() for m in matrices])
    largest = np.quantile(values[values.isfinite()].numpy(), 0.995) if values.isfinite().any() else 1.0
    digit = 10.0 ** np.floor(np.log10(max(largest, 0.01)))
    return float(f"{np.clip(np.ceil(largest / digit) * digit, 0.01, 1):.1g}")


def draw_images(axis, network: Network, cells: Tensor, order: np.ndarray, limit: float):
    """Draw the cosines of images in cells; return the image for its color bar."""
    m = len(order)
    image = axis.imshow(
        cells.numpy(), cmap=diverging(), vmin=-limit, vmax=limit, extent=(0, m, m, 0), interpolation="nearest"
    )
    axis.set_title(as_text(network.label), fontsize=11)
    size = -(-m // CELLS)
    means = f"; means of {size} x {size}" if size > 1 else ""
    kind = "class, then code" if network.data.classes else "code"
    axis.set_xlabel(f"{m:,} images, by {kind}{means}", fontsize=9)
    axis.tick_params(labelsize=8)
    classes = network.data.classes
    if classes and len(classes) <= MOST_BLOCKS:
        ends = np.searchsorted(network.data.labels.numpy()[order], np.arange(len(classes) + 1))
        for end in ends[1:-1]:
            axis.axhline(end, color="black", lw=0.4)
            axis.axvline(end, color="black", lw=0.4)
        axis.set_yticks((ends[1:] + ends[:-1]) / 2, [as_text(shortened(name, 12)) for name in classes], fontsize=8)
        axis.tick_params(axis="y", length=0)
    return image


def draw_blocks(axis, network: Network, means: Tensor, groups: Tensor, names: list[str], share: float, limit: float):
    """Draw the mean cosines of classes or codes; return the image for its color bar."""
    k = len(names)
    image = axis.imshow(means.numpy(), cmap=diverging(), vmin=-limit, vmax=limit, interpolation="nearest")
    axis.set_facecolor("0.85")  # of what has no pair
    axis.tick_params(labelsize=8)
    if k <= MOST_BLOCKS:
        short = [as_text(name.rpartition(" (")[0]) for name in names]
        axis.set_xticks(range(k), short, rotation=90, fontsize=8)
        axis.set_yticks(range(k), [as_text(name) for name in names], fontsize=8)
    if k <= MOST_NUMBERS:
        for (a, b), value in np.ndenumerate(means.numpy()):
            if np.isfinite(value):
                color = "white" if abs(value) > 0.65 * limit else "black"
                axis.text(
                    b,
                    a,
                    two_digits(value).replace("0.", "."),
                    ha="center",
                    va="center",
                    fontsize=7,
                    color=color,
                )
    own = means.diagonal().nanmean().item()
    other = means[~torch.eye(k, dtype=torch.bool)].nanmean().item()
    kind = "class" if network.data.classes else "code"
    axis.set_title(f"means by {kind}: same {two_digits(own)}, other {two_digits(other)}", fontsize=9)
    counts, total = groups[groups >= 0].bincount(minlength=k), f"{len(groups):,} images"
    least, most = counts.min(), counts.max()
    classes = f"{k} classes of {least:,}{f' to {most:,}' if most > least else ''} images"
    codes = f"{k} most used codes (images): {share:.0%} of {total}"
    axis.set_xlabel(classes if network.data.classes else codes, fontsize=9)
    return image


def two_digits(value: float) -> str:
    """Return the number with two digits after the point, and no minus before a zero."""
    return f"{round(value, 2) + 0:.2f}"


def file_name(label: str, i: int) -> str:
    """Return a user's words for the i-th network as a part of a file's name."""
    return f"{i + 1}_" + "".join(x if x.isalnum() else "_" for x in label[:40])


def write_matrix(path: Path, matrix: Tensor) -> None:
    """Write a matrix as CSV, without a header."""
    path.unlink(missing_ok=True)  # never through a link
    np.savetxt(path, matrix.numpy(), fmt="%.4g", delimiter=",")
