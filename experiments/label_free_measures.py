"""Measures of a representation that need no label, of two views of the same images.

Each is a pure function of tensors on the CPU, computed in float64, and returns NaN for what is not finite or too small
to measure. Which of them follow k-NN was measured (results/label_free.md); one of these, `collapse.view_nearness`, is
the score of a run.
"""

import math
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from cplearn.metrics import collapse

MEASURES = ("rank", "dimensions", "std", "lidar", "alpha", "alpha_distance", "learnability", "intrinsic_dimension",
            "clid", "retrieval", "view_nearness", "cluster_agreement", "cluster_ami")  # fmt: skip


def lidar(views: Tensor, delta: float = 1e-4, epsilon: float = 1e-7) -> float:
    """Return LiDAR: the effective rank of what tells images apart, in units of what differs between their views.

    exp(entropy of the eigenvalues of Sw^-1/2 Sb Sw^-1/2 as shares of their sum), with the scatter Sb of the images'
    mean vectors, and Sw of views around their image's mean plus delta on its diagonal (Thilak et al., ICLR 2024,
    section 3). The paper takes about 50 views of each image; with two, delta, whose value is ours, matters more.
    Shape: (n, q, d).
    """
    if not views.isfinite().all() or views.shape[0] < 2 or views.shape[1] < 2:
        return math.nan
    views = views.double()
    n, q, d = views.shape
    of_image = views.mean(1)
    between, within = of_image - of_image.mean(0), (views - of_image[:, None]).reshape(n * q, d)
    root = torch.linalg.cholesky(within.T @ within / (n * q) + delta * torch.eye(d, dtype=torch.float64))
    whitened = torch.linalg.solve_triangular(root, between.T, upper=False)  # the same eigenvalues as by Sw^-1/2
    values = collapse.singular_values(whitened).square()
    total = values.sum().item()
    if total <= 1e-12:
        return 1.0
    share = values / total + epsilon
    return math.exp(torch.special.entr(share).sum().item())


def alpha_req(x: Tensor, first: int = 5, last: int = 100) -> float:
    """Return the exponent alpha of a power law, eigenvalue number j ~ j^-alpha, fitted to those of the covariance.

    Least squares between logarithms with weight 1 / j, from eigenvalue `first` to `last` or the last above rounding
    (Agrawal et al., NeurIPS 2022, section 3; the fit is that of Stringer et al., Nature 2019; the range is ours).
    There, an alpha near 1 goes with good features. NaN with fewer than five eigenvalues. Shape: (n, d).
    """
    if not x.isfinite().all():
        return math.nan
    values = collapse.covariance_spectrum(x)[: len(x) - 1]
    usable = int((values > 1e-10 * values[0]).sum()) if len(values) else 0
    last = min(last, usable)
    if last - first < 4:
        return math.nan
    rank = torch.arange(first, last + 1, dtype=torch.float64)
    log_rank, log_value, weight = rank.log(), values[first - 1 : last].log(), 1 / rank
    weight = weight / weight.sum()
    centered = log_rank - (weight * log_rank).sum()
    return -((weight * centered * log_value).sum() / (weight * centered.square()).sum()).item()


