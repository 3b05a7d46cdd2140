"""Numbers that tell a collapse, and the verdict on them beside their values before the first step.

The four collapses of the paper (section 1): *representation* (all images get the same features), *dimensional* (the
embedding lies in few dimensions), *cluster* (all images get the same code), *intracluster* (images of one code get the
same features). *Stuck at uniform* is no collapse but looks like one in k-NN: nothing is learned yet. Without any of
these a network may still be *losing dimensions*, or be *no better than at the start*; *learning* is only what the
score without labels has shown to be better.

Everything here is a pure function of tensors on the CPU; `probe/monitor.py` calls it during training,
`eval_collapse.py` afterwards.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def singular_values(x: Tensor) -> Tensor:
    """Return the singular values, largest first, from the smaller of the two Gram matrices, in float64.

    They are exact to 1e-8 of the largest, and several times faster than by a decomposition of x.
    Shape: (n, d) -> (min(n, d),).
    """
    x = x.double()
    gram = x.T @ x if x.shape[0] > x.shape[1] else x @ x.T
    return torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().flip(0)


def rankme(x: Tensor) -> float:
    """Return the effective rank: exp(entropy of the singular values as shares of their sum), from 1 to min(n, d).

    RankMe (Garrido et al., ICML 2023, eq. 1 and 2), of the vectors as they are, not centered. Shape: (n, d).
    """
    sigma = singular_values(x)
    total = sigma.sum()
    if total == 0:
        return 1.0
    return math.exp(torch.special.entr(sigma / total).sum().item())


def covariance_spectrum(x: Tensor) -> Tensor:
    """Return the singular values (eigenvalues) of the covariance over images, largest first.

    Shape: (n, d) -> (min(n, d),).
    """
    return singular_values(x - x.mean(0)).square() / max(1, len(x) - 1)


def dimensions(values: Tensor) -> float:
    """Return in how many directions the vectors vary, from 1 to min(n - 1, d).

    This is the participation ratio (sum of l)^2 / sum of l^2 of the covariance's singular values l, of which small
    ones hardly count, unlike in `rankme`. Shape: that of `covariance_spectrum`.
    """
    total = values.sum().item()
    return total**2 / values.square().sum().item() if total else 1.0


def mean_cosine(x: Tensor) -> float:
    """Return the mean cosine of two different rows; 1 if all point the same way, or are zero. Shape: (n, d)."""
    u = F.normalize(x.double(), dim=1)
    u[u.norm(dim=1) == 0] = x.shape[1] ** -0.5
    n = len(u)
    return ((u.sum(0).square().sum() - u.square().sum()) / max(1, n * (n - 1))).item()


def within_code_share(x: Tensor, codes: Tensor) -> float | None:
    """Return the variance of images of the same code as a share of the variance of all.

    1 if codes say nothing, 0 if images of a code are alike. Both variances are unbiased; codes of one image are left
    out. None if that leaves less than 20 images beyond the first of their code, too few to tell, or if all images
    have the same vector. Shape: (n, d), int64 (n,).
    """
    x = x.double()
    _, code, count = codes.unique(return_inverse=True, return_counts=True)
    freedom = (count - 1).sum().item()
    total = (x - x.mean(0)).square().sum().item() / max(1, len(x) - 1)
    if freedom < 20 or total == 0:
        return None
    sums = torch.zeros(len(count), x.shape[1], dtype=x.dtype).index_add_(0, code, x)
    inside = (x - (sums / count[:, None])[code]).square().sum().item() / freedom
    return inside / total


def code_usage(codes: Tensor) -> tuple[int, float]:
    """Return the number of codes in use, and the perplexity of their shares. Shape: int64 (n,)."""
    share = codes.unique(return_counts=True)[1].double() / len(codes)
    return len(share), math.exp(torch.special.entr(share).sum().item())


SIMILAR = 0.95  # cosine from which two prototypes count as the same
MOST_PROTOTYPES = 8192  # that are looked at


def unique_prototypes(prototypes: Tensor, block: int = 2048) -> tuple[int, int]:
    """Return how many prototypes are not copies of each other, by their cosine, and how many were looked at.

    Taken in order, one counts unless its cosine with one counted before is above `SIMILAR`. (Partial prototype
    collapse: Govindarajan et al., BMVC 2024; the threshold is ours.) Of more than `MOST_PROTOTYPES` only so many are
    looked at, evenly spaced, which misses copies of those that are not. Shape: (c, d), on the CPU.
    """
    c, seen = len(prototypes), min(len(prototypes), MOST_PROTOTYPES)
    unit = F.normalize(prototypes[torch.arange(seen) * c // seen].float(), dim=1)
    counted = unit[:0]
    for part in unit.split(block):
        if len(counted):
            part = part[(part @ counted.T).amax(1) <= SIMILAR]
        similar, new = (part @ part.T > SIMILAR).triu(1), torch.ones(len(part), dtype=torch.bool)
        for i in similar.any(1).nonzero()[:, 0].tolist():
            if new[i]:
                new &= ~similar[i]
        counted = torch.cat([counted, part[new]])
    return len(counted), seen


def prototype_numbers(prototypes: Tensor | None) -> dict[str, int | None]:
    """Return the numbers of `unique_prototypes` by their names; None where codes are not learned."""
    different, seen = (None, None) if prototypes is None else unique_prototypes(prototypes)
    return {"unique_prototypes": different, "prototypes": seen}


def code_agreement(codes: Tensor, others: Tensor) -> tuple[float, float, float]:
    """Return how often two views of an image get the same code, the level of chance, and the score made of both.

    The score is the logarithm of their ratio: what the code of one view tells about that of the other. At least one
    image and one pair count as agreeing, so that it is finite. Shape: int64 (n,) twice.
    """
    n, n_codes = len(codes), int(max(codes.max(), others.max())) + 1
    shares = [c.bincount(minlength=n_codes).double() / n for c in (codes, others)]
    agreement, chance = (codes == others).double().mean().item(), (shares[0] * shares[1]).sum().item()
    return agreement, chance, math.log(max(agreement, 1 / n) / max(chance, 1 / n**2))


def nearer_and_alike(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many first views are nearer to an image's second view than its own one, by cosine, and how many are
    as near, which that one is itself. Shape: (n, d) twice; int64 (n,) twice."""
    cosine = F.normalize(y.double(), dim=1) @ F.normalize(x.double(), dim=1).T
    own = cosine.diagonal()[:, None]
    return (cosine > own + 1e-12).sum(1), ((cosine - own).abs() <= 1e-12).sum(1)


