"""The verdict on a run: learning, collapsing, or neither, from its numbers beside their values at the start."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cplearn.metrics import collapse

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

    def line(self, remedies: dict[str, str], warnings: Sequence[str] = ()) -> str:
        """Return the sentence to print; `remedies` are the method's own, `warnings` what it said of its settings."""
        if self.name not in ALARMS:
            return f"{self.name}: {self.evidence}"
        kind = self.name if self.name == "stuck at uniform" else f"{self.name} collapse"
        first = f"The start-up warned: {'; '.join(warnings)}. Mend that first, then try" if warnings else "Try"
        return f"{kind}: {self.evidence}. {first} {(REMEDIES | remedies)[self.name]}"


def judge(metrics: dict, out_dim: int) -> Verdict | None:
    """Judge an epoch by its numbers and those of the start, which have their names in the log. None without any.

    Without those of the probe only `cluster` and `stuck at uniform` can be told; without those of the start, only what
    is an alarm.
    """
    probe, start = ({k.removeprefix(x): v for k, v in metrics.items() if k.startswith(x)} for x in ("probe_", "start_"))
    enough = probe.get("images", 0) >= MIN_IMAGES
    if alarm := _alarm(metrics, probe if enough else {}, start, out_dim):
        return alarm
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
        cosine = _number(probe, start, "features_cosine", ".4f")
        return Verdict("representation", f"the features of two images have a cosine of {cosine} on average")
    if information is not None and information < MIN_INFORMATION and not perplexity < least:
        return Verdict("stuck at uniform", f"an assignment tells {information:.4f} nats about its image")
    of_start = {}
    if probe and probe["codes_perplexity"] < perplexity:
        perplexity, of_start = probe["codes_perplexity"], start
    if perplexity < least:
        number = f"{perplexity:.1f}, of {out_dim}{_at_start(of_start, 'codes_perplexity', '.1f')}"
        return Verdict("cluster", f"the perplexity of the codes is {number}")
    if not probe:
        return None
    chance, within = probe["agreement_chance"], probe["within_code"]
    if probe["agreement"] <= chance + 3 * math.sqrt(chance * (1 - chance) / probe["images"]):
        return Verdict("stuck at uniform", _agreement(probe, start))
    if probe["embedding_dimensions"] < MIN_DIMENSIONS:
        dimensions = _number(probe, start, "embedding_dimensions", ".1f", " dimensions")
        return Verdict("dimensional", f"the embeddings vary in {dimensions}")
    if within is not None and within < MIN_WITHIN:
        share = f"{within:.1%}{_at_start(start, 'within_code', '.0%')}"
        return Verdict("intracluster", f"{share} of the variance of the features is between images of one code")
    return None


def _against_start(probe: dict, start: dict) -> Verdict:
    """Judge a probe that is no alarm by the numbers from before the first step."""
    words = numbers_in_words(probe, start)
    if not math.isfinite(start.get(f"{SCORE}_error", math.nan)):
        return Verdict(NO_ALARM, f"nothing is known about the start, so not whether this is better; {words}")
    score = score_in_words(probe, start)
    lost = [
        f"{what} {_number(probe, start, name, '.3g')}"
        for name, (share, what) in KEPT.items()
        if probe[name] < share * start.get(name, 0)
    ]
    if lost:
        return Verdict(LOSING, f"{', '.join(lost)}; {score}")
    if not has_risen(probe, start):
        return Verdict(NO_BETTER, f"{score}; {words}")
    if "knn20" not in probe or "knn20" not in start:
        return Verdict(LEARNING, f"{score}; {words}; 20-NN by the labels was not measured (--knn_freq)")
    knn = f"20-NN by the labels {_number(probe, start, 'knn20', '.4f')}, standard error {knn_error(probe, start):.4f}"
    risen = probe["knn20"] > start["knn20"] + STANDARD_ERRORS * knn_error(probe, start)
    return Verdict(LEARNING, f"{score}; {knn}; {words}") if risen else Verdict(NO_BETTER, f"{knn}; {score}; {words}")


def knn_error(probe: dict, start: dict) -> float:
    """Return the standard error of the difference of two accuracies, as if measured on different images."""
    return math.sqrt(sum(x["knn20"] * (1 - x["knn20"]) for x in (probe, start)) / probe["images"])


def has_risen(probe: dict, start: dict) -> bool:
    """Return whether the score is above that at the start by more than chance does in one of six cases."""
    error = math.hypot(probe[f"{SCORE}_error"], start[f"{SCORE}_error"])
    return probe[SCORE] > start[SCORE] + STANDARD_ERRORS * error


def score_in_words(probe: dict, start: dict) -> str:
    """Return the score without labels as the (geometric) mean place, beside that at the start, where it is known."""
    n = probe["images"]
    now, before = ({SCORE: math.exp((1 - x.get(SCORE, math.nan)) * collapse.mean_log_place(n))} for x in (probe, start))
    return f"another view finds its image at place {_number(now, before, SCORE, '.1f', f' of {n} on average')}"


def numbers_in_words(probe: dict, start: dict) -> str:
    """Return agreement of views, use of codes and effective ranks, each beside its value at the start, where known."""
    used = f" different codes on {probe['images']} images"
    return (
        f"{_agreement(probe, start)}; "
        f"{_number(probe, start, 'codes_used', '.0f', used)}; "
        f"effective rank of the features {_number(probe, start, 'features_rank', '.0f')}, "
        f"of the embedding {_number(probe, start, 'embedding_rank', '.0f')}"
    )


def _number(probe: dict, start: dict, name: str, form: str, unit: str = "") -> str:
    """Return a number with its unit, and in brackets its value before the first step, where that is known."""
    return f"{probe[name]:{form}}{unit}{_at_start(start, name, form)}"


def _at_start(start: dict, name: str, form: str) -> str:
    value = start.get(name)
    return "" if value is None or not math.isfinite(value) else f" (at the start {value:{form}})"


def _agreement(probe: dict, start: dict) -> str:
    at_start = f"; at the start {start['agreement']:.1%}" if "agreement" in start else ""
    chance = f"({probe['agreement_chance']:.1%} by chance{at_start})"
    return f"two views of an image get the same code in {probe['agreement']:.1%} {chance}"
