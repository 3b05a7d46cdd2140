"""Numbers that tell a collapse from health, and the verdict on them.

The four collapses of the paper (section 1): *representation* (all images get the same features), *dimensional* (the
embedding lies in few dimensions), *cluster* (all images get the same code), *intracluster* (images of one code get the
same features). And *stuck at uniform*, which is no collapse but looks like one in k-NN: nothing is learned yet.

Everything here is a pure function of tensors on the CPU; `training/monitor.py` calls it during training,
`eval_collapse.py` afterwards.
"""

import math
from dataclasses import dataclass

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


def code_agreement(codes: Tensor, others: Tensor) -> tuple[float, float, float]:
    """Return how often two views of an image get the same code, the level of chance, and the score made of both.

    The score is the logarithm of their ratio: what the code of one view tells about that of the other. At least one
    image and one pair count as agreeing, so that it is finite. Shape: int64 (n,) twice.
    """
    n, n_codes = len(codes), int(max(codes.max(), others.max())) + 1
    shares = [c.bincount(minlength=n_codes).double() / n for c in (codes, others)]
    agreement, chance = (codes == others).double().mean().item(), (shares[0] * shares[1]).sum().item()
    return agreement, chance, math.log(max(agreement, 1 / n) / max(chance, 1 / n**2))


def probe_metrics(
    features: Tensor, embedding: Tensor, codes: Tensor, vectors: Tensor | None, other_codes: Tensor
) -> dict[str, float | int | None | list[float]]:
    """Measure what one view of the probe's images, and the codes of another view of them, say about collapse.

    Shape: features (n, f), embedding (n, d), codes int64 (n,), vectors of those codes (n, d) or None, other_codes int64
    (n,) -> names as in the log, without its prefix.
    """
    used, perplexity = code_usage(codes)
    n = len(codes)
    agreement, chance, score = code_agreement(codes, other_codes)
    of_features, of_embedding = covariance_spectrum(features), covariance_spectrum(embedding)
    unit = F.normalize(features.double(), dim=1)
    return {
        "images": n,
        "features_rank": rankme(features),
        "features_dimensions": dimensions(of_features),
        "features_std": unit.std(0).mean().item() * math.sqrt(features.shape[1]),
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
        "score": score,  # its rank correlation with k-NN: results/collapse.md
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


# --- the verdict -----------------------------------------------------------------------------------------

# Chosen from forced and healthy runs (results/collapse.md).
MAX_COSINE = 0.99  # mean cosine of the features of two images
MIN_PERPLEXITY = 0.4  # of the codes, as a share of min(out_dim, 10); and at least 1.5
MIN_INFORMATION = 0.01  # nats that an assignment tells about its image
MIN_DIMENSIONS = 1.4  # in which embeddings vary
MIN_WITHIN = 0.02  # share of the variance that is between images of one code
MIN_IMAGES = 32  # of a probe that a verdict is built on

REMEDIES = {  # what to try; a method may know better (`Method.REMEDIES`)
    "representation": "a lower --lr",
    "cluster": "a larger batch (of all processes), a lower --lr",
    "stuck at uniform": "a larger --lr",
    "dimensional": "a larger --out_dim",
    "intracluster": "a larger --out_dim: fewer images that have to share a code",
}


@dataclass(frozen=True)
class Verdict:
    """`healthy`, or one of the states in `REMEDIES` for which there is evidence."""

    name: str
    evidence: str

    def line(self, remedies: dict[str, str]) -> str:
        """Return the sentence to print; `remedies` are the method's own."""
        if self.name == "healthy":
            return f"healthy: {self.evidence}"
        kind = self.name if self.name == "stuck at uniform" else f"{self.name} collapse"
        return f"{kind}: {self.evidence}. Try {(REMEDIES | remedies)[self.name]}"


def verdict(metrics: dict, out_dim: int) -> Verdict | None:
    """Judge an epoch by its numbers, which have their names in the log. None if they cannot tell.

    Without those of the probe only `cluster` and `stuck at uniform` can be told, and health cannot.
    """
    information, perplexity = metrics.get("information"), metrics.get("usage_perplexity", math.inf)
    least = max(1.5, MIN_PERPLEXITY * min(out_dim, 10))
    probe = {k.removeprefix("probe_"): v for k, v in metrics.items() if k.startswith("probe_")}
    if probe and probe["images"] < MIN_IMAGES:
        probe = {}
    if probe and not probe["features_cosine"] < MAX_COSINE:
        return Verdict("representation", f"features of two images have a cosine of {probe['features_cosine']:.4f}")
    if information is not None and information < MIN_INFORMATION and not perplexity < least:
        return Verdict("stuck at uniform", f"an assignment tells {information:.4f} nats about its image")
    if probe:
        perplexity = min(perplexity, probe["codes_perplexity"])
    if perplexity < least:
        return Verdict("cluster", f"perplexity of the codes {perplexity:.1f}, of {out_dim}")
    if not probe:
        return None
    chance, within = probe["agreement_chance"], probe["within_code"]
    agreement = f"codes of two views agree in {probe['agreement']:.1%} (chance {chance:.1%})"
    if probe["agreement"] <= chance + 3 * math.sqrt(chance * (1 - chance) / probe["images"]):
        return Verdict("stuck at uniform", agreement)
    if probe["embedding_dimensions"] < MIN_DIMENSIONS:
        return Verdict("dimensional", f"embeddings vary in {probe['embedding_dimensions']:.1f} dimensions")
    if within is not None and within < MIN_WITHIN:
        return Verdict("intracluster", f"{within:.1%} of the variance is between images of one code")
    evidence = f"{agreement}, {probe['codes_used']} codes for {probe['images']} images, effective rank "
    evidence += f"{probe['features_rank']:.0f} (features), {probe['embedding_rank']:.0f} (embedding)"
    if within is not None:
        evidence += f", {within:.0%} of the variance inside codes"
    return Verdict("healthy", evidence)
