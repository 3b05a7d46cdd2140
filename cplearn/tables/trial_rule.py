"""The rule by which the trials of --tune are drawn. It was written down before anything was measured.

Trial 0 is the method as it stands in rows.py. Trial k does not depend on N or on the other methods: all have the same
points.
"""

import math
from collections.abc import Callable
from dataclasses import replace

from cplearn.slurm.checks import parse_flags
from cplearn.tables.rows import Row

HELD_OUT = 5  # one image of so many, in every class
SEED = 0  # of every trial, whatever the seeds of the cells
OUT_DIM = 1024  # of every trial, unless --tune_out_dim says otherwise
LR_FACTOR = 4.0  # learning rates from a quarter to four times the recipe's

Value = Callable[[float, int], str]  # of a place in [0, 1) and the size


def _log_uniform(low: float, high: float) -> Value:
    return lambda place, out_dim: f"{low * (high / low) ** place:.3g}"


def _one_of(*values: float | str) -> Value:
    return lambda place, out_dim: str(values[int(place * len(values))])


def _one_minus(low: float, high: float) -> Value:
    return lambda place, out_dim: f"{1 - low * (high / low) ** place:.5g}"


def _over_log_size(low: float, high: float) -> Value:
    return lambda place, out_dim: f"{low * (high / low) ** place / math.log(out_dim):.3g}"


# The learning rate, and of every method its own two most important settings.
RULE: dict[str, dict[str, Value]] = {
    # The paper's Tables 7 and 9 (0.05 to 1; above 1 a run can fall to a few codes); 1 is the theory's logit scale,
    # 64 the published code's.
    "cplearn": {"--beta": _log_uniform(0.05, 1), "--n_ref": _one_of(1, 4, 16, 64)},
    # A tenth to ten times the paper's 0.0051, over which its ablation goes; its projector gets better with width.
    "barlow_twins": {"--lambd": _log_uniform(0.00051, 0.051), "--projector_width": _one_of(512, 1024, 2048)},
    # Its ablation goes from 0.02 up, and above 0.07 it is unstable; 0.9 to 0.999 is around 0.99 for short runs.
    "dino": {"--teacher_temp": _log_uniform(0.02, 0.07), "--momentum_teacher": _one_minus(0.001, 0.1)},
    # 0.05, and 0.03 where it sticks, in the original; its queue is for small batches: none, 15 or 60 batches of 64.
    "swav": {"--epsilon": _log_uniform(0.02, 0.1), "--queue_length": _one_of(0, 960, 3840)},
    # Below where the forward prior lets all images fall to one code (1.8 over log c at c = 128, 1.4 at 131,072); mean
    # is the equation, sum the published code.
    "gedi": {"--beta": _over_log_size(0.1, 1), "--gedi_prior_reduction": _one_of("mean", "sum")},
}

# Halton's sequence: every axis is filled evenly from the first trials on, and none of its points depends on their
# number.
BASES = (2, 3, 5)


def point(trial: int) -> tuple[float, float, float]:
    """Return the place of a trial in the unit cube: learning rate, first and second setting.

    It has the digits of the trial's number in each base, mirrored at the point: trial 1 is at 1/2, 1/3, 1/5.
    """
    return tuple(_mirrored(trial, base) for base in BASES)


def _mirrored(number: int, base: int) -> float:
    place, unit = 0.0, 1.0
    while number:
        number, digit = divmod(number, base)
        unit /= base
        place += digit * unit
    return place


def trial_flags(method: str, trial: int, out_dim: int, lr: float) -> list[str]:
    """Return what a trial adds to the flags of its method at a size; `lr` is the rate that these have."""
    if trial == 0:
        return []
    first, *others = point(trial)
    flags = ["--lr", f"{lr * LR_FACTOR ** (2 * first - 1):.3g}"]
    for (flag, value), place in zip(RULE[method].items(), others, strict=True):
        flags += [flag, value(place, out_dim)]
    return flags


def tuned(row: Row, trial: int) -> Row:
    """Return a row with the settings of its method's trial."""
    lr = parse_flags("main_cplearn", [*row.flags, "--data_path", "."]).lr
    return replace(row, flags=[*row.flags, *trial_flags(row.method, trial, row.out_dim, lr)])


def own_settings() -> set[str]:
    """Return the flags that trials set."""
    return {"--lr", *(flag for settings in RULE.values() for flag in settings)}
