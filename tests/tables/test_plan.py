"""Probe, plan and budget."""

import json
import os
import re

import pytest
from helpers import children_of

import reproduce_table3
from cplearn.errors import UserError
from cplearn.tables.plan import epochs_within

PLAN = "--scale small --dataset digits --methods cplearn --out_dims 16 --epochs 7000 --dry_run --probe_steps 4"


@pytest.mark.parametrize(
    ("flags", "cells", "sharing"),
    [("--price 2 --seeds 0 1", 2, 1), pytest.param("--price 2 --cells_per_gpu 2", 1, 2, marks=pytest.mark.slow)],
)
def test_the_plan_adds_up(tmp_path, capsys, monkeypatch, flags, cells, sharing):
    """Cells that share a GPU are timed beside others that really train; each has half of a GPU-hour then."""
    if sharing > 1:
        monkeypatch.setattr(reproduce_table3, "gpus", lambda: ["0"])  # the processes themselves take the CPU
    before = children_of(os.getpid())
    reproduce_table3.main(["--output_dir", str(tmp_path), *f"{PLAN} {flags}".split()])
    printed = capsys.readouterr().out
    ((name, probe),) = json.loads((tmp_path / "probe.json").read_text()).items()
    assert ("shared by 2" in name) == (sharing == 2) and probe["train_images"] == 1433
    step = probe["step_seconds"]
    # Features are extracted once, as nothing is augmented, of the trained and the untrained network. Forward only, of
    # one view of the two.
    hours = cells * (7000 * (1433 // 64) * step + 2 * 1433 * step / 64 / 3 / 2) / 3600 / sharing
    shown = re.search(r" ([\d,]+) CPU-hours, [\d.,]+ days with (\d) side .* ([\d,]+) euros at 2 for such", printed)
    assert shown and [int(x.replace(",", "")) for x in shown.groups()] == [round(hours), sharing, round(2 * hours)]
    assert round(hours) > 1, printed
    assert printed.count("main_cplearn.py @") == cells and "1 process each, a batch of 64: " in printed
    assert "eval_linear.py --pretrained_weights" in printed
    assert bool(re.search(r"2 cells share a GPU, .* up to about [\d.]+ GB of it", printed)) == (sharing == 2)
    assert not (tmp_path / "grid.json").exists() and not list(tmp_path.glob("cplearn*"))
    assert set(children_of(os.getpid())) <= set(before)


def test_minutes_per_cell_give_the_slowest_line_its_time(tmp_path):
    flags = f"--output_dir {tmp_path} --scale small --dataset digits --minutes_per_cell 3 --ngpus 1"
    args, _ = reproduce_table3.parse_args(flags.split())
    settings = reproduce_table3.choose_settings(args)
    timing = {"images": 64, "processes": 1, "train_images": 1433}
    times = {"cplearn_c16": {"step_seconds": 0.5, **timing}, "swav_c16": {"step_seconds": 1.0, **timing}}
    assert epochs_within(settings, times) == 180 // 22  # 22 steps of a second
    times["swav_c16"]["train_images"] = 40
    with pytest.raises(UserError, match="40 images are fewer than a batch of 64"):
        epochs_within(settings, times)
