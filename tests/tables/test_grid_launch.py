"""Last messages of a process, and GPUs by slot."""

import pytest

import reproduce_table3
from cplearn.errors import UserError
from cplearn.slurm.submit import Resources
from cplearn.tables import launch
from cplearn.tables.launch import environment, last_message
from cplearn.tables.status import snapshot


def test_last_messages_under_torchrun_and_without():
    plain = "main_cplearn.py: error: --lr -1 must be positive\n"
    torchrun = (
        plain
        + """E0101 torch/distributed/elastic failed
============================================================
main_cplearn.py FAILED
------------------------------------------------------------
  rank      : 0 (local_rank: 0)
  exitcode  : 2 (pid: 4242)
============================================================
"""
    )
    assert last_message(plain, 2) == (2, "--lr -1 must be positive")
    assert last_message(torchrun, 1) == (2, "--lr -1 must be positive")
    assert last_message("Traceback\nKeyError: 'x'\n", 1) == (1, "KeyError: 'x'")
    assert last_message("", -9) == (-9, "exit code -9")


def test_a_number_of_workers_that_is_given_stays(tmp_path):
    (tmp_path / "two.txt").write_text("--num_workers 2")
    assert launch.loader_flags(["--lr", "1"], 1, 1)[0] == "--num_workers"
    for flags in (["--num_workers", "2"], ["--num_workers=2"], [f"@{tmp_path}/two.txt"]):
        assert launch.loader_flags(flags, 1, 1) == []


def test_every_slot_has_its_own_gpus(monkeypatch):
    monkeypatch.setattr(launch, "gpus", lambda: ["2", "3", "5", "7"])
    monkeypatch.setattr(reproduce_table3, "gpus", lambda: ["2", "3", "5", "7"])
    assert [environment(slot, 2, 2)["CUDA_VISIBLE_DEVICES"] for slot in (0, 1)] == ["2,3", "5,7"]
    args, _ = reproduce_table3.parse_args("--output_dir x --dataset digits --jobs 3 --ngpus 2".split())
    with pytest.raises(UserError, match="--jobs 3 x --ngpus 2 are more than this machine's 4 GPUs"):
        reproduce_table3.choose_settings(args)
    args, _ = reproduce_table3.parse_args("--output_dir x --dataset digits --jobs 2".split())
    settings = reproduce_table3.choose_settings(args)
    assert settings.ngpus == 2 and "256" in settings.common_flags()  # of 512


def test_cells_share_gpus_in_turn(monkeypatch):
    monkeypatch.setattr(launch, "gpus", lambda: ["2", "5"])
    monkeypatch.setattr(reproduce_table3, "gpus", lambda: ["2", "5"])
    args, _ = reproduce_table3.parse_args("--output_dir x --dataset digits --cells_per_gpu 3".split())
    assert args.jobs == 6 and reproduce_table3.choose_settings(args).ngpus == 1
    assert [environment(slot, 6, 1)["CUDA_VISIBLE_DEVICES"] for slot in range(6)] == ["2", "5"] * 3
    args, _ = reproduce_table3.parse_args("--output_dir x --dataset digits --cells_per_gpu 3 --jobs 7".split())
    with pytest.raises(UserError, match=r"--jobs 7 .* more than this machine's 2 GPUs \(--cells_per_gpu 3\)"):
        reproduce_table3.choose_settings(args)
    for wrong, words in {"--ngpus 2": "either shares a GPU or has several", "--launcher slurm": "has its own"}.items():
        with pytest.raises(UserError, match=f"--cells_per_gpu 2.*{words}"):
            reproduce_table3.parse_args(f"--output_dir x --cells_per_gpu 2 {wrong}".split())


def test_cells_cannot_share_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(reproduce_table3, "gpus", lambda: [])
    args, _ = reproduce_table3.parse_args("--output_dir x --dataset digits --cells_per_gpu 2".split())
    with pytest.raises(UserError, match="--cells_per_gpu 2, but there is no GPU here: --jobs"):
        reproduce_table3.choose_settings(args)


def test_jobs_of_a_grid_form_chains(monkeypatch, tmp_path):
    """Two cells at a time: the third waits for the first; evaluations need the training of their cell."""
    requests = []

    def submit(request) -> str:
        requests.append(request)
        return str(100 + len(requests))

    monkeypatch.setattr(launch, "submit", submit)
    args, rest = reproduce_table3.parse_args(
        f"--output_dir {tmp_path} --scale small --dataset digits --methods swav --out_dims 16 --epochs 2 "
        "--seeds 0 1 2 --launcher slurm --cpu --mem 2G".split()
    )
    grid = reproduce_table3.build_grid(args, reproduce_table3.choose_settings(args))
    resources = Resources.from_args(reproduce_table3.parse_launcher_flags(rest))
    launch.run_on_slurm(grid, snapshot(grid), 2, resources, "afterok:7")
    by_cell = {cell.name: [x for x in requests if x.name == cell.name] for cell in grid.cells}
    first, second, third = ([x.dependency for x in found] for found in by_cell.values())
    n = len(grid.cells[0].stages())
    assert n == len(first) == len(second) == len(third) == 8
    assert first[:4] == ["afterok:7", "afterok:101", "afterok:101,afterany:102", "afterok:101,afterany:103"]
    assert second[0] == "afterok:7" and third[0] == f"afterany:{100 + n}"
    assert [x.script for x in requests[:3]] == ["main_cplearn", "eval_knn", "eval_linear"]
    assert "--arch" in requests[0].argv and not any(x.startswith("@") for x in requests[0].argv)  # the recipe's flags
    assert requests[1].output_dir == grid.cells[0].folder / "trained" and requests[0].resources.mem == "2G"
