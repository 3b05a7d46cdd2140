"""The grid as a script: wrong input, a kill in the middle, a cell that fails."""

import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT, write_images

import reproduce_table3
from cplearn.errors import UserError
from cplearn.tables.cells import Grid
from cplearn.tables.status import snapshot, status_lines


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--scale small --dataset digits", "needs a budget"),
        ("--epochs 1 --minutes_per_cell 1 --dataset digits", "leave one out"),
        ("--epochs 0 --dataset digits", "--epochs 0 must be positive"),
        ("--epochs 1", "--data_path is missing"),
        ("--epochs 1 --data_path /nowhere", "/nowhere is not a folder"),
        ("--epochs 1 --dataset digits --seeds 0 0", "names one twice"),
        ("--epochs 1 --dataset digits --methods self_classifier", "not in the paper's Table 3"),
        ("--epochs 1 --dataset digits --scale small --table 9 --out_dims 8 16", "one size"),
        ("--epochs 1 --dataset digits --scale small --table 9 --methods swav", "of CPLearn"),
        ("--epochs 1 --dataset digits --table 2", "of CIFAR-10, not of --dataset digits"),
        ("--epochs 1 --dataset digits --ngpus 3", "a batch of 512 cannot be shared evenly"),
        ("--epochs 1 --dataset digits --train_flags '--lr=1 \"'", "No closing quotation"),
        ("--epochs 1 --dataset digits --train_flags '--epochs 3'", "--epochs is not for the cells"),
        ("--epochs 1 --dataset digits --launcher slurm --n_ref 1", "--n_ref 1 is no flag of the grid"),
        ("--epochs 1 --dataset digits --launcher slurm --nodes 2", "--nodes 2 is no flag of the grid"),
        ("--epochs 1 --dataset digits --table 1 --out_dims 77", "no line of"),
        ("--epochs 1 --dataset digits --scale small --train_flags '--seed 3'", "--seed is not for the cells"),
        ("--epochs 1 --dataset digits --scale small --train_flags '--lr nan'", "barlow_twins_c16_s0: --lr nan"),
        (
            "--epochs 1 --dataset digits --scale small --train_flags '--beta 0.1'",
            "barlow_twins_c16_s0: --beta belongs to --method cplearn",
        ),
        ("--epochs 1 --dataset digits --scale small --train_flags=@RECIPE", "--out_dim, --seed is not for the cells"),
        ("--epochs 1 --dataset digits --train_flags @/nowhere.txt", "@/nowhere.txt cannot be read"),
        (
            "--epochs 1 --dataset digits --scale small --table 9 --train_flags '--beta 1'",
            "would be the same training: take what sets them apart out of --train_flags '--beta 1'",
        ),
        (
            "--epochs 1 --dataset digits --scale small --table 1",
            "gedi_gen_c10_s0 samples images with its network, and timm:resnet10t has batch norm",
        ),
        (
            "--epochs 1 --dataset digits --scale small --table 1 --train_flags '--arch timm:test_resnet'",
            "gedi_gen_c10_s0 samples images with its network, and timm:test_resnet has batch norm",
        ),
        ("--epochs 1 --dataset digits --data_path .", "is not read with --dataset digits"),
        ("--epochs 1 --data_path ''", "--data_path '' is empty"),
        ("--epochs 1 --dataset digits --seeds 2147483648", "--seeds 2147483648 must not be negative, and be below"),
        ("--epochs 1 --dataset digits --mehtods swav", "did you mean --methods?"),
        ("--status", "holds no grid"),
        ("--epochs 1 --dataset digits --table 5", "invalid choice: 5"),
        ("--epochs 1 --dataset digits --table falcn", "invalid choice: 'falcn'"),
        ("--epochs 1 --dataset digits --table falcon --methods swav", "not in the earlier version's grid"),
        ("--epochs 1 --dataset digits --scale small --tune 1", "--tune 1 leaves nothing to choose from"),
        ("--epochs 1 --dataset digits --scale small --tune_epochs 3", "--tune_epochs 3 is of the trials"),
        ("--epochs 1 --dataset digits --scale small --tune 2", "--dataset digits has none; save it as images"),
        (
            "--epochs 1 --dataset digits --scale small --tune 2 --train_flags '--lr .1 --n_ref=4'",
            "chooses --lr, --n_ref",
        ),
        ("--dataset digits --scale small --tune 2", "needs a budget"),
    ],
)
def test_bad_input_is_one_line(tmp_path, flags, message):
    (tmp_path / "recipe.txt").write_text("--out_dim 64\n--seed=3\n")
    flags = flags.replace("RECIPE", str(tmp_path / "recipe.txt"))
    with pytest.raises(UserError, match=re.escape(message)):
        reproduce_table3.main(["--output_dir", str(tmp_path / "grid"), *shlex.split(flags)])


