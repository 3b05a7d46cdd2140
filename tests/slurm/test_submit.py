"""Time limits of partitions; jobs of submitit's local executor."""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys

import pytest
from helpers import ROOT, SMALL, log_of, run_script, same_state, under_torchrun, wait_for, without_time
from submitit.core.utils import DelayedSubmission

import run_with_submitit
from cplearn.errors import UserError
from cplearn.host import process_start
from cplearn.slurm.checks import _minutes, check_inputs, output_dir_of, parse_flags
from cplearn.slurm.job import Task
from cplearn.slurm.status import status
from cplearn.slurm.submit import JobRequest, Resources, batch_script


@pytest.mark.parametrize(
    ("text", "minutes"), [("UNLIMITED", float("inf")), ("00:30:00", 30), ("2-01:00:30", 2940.5), ("12:00:00", 720)]
)
def test_time_limits_of_partitions(text, minutes):
    assert _minutes(text) == minutes


def test_several_checkpoints_are_weights_too(run, tmp_path):
    both = [str(run / "checkpoint.pth"), str(tmp_path / "nowhere.pth")]
    parsed = parse_flags("eval_collapse", ["--checkpoints", *both])
    assert output_dir_of("eval_collapse", parsed) == run
    with pytest.raises(UserError, match="--checkpoints .*nowhere.pth"):
        check_inputs(parsed, may_come=False)
    check_inputs(parsed, may_come=True)


def submit(out, *more) -> str:
    argv = ["--local", "--cpu", "--ngpus", "2", "--cpus_per_task", "1", *SMALL, "--output_dir", out, *more]
    (job,) = run_with_submitit.main([str(x) for x in argv])
    return job


def wait_end(out, job: str) -> str:
    """The job's line in --status when it has ended."""

    def ended():
        with contextlib.suppress(ChildProcessError):  # a child of this process, unless its launcher has returned
            os.waitpid(int(job), os.WNOHANG)
        return "RUNNING" not in (line := status(out)[-1]) and line

    line = wait_for(ended, f"job {job}", 300)  # a minute where nobody else works
    assert line.split()[0] == job
    return line


@pytest.mark.slow
@pytest.mark.dist
def test_a_local_job_trains_and_equals_torchrun(tmp_path, image_folder):
    data = ("--data_path", str(image_folder), "--epochs", "2")
    job = submit(tmp_path / "out", *data)
    with pytest.raises(UserError, match=rf"job {job} .*RUNNING.* kill {job}"):
        submit(tmp_path / "out", *data)
    assert wait_end(tmp_path / "out", job).split() == f"{job} main_cplearn COMPLETED epoch 2 of 2".split()
    assert same_state(tmp_path / "out", under_torchrun(tmp_path / "torchrun", *data))
    evaluated = ("--script", "eval_knn", "--pretrained_weights", str(tmp_path / "out/checkpoint.pth"))
    (job,) = run_with_submitit.main(["--local", "--cpu", "--ngpus", "1", "--cpus_per_task", "1", *evaluated])
    assert "COMPLETED" in wait_end(tmp_path / "out", job)
    assert json.loads((tmp_path / "out/results.jsonl").read_text())["script"] == "eval_knn"


@pytest.mark.slow
@pytest.mark.dist
def test_a_local_job_is_stopped_and_told_to_go_on(tmp_path, image_folder):
    data = ("--data_path", str(image_folder), "--epochs", "15", "--batch_size_per_gpu", "2", "--saveckp_freq", "0")
    job = submit(tmp_path / "out", *data)
    log = tmp_path / f"out/slurm/{job}_0_log.out"
    wait_for(lambda: log.exists() and "epoch 2/15  loss" in log.read_text())
    os.kill(int(job), signal.SIGTERM)
    line = wait_end(tmp_path / "out", job)
    assert "INTERRUPTED" in line and "exit 75 on rank" in line and "SIGTERM: stopped after step" in line
    job = submit(tmp_path / "out", *data)
    assert "COMPLETED" in wait_end(tmp_path / "out", job)
    assert "Resuming" in (tmp_path / f"out/slurm/{job}_0_log.out").read_text()
    under_torchrun(tmp_path / "whole", *data)
    assert same_state(tmp_path / "out", tmp_path / "whole")
    assert without_time(log_of(tmp_path / "out")) == without_time(log_of(tmp_path / "whole"))


