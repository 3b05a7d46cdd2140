"""How a job ended, which of several errors is told, and files that are damaged."""

import json

import pytest

import run_with_submitit
from cplearn.errors import UserError
from cplearn.files import append_json_line
from cplearn.slurm.job import Ending, classify
from cplearn.slurm.status import last_error, status, the_cause


def end(rank, code, signal=None, at=1.0):
    return {"rank": rank, "code": code, "signal": signal, "time": at, "line": f"{code}", "host": "a", "restarts": 0}


def test_the_error_to_tell_is_the_one_that_others_follow_from():
    peer, own, late = end(0, 6), end(1, 2, at=2.0), end(2, 3, at=3.0)
    assert the_cause([peer, own, late]) == own
    assert the_cause([end(3, 0, at=0.0), peer, end(4, 75)]) == peer
    assert the_cause([end(0, 0), end(1, 75)]) is None


@pytest.mark.parametrize(
    ("ends", "srun_code", "ending"),  # of two processes
    [
        ([end(0, 0), end(1, 0)], 0, Ending.DONE),
        ([end(0, 0), end(1, 0)], 1, Ending.DONE),  # one has failed after its work was done
        ([end(0, 0)], 0, Ending.DONE),  # a file that has not come yet
        ([end(0, 0)], 137, Ending.LOST),
        ([], 0, Ending.LOST),
        ([], 137, Ending.LOST),
        ([end(0, 6)], 137, Ending.LOST),
        ([end(0, 6), end(1, 6)], 6, Ending.LOST),
        ([end(0, 75, "SIGTERM")], 137, Ending.LOST),  # srun's own, as the other has died
        ([end(0, 75, "SIGTERM"), end(1, 75)], 0, Ending.STOPPED),
        ([end(0, 75), end(1, 75, "SIGUSR2")], 0, Ending.STOPPED),
        ([end(0, 75, "SIGUSR2")], 137, Ending.STOPPED),  # and the other was too slow
        ([{k: v for k, v in end(0, 75).items() if k != "signal"}], 0, Ending.STOPPED),  # older code
        ([end(0, 2), end(1, 6)], 6, Ending.FAILED),
        ([end(0, 1), end(1, 75, "SIGTERM")], 75, Ending.FAILED),
        ([end(0, 75, "SIGUSR2"), end(1, 3)], 75, Ending.FAILED),
        ([], 4, Ending.FAILED),  # a full disk could not record it
        ([end(0, 6)], 2, Ending.FAILED),
    ],
)
def test_how_a_job_ended(ends, srun_code, ending):
    assert classify(ends, 2, srun_code) is ending


def test_what_the_batch_script_gave_up_is_told_before_the_ends_of_processes(tmp_path):
    (tmp_path / "7_0_end.json").write_text(json.dumps(end(0, 75, "SIGUSR2")))
    entry, now = {"job": "7", "processes": 1}, {"JobState": "FAILED", "ExitCode": "75:0"}
    for given_up, words in ((False, "exit 75 on rank 0 (a): 75"), (True, "exit 75: enough")):
        batch = {"line": "enough", "restarts": 0, "given_up": given_up}
        (tmp_path / "7_end.json").write_text(json.dumps(batch))
        assert last_error(tmp_path, entry, now) == words


def test_status_names_the_file_that_is_damaged(tmp_path):
    folder = tmp_path / "slurm"
    folder.mkdir()
    entry = {"job": "999999999", "cluster": "local", "started": "1", "script": "main_cplearn", "processes": 1}
    append_json_line(folder / "jobs.jsonl", entry)
    files = {
        folder / "999999999_0_end.json": end(0, 2),
        tmp_path / "args.json": {"args": {"epochs": 2, "max_steps": None}, "derived": {"steps_per_epoch": 3}},
        tmp_path / "log.txt": {"step": 3, "seconds": 1.0, "steps": 3},
        folder / "jobs.jsonl": entry,
    }
    for path, content in files.items():
        path.write_text(json.dumps(content))
    assert status(str(tmp_path))[0].split()[2:6] == ["FAILED", "epoch", "1", "of"]
    for path, content in files.items():
        path.write_text('{"foreign": 1}')
        with pytest.raises(UserError, match=path.name.replace("_0_", "_RANK_")) as caught:
            run_with_submitit.main(["--status", str(tmp_path)])
        assert len(str(caught.value).splitlines()) == 1
        path.write_text(json.dumps(content))
