"""Differences of every method to CPLearn, paired by seed, with intervals."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from cplearn.tables.rows import NAMES, OF_SIZES
from cplearn.tables.status import State
from cplearn.text import format_table

COMPARED = {"linear": "linear", "knn": "20-NN", "ami": "AMI"}  # measure: its name in the table
LEVEL = 0.95
TO = "cplearn"


@dataclass(frozen=True)
class Difference:
    """A method's measure minus CPLearn's at one size, in points, over the seeds that both have."""

    method: str
    out_dim: int
    measure: str
    n: int
    mean: float
    low: float  # of the interval of the mean
    high: float

    @property
    def clear(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low > 0 or self.high < 0


def t_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean of n >= 2 differences and Student's interval of it (n - 1 degrees of freedom)."""
    from scipy.special import stdtrit  # slow to load; scikit-learn needs it anyway

    n, mean = len(values), statistics.mean(values)
    half = float(stdtrit(n - 1, (1 + LEVEL) / 2)) * statistics.stdev(values) / math.sqrt(n)
    return mean, mean - half, mean + half


def differences(states: Sequence[State]) -> list[Difference]:
    """Return the differences of the complete cells, by size, method and measure; those of one seed are left out."""
    values: dict[tuple[int, str], dict[int, dict[str, float]]] = {}  # by size and method, then by seed
    for state in states:
        if state.complete:
            row = state.cell.row
            values.setdefault((row.out_dim, row.method), {})[state.cell.seed] = state.measures
    findings = []
    for (c, method), theirs in sorted(values.items(), key=lambda x: x[0][0]):
        ours = values.get((c, TO), {})
        both = sorted(theirs.keys() & ours.keys()) if method != TO else []
        for measure in COMPARED:
            pairs = [(theirs[seed].get(measure), ours[seed].get(measure)) for seed in both]
            points = [a - b for a, b in pairs if a is not None and b is not None]
            if len(points) > 1:
                findings.append(Difference(method, c, measure, len(points), *t_interval(points)))
    return findings


def section(table: int | str, states: Sequence[State]) -> list[str]:
    """Return the paragraphs on paired differences, [] if there are none: another table, or one seed."""
    findings = differences(states) if table in OF_SIZES else []
    if not findings:
        return []
    lines: dict[tuple[str, int], dict[str, Difference]] = {}
    for x in sorted(findings, key=lambda x: [*NAMES].index(x.method)):
        lines.setdefault((x.method, x.out_dim), {})[x.measure] = x
    rows = [
        [NAMES[method], f"c = {c}", max(x.n for x in line.values()), *(_shown(line.get(name)) for name in COMPARED)]
        for (method, c), line in lines.items()
    ]
    heading = f"## Differences to {NAMES[TO]}, paired by seed"
    note = (
        f"Points: the method minus {NAMES[TO]} at the same size, mean over the n seeds that both have, and Student's "
        f"{LEVEL:.0%} interval of it, each by itself. Of few seeds it is wide; equal in every seed, it is a point."
    )
    return [heading, format_table(rows, ("method", "", "n", *COMPARED.values())), note, _summary(findings)]


def _summary(findings: list[Difference]) -> str:
    """Return how many differences were looked at, and which are clear."""
    clear = [x for x in findings if x.clear]
    text = (
        f"{len(findings)} differences were looked at; if no method differed from {NAMES[TO]}, about "
        f"{(1 - LEVEL) * len(findings):.1f} of these intervals would still exclude 0. **Clear differences (the "
        f"interval excludes 0): {len(clear)}.**"
    )
    for measure, name in COMPARED.items():
        for word, sign in (("below", -1), ("above", 1)):
            named = [f"{NAMES[x.method]} at {x.out_dim}" for x in clear if x.measure == measure and sign * x.mean > 0]
            if named:
                text += f" {name} {word} {NAMES[TO]}'s: {', '.join(named)}."
    return text


def _shown(x: Difference | None) -> str:
    return f"{x.mean:+.1f} [{x.low:+.1f}, {x.high:+.1f}]{'*' * x.clear}" if x else ""
