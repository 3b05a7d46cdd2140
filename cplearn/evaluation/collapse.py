"""Numbers that tell a collapse, and the verdict on them beside their values before the first step.

The four collapses of the paper (section 1): *representation* (all images get the same features), *dimensional* (the
embedding lies in few dimensions), *cluster* (all images get the same code), *intracluster* (images of one code get the
same features). *Stuck at uniform* is no collapse but looks like one in k-NN: nothing is learned yet. Without any of
these a network may still be *losing dimensions*, or be *no better than at the start*; *learning* is only what the
score without labels has shown to be better.

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
    average by chance. Of the measures without labels in `label_free.py` this followed k-NN best over 99 runs on two
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


# --- the verdict -----------------------------------------------------------------------------------------

# Chosen from runs that were made to collapse, and from others (results/collapse.md).
MAX_COSINE = 0.99  # mean cosine of the features of two images
MIN_PERPLEXITY = 0.4  # of the codes, as a share of min(out_dim, 10); and at least 1.5
MIN_INFORMATION = 0.01  # nats that an assignment tells about its image
MIN_DIMENSIONS = 1.4  # in which embeddings vary
MIN_WITHIN = 0.02  # share of the variance that is between images of one code
MIN_IMAGES = 32  # of a probe that a verdict is built on

# Against the values before the first step. Of the features only, and by effective rank: an embedding may lose four
# fifths of its rank, and features as much of their participation ratio, while 20-NN rises (results/collapse.md).
KEPT = {  # number of the probe -> the share of its start below which dimensions are being lost, and what it is
    "features_rank": (0.4, "effective rank of the features"),
}
SCORE = "view_nearness"  # the number of the probe that has to rise above its start
STANDARD_ERRORS = 1  # by which it has to, as if the two had been measured on different images

REMEDIES = {  # what to try; a method may know better (`Method.REMEDIES`)
    "representation": "a lower --lr",
    "cluster": "a larger batch (of all processes), a lower --lr",
    "stuck at uniform": "a larger --lr",
    "dimensional": "a larger --out_dim",
    "intracluster": "a larger --out_dim: fewer images that have to share a code",
}
ALARMS = tuple(REMEDIES)  # the verdicts that --on_collapse stop counts
LOSING, NO_BETTER, LEARNING = "losing dimensions", "no better than at the start", "learning"
NO_ALARM, TOO_SHORT = "no alarm", "too short to judge"
WARNINGS = (*ALARMS, LOSING, NO_BETTER)


@dataclass(frozen=True)
class Verdict:
    """One of `ALARMS`, `LOSING`, `NO_BETTER`, `LEARNING`, `NO_ALARM` and `TOO_SHORT`, with its evidence in words."""

    name: str
    evidence: str

    def line(self, remedies: dict[str, str]) -> str:
        """Return the sentence to print; `remedies` are the method's own."""
        if self.name not in ALARMS:
            return f"{self.name}: {self.evidence}"
        kind = self.name if self.name == "stuck at uniform" else f"{self.name} collapse"
        return f"{kind}: {self.evidence}. Try {(REMEDIES | remedies)[self.name]}"


def verdict(metrics: dict, out_dim: int) -> Verdict | None:
    """Judge an epoch by its numbers and those of the start, which have their names in the log. None without any.

    Without those of the probe only `cluster` and `stuck at uniform` can be told; without those of the start, only what
    is an alarm.
    """
    probe, start = ({k.removeprefix(x): v for k, v in metrics.items() if k.startswith(x)} for x in ("probe_", "start_"))
    enough = probe.get("images", 0) >= MIN_IMAGES
    if found := _alarm(metrics, probe if enough else {}, start, out_dim):
        return found
    if not probe:
        return None
    if not enough:
        return Verdict(NO_ALARM, f"the probe has {probe['images']} images, fewer than the {MIN_IMAGES} that tell more")
    return _against_start(probe, start)


