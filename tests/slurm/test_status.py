"""Which of several errors is told; files that others have written or damaged."""

import itertools
import json

import pytest

import run_with_submitit
from cplearn.errors import UserError
from cplearn.files import append_json_line
from cplearn.slurm.status import status, the_cause


def test_the_error_to_tell_is_the_one_that_others_follow_from():
    def end(rank, code, at):
        return {"rank": rank, "code": code, "time": at, "line": ""}

    peer, mine, late = end(0, 6, 1.0), end(1, 2, 2.0), end(2, 3, 3.0)
    assert the_cause([peer, mine, late]) == mine
    assert the_cause([end(3, 0, 0.0), peer, end(4, 75, 1.0)]) == peer
    assert the_cause([end(0, 0, 1.0), end(1, 75, 1.0)]) is None


GOOD = {"job": "999999999", "cluster": "local", "started": "1", "script": "main_cplearn", "processes": 1, "time": 1.0}
FOREIGN = (None, True, -1, 1.5, "x", "", [], {}, "../../etc", "1; ls", 10**30)


def test_foreign_lines_of_jobs_are_left_out_with_a_word(tmp_path, capsys):
    jobs = tmp_path / "slurm/jobs.jsonl"
    jobs.parent.mkdir()
    bad = [GOOD | {name: x} for name in ("job", "cluster", "script", "processes", "time") for x in (None, True, [], {})]
    bad += [GOOD | {"job": x} for x in FOREIGN] + [{k: v for k, v in GOOD.items() if k != x} for x in GOOD]
    bad = [x for x in bad if "started" in x]  # without it the job is one that has ended
    for x in bad:
        append_json_line(jobs, x)
    with open(jobs, "a") as f:
        f.writelines(f"{json.dumps(x)}\n" for x in FOREIGN)
    with pytest.raises(UserError, match="has no jobs"):
        status(str(tmp_path))
    foreign = sum(isinstance(x, dict) for x in FOREIGN)  # what is no record is no line of ours at all
    assert f"has {len(bad) + foreign} lines that no submission wrote: left out" in capsys.readouterr().err
    append_json_line(jobs, GOOD)
    append_json_line(jobs, {k: v for k, v in GOOD.items() if k != "started"})
    assert [line.split()[:3] for line in status(str(tmp_path))] == [["999999999", "main_cplearn", "GONE"]] * 2
    jobs.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="has no jobs") as caught:
        run_with_submitit.main(["--status", str(tmp_path)])
    assert len(str(caught.value).splitlines()) == 1


def test_status_reads_whatever_lies_beside_the_jobs(tmp_path):
    """Every file that --status reads, with any value in place of each of its fields."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    append_json_line(folder / "jobs.jsonl", GOOD)
    files = {
        folder / "999999999_0_end.json": {"code": 2, "line": "x", "rank": 0, "host": "a", "restarts": 0, "time": 1.0},
        folder / "999999999_end.json": {"restarts": 0, "line": "not requeued"},
        tmp_path / "args.json": {"args": {"epochs": 2, "max_steps": None}, "derived": {"steps_per_epoch": 3}},
        tmp_path / "log.txt": {"step": 3, "seconds": 1.0, "steps": 3},
    }
    for path, content in files.items():
        path.write_text(json.dumps(content))
    assert status(str(tmp_path))[0].split()[2:6] == ["FAILED", "epoch", "1", "of"]
    for path, content in files.items():
        for name, x in itertools.product(content, FOREIGN):
            for damaged in (content | {name: x}, {k: v for k, v in content.items() if k != name}, x):
                path.write_text(json.dumps(damaged))
                (line,) = status(str(tmp_path))
                assert len(line.splitlines()) == 1 and line.split()[0] == "999999999"
        path.write_bytes(b"\xff\x00{")
        assert len(status(str(tmp_path))) == 1
        path.write_text(json.dumps(content))