@pytest.mark.slow
def test_a_local_job_out_of_time_goes_on(tmp_path, image_folder):
    data = ("--data_path", str(image_folder), "--epochs", "40", "--batch_size_per_gpu", "2", "--saveckp_freq", "0")
    job = submit(tmp_path / "out", *data, "--ngpus", "1", "--timeout", "1", "--signal_delay_s", "50")
    line = wait_end(tmp_path / "out", job)
    assert re.search("requeued [1-9] time", line)
    if "INTERRUPTED  requeued 5 times" in line:  # submitit's local limit, on a busy machine
        assert "SIGUSR2" in line and "the same command goes on" in line
        line = wait_end(tmp_path / "out", submit(tmp_path / "out", *data, "--ngpus", "1"))
    assert "COMPLETED" in line
    assert "SIGUSR2: stopped after step" in (tmp_path / f"out/slurm/{job}_0_log.out").read_text()
    # With as many threads as the job had.
    done = run_script("main_cplearn.py", *SMALL, *data, "--output_dir", str(tmp_path / "whole"))
    assert done.returncode == 0, done.stderr
    assert same_state(tmp_path / "out", tmp_path / "whole")


def test_a_local_job_that_fails_says_why(tmp_path):
    job = submit(tmp_path / "%j", "--data_path", tmp_path / "nowhere")
    (out,) = tmp_path.iterdir()
    assert out.name == f"local{os.getpid()}"
    line = wait_end(out, job)
    assert re.search(r"FAILED .* exit 2 on rank [01] .*--data_path .* is not a folder", line)
    assert process_start(int(job)) is None


def fill_with_other_modules(folder):
    (folder / "cplearn").mkdir()
    for name in (
        "utils", "errors", "datasets", "cplearn/__init__", "main_cplearn", "cplearn_head", "vision_transformer", "job",
        "submit", "slurm_jobs", "submitit", "torch", "numpy",
    ):  # fmt: skip
        (folder / f"{name}.py").write_text("raise RuntimeError('a module of another project')\n")


def launch(folder, *more) -> str:
    """A job of one process that run_with_submitit.py has submitted in a folder, as typed, and left running."""
    command = [sys.executable, str(ROOT / "run_with_submitit.py"), "--local", "--cpu", "--ngpus", "1", *SMALL, *more]
    command += ["--output_dir", "out"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=100)  # until the pipe is closed
    assert done.returncode == 0, done.stderr
    return re.search(r"Submitted job (\d+)", done.stdout)[1]


def test_a_job_uses_this_code_wherever_it_was_submitted(tmp_path, image_folder):
    fill_with_other_modules(tmp_path)
    job = launch(tmp_path, "--data_path", str(image_folder), "--max_steps", "1")
    assert "COMPLETED" in wait_end(tmp_path / "out", job)


def started_by_path(tmp_path, *words, **env):
    """What the lines of a batch script start, from a working folder full of other modules."""
    (tmp_path / "elsewhere").mkdir()
    fill_with_other_modules(tmp_path / "elsewhere")
    command = [sys.executable, str(ROOT / "cplearn/slurm/__main__.py"), *map(str, words)]
    return subprocess.run(command, cwd=tmp_path / "elsewhere", env={**os.environ, "PYTHONPATH": os.pathsep, **env},
                          capture_output=True, text=True, timeout=100)  # fmt: skip


def test_the_last_line_of_a_batch_script(tmp_path):
    done = started_by_path(tmp_path, "finish", "/nowhere", 0, 0, SLURM_JOB_ID="7")
    assert (done.returncode, done.stdout, done.stderr) == (4, "job 7: /nowhere is gone\n", "")


def test_a_process_of_a_job_that_older_code_has_queued(tmp_path):
    task = Task("main_cplearn", [*SMALL, "--data_path", "/nowhere", "--output_dir", str(tmp_path)], str(tmp_path), 20)
    DelayedSubmission(task).dump(tmp_path / "7_submitted.pkl")
    done = started_by_path(tmp_path, "task", tmp_path, SUBMITIT_EXECUTOR="local", SUBMITIT_LOCAL_JOB_ID="7")
    end = json.loads((tmp_path / "7_0_end.json").read_text())
    assert done.returncode == end["code"] == 2 and "/nowhere" in end["line"], done.stderr


