"""Differences of every method to CPLearn, paired by seed, with intervals."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from cplearn.tables.grid import Grid
from cplearn.tables.measures import read_measures
from cplearn.tables.rows import NAMES, OF_SIZES
from cplearn.tables.status import CellState
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


def differences(grid: Grid, states: dict[str, CellState]) -> list[Difference]:
    """Return the differences of the complete cells, by size, method and measure; those of one seed are left out."""
    values: dict[tuple[str, int], dict[int, dict[str, float]]] = {}
    for cell in grid.cells:
        if states[cell.name].complete:
            of_line = values.setdefault((cell.row.method, cell.row.out_dim), {})
            of_line[cell.seed] = read_measures(cell.results())
    found = []
    for (method, c), other in sorted(values.items(), key=lambda x: x[0][1]):
        ours = values.get((TO, c), {})
        if method == TO:
            continue
        for measure in COMPARED:
            pairs = [
                other[seed][measure] - ours[seed][measure]
                for seed in sorted(other.keys() & ours.keys())
                if measure in other[seed] and measure in ours[seed]
            ]
            if len(pairs) > 1:
                found.append(Difference(method, c, measure, len(pairs), *t_interval(pairs)))
    return found


def section(grid: Grid, states: dict[str, CellState]) -> list[str]:
    """Return the paragraphs on paired differences, [] if there are none: another table, or one seed."""
    found = differences(grid, states) if grid.settings.table in OF_SIZES else []
    if not found:
        return []
    rows = []
    for method, c in dict.fromkeys((x.method, x.out_dim) for x in found):
        mine = {x.measure: x for x in found if (x.method, x.out_dim) == (method, c)}
        numbers = [_shown(mine.get(measure)) for measure in COMPARED]
        rows.append([NAMES[method], f"c = {c}", max(x.n for x in mine.values()), *numbers])
    rows.sort(key=lambda row: [*NAMES.values()].index(row[0]))
    heading = f"## Differences to {NAMES[TO]}, paired by seed"
    note = (
        f"Points: the method minus {NAMES[TO]} at the same size, mean over the n seeds that both have, and Student's "
        f"{LEVEL:.0%} interval of it, each by itself. Of few seeds it is wide; equal in every seed, it is a point."
    )
    return [heading, format_table(rows, ("method", "", "n", *COMPARED.values())), note, summary(found)]


def summary(found: list[Difference]) -> str:
    """Return how many differences were looked at, and which are clear."""
    clear = [x for x in found if x.clear]
    text = (
        f"{len(found)} differences were looked at; if no method differed from {NAMES[TO]}, about "
        f"{(1 - LEVEL) * len(found):.1f} of these intervals would still exclude 0. **Clear differences (the interval "
        f"excludes 0): {len(clear)}.**"
    )
    for measure, name in COMPARED.items():
        for word, sign in (("below", -1), ("above", 1)):
            named = [f"{NAMES[x.method]} at {x.out_dim}" for x in clear if x.measure == measure and sign * x.mean > 0]
            if named:
                text += f" {name} {word} {NAMES[TO]}'s: {', '.join(named)}."
    return text


def _shown(x: Difference | None) -> str:
    return f"{x.mean:+.1f} [{x.low:+.1f}, {x.high:+.1f}]{'*' * x.clear}" if x else ""
