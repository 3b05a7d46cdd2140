"""Paired differences against SciPy's paired t-test."""

import re

import numpy as np
import pytest
from grids import finish, grid_of
from scipy import stats

from cplearn.tables import paired
from cplearn.tables.report import update
from cplearn.tables.status import snapshot

LINEAR = {  # by size, seed after seed; SwAV is clearly below at 16 and not at 128, Barlow lacks seeds
    ("cplearn", 16): [0.50, 0.54, 0.52],
    ("swav", 16): [0.45, 0.50, 0.475],
    ("cplearn", 128): [0.50, 0.54, 0.52],
    ("swav", 128): [0.55, 0.50, 0.56],
    ("barlow_twins", 16): [0.60, 0.63, None],
    ("barlow_twins", 128): [0.60, None, None],
}


@pytest.fixture
def grid(tmp_path):
    flags = "--dataset digits --methods cplearn swav barlow_twins --out_dims 16 128 --epochs 1 --seeds 0 1 2"
    grid = grid_of(tmp_path, flags)
    for cell in grid.cells:
        value = LINEAR[cell.row.method, cell.row.out_dim][cell.seed]
        metrics = {
            "eval_knn": {"knn20_top1": 0.4 + 0.01 * cell.seed},  # equal in all methods
            "eval_linear": {"linear_last_top1": value},
            "eval_cluster": {"codes": {"nmi": 0.3, "ami": (value or 0) / 2 + 0.01 * (cell.row.method == "swav")}},
            "eval_collapse": {"features_rank": 1.0},
        }
        if value is not None:
            finish(cell, metrics, metrics)
    return grid


def test_intervals_are_those_of_the_paired_t_test(grid):
    differences = {(x.method, x.out_dim, x.measure): x for x in paired.differences(snapshot(grid))}
    assert {key[:2] for key in differences} == {("swav", 16), ("swav", 128), ("barlow_twins", 16)}
    assert len(differences) == 3 * 3
    for (method, c), n in {("swav", 16): 3, ("swav", 128): 3, ("barlow_twins", 16): 2}.items():
        theirs, ours = (100 * np.array(LINEAR[x, c][:n], float) for x in (method, "cplearn"))
        test = stats.ttest_rel(theirs, ours)
        low, high = test.confidence_interval(0.95)
        x = differences[method, c, "linear"]
        assert x.n == n and (x.mean, x.low, x.high) == pytest.approx(((theirs - ours).mean(), low, high))
        assert x.clear == (test.pvalue < 0.05)
    assert differences["swav", 16, "linear"].clear and not differences["swav", 128, "linear"].clear


def test_what_the_table_says_of_differences(grid):
    states = snapshot(grid)
    text = "\n\n".join(paired.section(3, states))
    assert re.search(r"\| SwAV +\| +c = 16 \| 3 \| +-4.5 \[-5.7, -3.3\]\* \|", text)
    assert "9 differences were looked at; if no method differed from CPLearn, about 0.5 of these intervals" in text
    assert (
        "Clear differences (the interval excludes 0): 4.** linear below CPLearn's: SwAV at 16. linear above CPLearn's: "
        "Barlow at 16. AMI below CPLearn's: SwAV at 16. AMI above CPLearn's: Barlow at 16."
    ) in text
    update(grid, states)
    assert text in (grid.folder / "table3.md").read_text()
    assert paired.section(3, [x for x in states if x.cell.seed == 0]) == []  # one seed has none


def test_a_point_and_a_wide_interval():
    assert paired.t_interval([2.0, 2.0]) == (2, 2, 2)
    mean, low, high = paired.t_interval([1.0, 3.0])
    assert mean == 2 and (low, high) == pytest.approx((2 - 12.7062, 2 + 12.7062), abs=1e-3)  # a printed table's t