def small_grid(folder) -> Grid:
    """Save the grid of one cell, and return it."""
    flags = f"--output_dir {folder} --scale small --dataset digits --methods swav --out_dims 16 --epochs 2 --ngpus 1"
    args, _ = reproduce_table3.parse_args(flags.split())
    grid = reproduce_table3.build_grid(args, reproduce_table3.choose_settings(args))
    folder.mkdir(exist_ok=True)
    return grid.save()


def refuse(path: Path, flags: str, words: str) -> None:
    """Check that the grid in the file's folder ends in one line with the file's name, and leaves the file as it is."""
    before = path.read_bytes()
    with pytest.raises(UserError, match=re.escape(str(path)) + ".*" + words) as error:
        reproduce_table3.main(["--output_dir", str(path.parent), *flags.split()])
    assert "\n" not in str(error.value) and path.read_bytes() == before


AGAIN = "--scale small --dataset digits --methods swav --out_dims 16"


@pytest.mark.parametrize("flags", ["--status", f"{AGAIN} --epochs 3", f"{AGAIN} --minutes_per_cell 3"])
@pytest.mark.parametrize("content", ['{"settings": {"table"', "[]", "{}", "\0\0", "[" * 100_000])
def test_a_damaged_grid_is_not_taken_for_none(tmp_path, flags, content):
    (tmp_path / "grid.json").write_text(content)
    refuse(tmp_path / "grid.json", flags, "is damaged")


def test_a_pipe_in_the_place_of_a_grid_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "grid.json")
    with pytest.raises(UserError, match="grid.json cannot be read: is no regular file"):
        reproduce_table3.main(["--output_dir", str(tmp_path), "--status"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x.pop("settings"), "has no field 'settings'"),
        (lambda x: x["cells"][0].pop("name"), "has no field 'name'"),
        (lambda x: x["settings"].update(foreign=1), "unexpected keyword argument 'foreign'"),
        (lambda x: x["settings"].update(ngpus="8"), "ngpus is '8'"),
        (lambda x: x["cells"][0].update(train=[1]), r"train is \[1\]"),
        (lambda x: x["cells"][0].update(evaluate={"knn": "x"}), "evaluate is"),
        (lambda x: x["cells"][0]["row"].update(out_dim="16"), "out_dim is '16'"),
        (lambda x: x["cells"].append("x"), "is not what a grid writes"),
        (lambda x: x.update(cells=7), "is not what a grid writes"),
    ],
)
def test_fields_that_no_grid_writes(tmp_path, change, words):
    grid = small_grid(tmp_path)
    content = json.loads((tmp_path / "grid.json").read_text())
    change(content)
    (tmp_path / "grid.json").write_text(json.dumps(content))
    refuse(tmp_path / "grid.json", "--status", words)
    refuse(tmp_path / "grid.json", f"{AGAIN} --epochs 2 --ngpus 1", words)
    (tmp_path / "grid.json").unlink()
    assert grid.save() == grid


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is damaged"),
        ('{"x": {}}', "step_seconds is None"),
        ('{"x": {"step_seconds": "1"}}', "step_seconds is '1'"),
    ],
)
def test_timings_that_no_grid_writes(tmp_path, content, words):
    (tmp_path / "probe.json").write_text(content)
    refuse(tmp_path / "probe.json", f"{AGAIN} --epochs 2 --dry_run", words)