def clusters(x: Tensor, k: int | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return k-means clusters of the rows, scaled to length 1: labels int64 (n,) and centers (k, d), in float64.

    k: by default the square root of n. Shape: (n, d).
    """
    from sklearn.cluster import KMeans

    unit = F.normalize(x.double(), dim=1).numpy()
    k = min(max(2, math.isqrt(len(x))) if k is None else k, len(x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fewer distinct rows than clusters: a collapse, which is what is measured
        fitted = KMeans(k, n_init=1, random_state=seed).fit(unit)
    return torch.from_numpy(fitted.labels_).long(), torch.from_numpy(fitted.cluster_centers_)


def cluster_agreement(x: Tensor, y: Tensor, groups: tuple[Tensor, Tensor] | None = None) -> tuple[float, float]:
    """Return how often the second view of an image falls into the cluster of its first, and that agreement's AMI.

    The clusters are `clusters` of the first view, or `groups` made of it; the second view goes to the nearest of their
    centers. The adjusted mutual information is 0 by chance. Shape: (n, d) twice.
    """
    from sklearn.metrics import adjusted_mutual_info_score

    if not (x.isfinite().all() and y.isfinite().all()) or len(x) < 4:
        return math.nan, math.nan
    labels, centers = groups or clusters(x)
    if len(labels.unique()) < 2:
        return 1.0, 0.0
    others = torch.cdist(F.normalize(y.double(), dim=1), centers).argmin(1)
    return (labels == others).double().mean().item(), float(adjusted_mutual_info_score(labels.numpy(), others.numpy()))


def learnability(x: Tensor, labels: Tensor | None = None) -> float:
    """Return the share of images whose k-means cluster is that of the nearest image before them.

    Cluster learnability (Lu et al., TMLR 2023, section 3): a nearest-neighbor classifier that meets the images one by
    one, here with a single neighbor by cosine, in the order of the rows. `labels`: clusters that are known already.
    Shape: (n, d), int64 (n,).
    """
    if not x.isfinite().all() or len(x) < 4:
        return math.nan
    labels = clusters(x)[0] if labels is None else labels
    unit = F.normalize(x.double(), dim=1)
    cosine = (unit @ unit.T).masked_fill(torch.ones(len(x), len(x), dtype=torch.bool).triu(), -math.inf)
    return (labels[cosine[1:].argmax(1)] == labels[1:]).double().mean().item()


def intrinsic_dimension(x: Tensor) -> float:
    """Return the dimension in which the images lie, from each one's two nearest neighbors.

    TwoNN (Facco et al., Scientific Reports 2017), by maximum likelihood: (m - 1) / sum of log(r2 / r1), with the
    distances r1 <= r2 of rows scaled to length 1 to their neighbors, over the m rows that have no duplicate. NaN with
    fewer than ten such rows. Shape: (n, d).
    """
    if not x.isfinite().all() or len(x) < 3:
        return math.nan
    unit = F.normalize(x.double(), dim=1)
    near = (2 - 2 * (unit @ unit.T).fill_diagonal_(-2).topk(2).values).clamp(min=0).sqrt()
    near = near[near[:, 0] > 1e-6]  # closer than that is rounding
    total = (near[:, 1] / near[:, 0]).log().sum().item() if len(near) >= 10 else 0.0
    return (len(near) - 1) / total if total > 0 else math.nan


def clid(learnability: float, dimension: float) -> float:
    """Return log(learnability * intrinsic dimension), which grows with both.

    CLID (Lu et al., TMLR 2023) adds the two after it scaled each over a set of networks; one network alone has no such
    scale, so their logarithms are added here.
    """
    product = learnability * dimension
    return math.log(product) if product > 0 else math.nan


def view_retrieval(x: Tensor, y: Tensor) -> float:
    """Return how often an image's second view has its first as the nearest of all first views, by cosine.

    Chance is 1 / n. Of first views that are equally near, each counts as found with the same probability. NaN if an
    entry is not finite. Shape: (n, d) twice.
    """
    if not (x.isfinite().all() and y.isfinite().all()):
        return math.nan
    nearer, alike = collapse.nearer_and_alike(x, y)
    return ((nearer == 0).double() / alike).mean().item()


def of_views(x: Tensor, y: Tensor) -> dict[str, float]:
    """Return every measure of two views' features or embeddings; NaN if an entry is not finite. Shape: (n, d) twice."""
    if not (x.isfinite().all() and y.isfinite().all()):
        return dict.fromkeys(MEASURES, math.nan)
    alpha, groups, dimension = alpha_req(x), clusters(x), intrinsic_dimension(x)
    learnable, (agreement, ami) = learnability(x, groups[0]), cluster_agreement(x, y, groups)
    values = (
        collapse.rankme(x), collapse.dimensions(collapse.covariance_spectrum(x)), collapse.feature_std(x),
        lidar(torch.stack([x, y], 1)), alpha, abs(alpha - 1), learnable, dimension, clid(learnable, dimension),
        view_retrieval(x, y), collapse.view_nearness(x, y)[0], agreement, ami,
    )  # fmt: skip
    return dict(zip(MEASURES, values, strict=True))


def label_free(
    features_a: Tensor, features_b: Tensor, embedding_a: Tensor, embedding_b: Tensor, codes_a: Tensor, codes_b: Tensor
) -> dict[str, float]:
    """Return every measure, by names that begin with `features_`, `embedding_` or `codes_`.

    Shape: features (n, f), embeddings (n, d), codes int64 (n,), each of the first view and of the second.
    """
    from sklearn.metrics import adjusted_mutual_info_score

    measures = {f"features_{name}": value for name, value in of_views(features_a, features_b).items()}
    measures |= {f"embedding_{name}": value for name, value in of_views(embedding_a, embedding_b).items()}
    agreement, chance, score = collapse.code_agreement(codes_a, codes_b)
    used, perplexity = collapse.code_usage(codes_a)
    return measures | {
        "retrieval_chance": 1 / len(features_a),
        "codes_agreement": agreement,
        "codes_agreement_chance": chance,
        "codes_score": score,
        "codes_ami": float(adjusted_mutual_info_score(codes_a.numpy(), codes_b.numpy())) if used > 1 else 0.0,
        "codes_used": used,
        "codes_perplexity": perplexity,
    }
