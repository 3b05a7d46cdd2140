"""The grid as a script: wrong input, a kill in the middle, a cell that fails."""

import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from grids import wait_for
from helpers import ROOT, write_images

import reproduce_table3
from cplearn.errors import UserError
from cplearn.tables.grid import Grid
from cplearn.tables.status import snapshot, status_lines

DIGITS = "--epochs 1 --dataset digits"


@pytest.mark.parametrize(
    ("flags", "named"),  # flags, and the value that the message names
    [
        ("--scale small --dataset digits", "--scale small"),
        ("--epochs 1 --minutes_per_cell 1 --dataset digits", "--minutes_per_cell"),
        ("--epochs 0 --dataset digits", "--epochs 0"),
        ("--epochs 1", "--data_path is missing"),
        ("--epochs 1 --data_path /nowhere", "/nowhere"),
        (f"{DIGITS} --seeds 0 0", "--seeds 0 0"),
        (f"{DIGITS} --methods self_classifier", "--methods self_classifier"),
        (f"{DIGITS} --scale small --table 9 --out_dims 8 16", "--table 9"),
        (f"{DIGITS} --scale small --table 9 --methods swav", "--table 9"),
        (f"{DIGITS} --table 2", "--table 2"),
        (f"{DIGITS} --ngpus 3", "--ngpus 3"),
        (f"{DIGITS} --train_flags '--lr=1 \"'", "--train_flags --lr=1"),
        (f"{DIGITS} --train_flags '--epochs 3'", "--epochs is not for the cells"),
        (f"{DIGITS} --launcher slurm --n_ref 1", "--n_ref 1"),
        (f"{DIGITS} --launcher slurm --nodes 2", "--nodes 2"),
        (f"{DIGITS} --table 1 --out_dims 77", "77"),
        (f"{DIGITS} --scale small --train_flags '--lr nan'", "barlow_twins_c16_s0: --lr nan"),
        (f"{DIGITS} --scale small --train_flags '--arch nonsense'", "barlow_twins_c16_s0: --arch nonsense"),
        (f"{DIGITS} --scale small --train_flags '--beta 0.1'", "barlow_twins_c16_s0: --beta"),
        (f"{DIGITS} --scale small --train_flags=@RECIPE", "--out_dim, --seed"),
        (f"{DIGITS} --train_flags @/nowhere.txt", "@/nowhere.txt"),
        (f"{DIGITS} --scale small --table 9 --train_flags '--beta 1'", "--train_flags '--beta 1'"),
        (f"{DIGITS} --scale small --table 1", "gedi_gen_c10_s0: --method gedi_gen"),
        (f"{DIGITS} --data_path .", "--data_path"),
        ("--epochs 1 --data_path ''", "--data_path ''"),
        (f"{DIGITS} --seeds 2147483648", "--seeds 2147483648"),
        (f"{DIGITS} --mehtods swav", "--methods?"),
        ("--status", "grid"),
        (f"{DIGITS} --table falcn", "falcn"),
        (f"{DIGITS} --table falcon --methods swav", "--methods swav"),
        (f"{DIGITS} --scale small --tune 1", "--tune 1"),
        (f"{DIGITS} --scale small --tune_epochs 3", "--tune_epochs 3"),
        (f"{DIGITS} --scale small --tune 2", "--dataset digits"),
        (f"{DIGITS} --scale small --tune 2 --train_flags '--lr .1 --n_ref=4'", "--lr, --n_ref"),
    ],
)
def test_bad_input_is_one_line(tmp_path, flags, named):
    (tmp_path / "recipe.txt").write_text("--out_dim 64\n--seed=3\n")
    flags = flags.replace("RECIPE", str(tmp_path / "recipe.txt"))
    with pytest.raises(UserError, match=re.escape(named)) as error:
        reproduce_table3.main(["--output_dir", str(tmp_path / "grid"), *shlex.split(flags)])
    assert "\n" not in str(error.value)


AGAIN = "--scale small --dataset digits --methods swav --out_dims 16"


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("grid.json", "--status"),
        ("grid.json", f"{AGAIN} --epochs 3"),
        ("grid.json", f"{AGAIN} --minutes_per_cell 3"),
        ("probe.json", f"{AGAIN} --epochs 3 --dry_run"),
    ],
)
@pytest.mark.parametrize("content", ['{"settings": {"table"', "[]", '{"cells": 7}', "\0\0", "[" * 100_000])
def test_a_damaged_file_is_not_taken_for_none(tmp_path, name, flags, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=re.escape(str(tmp_path / name))) as error:
        reproduce_table3.main(["--output_dir", str(tmp_path), *flags.split()])
    assert "\n" not in str(error.value) and (tmp_path / name).read_text() == content


def start(folder, *more: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "reproduce_table3.py"), "--output_dir", str(folder), *more]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)


def end_of(process: subprocess.Popen, timeout: float = 400) -> tuple[int, str]:
    """Return the exit code of a process, and what it printed."""
    printed = process.communicate(timeout=timeout)[0]
    return process.returncode, printed


def scripts_with_results(folder: Path) -> list[tuple[str, bool]]:
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return sorted((x["script"], x["random_init"]) for x in lines)