def test_a_grid_of_an_earlier_version_goes_on(tmp_path, capsys):
    """Its settings have no word of tuning."""
    grid = small_grid(tmp_path)
    content = json.loads((tmp_path / "grid.json").read_text())
    for name in ("tune", "tune_out_dim", "tune_epochs"):
        assert content["settings"].pop(name) is None
    (tmp_path / "grid.json").write_text(json.dumps(content))
    assert Grid.load(tmp_path) == grid and grid.save() == grid
    reproduce_table3.main(["--output_dir", str(tmp_path), "--status"])
    assert "1 cells: 1 waiting" in capsys.readouterr().out


def start(folder, *more: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "reproduce_table3.py"), "--output_dir", str(folder), *more]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)


def scripts_with_results(folder: Path) -> list[tuple[str, bool]]:
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return sorted((x["script"], x["random_init"]) for x in lines)


@pytest.mark.slow
def test_a_killed_grid_goes_on(tmp_path):
    """kill -9 during training, SIGTERM during what follows: every cell once in the end, to the same bits."""
    grid = "--scale small --dataset digits --methods cplearn swav --out_dims 16 --epochs 4 --jobs 2".split()
    flags = [*grid, "--train_flags", "--local_crops_number 0 --image_size 16 --warmup_epochs 0"]
    folder = tmp_path / "grid"
    cells = [folder / f"{name}_c16_s0" for name in ("cplearn", "swav")]

    run = start(folder, *flags)
    end = time.monotonic() + 120
    while not all((cell / "log.txt").exists() for cell in cells):
        assert time.monotonic() < end and run.poll() is None, run.communicate()[0]
        time.sleep(0.05)
    run.kill()
    run.communicate()
    assert not any((cell / "trained" / "results.jsonl").exists() for cell in cells), "killed too late to tell"

    run = start(folder, *flags)
    while not (cells[0] / "trained.json").exists():
        assert time.monotonic() < end + 120 and run.poll() is None, run.communicate()[0]
        time.sleep(0.05)
    other = start(folder, *flags)  # a second one is refused
    said, code = other.communicate()[0], other.returncode
    assert code == 2 and "is in use by" in said, said
    run.send_signal(signal.SIGTERM)
    said, code = run.communicate(timeout=60)[0], run.returncode
    assert code == 75 and "the same command goes on" in said, said

    run = start(folder, *flags)
    said = run.communicate(timeout=300)[0]
    assert run.returncode == 0, said
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
    other = start(folder, *flags[:-1], "--local_crops_number 0 --image_size 16 --warmup_epochs 0 --lr 0.1")
    said = other.communicate()[0]
    assert other.returncode == 2 and "--warmup_epochs 0, now --local_crops_number 0" in said, said
    other = start(folder, *flags, "--seeds", "1", "--ngpus", "2")
    said = other.communicate()[0]
    assert other.returncode == 2 and "--ngpus 1, now 2" in said, said


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
    end = time.monotonic() + 240
    while not (trials[1] / "log.txt").exists():
        assert time.monotonic() < end and run.poll() is None, run.communicate()[0]
        time.sleep(0.05)
    run.kill()
    run.communicate()
    assert not (trials[1] / "trained").exists() and not (folder / "grid.json").exists(), "killed too late to tell"
    said = start(folder, "--status").communicate()[0]
    assert re.search(r"cplearn_t0 \| +done", said) and "2 cells: " in said and "No best trials yet" in said, said

    run = start(folder, *flags)
    said = run.communicate(timeout=400)[0]
    assert run.returncode == 0, said
    assert "Tuning: 1 of 2 trials are over" in said and "Done: " in said
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
    run = start(folder, *flags, "--train_flags", "--max_bad_images 0 --init_from /nowhere")
    said = run.communicate(timeout=120)[0]
    assert run.returncode == 2 and "swav_c16_s0: train failed with exit code 2" in said, said
    grid = Grid.load(folder)
    lines = status_lines(grid, snapshot(grid))
    assert re.search(r"swav_c16_s0 \| +failed \| train, exit code 2: .*/nowhere", lines[0]), lines