def view_places(x: Tensor, y: Tensor) -> Tensor:
    """Return at which place an image is found by its second view: 1 if its own first view is the nearest by cosine.

    Of equally near first views the mean of their places counts. Shape: (n, d) twice; float64 (n,).
    """
    nearer, alike = nearer_and_alike(x, y)
    return nearer.double() + (alike + 1) / 2


def mean_log_place(n: int) -> float:
    """Return the mean logarithm of the places 1 to n, which is that of `view_places` by chance."""
    return math.lgamma(n + 1) / n


def view_nearness(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Return how near an image is to its own other view, of all images, and the standard error of that.

    One minus the mean logarithm of `view_places`, in units of that by chance: 1 if the own is always the nearest, 0 on
    average by chance. Of the measures without labels this followed k-NN best over 99 runs on two
    data sets (results/label_free.md). NaN if an entry is not finite, or with fewer than two. Shape: (n, d) twice.
    """
    if len(x) < 2 or not (x.isfinite().all() and y.isfinite().all()):
        return math.nan, math.nan
    log_place = view_places(x, y).log() / mean_log_place(len(x))
    return 1 - log_place.mean().item(), log_place.std().item() / math.sqrt(len(x))


def feature_std(x: Tensor) -> float:
    """Return the mean standard deviation of the dimensions of rows of length 1, times the root of their number.

    1 if rows spread over all directions alike, 0 if they are the same (Chen & He, CVPR 2021, section 4.1).
    Shape: (n, d).
    """
    return F.normalize(x.double(), dim=1).std(0).mean().item() * math.sqrt(x.shape[1])


def probe_metrics(
    features: Tensor,
    embedding: Tensor,
    codes: Tensor,
    vectors: Tensor | None,
    other_features: Tensor,
    other_codes: Tensor,
) -> dict[str, float | int | None | list[float]]:
    """Measure what one view of the probe's images, and features and codes of another view of them, say about collapse.

    Shape: features (n, f), embedding (n, d), codes int64 (n,), vectors of those codes (n, d) or None, other_features
    (n, f), other_codes int64 (n,) -> names as in the log, without its prefix.
    """
    used, perplexity = code_usage(codes)
    n = len(codes)
    agreement, chance, score = code_agreement(codes, other_codes)
    of_features, of_embedding = covariance_spectrum(features), covariance_spectrum(embedding)
    nearness, nearness_error = view_nearness(features, other_features)
    return {
        "images": n,
        "features_rank": rankme(features),
        "features_dimensions": dimensions(of_features),
        "features_std": feature_std(features),
        "features_cosine": mean_cosine(features),
        "features_spectrum": shape_of_spectrum(of_features, n),
        "embedding_rank": rankme(embedding),
        "embedding_dimensions": dimensions(of_embedding),
        "embedding_cosine": mean_cosine(embedding),
        "embedding_spectrum": shape_of_spectrum(of_embedding, n),
        "code_cosine": None
        if vectors is None
        else F.cosine_similarity(embedding.double(), vectors.double(), dim=1).abs().mean().item(),
        "within_code": within_code_share(features, codes),
        "agreement": agreement,
        "agreement_chance": chance,
        "score": score,
        "view_nearness": nearness,
        "view_nearness_error": nearness_error,
        "codes_used": used,
        "codes_perplexity": perplexity,
    }


def shape_of_spectrum(values: Tensor, n: int) -> list[float]:
    """Return the 1st, 2nd, 4th, 8th ... singular value of the covariance of n vectors, in units of the first.

    `eval_collapse.py` writes all of them. Shape: that of `covariance_spectrum`.
    """
    ranks = [2**k - 1 for k in range(min(n - 1, len(values)).bit_length())]  # n points span n - 1 dimensions
    first = values[0].clamp(min=torch.finfo(values.dtype).tiny)
    return [float(f"{(values[r] / first).item():.4g}") for r in ranks]