@pytest.mark.slow
def test_a_killed_grid_goes_on(tmp_path):
    """kill -9 during training, SIGTERM during what follows: every cell once in the end."""
    grid = "--scale small --dataset digits --methods cplearn swav --out_dims 16 --epochs 4 --jobs 2".split()
    flags = [*grid, "--train_flags", "--local_crops_number 0 --image_size 16 --warmup_epochs 0"]
    folder = tmp_path / "grid"
    cells = [folder / f"{name}_c16_s0" for name in ("cplearn", "swav")]

    run = start(folder, *flags)
    for cell in cells:
        wait_for((cell / "log.txt").exists, run)
    run.kill()
    run.communicate()
    assert not any((cell / "trained" / "results.jsonl").exists() for cell in cells), "killed too late to tell"

    run = start(folder, *flags)
    wait_for((cells[0] / "trained.json").exists, run)
    code, printed = end_of(start(folder, *flags))  # a second one is refused
    assert code == 2 and "is in use by" in printed, printed
    run.send_signal(signal.SIGTERM)
    code, printed = end_of(run, 60)
    assert code == 75, printed
    code, printed = end_of(start(folder, *flags))
    assert code == 0, printed
    for cell in cells:
        assert scripts_with_results(cell / "trained") == [
            (f"eval_{x}", False) for x in ("cluster", "collapse", "knn", "linear")
        ]
        epochs = [json.loads(line)["epoch"] for line in (cell / "log.txt").read_text().splitlines()]
        assert sorted(set(epochs)) == [0, 1, 2, 3]
    random = cells[0] / "random_init"
    assert scripts_with_results(random) == [(f"eval_{x}", True) for x in ("cluster", "knn", "linear")]

    with open(folder / "table3.csv") as f:
        table = {x["method"]: x for x in csv.DictReader(f)}
    assert set(table) == {"CPLearn", "SwAV", "random init"} and table["SwAV"]["n"] == "1"
    lines = [json.loads(line) for line in (cells[1] / "trained" / "results.jsonl").read_text().splitlines()]
    (codes,) = [x["metrics"]["codes"] for x in lines if x["script"] == "eval_cluster"]
    assert float(table["SwAV"]["nmi"]) == pytest.approx(100 * codes["nmi"], abs=1e-3)
    assert (folder / "table3.png").stat().st_size > 10_000
    assert "one seed" in (folder / "table3.md").read_text()

    assert "2 cells: 2 done" in start(folder, "--status").communicate()[0]
    # Other settings do not get mixed in.
    for more, words in (
        (["--train_flags", f"{flags[-1]} --lr 0.1"], "--warmup_epochs 0, now --local_crops_number 0"),
        (["--seeds", "1", "--ngpus", "2"], "--ngpus 1, now 2"),
    ):
        code, printed = end_of(start(folder, *flags, *more))
        assert code == 2 and words in printed, printed


@pytest.mark.slow
def test_a_killed_tuning_goes_on(tmp_path):
    """kill -9 while the second trial trains: each trial once in the end, and the cell has the best one's settings."""
    for part, count in (("train", 48), ("test", 8)):
        for k, name in enumerate(("cat", "dog")):
            write_images(tmp_path / "data" / part / name, count, (16, 16), seed=k)
    folder = tmp_path / "grid"
    flags = f"--scale small --data_path {tmp_path / 'data'} --methods cplearn --out_dims 16 --epochs 3 --tune 2".split()
    flags += ["--tune_out_dim", "32", "--train_flags", "--arch timm:test_resnet --warmup_epochs 0"]
    trials = [folder / "tuning" / f"cplearn_t{k}" for k in (0, 1)]

    run = start(folder, *flags)
    wait_for((trials[1] / "log.txt").exists, run)
    run.kill()
    run.communicate()
    assert not (trials[1] / "trained").exists() and not (folder / "grid.json").exists(), "killed too late to tell"
    printed = start(folder, "--status").communicate()[0]
    assert re.search(r"cplearn_t0 \| +done", printed) and "2 cells: " in printed and "No best trials yet" in printed

    code, printed = end_of(start(folder, *flags))
    assert code == 0, printed
    assert "Tuning: 1 of 2 trials are over" in printed and "Done: " in printed
    assert scripts_with_results(trials[0] / "trained") == scripts_with_results(trials[1] / "trained")
    assert scripts_with_results(trials[0] / "random_init") == [("eval_knn", True)]
    tuned = json.loads((folder / "tuning.json").read_text())
    assert (tuned["budget"]["train_images"], tuned["budget"]["held_out_images"]) == (76, 20)
    numbers = [x["knn"] for x in tuned["methods"]["cplearn"]["trials"]]
    best = tuned["methods"]["cplearn"]["best"]
    assert best == numbers.index(max(numbers)) and 0 <= tuned["random_init_knn"] <= 100
    runs = {x: json.loads((x / "args.json").read_text())["args"] for x in (*trials, folder / "cplearn_c16_s0")}
    assert [runs[x]["data_path"] for x in runs] == [str(folder / "tuning/data")] * 2 + [str(tmp_path / "data")]
    own = {name: runs[trials[best]][name] for name in (("lr", "beta", "n_ref") if best else ("lr", "n_ref"))}
    assert own.items() <= runs[folder / "cplearn_c16_s0"].items()
    assert "Settings: the best of 2 trials of every method" in (folder / "table3.md").read_text()


def test_a_cell_that_fails_is_named(tmp_path):
    folder = tmp_path / "grid"
    flags = "--scale small --dataset digits --methods swav --out_dims 16 --epochs 2".split()
    train = "--max_bad_images 0 --init_from /nowhere"
    code, printed = end_of(start(folder, *flags, "--train_flags", train))
    assert code == 2 and "swav_c16_s0: train failed with exit code 2" in printed, printed
    lines = status_lines(snapshot(Grid.load(folder)))
    assert re.search(r"swav_c16_s0 \| +failed \| train, exit code 2: .*/nowhere", lines[0]), lines
