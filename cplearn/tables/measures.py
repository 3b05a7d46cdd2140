"""What is read from the results of a cell, and its mean over seeds."""

import statistics

# Percent, except COUNTS. name: (script of the results, where in its metrics)
MEASURES = {
    "nmi": ("eval_cluster", ("codes", "nmi")),
    "linear": ("eval_linear", ("linear_last_top1",)),
    "ami": ("eval_cluster", ("codes", "ami")),
    "knn": ("eval_knn", ("knn20_top1",)),
    "nmi_shuffled": ("eval_cluster", ("codes_shuffled", "nmi")),
    "nmi_shuffled_highest": ("eval_cluster", ("codes_shuffled", "nmi_highest")),
    "nmi_random_codes": ("eval_cluster", ("random_codes", "nmi")),
    "nmi_singletons": ("eval_cluster", ("singletons", "nmi")),
    "kmeans_ami": ("eval_cluster", ("kmeans", "ami")),
    "used_codes": ("eval_cluster", ("codes", "used_codes")),
    "features_rank": ("eval_collapse", ("features_rank",)),
}
COUNTS = ("used_codes", "features_rank")


def read_measures(results: list[dict]) -> dict[str, float]:
    """Return the measures of one network from its results.jsonl. Only results of its newest weights count."""
    measures: dict[str, float] = {}
    for result in results:
        if result["weights_sha256"] != results[-1]["weights_sha256"]:
            continue
        for name, (script, path) in MEASURES.items():
            if result["script"] == script:
                value = result["metrics"]
                for key in path:
                    value = value.get(key) if isinstance(value, dict) else None
                if isinstance(value, int | float):
                    measures[name] = value if name in COUNTS else 100 * value
    return measures


def mean_and_spread(values: list[float]) -> tuple[float, float]:
    """Return the mean and the largest distance from it."""
    mean = statistics.mean(values)
    return mean, max(abs(v - mean) for v in values)


def in_text(mean: float, spread: float, n: int, form: str) -> str:
    """Return "mean ± spread", the mean alone of one value; `form`: of each number, as in an f-string."""
    return f"{mean:{form}}" + (f" ± {spread:{form}}" if n > 1 else "")
