"""Last words of a process, and GPUs by slot."""

import pytest

import reproduce_table3
from cplearn.errors import UserError
from cplearn.tables import launch as launch
from cplearn.tables.cells import common_flags
from cplearn.tables.launch import end_of, environment


def test_last_words_under_torchrun_and_without():
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
    assert end_of(plain, 2) == (2, "--lr -1 must be positive")
    assert end_of(torchrun, 1) == (2, "--lr -1 must be positive")
    assert end_of("Traceback\nKeyError: 'x'\n", 1) == (1, "KeyError: 'x'")
    assert end_of("", -9) == (-9, "exit code -9")


def test_every_slot_has_its_own_gpus(monkeypatch):
    monkeypatch.setattr(launch, "gpus", lambda: ["2", "3", "5", "7"])
    monkeypatch.setattr(reproduce_table3, "gpus", lambda: ["2", "3", "5", "7"])
    assert [environment(slot, 2, 2)["CUDA_VISIBLE_DEVICES"] for slot in (0, 1)] == ["2,3", "5,7"]
    args, _ = reproduce_table3.parse_args("--output_dir x --dataset digits --jobs 3 --ngpus 2".split())
    with pytest.raises(UserError, match="--jobs 3 x --ngpus 2 are more than this machine's 4 GPUs"):
        reproduce_table3.share_devices(args)
    args, _ = reproduce_table3.parse_args("--output_dir x --dataset digits --jobs 2".split())
    reproduce_table3.share_devices(args)
    assert args.ngpus == 2 and "256" in common_flags(args)  # of 512
