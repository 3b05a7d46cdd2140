"""The table: means, spreads, marks, sentences."""

import csv
import json
import re

import pytest

import reproduce_table3
from cplearn.tables import launch as launch
from cplearn.tables.cells import build_cells
from cplearn.tables.report import collect, marks, write
from cplearn.tables.status import state_of


def result(script: str, metrics: dict, *, random=False, sha="a") -> dict:
    source = {"random_init": random, "weights_sha256": sha, "data": "digits", "data_hash": "364 images"}
    return {"script": script, "metrics": metrics, **source}


def results(nmi, ami, linear, knn, *, highest=0.05, random=False, sha="a") -> list[dict]:
    cluster = {
        "codes": {"nmi": nmi, "ami": ami, "used_codes": 7},
        "codes_shuffled": {"nmi": 0.04, "nmi_highest": highest},
        "random_codes": {"nmi": 0.06},
        "singletons": {"nmi": 0.4},
        "kmeans": {"ami": 0.1},
    }
    return [
        result("eval_knn", {"knn20_top1": knn}, random=random, sha=sha),
        result("eval_linear", {"linear_last_top1": linear}, random=random, sha=sha),
        result("eval_cluster", cluster, random=random, sha=sha),
        result("eval_collapse", {"features_rank": 12.5}, random=random, sha=sha),
    ]


@pytest.fixture
def cells(tmp_path):
    """Two methods at c = 128, two seeds; SwAV at chance and below the untrained network."""
    args, _ = reproduce_table3.parse_args(
        f"--output_dir {tmp_path} --scale small --dataset digits --methods cplearn swav --out_dims 128 --epochs 1 "
        "--seeds 0 1 --ngpus 1".split()
    )
    cells = build_cells(args, 1)
    numbers = {
        "cplearn_c128_s0": results(0.30, 0.20, 0.50, 0.40),
        "cplearn_c128_s1": results(0.32, 0.22, 0.54, 0.44),
        "swav_c128_s0": results(0.05, 0.001, 0.30, 0.46),
        "swav_c128_s1": results(0.05, 0.001, 0.32, 0.46),
    }
    for cell in cells:
        (cell.folder / "trained").mkdir(parents=True)
        args = {"arch": "resnet8", "data_path": None, "dataset": "digits", "epochs": 1}
        derived = {"train_images": 1433, "effective_batch": 64, "device": "cpu", "commit": "abc"}
        verdict = "cluster" if cell.name == "swav_c128_s1" else "healthy"
        (cell.folder / "log.txt").write_text(json.dumps({"verdict": verdict}) + "\n")
        (cell.folder / "args.json").write_text(json.dumps({"args": args, "derived": derived}))
        (cell.folder / "trained.json").write_text("{}")
        lines = [*results(0.9, 0.9, 0.9, 0.9, sha="older"), *numbers[cell.name]]
        (cell.folder / "trained" / "results.jsonl").write_text("\n".join(map(json.dumps, lines)))
        if any(stage.startswith("random") for stage in cell.evaluate):
            (cell.folder / "random_init").mkdir()
            lines = results(0.1, 0.05, 0.40, 0.35, random=True)
            (cell.folder / "random_init" / "results.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return cells


def test_means_spreads_and_marks(cells):
    cplearn, swav, untrained = collect(cells)
    assert [x["n"] for x in (cplearn, swav, untrained)] == [2, 2, 2]
    assert cplearn["linear"] == pytest.approx((52, 2)) and cplearn["nmi"] == pytest.approx((31, 1))
    assert swav["knn"] == pytest.approx((46, 0)) and swav["features_rank"] == pytest.approx((12.5, 0))
    assert untrained["random"] and untrained["linear"] == pytest.approx((40, 0))
    assert (cplearn["verdict"], swav["verdict"], untrained["verdict"]) == ("healthy", "healthy, cluster", "")
    assert marks(cplearn, [untrained]) == ""
    assert marks(swav, [untrained]) == "chance, AMI <= untrained, linear <= untrained"


def test_what_the_table_says(cells, tmp_path):
    write(tmp_path, 3, "small", cells)
    text = (tmp_path / "table3.md").read_text()
    assert "| CPLearn      |   c = 128 | 2 | 31.0 ± 1.0 |  34.1 |" in text or re.search(
        r"CPLearn +\| +c = 128 \| 2 \| 31.0 ± 1.0 \| +34.1 \|", text
    )
    assert "Highest linear accuracy: cplearn at 128 (by 21.0, not clear of swav)." in text  # two seeds are too few
    assert (
        "images 1,433; evaluated on digits (364 images); epochs 1; batch 64; seeds 0, 1; device cpu; commit abc."
        in text
    )
    assert "random init, CPLearn's head" in text
    assert "The NMI is above the highest of the shuffles in 1 of 2 lines (not: swav_c128)." in text
    assert "20-NN accuracy is above the untrained network's in 2 of 2 lines." in text
    assert "not the paper's setting" in text and "one seed" not in text
    with open(tmp_path / "table3.csv") as f:
        rows = list(csv.DictReader(f))
    assert [(x["method"], x["paper_nmi"]) for x in rows] == [("CPLearn", "34.1"), ("SwAV", "28.0"), ("random init", "")]
    assert float(rows[0]["linear_spread"]) == 2.0


def test_a_cell_counts_when_all_of_it_is_there(cells):
    (cells[0].folder / "trained" / "results.jsonl").write_text(
        json.dumps(results(0.3, 0.2, 0.5, 0.4)[0]) + '\n{"script": "eval_li'
    )
    assert not cells[0].finished() and cells[0].done("knn") and not cells[0].done("linear")
    cplearn = collect(cells)[0]
    assert cplearn["n"] == 1 and cplearn["linear"] == pytest.approx((54, 0))
    assert state_of(cells[0]) == ("stopped", "before linear")
