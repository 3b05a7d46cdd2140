"""Last messages of a process, and GPUs by slot."""

import pytest

import reproduce_table3
from cplearn.errors import UserError
from cplearn.tables import launch
from cplearn.tables.launch import environment, last_message


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