# Text that does something, or becomes something else, where it is not quoted; the last ones are refused.
ACTIONS = ["$({})", "`{}`", "; {}", "' ; {} ; '", '" ; {} ; "', "| {}", "& {} &", "<({})", "${{x:-$({})}}", "'$({})'",
           "#{}"]  # fmt: skip
INERT = ["a b", " a ", "", "'", '"', "$HOME", "~", "*", "[a]", "{a,b}", "!!", " #", "--wrap=x", "=", "%j", "%t", "é",
         "\u202e"]  # fmt: skip
REFUSED = ["\n{}\n", "\r{}", "\x00{}", "\x1b{}", "\u2028{}", "\\' ; {}", "\\\n{}", "\udc80"]


@pytest.mark.parametrize("text", [*ACTIONS, *INERT, *REFUSED], ids=ascii)
def test_no_value_of_a_flag_becomes_a_command_or_another_value(tmp_path, monkeypatch, text):
    marker, called = tmp_path / "marker", tmp_path / "called"
    recorder = tmp_path / "bin/srun"  # instead of srun, and of the interpreter in the script's last line
    recorder.parent.mkdir()
    recorder.write_text(f'#!/bin/bash\nprintf "%s\\0" "$@" >> {called}\n')
    recorder.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(recorder))
    refused, text = text in REFUSED, text.format(f"touch {marker}") if text not in INERT else text
    options = {name: text for name in ("partition", "account", "qos", "constraint", "exclude", "comment")}
    flags = run_with_submitit.get_args_parser().parse_args([])
    flags.__dict__.update(options, sbatch=[f"reservation={text}"])
    out = tmp_path / f"out{text.replace('/', '_')}"
    if refused:
        with pytest.raises(UserError) as caught:
            JobRequest("main_cplearn", [], out, Resources.from_args(flags), text)
        assert str(caught.value).isprintable() and len(str(caught.value).splitlines()) == 1
        return
    script = batch_script(JobRequest("main_cplearn", [text], out, Resources.from_args(flags), text or None))
    asked = {k: shlex.split(v) for k, v in re.findall(r"#SBATCH --([a-z-]+)=(.*)", script)}
    given = {**options, "job-name": text or out.name} | ({"reservation": text} if text else {})
    assert {k: asked[k] for k in given} == {k: [v] for k, v in given.items()}
    done = subprocess.run(["bash"], input=script, env={**os.environ, "PATH": f"{recorder.parent}:/usr/bin:/bin"},
                          cwd=tmp_path, capture_output=True, text=True, timeout=60)  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    words = called.read_text().split("\0")
    assert words[words.index("--output") + 1] == f"{out}/slurm/%j_%t_log.out"
    assert words[words.index("submitit.core._submit") + 1] == words[words.index("finish") + 1] == str(out / "slurm")
    assert not marker.exists()


@pytest.mark.parametrize("flag", "comment name partition constraint output_dir".split())
def test_a_line_end_in_a_flag_is_refused(tmp_path, flag):
    with pytest.raises(UserError, match=f"--{flag}.*touch b") as caught:
        run_with_submitit.main(["--dry_run", "--output_dir", str(tmp_path / "out"), f"--{flag}", "a\ntouch b"])
    assert len(str(caught.value).splitlines()) == 1


def test_a_local_job_does_not_hold_the_pipe_of_its_launcher_and_ends_with_its_controller(tmp_path, image_folder):
    job = launch(tmp_path, "--data_path", str(image_folder), "--epochs", "100000")
    log = tmp_path / f"out/slurm/{job}_0_log.out"
    wait_for(lambda: log.exists() and "epoch 2/" in log.read_text())
    os.kill(int(job), signal.SIGKILL)
    wait_for((tmp_path / f"out/slurm/{job}_0_end.json").exists)
    assert "INTERRUPTED" in status(tmp_path / "out")[0]
