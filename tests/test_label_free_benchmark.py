"""`experiments/label_free.py compare` on runs whose answer is known."""

import json
import math

import label_free
import numpy as np
import pytest
from scipy.stats import ttest_ind, ttest_rel

from cplearn.errors import UserError
from cplearn.methods.cplearn import aligned_from


def write_runs(path, count: int) -> None:
    """Runs of three epochs: `follows` is 20-NN cubed, `against` falls when it rises, `start` tells the networks apart
    and nothing else, `noise` nothing."""
    rng = np.random.default_rng(1)
    lines = []
    for run in range(count):
        start = float(rng.uniform(0.1, 0.6))
        for epoch, gain in ((0, 0.0), (1, float(rng.uniform(-0.05, 0.1))), (2, float(rng.uniform(-0.1, 0.2)))):
            line = {"run": f"r{run}", "epoch": epoch, "method": "cplearn", "commit": "x", "knn": start + gain}
            line |= {"follows": gain**3, "against": 7 - gain, "start": 5 * start, "noise": float(rng.normal())}
            lines.append(json.dumps(line))
    path.write_text("\n".join(lines) + "\n")


def test_the_measure_that_follows_is_found(tmp_path, capsys):
    write_runs(tmp_path / "m.jsonl", 40)
    label_free.main(["compare", str(tmp_path / "m.jsonl"), "--json", str(tmp_path / "c.json"), "--draws", "50"])
    found = json.loads((tmp_path / "c.json").read_text())["measures"]
    for name, sign in (("follows", 1), ("against", -1)):
        assert found[name]["sign"] == sign and found[name]["within"] == 1
        assert found[name]["second"] == pytest.approx(sign) and found[name]["low"] == pytest.approx(sign)
        assert found[name]["right"] >= 19 and found[name]["false"] <= 1  # of 20; the threshold is of the other half
    assert math.isnan(found["start"]["second"])  # the same at the start and after, so it says nothing
    assert abs(found["noise"]["second"]) < 0.6 and found["noise"]["low"] < 0 < found["noise"]["high"]
    assert capsys.readouterr().out.splitlines()[0].startswith("40 runs (40 cplearn)")


def test_rules_say_better_where_the_same_images_rise():
    base = [1] * 10 + [20] * 90
    ends = {  # ranks at the end, difference of 20-NN
        "same": (base, -0.01),
        "five more": ([1] * 15 + [20] * 85, 0.05),
        "nearer": ([1] * 10 + [10] * 90, 0.03),
        "fewer": ([1] * 3 + [20] * 97, -0.03),
        "others": ([20] * 12 + [1] * 12 + [20] * 76, 0.01),  # ten lost, twelve found
    }
    lines = []
    for name, (ranks, gain) in ends.items():
        for epoch, of, knn in ((0, base, 0.3), (2, ranks, 0.3 + gain)):
            lines.append({"run": name, "epoch": epoch, "places": of, "knn": knn})
    found = {tuple(row[:3]): row[3:] for row in label_free.rules(lines, 0.02)}
    assert found == {  # called better; of these better, below the start; better and missed
        ("retrieval", "other", 1): (1, 1, 0, 1),
        ("retrieval", "other", 2): (0, 0, 0, 2),
        ("retrieval", "same", 1): (1, 1, 0, 1),
        ("retrieval", "same", 2): (1, 1, 0, 1),
        ("nearness", "other", 1): (2, 2, 0, 0),
        ("nearness", "other", 2): (1, 1, 0, 1),
        ("nearness", "same", 1): (2, 2, 0, 0),
        ("nearness", "same", 2): (2, 2, 0, 0),
    }


def test_a_rise_in_standard_errors():
    a, b = np.random.default_rng(0).normal(size=(2, 50))
    b += 0.3
    assert label_free.risen(a, b, same=True) == pytest.approx(ttest_rel(b, a).statistic)
    assert label_free.risen(a, b, same=False) == pytest.approx(ttest_ind(b, a, equal_var=False).statistic)
    assert label_free.risen(a, a, same=True) == 0


def test_few_runs_are_refused(tmp_path):
    write_runs(tmp_path / "m.jsonl", 9)
    with pytest.raises(UserError, match="9 runs"):
        label_free.main(["compare", str(tmp_path / "m.jsonl")])


@pytest.mark.parametrize(("n", "c"), [(64, 4096), (64, 16384), (256, 4096)])
def test_at_the_edge_aligned_costs_what_uniform_does(n, c):
    assert aligned_from(c, n) * math.log(c) == pytest.approx(math.log(c / n))
