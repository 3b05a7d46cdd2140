"""GPUs by slot, and cells as jobs."""

import json
from dataclasses import replace

import pytest
from grids import grid_of

import reproduce_table3
from cplearn.errors import UserError
from cplearn.slurm.submit import Resources
from cplearn.tables import run
from cplearn.tables.run import Share
from cplearn.tables.status import describe, snapshot


def settings_of(flags: str):
    args, _ = reproduce_table3.parse_args(["--output_dir", "x", "--dataset", "digits", *flags.split()])
    return reproduce_table3.choose_settings(args), args.jobs


@pytest.fixture
def gpus(monkeypatch):
    """Return a function that says which GPUs this machine has."""

    def have(*names: str) -> None:
        for module in (run, reproduce_table3):
            monkeypatch.setattr(module, "gpus", lambda: list(names))

    return have


def test_every_slot_has_its_own_gpus(gpus):
    gpus("2", "3", "5", "7")
    assert [Share(2, 2).environment(slot)["CUDA_VISIBLE_DEVICES"] for slot in (0, 1)] == ["2,3", "5,7"]
    settings, _ = settings_of("--jobs 2")
    assert settings.ngpus == 2 and "256" in settings.common_flags()  # of 512


def test_cells_share_gpus_in_turn(gpus):
    gpus("2", "5")
    settings, jobs = settings_of("--cells_per_gpu 3")
    assert (settings.ngpus, jobs) == (1, 6)
    assert [Share(1, 6).environment(slot)["CUDA_VISIBLE_DEVICES"] for slot in range(6)] == ["2", "5"] * 3


@pytest.mark.parametrize(
    ("names", "flags", "words"),
    [
        ("2357", "--jobs 3 --ngpus 2", "--jobs 3 x --ngpus 2"),
        ("25", "--cells_per_gpu 3 --jobs 7", "--jobs 7 .*--cells_per_gpu 3"),
        ("25", "--cells_per_gpu 2 --ngpus 2", "--cells_per_gpu 2"),
        ("25", "--cells_per_gpu 2 --launcher slurm", "--cells_per_gpu 2"),
        ("", "--cells_per_gpu 2", "--cells_per_gpu 2"),
    ],
)
def test_gpus_that_are_not_there(gpus, names, flags, words):
    gpus(*names)
    with pytest.raises(UserError, match=words):
        settings_of(flags)


CELLS = "--dataset digits --methods swav --out_dims 16 --epochs 2"
JOBS = "--cpu --mem 2G --cpus_per_task 3"


def resources_of(**more) -> Resources:
    return replace(Resources.from_args(reproduce_table3.parse_launcher_flags(JOBS.split())), **more)


def test_one_job_per_cell_and_so_many_at_a_time(monkeypatch, tmp_path):
    """Two cells at a time: the third waits for the first."""
    requests = []
    monkeypatch.setattr(run, "submit", lambda request: requests.append(request) or str(100 + len(requests)))
    grid = grid_of(tmp_path, f"{CELLS} --seeds 0 1 2 3 --launcher slurm --ngpus 4")
    run.run_on_slurm(snapshot(grid), 2, resources_of(ngpus=4), "afterok:7")
    assert [x.name for x in requests] == [cell.name for cell in grid.cells]
    assert [x.dependency for x in requests] == ["afterok:7", "afterok:7", "afterany:101", "afterany:102"]
    first = requests[0]
    assert (first.script, first.argv) == ("cplearn.tables.cell", [str(grid.cells[0].folder)])
    assert (first.tasks_per_node, first.cpus_per_task, first.resources.mem) == (1, 4 * 3, "2G")
    kept = json.loads((grid.cells[0].folder / "cell.json").read_text())
    assert "--arch" in kept["train"] and not any(x.startswith("@") for x in kept["train"])  # the recipe's flags
    assert kept["processes"] == 4


@pytest.mark.parametrize("place", ["", "trained"])
def test_a_job_of_an_earlier_version_counts(monkeypatch, tmp_path, place):
    """It had a job for the training and one for every evaluation; while one waits or runs there is no other."""
    monkeypatch.setattr(run, "submit", lambda request: pytest.fail("submitted a second one"))
    monkeypatch.setattr("cplearn.tables.status.job_state", lambda folder, entry: {"JobState": "PENDING"})
    grid = grid_of(tmp_path, f"{CELLS} --launcher slurm")
    logs = grid.cells[0].folder / place / "slurm"
    logs.mkdir(parents=True)
    entry = {"job": "7", "cluster": "slurm", "script": "main_cplearn", "processes": 1, "time": 0.0}
    (logs / "jobs.jsonl").write_text(json.dumps(entry) + "\n")
    states = snapshot(grid)
    run.run_on_slurm(states, 2, resources_of(), None)
    assert describe(states[0]) == ("queued", "job 7")
