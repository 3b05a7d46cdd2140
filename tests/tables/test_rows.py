"""The lines of each table against the paper's values."""

import re

import pytest
from helpers import ROOT

import main_cplearn
from cplearn.errors import UserError
from cplearn.tables.rows import OF_SIZES, beta_of, paper_lines, rows


def line(table, key, data="cifar10"):
    """Return the paper's values of a line, and its flags as parsed."""
    (row,) = [x for x in rows(table, "paper", [], [], data) if x.key == key]
    return row.paper, main_cplearn.parse_args([*row.flags, "--data_path", "."])


@pytest.mark.parametrize(
    ("table", "data", "key", "paper", "flags"),
    [
        (3, "cifar10", "cplearn_c131072", {"nmi": 70.9, "linear": 78.0}, {}),
        (3, "cifar10", "dino_c1024", {"nmi": 53.4, "linear": 73.6}, {}),
        (3, "cifar10", "gedi_c128", {"nmi": 24.5, "linear": 71.8}, {}),
        (3, "cifar10", "barlow_twins_c65536", {"nmi": "oom", "linear": "oom"}, {}),
        ("falcon", "cifar10", "cplearn_c50000", {"linear": 73.9}, {"epochs": 100, "arch": "vit_small"}),
        ("falcon", "cifar10", "dino_c50000", {"linear": 67.5}, {"epochs": 100, "arch": "vit_small"}),
        (1, "cifar10", "cplearn_c16384", {"nmi": 35.0, "linear": 67.0}, {"beta": 0.05}),  # Table 7
        (1, "svhn", "self_classifier_c10", {"nmi": 7.0, "linear": 58.0}, {"epochs": 20}),
        (1, "cifar100", "cplearn_c256", {"nmi": 33.0, "linear": 18.0}, {"arch": "resnet8_w256"}),  # c = f
        (2, "cifar10", "cplearn_c512", {"nmi": 47.4, "linear": 91.6}, {"beta": 1}),
        (4, "cifar10", "l2_c16384", {"nmi": 35.0, "linear": 68.0}, {"activation": "l2"}),
        (9, "cifar10", "beta1.25_c512", {"linear": 10.0, "collapse": "yes"}, {"beta": 1.25}),
    ],
)
def test_values_of_lines(table, data, key, paper, flags):
    values, parsed = line(table, key, data)
    assert values == paper and flags.items() <= vars(parsed).items()


@pytest.mark.parametrize("scale", ("paper", "small"))
@pytest.mark.parametrize("data", ("cifar10", "cifar100", "svhn"))
@pytest.mark.parametrize("table", (1, 2, 3, 4, 9, "falcon"))
def test_every_line_can_be_trained(table, data, scale):
    if (table, data) in ((2, "cifar100"), (2, "svhn")):
        with pytest.raises(UserError, match="--table 2"):
            rows(table, scale, [], [], data)
        return
    lines = rows(table, scale, [], [], data)
    assert len({x.key for x in lines}) == len(lines)
    for line in lines:
        args = main_cplearn.parse_args([*line.flags, "--data_path", "."])
        assert (args.method, args.out_dim) == (line.method, line.out_dim)


def test_sizes_and_methods():
    lines = rows(3, "paper", [], [], "cifar10")
    assert len(lines) == 30 and {x.out_dim for x in lines} == {128, 1024, 2048, 32768, 65536, 131072}
    earlier = rows("falcon", "paper", [], [], "cifar10")
    assert len(earlier) == 20 and {x.method for x in earlier} == {"dino", "cplearn"}
    assert line("falcon", "dino_c50000")[1].class_list.endswith("imagenet100.txt")
    assert [x.key for x in rows("falcon", "paper", ["dino"], [77], "cifar10")] == ["dino_c77"]
    with pytest.raises(UserError, match="--methods swav"):
        rows("falcon", "paper", ["swav"], [], "cifar10")


def test_how_the_two_versions_disagree():
    """Every number of results/table3_versions.md, from the authors' tables."""
    page = (ROOT / "results" / "table3_versions.md").read_text()
    shown = re.findall(r"^\| ([\d,]+) \| ([\d.]+) \| ([\d.]+) \| ([+-][\d.]+) \|$", page, re.M)
    shown = [(int(c.replace(",", "")), float(dino), float(ours), float(more)) for c, dino, ours, more in shown]

    def paper(table, method, name="linear"):
        return {x.out_dim: x.paper[name] for x in rows(table, "paper", [method], [], "cifar10")}

    final, earlier = ([(c, x, paper(table, "cplearn")[c], round(paper(table, "cplearn")[c] - x, 1))
                       for c, x in paper(table, "dino").items()] for table in OF_SIZES)  # fmt: skip
    assert shown == earlier + final
    assert min(x[3] for x in earlier) == 0.8 and max(x[3] for x in earlier) == 6.8
    assert [c for c, *_, more in final if more > 0] == [131072]
    before, after = ({x[0]: x for x in version} for version in (earlier, final))
    assert (before[50000][3], after[65536][3]) == (6.4, -1.5)
    assert [round(after[65536][k] - before[50000][k], 1) for k in (1, 2)] == [8.7, 0.8]
    nmi = zip(*(paper(3, method, "nmi").values() for method in ("cplearn", "dino")), strict=True)
    assert [round(ours - dino, 1) for ours, dino in nmi] == [-11.9, 0.9, 2.7, 6.2, 4.9, 6.6]
    linear = zip(*(paper(3, method).values() for method in ("swav", "cplearn")), strict=True)
    assert [swav > ours for swav, ours in linear] == [True] * 5 + [False]
    best = {(x["method"], x["linear_top1_percent"]) for x in paper_lines(3) if x["linear_top1_percent"] >= "78.0"}
    assert {x for x in best if x[1] != "oom"} == {("SwAV", "78.0"), ("CPLearn", "78.0")}


def test_beta_of_table_7():
    assert [beta_of(c) for c in (10, 100, 128, 256, 2048, 16384, 131072)] == [
        "0.5", "0.5", "0.5", "0.25", "0.1", "0.05", "0.05",
    ]  # fmt: skip
