"""`experiments/theory.py`: the minimum of the loss against closed forms, and what it says of wrong flags."""

import json
import math

import pytest
import theory
import torch
from PIL import Image
from theory import Setting

from cplearn.errors import UserError
from cplearn.loss import DICTIONARIES


def terms_of(row: dict, setting: Setting) -> float:
    """The loss by its definition, beta * mean entropy + log c - entropy of the mean, from other columns."""
    log_own, log_groups = math.log(row["per image"]), math.log(row["groups"])
    return setting.beta * log_own + math.log(setting.c) - (log_own + log_groups)


def test_exactly_aligned_embeddings_have_the_assignments_of_the_paper():
    """One Hadamard block: probability eps for every wrong code, and every code for one image."""
    setting, eps = Setting(64, 64, 64, 0.25, "aligned", "hadamard"), 1e-8
    row = theory.minimize(setting, calls=1)
    right = 1 - 63 * eps
    assert row["at start"] == pytest.approx(0.25 * -(right * math.log(right) + 63 * eps * math.log(eps)), rel=1e-6)


def test_with_as_many_images_as_codes_the_minimum_of_the_paper_is_reached():
    setting = Setting(64, 256, 256, 0.25, "aligned", "hadamard")
    row = theory.minimize(setting)
    assert 0 < row["loss"] < row["at start"] < 2e-4 and row["gradient"] < 1e-3
    assert (row["used"], row["most"]) == (256, 1) and row["groups"] == pytest.approx(256, rel=1e-3)
    assert row["off"] < 1e-4 and row["its codes"] < 1e-9 and row["formula"] == 0
    assert 0.97 < row["alignment"] < 0.999 and row["same"] is None and row["other"] < 2 / 64
    assert row["loss"] == pytest.approx(terms_of(row, setting), abs=1e-9)


def test_with_fewer_images_and_beta_below_1_the_minimum_is_soft():
    """c / n = 4 codes per image, its own; below aligned and uniform, which are equal here: n = c^(1 - beta)."""
    setting = Setting(64, 256, 64, 0.25, "random")
    row = theory.minimize(setting, calls=150)
    assert row["aligned"] == pytest.approx(row["uniform"]) and row["bound"] == pytest.approx(0.25 * math.log(4))
    assert row["bound"] + 0.03 < row["loss"] < row["aligned"] - 0.8
    assert 3 < row["per image"] < 5 and 55 < row["groups"] <= 64 and row["used"] == 64
    assert row["random"] < row["alignment"] < 0.8
    assert row["loss"] == pytest.approx(terms_of(row, setting), abs=1e-9)


def test_above_beta_1_few_codes_are_left_from_an_alike_start_only():
    alike, random = (theory.minimize(Setting(64, 256, 256, 2.0, start), calls=100) for start in ("alike", "random"))
    assert alike["used"] <= 3 and alike["loss"] == pytest.approx(math.log(256 / alike["groups"]), abs=0.01)
    assert alike["same"] > 0.9 and alike["off"] > 0.95
    assert random["used"] > 150 and random["loss"] < 1


def test_a_saturated_aligned_start_is_never_left():
    """At a loss worse than uniform: nothing pulls where assignments are one-hot."""
    setting = Setting(64, 256, 32, 0.25, "aligned", n_ref=64)
    row = theory.minimize(setting)
    assert row["loss"] == pytest.approx(math.log(256 / 32), abs=1e-9) and row["loss"] > row["uniform"] + 0.5
    assert row["gradient"] < 1e-9 and row["calls"] < 5 and row["alignment"] == pytest.approx(1)


@pytest.mark.parametrize("count", [64, 256])
def test_energy_off_the_diagonal_of_codes_is_the_formula_on_average(count):
    drawn = [DICTIONARIES["rademacher"](count, 64, seed).codes(dtype=torch.float64) for seed in range(20)]
    mean = sum(map(theory.energy_off_diagonal, drawn)) / len(drawn)
    assert mean == pytest.approx(theory.expected_energy(Setting(64, count, 512, 1.0, "aligned")), rel=0.02)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--only", "beta 7"], "--only 'beta 7'"),
        (["--figure", "theory.jpg"], "--figure theory.jpg"),
        (["--json", "/proc/nothing/rows.json"], "--json /proc/nothing/rows.json"),
    ],
)
def test_wrong_flags_are_refused_at_once(flags, words, monkeypatch):
    monkeypatch.setattr(theory, "minimize", None)
    with pytest.raises(UserError, match=words):
        theory.main(flags)


def test_one_row_by_its_name(tmp_path, capsys):
    theory.main(["--only", "n 64, beta 1, hadamard, aligned", "--json", str(tmp_path / "rows.json")])
    said = capsys.readouterr().out
    assert "| beta 1, hadamard, aligned |" in said and "\n1 rows" in said
    (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert row["n"] == 64 and row["loss"] == pytest.approx(math.log(4), abs=1e-3) and row["most"] == 1


def test_which_rows_there_are():
    assert len(theory.chosen(None)) == len(set(theory.chosen(None))) == 54 + 8 + 2 + 9 + 8
    assert {(s.c, s.recipe) for s in theory.chosen("n_ref 4")} == {(16384, ""), (1024, "digits"), (4096, "laptop")}
    assert {s.start for s in theory.chosen("n 256*beta 2, hadamard")} == set(theory.STARTS)


def test_the_figure(tmp_path):
    found = {s: theory.minimize(s, calls=2) for s in theory.CURVES}
    theory.draw(found, tmp_path / "theory.png")
    assert Image.open(tmp_path / "theory.png").width > 800


def test_at_c_equal_f_a_start_on_the_codes_is_the_minimum_unless_images_are_fewer():
    """Theorem 1's own case, and the same with a quarter of the images."""
    stays, leaves = (theory.minimize(Setting(64, 64, n, 0.25, "aligned", "hadamard")) for n in (64, 16))
    assert stays["loss"] < 1e-4 and stays["alignment"] > 0.9999 and stays["off"] < 1e-6 and stays["used"] == 64
    assert leaves["loss"] < leaves["at start"] - 0.5 and leaves["alignment"] < 0.5
