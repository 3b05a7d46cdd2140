"""GPUs by slot, and cells as jobs."""

import json
from dataclasses import replace

import pytest

import reproduce_table3
from cplearn.errors import UserError
from cplearn.slurm.submit import Resources
from cplearn.tables import run
from cplearn.tables.run import environment
from cplearn.tables.status import describe, snapshot


def test_every_slot_has_its_own_gpus(monkeypatch):
    monkeypatch.setattr(run, "gpus", lambda: ["2", "3", "5", "7"])
    monkeypatch.setattr(reproduce_table3, "gpus", lambda: ["2", "3", "5", "7"])
    assert [environment(slot, 2, 2)["CUDA_VISIBLE_DEVICES"] for slot in (0, 1)] == ["2,3", "5,7"]
    args, _ = reproduce_table3.parse_args("--output_dir x --dataset digits --jobs 3 --ngpus 2".split())
    with pytest.raises(UserError, match="--jobs 3 x --ngpus 2"):
        reproduce_table3.choose_settings(args)
    args, _ = reproduce_table3.parse_args("--output_dir x --dataset digits --jobs 2".split())
    settings = reproduce_table3.choose_settings(args)
    assert settings.ngpus == 2 and "256" in settings.common_flags()  # of 512


def test_cells_share_gpus_in_turn(monkeypatch):
    monkeypatch.setattr(run, "gpus", lambda: ["2", "5"])
    monkeypatch.setattr(reproduce_table3, "gpus", lambda: ["2", "5"])
    args, _ = reproduce_table3.parse_args("--output_dir x --dataset digits --cells_per_gpu 3".split())
    assert args.jobs == 6 and reproduce_table3.choose_settings(args).ngpus == 1
    assert [environment(slot, 6, 1)["CUDA_VISIBLE_DEVICES"] for slot in range(6)] == ["2", "5"] * 3
    args, _ = reproduce_table3.parse_args("--output_dir x --dataset digits --cells_per_gpu 3 --jobs 7".split())
    with pytest.raises(UserError, match="--jobs 7 .*--cells_per_gpu 3"):
        reproduce_table3.choose_settings(args)
    for wrong in ("--ngpus 2", "--launcher slurm"):
        with pytest.raises(UserError, match="--cells_per_gpu 2"):
            reproduce_table3.parse_args(f"--output_dir x --cells_per_gpu 2 {wrong}".split())


def test_cells_cannot_share_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(reproduce_table3, "gpus", lambda: [])
    args, _ = reproduce_table3.parse_args("--output_dir x --dataset digits --cells_per_gpu 2".split())
    with pytest.raises(UserError, match="--cells_per_gpu 2"):
        reproduce_table3.choose_settings(args)


def test_one_job_per_cell_and_so_many_at_a_time(monkeypatch, tmp_path):
    """Two cells at a time: the third waits for the first. What waits or runs is not submitted again."""
    requests = []

    def submit(request) -> str:
        requests.append(request)
        return str(100 + len(requests))

    monkeypatch.setattr(run, "submit", submit)
    args, rest = reproduce_table3.parse_args(
        f"--output_dir {tmp_path} --scale small --dataset digits --methods swav --out_dims 16 --epochs 2 "
        "--seeds 0 1 2 3 --launcher slurm --cpu --mem 2G --ngpus 4 --cpus_per_task 3".split()
    )
    grid = reproduce_table3.build_grid(args, reproduce_table3.choose_settings(args))
    resources = replace(Resources.from_args(reproduce_table3.parse_launcher_flags(rest)), ngpus=grid.settings.ngpus)
    run.run_on_slurm(grid, snapshot(grid), 2, resources, "afterok:7")
    assert [x.name for x in requests] == [cell.name for cell in grid.cells]
    assert [x.dependency for x in requests] == ["afterok:7", "afterok:7", "afterany:101", "afterany:102"]
    first = requests[0]
    assert (first.script, first.argv) == ("cplearn.tables.cell", [str(grid.cells[0].folder)])
    assert (first.tasks_per_node, first.cpus_per_task, first.resources.mem) == (1, 4 * 3, "2G")
    kept = json.loads((grid.cells[0].folder / "cell.json").read_text())
    assert "--arch" in kept["train"] and not any(x.startswith("@") for x in kept["train"])  # the recipe's flags


@pytest.mark.parametrize("place", ["", "trained"])
def test_a_job_of_an_earlier_version_counts(monkeypatch, tmp_path, place):
    """It had a job for the training and one for every evaluation; while one waits or runs there is no other."""
    monkeypatch.setattr(run, "submit", lambda request: pytest.fail("submitted a second one"))
    monkeypatch.setattr("cplearn.tables.status.job_state", lambda folder, entry: {"JobState": "PENDING"})
    args, rest = reproduce_table3.parse_args(
        f"--output_dir {tmp_path} --scale small --dataset digits --methods swav --out_dims 16 --epochs 2 "
        "--launcher slurm --cpu".split()
    )
    grid = reproduce_table3.build_grid(args, reproduce_table3.choose_settings(args))
    (cell,) = grid.cells
    (cell.folder / place / "slurm").mkdir(parents=True)
    entry = {"job": "7", "cluster": "slurm", "script": "main_cplearn", "processes": 1, "time": 0.0}
    (cell.folder / place / "slurm" / "jobs.jsonl").write_text(json.dumps(entry) + "\n")
    states = snapshot(grid)
    run.run_on_slurm(grid, states, 2, Resources.from_args(reproduce_table3.parse_launcher_flags(rest)), None)
    assert describe(cell, states[cell.name]) == ("queued", "job 7")
