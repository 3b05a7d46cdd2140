"""Numbers of a finished network: those of `collapse.py`, and the paper's analysis of covariances and codes."""

import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cplearn.features.splits import Features
from cplearn.methods.base import Method
from cplearn.metrics import collapse

# Which values are good, for a table; docs/collapse-numbers.md says what each number is. K: components of a mixture.
GOOD = {
    "images": "",
    "features_dim": "",
    "features_rank": "high",
    "features_dimensions": "high",
    "features_cosine": "low; 1: collapse",
    "features_off_diagonal": "low",
    "embedding_dim": "",
    "embedding_rank": "high",
    "embedding_dimensions": "high; 1: collapse",
    "embedding_cosine": "near 0",
    "embedding_off_diagonal": "near its chance",
    "embedding_off_diagonal_chance": "",
    "same_code_cos2": "above other_code",
    "other_code_cos2": "near 0",
    "out_dim": "",
    "codes_used": "high",
    "codes_perplexity": "high; 1: collapse",
    "block_mean": "",
    "block_max": "near block_mean",
    "within_code": "below 1, not 0",
    "code_cosine": "above its chance",
    "code_cosine_chance": "",
    "unique_prototypes": "near prototypes",
    "prototypes": "",
    "mixtureK_entropy": "high",
}


@dataclass
class Network:
    """What one network makes of one split, on the CPU."""

    label: str
    data: Features
    embedding: Tensor | None = None  # (n, d)
    alignment: Tensor | None = None  # cosine of each embedding with its code (n,)
    chance_alignment: float | None = None  # the same of random directions, mean
    prototypes: Tensor | None = None  # all code vectors (c, d), where they are learned

    def vectors(self, kind: str) -> Tensor | None:
        """Return the vectors of this kind: embedding or representation."""
        return self.embedding if kind == "embedding" else self.data.features


@torch.inference_mode()
def embed(label: str, data: Features, method: Method | None, device: torch.device, seed: int) -> Network:
    """Compute the embeddings of features, and their alignment to their codes; nothing more without a method.

    The level of chance is that of 1,000 random directions.
    """
    network, embeddings, cosines = Network(label, data), [], []
    if method is None:
        return network
    for features, codes in zip(data.features.split(1024), data.codes.split(1024), strict=True):
        h = method.embed(features.to(device))
        vectors = method.code_vectors(codes.to(device))
        embeddings.append(h.float().cpu())
        if vectors is not None:
            cosines.append(F.cosine_similarity(h, vectors, dim=1).cpu())
    network.embedding = torch.cat(embeddings)
    if cosines:
        network.alignment = torch.cat(cosines)
        generator = torch.Generator().manual_seed(seed)
        directions = torch.randn(1000, network.embedding.shape[1], generator=generator).to(device)
        vectors = method.code_vectors(method.assign(F.normalize(directions, dim=1)))
        network.chance_alignment = F.cosine_similarity(directions, vectors, dim=1).abs().mean().item()
        prototypes = method.learned_codes()
        network.prototypes = None if prototypes is None else prototypes.float().cpu()
    return network


def off_diagonal_energy(x: Tensor) -> tuple[float, float]:
    """Return the share of the covariance's squared entries that lie off its diagonal, and its level of chance.

    0 if decorrelated; independent dimensions of equal variance show (d - 1) / (n + d - 1) on n images. Shape: (n, d).
    """
    covariance = covariance_of(x)
    total = covariance.square().sum().item()
    n, d = x.shape
    off = 1 - covariance.diagonal().square().sum().item() / total if total else 0.0
    return off, (d - 1) / (n + d - 1)


def covariance_of(x: Tensor, rows: int = 4096) -> Tensor:
    """Compute the covariance in float64, a few rows at a time. Shape: (n, d) -> (d, d)."""
    mean = x.mean(0, dtype=torch.float64)
    total = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    for part in x.split(rows):
        centered = part.double() - mean
        total.addmm_(centered.T, centered)
    return total / max(1, len(x) - 1)


def block_energy(x: Tensor, codes: Tensor) -> dict[str, float | None]:
    """Return the mean squared cosine of two different images of the same code, and of different codes.

    No n x n matrix is needed: sum_ij (u_i . u_j)^2 = |U^T U|^2, for all images and for each code. None where there is
    no such pair. Shape: (n, d), int64 (n,).
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


def block_cosines(x: Tensor, groups: Tensor, n_groups: int) -> Tensor:
    """Return the mean cosine of two different images, for each pair of groups; NaN where there is no such pair.

    Images of group -1 do not count. Shape: (n, d), int64 (n,) -> float64 (n_groups, n_groups).
    """
    inside = groups >= 0
    u, groups = F.normalize(x[inside].double(), dim=1), groups[inside]
    sums = torch.zeros(n_groups, x.shape[1], dtype=u.dtype).index_add_(0, groups, u)
    own = torch.zeros(n_groups, dtype=u.dtype).index_add_(0, groups, u.square().sum(1))  # of images with themselves
    counts = groups.bincount(minlength=n_groups).double()
    pairs = counts[:, None] * counts - counts.diag()
    return (sums @ sums.T - own.diag()) / pairs.masked_fill(pairs == 0, float("nan"))


def collapse_metrics(network: Network) -> dict[str, float | int | None]:
    """Measure how far a network is from collapse; the names that a run logs mean the same here."""
    x, h, codes = network.data.features, network.embedding, network.data.codes
    metrics: dict[str, float | int | None] = {
        "images": len(x),
        "features_dim": x.shape[1],
        "features_rank": collapse.rankme(x),
        "features_dimensions": collapse.dimensions(collapse.covariance_spectrum(x)),
        "features_cosine": collapse.mean_cosine(x),
        "features_off_diagonal": off_diagonal_energy(x)[0],
    }
    if h is None or codes is None:
        return metrics
    used, perplexity = collapse.code_usage(codes)
    off, chance = off_diagonal_energy(h)
    largest = codes.unique(return_counts=True)[1].max().item()
    return metrics | {
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
        **collapse.prototype_numbers(network.prototypes),
    }


def good_values(name: str) -> str:
    """Return which values of a number are good, in a few words; "" where that is no question."""
    return GOOD[re.sub(r"^mixture\d+_", "mixtureK_", name)]
