"""The table: means, spreads, caveats, sentences; and which results count."""

import csv
import hashlib
import json
import re

import pytest
from grids import finish, grid_of
from helpers import result

from cplearn import checkpoints
from cplearn.tables.grid import Grid
from cplearn.tables.report import caveats, collect, write
from cplearn.tables.status import State, describe, snapshot


def metrics(nmi, ami, linear, knn) -> dict[str, dict]:
    cluster = {
        "codes": {"nmi": nmi, "ami": ami, "used_codes": 7},
        "codes_shuffled": {"nmi": 0.04, "nmi_highest": 0.05},
        "random_codes": {"nmi": 0.06},
        "singletons": {"nmi": 0.4},
        "kmeans": {"ami": 0.1},
    }
    return {
        "eval_knn": {"knn20_top1": knn},
        "eval_linear": {"linear_last_top1": linear},
        "eval_cluster": cluster,
        "eval_collapse": {"features_rank": 12.5},
    }


@pytest.fixture
def grid(tmp_path):
    """Two methods at c = 128, two seeds; SwAV at chance and below the untrained network."""
    grid = grid_of(tmp_path, "--dataset digits --methods cplearn swav --out_dims 128 --epochs 1 --seeds 0 1")
    numbers = {
        "cplearn_c128_s0": (0.30, 0.20, 0.50, 0.40),
        "cplearn_c128_s1": (0.32, 0.22, 0.54, 0.44),
        "swav_c128_s0": (0.05, 0.001, 0.30, 0.46),
        "swav_c128_s1": (0.05, 0.001, 0.32, 0.46),
    }
    for cell in grid.cells:
        untrained = metrics(0.1, 0.05, 0.40, 0.35) if "random knn" in cell.evaluate else None
        verdict = "cluster" if cell.name == "swav_c128_s1" else "learning"
        finish(cell, metrics(*numbers[cell.name]), untrained, verdict=verdict)
        path = cell.folder / "trained" / "results.jsonl"
        older = [json.dumps(result(name, x, sha="older")) for name, x in metrics(0.9, 0.9, 0.9, 0.9).items()]
        path.write_text("\n".join(older) + "\n" + path.read_text())
        args = {"arch": "resnet8", "data_path": None, "dataset": "digits", "epochs": 1}
        derived = {"train_images": 1433, "effective_batch": 64, "device": "cpu", "commit": "abc"}
        (cell.folder / "args.json").write_text(json.dumps({"args": args, "derived": derived}))
    return grid


def test_means_spreads_and_caveats(grid):
    (cplearn, swav), (codes, features) = collect(snapshot(grid))
    assert [x.n for x in (cplearn, swav, codes, features)] == [2, 2, 2, 2]
    assert cplearn.numbers["linear"] == pytest.approx((52, 2)) and cplearn.numbers["nmi"] == pytest.approx((31, 1))
    assert swav.numbers["knn"] == pytest.approx((46, 0)) and swav.numbers["features_rank"] == pytest.approx((12.5, 0))
    assert (codes.kind, features.kind) == ("codes", "features")
    assert features.numbers["linear"] == pytest.approx((40, 0)) and "ami" not in features.numbers
    assert "linear" not in codes.numbers and codes.numbers["ami"] == pytest.approx((5, 0))
    assert (cplearn.verdict, swav.verdict, codes.verdict) == ("learning", "learning, cluster", "")
    assert caveats(cplearn, [codes, features]) == []
    assert caveats(swav, [codes, features]) == ["chance", "AMI <= untrained", "linear <= untrained"]


def test_what_the_table_says(grid, tmp_path):
    write(grid, snapshot(grid))
    text = (tmp_path / "table3.md").read_text()
    for part in (
        r"\| CPLearn +\| +c = 128 \| 2 \| 31.0 ± 1.0 \| +34.1 \|",
        r"images 1,433; evaluated on digits \(364 images\); epochs 1; batch 64; seeds 0, 1; device cpu; commit abc\.",
        "random init, CPLearn's head",
        r"The NMI is above the highest of the shuffles in 1 of 2 lines \(not: swav_c128\)\.",
        r"SwAV .* chance, AMI <= untrained, linear <= untrained \|",
        r"20-NN accuracy is above the untrained network's in 2 of 2 lines\.",
        "not the paper's setting",
        r"\| random init +\| +\| 2 \|.*\| 40.0 ± 0.0 \|",
    ):
        assert re.search(part, text), part
    assert "one seed" not in text and "Not complete" not in text
    with open(tmp_path / "table3.csv") as f:
        rows = list(csv.DictReader(f))
    assert [(x["method"], x["out_dim"], x["paper_nmi"]) for x in rows] == [
        ("CPLearn", "128", "34.1"), ("SwAV", "128", "28.0"), ("random init", "128", ""), ("random init", "", "")
    ]  # fmt: skip
    assert float(rows[0]["linear_spread"]) == 2.0

    (grid.cells[0].folder / "args.json").write_text("{damaged")
    (grid.cells[3].folder / "trained.json").unlink()
    write(grid, snapshot(grid))
    text = (tmp_path / "table3.md").read_text()
    assert "Setting: without args.json cplearn_c128_s0; network resnet8;" in text
    assert "Not complete: 3 of 4 cells" in text and "one seed" in text


