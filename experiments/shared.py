"""What the experiments share: scripts run as commands, rank correlations."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cplearn.errors import UserError
from cplearn.host import ROOT


def run_script(script: str, *flags: object, output: Path | None = None, **environment: str) -> None:
    """Run a script of the checkout to its end; what it prints is appended to `output`, if one is named.

    Raises `UserError` if it fails.
    """
    with open(output or os.devnull, "ab") as file:
        command = [sys.executable, str(ROOT / script), *map(str, flags)]
        ended = subprocess.run(command, env=os.environ | environment, stdout=file, stderr=file if output else None)
    if ended.returncode:
        where = f": see {output}" if output else ""
        raise UserError(f"{script} {' '.join(map(str, flags))} ended with code {ended.returncode}{where}")


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> float:
    """Return Spearman's correlation; NaN of fewer than five pairs, or where one side does not vary."""
    from scipy.stats import spearmanr

    x, y = np.array(pairs).reshape(-1, 2).T
    if len(x) < 5 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(spearmanr(x, y).statistic)