def _alarm(metrics: dict, probe: dict, start: dict, out_dim: int) -> Verdict | None:
    """Return one of `ALARMS`, with its number beside that of the start, if there is one."""
    information, perplexity = metrics.get("information"), metrics.get("usage_perplexity", math.inf)
    least = max(1.5, MIN_PERPLEXITY * min(out_dim, 10))
    if probe and not probe["features_cosine"] < MAX_COSINE:
        number = f"{probe['features_cosine']:.4f}{_beside(start, 'features_cosine', '.4f')}"
        return Verdict("representation", f"the features of two images have a cosine of {number} on average")
    if information is not None and information < MIN_INFORMATION and not perplexity < least:
        return Verdict("stuck at uniform", f"an assignment tells {information:.4f} nats about its image")
    of_start = ""
    if probe and probe["codes_perplexity"] < perplexity:
        perplexity, of_start = probe["codes_perplexity"], _beside(start, "codes_perplexity", ".1f")
    if perplexity < least:
        return Verdict("cluster", f"the perplexity of the codes is {perplexity:.1f}, of {out_dim}{of_start}")
    if not probe:
        return None
    chance, within = probe["agreement_chance"], probe["within_code"]
    if probe["agreement"] <= chance + 3 * math.sqrt(chance * (1 - chance) / probe["images"]):
        return Verdict("stuck at uniform", _agreement(probe, start))
    if probe["embedding_dimensions"] < MIN_DIMENSIONS:
        number = f"{probe['embedding_dimensions']:.1f} dimensions{_beside(start, 'embedding_dimensions', '.1f')}"
        return Verdict("dimensional", f"the embeddings vary in {number}")
    if within is not None and within < MIN_WITHIN:
        number = f"{within:.1%}{_beside(start, 'within_code', '.0%')}"
        return Verdict("intracluster", f"{number} of the variance of the features is between images of one code")
    return None


def _against_start(probe: dict, start: dict) -> Verdict:
    """Judge a probe that is no alarm by the numbers from before the first step."""
    words = numbers_in_words(probe, start)
    if not math.isfinite(start.get(f"{SCORE}_error", math.nan)):
        return Verdict(NO_ALARM, f"nothing is known about the start, so not whether this is better; {words}")
    score = score_in_words(probe, start)
    lost = [
        f"{what} {probe[name]:.3g}{_beside(start, name, '.3g')}"
        for name, (share, what) in KEPT.items()
        if probe[name] < share * start.get(name, 0)
    ]
    if lost:
        return Verdict(LOSING, f"{', '.join(lost)}; {score}")
    if not has_risen(probe, start):
        return Verdict(NO_BETTER, f"{score}; {words}")
    if "knn20" in start and probe.get("knn20", math.inf) <= start["knn20"]:
        neighbors = f"20-NN by the labels {probe['knn20']:.4f}{_beside(start, 'knn20', '.4f')}"
        return Verdict(NO_BETTER, f"{neighbors}; {score}; {words}")
    return Verdict(LEARNING, f"{score}; {words}")


def has_risen(probe: dict, start: dict) -> bool:
    """Return whether the score is above that at the start by more than chance does in one of six cases."""
    error = math.hypot(probe[f"{SCORE}_error"], start[f"{SCORE}_error"])
    return probe[SCORE] > start[SCORE] + STANDARD_ERRORS * error


def score_in_words(probe: dict, start: dict) -> str:
    """Return the score without labels as the (geometric) mean place, beside that at the start, where it is known."""
    n = probe["images"]
    now, before = (math.exp((1 - x.get(SCORE, math.nan)) * mean_log_place(n)) for x in (probe, start))
    return f"another view finds its image at place {now:.1f} of {n} on average{_beside({SCORE: before}, SCORE, '.1f')}"


def numbers_in_words(probe: dict, start: dict) -> str:
    """Return agreement of views, use of codes and effective ranks, each beside its value at the start, where known."""
    return "; ".join(
        (
            _agreement(probe, start),
            f"{probe['codes_used']} different codes on {probe['images']} images{_beside(start, 'codes_used', '.0f')}",
            f"effective rank of the features {probe['features_rank']:.0f}{_beside(start, 'features_rank', '.0f')}, "
            f"of the embedding {probe['embedding_rank']:.0f}{_beside(start, 'embedding_rank', '.0f')}",
        )
    )


def _beside(start: dict, name: str, form: str) -> str:
    """Return the value of a number before the first step, in brackets, "" if that is not known."""
    value = start.get(name)
    return "" if value is None or not math.isfinite(value) else f" (at the start {value:{form}})"


def _agreement(probe: dict, start: dict) -> str:
    at_start = f"; at the start {start['agreement']:.1%}" if "agreement" in start else ""
    chance = f"({probe['agreement_chance']:.1%} by chance{at_start})"
    return f"two views of an image get the same code in {probe['agreement']:.1%} {chance}"
