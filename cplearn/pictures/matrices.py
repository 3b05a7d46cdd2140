"""Matrices of networks as pictures: covariances of dimensions, and cosines of images, by class and code."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cplearn.files import written
from cplearn.metrics.analysis import Network, block_cosines, covariance_of, off_diagonal_energy
from cplearn.pictures.style import as_text, diverging, panels, shortened

CELLS = 100  # along a side of the matrix of images
DIMENSIONS = 128  # drawn of a covariance
MOST_BLOCKS = 20  # that are named, and codes that are drawn
MOST_NUMBERS = 12  # blocks along a side with their number written


class Drawn(NamedTuple):
    """A figure and its numbers."""

    figure: object
    rows: list[tuple] = []
    matrices: dict[str, Tensor] = {}  # by the names of their files


def draw_covariances(networks: list[Network]) -> Drawn:
    """Draw the covariance of embedding and representation, similar dimensions side by side, with its energy."""
    kinds = ["embedding", "representation"] if any(n.embedding is not None for n in networks) else ["representation"]
    figure, axes = panels(len(networks), len(kinds), width=4.2, height=4.4, aside=1)
    matrices = {}
    for row, kind in zip(axes, kinds, strict=True):
        row[0].set_ylabel(kind, fontsize=11)
        for i, (axis, network) in enumerate(zip(row, networks, strict=True)):
            x = network.vectors(kind)
            if x is None:
                axis.set_axis_off()
                continue
            covariance = covariance_of(x)
            matrices[f"matrices_{file_name(network.label, i)}_{kind}"] = covariance
            order = similar_together(covariance)
            some = order[:: -(-len(order) // DIMENSIONS)]  # not means, in which the diagonal would fade
            image = show(axis, (covariance / covariance.diagonal().mean().clamp(min=1e-300))[some][:, some], 1)
            off, chance = off_diagonal_energy(x)
            energy = f"energy off the diagonal {off:.1%} (chance {chance:.1%}), on it {1 - off:.1%}"
            axis.set_title(f"{as_text(network.label)}\n{energy}", fontsize=9)
            count = f"{len(order)}" if len(some) == len(order) else f"{len(some)} of {len(order)}"
            axis.set_xlabel(f"{count} dimensions, similar ones together", fontsize=9)
            axis.set(xticks=[], yticks=[])
    add_bar(figure, image, axes, "covariance / mean variance", 1)
    return Drawn(figure, matrices=matrices)


def show(axis, matrix: Tensor, limit: float, **more):
    """Draw a matrix in colors that end at `limit`; return the image for its color bar."""
    colors = {"cmap": diverging(), "vmin": -limit, "vmax": limit}
    return axis.imshow(matrix.numpy(), interpolation="nearest", **colors, **more)


def add_bar(figure, image, axes: np.ndarray, label: str, limit: float) -> None:
    """Add a color bar beside these axes."""
    bar = figure.colorbar(image, ax=list(axes.flat), shrink=0.7, extend="both")
    bar.set_label(f"{label} (colors end at ±{limit:g})", fontsize=9)


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


def draw_cosines(networks: list[Network], some: np.ndarray) -> Drawn | None:
    """Draw cosines of embeddings (features without a head): of some images, and the means over classes or codes.

    Images are in the order of class, then code. Nothing is drawn where there are neither.
    """
    networks = [n for n in networks if n.data.classes or n.data.codes is not None]
    if not networks:
        return None
    figure, axes = panels(len(networks), 2, width=4.6, height=4.7, aside=1)
    matrices, cells, means = {}, [], []
    for i, network in enumerate(networks):
        x = network.data.features if network.embedding is None else network.embedding
        u = F.normalize(x[some[in_order(network, some)]].double(), dim=1)
        groups, names, _ = groups_of(network)
        name = file_name(network.label, i)
        matrices[f"cosines_{name}_images"] = u @ u.T
        matrices[f"cosines_{name}_blocks"] = block_cosines(x, groups, len(names))
        cells.append(in_cells(matrices[f"cosines_{name}_images"], CELLS))
        means.append(matrices[f"cosines_{name}_blocks"])
    for row, shown in zip(axes, (cells, means), strict=True):
        limit = limit_of(shown)
        for axis, network, matrix in zip(row, networks, shown, strict=True):
            if shown is cells:
                image = show(axis, matrix, limit, extent=(0, len(some), len(some), 0))
                describe_images(axis, network, some)
            else:
                image = show(axis, matrix, limit)
                describe_blocks(axis, network, matrix, limit)
        add_bar(figure, image, row, "mean cosine", limit)
    return Drawn(figure, matrices=matrices)


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


def describe_images(axis, network: Network, some: np.ndarray) -> None:
    """Say which images a matrix of cosines shows; lines part their classes, if these are few."""
    m, classes = len(some), network.data.classes
    size = -(-m // CELLS)
    means = f"; means of {size} x {size}" if size > 1 else ""
    axis.set_title(as_text(network.label), fontsize=11)
    axis.set_xlabel(f"{m:,} images, by {'class, then code' if classes else 'code'}{means}", fontsize=9)
    axis.tick_params(labelsize=8)
    if classes and len(classes) <= MOST_BLOCKS:
        ends = np.searchsorted(np.sort(network.data.labels.numpy()[some]), np.arange(len(classes) + 1))
        for end in ends[1:-1]:
            axis.axhline(end, color="black", lw=0.4)
            axis.axvline(end, color="black", lw=0.4)
        axis.set_yticks((ends[1:] + ends[:-1]) / 2, [as_text(shortened(name, 12)) for name in classes], fontsize=8)
        axis.tick_params(axis="y", length=0)


def describe_blocks(axis, network: Network, means: Tensor, limit: float) -> None:
    """Name the classes or codes of a matrix of mean cosines, and write its numbers, if they are few."""
    groups, names, share = groups_of(network)
    k, classes = len(names), network.data.classes
    axis.set_facecolor("0.85")  # of what has no pair
    axis.tick_params(labelsize=8)
    if k <= MOST_BLOCKS:
        axis.set_xticks(range(k), [as_text(name.rpartition(" (")[0]) for name in names], rotation=90, fontsize=8)
        axis.set_yticks(range(k), map(as_text, names), fontsize=8)
    if k <= MOST_NUMBERS:
        for (a, b), value in np.ndenumerate(means.numpy()):
            if np.isfinite(value):
                look = {"color": "white" if abs(value) > 0.65 * limit else "black", "fontsize": 7}
                axis.text(b, a, two_digits(value).replace("0.", "."), ha="center", va="center", **look)
    own, other = means.diagonal().nanmean().item(), means[~torch.eye(k, dtype=torch.bool)].nanmean().item()
    numbers = f"same {two_digits(own)}, other {two_digits(other)}"
    axis.set_title(f"means by {'class' if classes else 'code'}: {numbers}", fontsize=9)
    counts = groups[groups >= 0].bincount(minlength=k)
    least, most = counts.min(), counts.max()
    of_classes = f"{k} classes of {least:,}{f' to {most:,}' if most > least else ''} images"
    of_codes = f"{k} most used codes (images): {share:.0%} of {len(groups):,} images"
    axis.set_xlabel(of_classes if classes else of_codes, fontsize=9)


def two_digits(value: float) -> str:
    """Return the number with two digits after the point, and no minus before a zero."""
    return f"{round(value, 2) + 0:.2f}"


def file_name(label: str, i: int) -> str:
    """Return a user's words for the i-th network as a part of a file's name."""
    return f"{i + 1}_" + "".join(x if x.isalnum() else "_" for x in label[:40])


def write_matrix(path: Path, matrix: Tensor) -> None:
    """Write a matrix as CSV, without a header, whole or not at all. Raises `WriteError`."""
    with written(path) as file:
        np.savetxt(file, matrix.numpy(), fmt="%.4g", delimiter=",")
