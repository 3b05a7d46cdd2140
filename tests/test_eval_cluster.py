"""Agreement of codes and classes, written out and at known levels; the file of codes."""

import csv
import math

import numpy as np
import pytest
import torch
from helpers import eval_flags, write_images

import eval_cluster
from cplearn import checkpoints
from cplearn.errors import UserError


def test_agreement_written_out():
    labels, codes = np.array([0, 0, 1, 1, 2, 2]), np.array([5, 5, 5, 9, 7, 7])
    table = np.array([[2, 0, 0], [1, 0, 1], [0, 2, 0]]) / 6  # rows classes, columns codes 5, 7, 9
    pc, pk = table.sum(1), table.sum(0)
    outer = np.outer(pc, pk)
    mi = (table[table > 0] * np.log(table[table > 0] / outer[table > 0])).sum()
    entropy = [-(p * np.log(p)).sum() for p in (pc, pk)]
    got = eval_cluster.agreement(codes, labels)
    assert got["nmi"] == pytest.approx(2 * mi / sum(entropy))
    assert got["hungarian"] == pytest.approx(5 / 6)
    assert got["used_codes"] == 3 and got["perplexity"] == pytest.approx(math.exp(entropy[1]))
    assert got["ari"] == pytest.approx(4 / 9)  # 2 agreeing pairs; (2 - 4 * 3/15) / ((4 + 3)/2 - 4 * 3/15)


@pytest.mark.parametrize("counts", [[1], [5], [1, 1, 1], [1, 2, 9], [30, 1, 7, 7, 100]])
def test_singletons_agree_as_in_the_dense_table(counts):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    dense = eval_cluster.agreement(np.arange(len(labels)), labels)
    assert eval_cluster.singletons(labels) == pytest.approx(dense, rel=1e-12, abs=1e-12)


def test_singletons_and_random_codes_have_the_known_levels():
    """On the shape of the ImageNet-100 validation split."""
    labels = np.repeat(np.arange(100), 50)
    single = eval_cluster.singletons(labels)
    assert single["nmi"] == pytest.approx(2 * math.log(100) / (math.log(100) + math.log(5000)), abs=1e-6)
    assert single["nmi"] == pytest.approx(0.7019, abs=1e-4) and single["ami"] == pytest.approx(0, abs=1e-6)
    rng = np.random.default_rng(0)
    for c, expected in ((128, 0.248), (1024, 0.516), (32768, 0.692), (131072, 0.699)):
        got = eval_cluster.agreement(rng.integers(0, c, 5000), labels)
        assert got["nmi"] == pytest.approx(expected, abs=0.005) and got["ami"] == pytest.approx(0, abs=0.01)


def test_cluster_rows_of_a_perfect_head():
    labels = torch.arange(5).repeat(40)
    features = 5 * torch.eye(5)[labels] + 0.1 * torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
    rows = eval_cluster.cluster_metrics(features, labels, labels * 3, 50, seed=0, redo=3, shuffles=3)
    for name in ("codes", "kmeans"):
        assert rows[name]["nmi"] == pytest.approx(1) and rows[name]["hungarian"] == pytest.approx(1)
    assert rows["codes_shuffled"]["used_codes"] == 5 and abs(rows["codes_shuffled"]["ami"]) < 0.05
    assert rows["codes_shuffled"]["nmi"] < rows["codes_shuffled"]["nmi_highest"] < rows["codes"]["nmi"]
    assert rows["random_codes"]["used_codes"] > 40 and abs(rows["random_codes"]["ami"]) < 0.05
    assert rows["singletons"]["perplexity"] == pytest.approx(200)


def test_a_file_that_is_no_table_of_codes_is_kept(run, tmp_path):
    precious = tmp_path / "checkpoint.pth"
    checkpoints.write(precious, {"x": torch.zeros(3)})
    before = precious.read_bytes()
    for path in (precious, tmp_path):
        with pytest.raises(UserError, match=f"--out_csv {path}"):
            eval_cluster.main(eval_flags(run, tmp_path / "out", "--out_csv", str(path)))
    assert precious.read_bytes() == before


def test_names_in_the_table_of_codes_are_no_formulas(run, tmp_path):
    for split in ("train", "val"):
        for name in ("=1+1", "bee"):
            write_images(tmp_path / "data" / split / name, 4)
    flags = eval_flags(run, tmp_path, "--data_path", str(tmp_path / "data"), "--out_csv", str(tmp_path / "c.csv"))
    for _ in range(2):  # its own file may be written again
        eval_cluster.main([*flags, "--kmeans_redo", "1", "--shuffles", "1"])
    with open(tmp_path / "c.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["image", "class", "code"] and rows[1][:2] == ["'=1+1/000.jpg", "'=1+1"] and len(rows) == 9
    assert rows[-1][:2] == ["bee/003.jpg", "bee"] and int(rows[-1][2]) >= 0