def test_a_cell_counts_when_all_of_it_is_there(grid):
    cell = grid.cells[0]
    line = json.dumps(result("eval_knn", {"knn20_top1": 0.4}))
    (cell.folder / "trained" / "results.jsonl").write_text(line + '\n{"script": "eval_li')
    states = snapshot(grid)
    assert states[0].missing == ["linear", "cluster", "collapse"]
    ((cplearn, _), _) = collect(states)
    assert cplearn.n == 1 and cplearn.numbers["linear"] == pytest.approx((54, 0))
    assert describe(states[0]) == ("stopped", "before linear")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({}, ""),
        ({"out_dim": 64}, "--out_dim 64, not 128"),
        ({"seed": 1}, "--seed 1, not 0"),
        ({"epochs": 9, "method": "swav"}, "--method swav, not cplearn, --epochs 9, not 1"),
    ],
)
def test_results_of_another_training_do_not_count(grid, wrong, words):
    cell = grid.cells[0]
    right = {"method": "cplearn", "out_dim": 128, "seed": 0, "epochs": 1}
    checkpoints.save(cell.folder / "checkpoint.pth", {"args": right | wrong, "epoch": 1})
    states = snapshot(grid)
    assert states[0].complete is (not wrong) and states[0].differs == words
    assert collect(states)[0][0].n == (1 if wrong else 2)
    expected = f"its checkpoint has {words}: move {cell.folder} away"
    assert describe(states[0]) == (("failed", expected) if wrong else ("done", ""))
    (cell.folder / "checkpoint.pth").write_bytes(b"no checkpoint")  # an evaluation says so
    assert cell.differs() == ""


def test_results_of_weights_that_were_trained_before_do_not_count(grid):
    cell = grid.cells[0]
    evaluations = list(cell.evaluate)
    (cell.folder / "trained.json").unlink()  # as for a new training
    assert cell.missing() == ["train", *evaluations]
    (cell.folder / "checkpoint.pth").write_bytes(b"weights")
    cell.mark_trained()
    assert cell.missing() == evaluations and cell.results() == []
    line = {"script": "eval_knn", "weights_sha256": hashlib.sha256(b"weights").hexdigest(), "metrics": {}}
    with open(cell.folder / "trained" / "results.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")
    assert cell.results() == [line] and "knn" not in cell.missing()


def test_a_failure_that_says_nothing(grid):
    (grid.cells[0].folder / "trained.json").unlink()
    (grid.cells[0].folder / "failed.json").write_text('{"foreign": 1}')
    assert describe(State(grid.cells[0])) == ("failed", "?, exit code ?: ?")


def test_looking_changes_nothing(grid):
    before = sorted(grid.folder.rglob("*"))
    assert all(describe(state) == ("done", "") for state in snapshot(grid))
    assert sorted(grid.folder.rglob("*")) == before


def test_a_grid_is_saved_and_loaded(grid):
    assert grid.save() == grid == Grid.load(grid.folder)
    (first, *_) = json.loads((grid.folder / "grid.json").read_text())["cells"]
    assert list(first) == ["row", "seed", "name", "train", "evaluate"]


def test_cells_of_other_images_are_not_compared(grid):
    """The folder's images were replaced while the grid went on."""

    def written(name: str, **source: str) -> str:
        path = grid.folder / name / "trained" / "results.jsonl"
        lines = [json.loads(line) | source for line in path.read_text().splitlines()]
        path.write_text("\n".join(map(json.dumps, lines)))
        write(grid, snapshot(grid))
        return (grid.folder / "table3.md").read_text()

    assert "Not to be compared" not in written("swav_c128_s0", trained_on="a", images_sha256="b")
    assert "Not to be compared" not in written("swav_c128_s1", trained_on="a", images_sha256="b")
    assert "these cells were evaluated on different images" in written("cplearn_c128_s0", images_sha256="c")
    assert "these cells were trained and evaluated on different" in written("cplearn_c128_s1", trained_on="d")
