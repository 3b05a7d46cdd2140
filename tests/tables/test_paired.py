"""Paired differences against SciPy's paired t-test."""

import json
import re

import numpy as np
import pytest
from helpers import result
from scipy import stats

import reproduce_table3
from cplearn.tables import paired
from cplearn.tables.report import update
from cplearn.tables.status import snapshot

SEEDS = 3
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
    args, _ = reproduce_table3.parse_args(
        f"--output_dir {tmp_path} --scale small --dataset digits --methods cplearn swav barlow_twins --out_dims 16 128 "
        "--epochs 1 --seeds 0 1 2 --ngpus 1".split()
    )
    grid = reproduce_table3.build_grid(args, reproduce_table3.choose_settings(args))
    for cell in grid.cells:
        value = LINEAR[cell.row.method, cell.row.out_dim][cell.seed]
        if value is None:
            continue
        metrics = {
            "eval_knn": {"knn20_top1": 0.4 + 0.01 * cell.seed},  # equal in all methods
            "eval_linear": {"linear_last_top1": value},
            "eval_cluster": {"codes": {"nmi": 0.3, "ami": value / 2 + 0.01 * (cell.row.method == "swav")}},
            "eval_collapse": {"features_rank": 1.0},
        }
        for place in ("trained", "random_init"):
            (cell.folder / place).mkdir(parents=True)
            lines = [json.dumps(result(name, x)) for name, x in metrics.items()]
            (cell.folder / place / "results.jsonl").write_text("\n".join(lines) + "\n")
        (cell.folder / "trained.json").write_text("{}")
    return grid


def test_intervals_are_those_of_the_paired_t_test(grid):
    found = {(x.method, x.out_dim, x.measure): x for x in paired.differences(grid, snapshot(grid))}
    assert {key[:2] for key in found} == {("swav", 16), ("swav", 128), ("barlow_twins", 16)}
    assert len(found) == 3 * 3
    for (method, c), n in {("swav", 16): 3, ("swav", 128): 3, ("barlow_twins", 16): 2}.items():
        theirs, ours = (100 * np.array(LINEAR[x, c][:n], float) for x in (method, "cplearn"))
        test = stats.ttest_rel(theirs, ours)
        low, high = test.confidence_interval(0.95)
        x = found[method, c, "linear"]
        assert x.n == n and (x.mean, x.low, x.high) == pytest.approx(((theirs - ours).mean(), low, high))
        assert x.clear == (test.pvalue < 0.05)
    assert found["swav", 16, "linear"].clear and not found["swav", 128, "linear"].clear


def test_what_the_table_says_of_differences(grid):
    text = "\n\n".join(paired.section(grid, snapshot(grid)))
    assert re.search(r"\| SwAV +\| +c = 16 \| 3 \| +-4.5 \[-5.7, -3.3\]\* \|", text)
    assert "9 differences were looked at; if no method differed from CPLearn, about 0.5 of these intervals" in text
    assert (
        "Clear differences (the interval excludes 0): 4.** linear below CPLearn's: SwAV at 16. linear above CPLearn's: "
        "Barlow at 16. AMI below CPLearn's: SwAV at 16. AMI above CPLearn's: Barlow at 16."
    ) in text
    update(grid, snapshot(grid))
    assert text in (grid.folder / "table3.md").read_text()


def test_one_seed_has_no_differences(grid):
    one = type(grid)(grid.folder, grid.settings, [cell for cell in grid.cells if cell.seed == 0])
    assert paired.section(one, snapshot(one)) == []


def test_a_point_and_a_wide_interval():
    assert paired.t_interval([2.0, 2.0]) == (2, 2, 2)
    mean, low, high = paired.t_interval([1.0, 3.0])
    assert mean == 2 and (low, high) == pytest.approx((2 - 12.7062, 2 + 12.7062), abs=1e-3)  # a printed table's t
