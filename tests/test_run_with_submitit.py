"""The launcher without a cluster: flags, the batch script, jobs in the background of this machine."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from test_main import SMALL, log_of, run_script, same_state, without_time

import run_with_submitit
from cplearn.errors import UserError
from cplearn.host import process_start
from cplearn.slurm.checks import _minutes
from cplearn.slurm.status import status, the_cause


def test_no_flag_means_two_things():
    mine = set(run_with_submitit.get_args_parser()._option_string_actions) - {"-h", "--help"}
    for script in run_with_submitit.SCRIPTS:
        theirs = set(importlib.import_module(script).get_args_parser()._option_string_actions)
        assert not mine & theirs, script


def test_the_batch_script_of_8_gpus(tmp_path):
    out = tmp_path / "in100"
    done = run_script("run_with_submitit.py", "@recipes/imagenet100_cplearn.txt", "--nodes", "2", "--partition", "gpu",
                      "--constraint", "a100", "--account", "vision", "--qos", "long", "--exclude", "n[1-2]",
                      "--sbatch", "reservation=r1", "exclusive", "--comment", "for the paper", "--dry_run",
                      "--output_dir", str(out), "--data_path", str(tmp_path / "imagenet"),
                      "--then", "eval", PATH=f"{os.path.dirname(sys.executable)}:/bin")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not out.exists()
    first, *others = done.stdout.split("#!/bin/bash")[1:]
    asked = dict(re.findall(r"#SBATCH --([a-z-]+)=?(.*)", first))
    assert asked == {
        "account": "vision", "comment": "'for the paper'", "constraint": "a100", "cpus-per-task": "10",
        "exclude": "'n[1-2]'", "gpus-per-node": "8", "job-name": "in100", "mem": "320G", "nodes": "2",
        "ntasks-per-node": "8", "open-mode": "append", "output": f"{out}/slurm/%j_0_log.out", "partition": "gpu",
        "qos": "long", "requeue": "", "reservation": "r1", "exclusive": "", "signal": "USR2@120", "time": "2800",
    }  # fmt: skip
    command = re.search(r"# Every process then runs: (.*)", first)[1]
    assert "--class_list imagenet100.txt --arch vit_small" in command  # the recipe, written out
    assert "--device cuda" in command and "--num_workers 10" in command
    names = [re.search(r"job-name=in100-(\S+)", x)[1] for x in others]
    assert names == ["eval_knn", "eval_linear", "eval_cluster", "eval_collapse"]
    assert all("nodes=1\n" in x and "dependency=afterok:JOB" in x and "kill-on-invalid-dep=yes" in x for x in others)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--nodes", "0"], "--nodes 0 must be positive"),
        (["--ngpus", "-1"], "--ngpus -1 must be positive"),
        (["--mem", "much"], "--mem much is not a memory size"),
        (["--timeout", "1", "--signal_delay_s", "60"], "--signal_delay_s 60 exceeds --timeout 1 minutes"),
        (["--max_requeues", "-1"], "--max_requeues -1 must not be negative"),
        (["--local", "--nodes", "2"], "--local has one machine"),
        (["--local", "--then", "eval"], "--local knows no dependencies"),
        (["--local", "--dependency", "afterok:1"], "--local knows no dependencies"),
        (["--dependency", "1"], "--dependency 1 is not sbatch's TYPE:JOB"),
        (["--script", "eval_knn", "--then", "eval"], "--then eval follows pre-training"),
        (["--script", "eval_knn", "--dry_run"], "--pretrained_weights is missing"),
        (["--status", "out", "--lr", "1"], "--status takes folders only: leave out --lr 1"),
        (["--status", "/nowhere"], "/nowhere/slurm has no jobs"),
        (["--dry_run", "--lr", "-1"], "--lr -1 must be positive"),
        (["--dry_run", "--time", "60"], "--time is called --timeout here"),
        (["--dry_run", "--output_dir", "out/%u_%j"], "only %j, the job's number, is understood"),
        (["--dry_run", "--output_dir", " "], "--output_dir is empty"),
        (["--sbatch", "Mail=x"], "--sbatch Mail=x is not OPTION=VALUE"),
        (["--script", "eval_knn", "--pretrained_weights", "/nowhere.pth"], "/nowhere.pth does not exist"),
        (["--script", "eval_knn", "--load_features", "/nowhere"], "--load_features /nowhere does not exist"),
        (["--dry_run", "--momentum_teacher", "0.99"], "--momentum_teacher makes no sense"),
    ],
)
def test_wrong_flags_before_anything_is_submitted(flags, words):
    with pytest.raises(UserError, match=words):
        run_with_submitit.main(flags)


def test_without_slurm_the_error_names_the_ways_out(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="no Slurm here .* --local, or torchrun --nproc_per_node=8 main_cplearn.py"):
        run_with_submitit.main(["--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "minutes"), [("UNLIMITED", float("inf")), ("00:30:00", 30), ("2-01:00:30", 2940.5), ("12:00:00", 720)]
)
def test_time_limits_of_partitions(text, minutes):
    assert _minutes(text) == minutes


def test_the_error_to_tell_is_the_one_that_others_follow_from():
    def end(rank, code, at):
        return {"rank": rank, "code": code, "time": at, "line": ""}

    peer, mine, late = end(0, 6, 1.0), end(1, 2, 2.0), end(2, 3, 3.0)
    assert the_cause([peer, mine, late]) == mine
    assert the_cause([end(3, 0, 0.0), peer, end(4, 75, 1.0)]) == peer
    assert the_cause([end(0, 0, 1.0), end(1, 75, 1.0)]) is None


# --- jobs of submitit's local executor --------------------------------------------------------------------


def submit(out, *more) -> str:
    argv = ["--local", "--cpu", "--ngpus", "2", "--cpus_per_task", "1", *SMALL, "--output_dir", out, *more]
    (job,) = run_with_submitit.main([str(x) for x in argv])
    return job


def wait_end(out, job: str) -> str:
    """The job's line in --status when it has ended."""
    end = time.monotonic() + 120
    while "RUNNING" in (line := status(out)[-1]):
        assert time.monotonic() < end, line + (out / f"slurm/{job}_0_log.out").read_text()
        time.sleep(0.1)
        reap(job)
    assert line.split()[0] == job
    return line


def reap(job: str) -> None:
    """The job is a child of this process, unlike that of a launcher which has returned."""
    try:
        os.waitpid(int(job), os.WNOHANG)
    except ChildProcessError:
        pass


@pytest.mark.slow
@pytest.mark.dist
def test_a_local_job_trains_and_equals_torchrun(tmp_path, image_folder):
    data = ("--data_path", str(image_folder), "--epochs", "2")
    job = submit(tmp_path / "out", *data)
    with pytest.raises(UserError, match=rf"has job {job} \(main_cplearn\), which is RUNNING: kill {job}"):
        submit(tmp_path / "out", *data)
    assert wait_end(tmp_path / "out", job).split() == f"{job} main_cplearn COMPLETED epoch 2 of 2".split()
    done = run_script("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "main_cplearn.py", *SMALL,
                      *data, "--output_dir", str(tmp_path / "torchrun"))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert same_state(tmp_path / "out", tmp_path / "torchrun")
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
    while not log.exists() or "epoch 2/15  loss" not in log.read_text():
        time.sleep(0.05)
    os.kill(int(job), signal.SIGTERM)
    line = wait_end(tmp_path / "out", job)
    assert "INTERRUPTED" in line and "exit 75 on rank" in line and "SIGTERM: stopped after step" in line
    job = submit(tmp_path / "out", *data)
    assert "COMPLETED" in wait_end(tmp_path / "out", job)
    assert "Resuming" in (tmp_path / f"out/slurm/{job}_0_log.out").read_text()
    done = run_script("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "main_cplearn.py", *SMALL,
                      *data, "--output_dir", str(tmp_path / "whole"))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert same_state(tmp_path / "out", tmp_path / "whole")
    assert without_time(log_of(tmp_path / "out")) == without_time(log_of(tmp_path / "whole"))


@pytest.mark.slow
def test_a_local_job_out_of_time_goes_on(tmp_path, image_folder):
    data = ("--data_path", str(image_folder), "--epochs", "60", "--batch_size_per_gpu", "2", "--saveckp_freq", "0")
    job = submit(tmp_path / "out", *data, "--ngpus", "1", "--timeout", "1", "--signal_delay_s", "50")
    assert re.search("COMPLETED +requeued [1-9] time", wait_end(tmp_path / "out", job))
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


def test_a_job_uses_this_code_wherever_it_was_submitted(tmp_path, image_folder):
    (tmp_path / "cplearn").mkdir()
    for name in ("utils.py", "errors.py", "datasets.py", "cplearn/__init__.py", "main_cplearn.py", "cplearn_head.py",
                 "vision_transformer.py", "job.py", "submit.py"):  # fmt: skip
        (tmp_path / name).write_text("raise RuntimeError('a module of another project')\n")
    command = [sys.executable, str(ROOT / "run_with_submitit.py"), "--local", "--cpu", "--ngpus", "1", *SMALL]
    command += ["--data_path", str(image_folder), "--max_steps", "1", "--output_dir", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    job = re.search(r"Submitted job (\d+)", done.stdout)[1]
    assert "COMPLETED" in wait_end(tmp_path / "out", job)


def test_defaults_of_the_site_come_from_sbatchs_variables(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("SBATCH_PARTITION", "mine")
    monkeypatch.setenv("SBATCH_ACCOUNT", "lab")
    run_with_submitit.main(["--dry_run", "--account", "other", "--output_dir", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "#SBATCH --partition=mine\n" in said and "#SBATCH --account=other\n" in said


def test_evaluations_that_could_not_run_are_refused_before_pre_training(tmp_path, image_folder):
    flat = image_folder / "train"
    with pytest.raises(UserError, match="--then eval needs a val or test folder with classes in --data_path"):
        run_with_submitit.main(["--dry_run", "--then", "eval", "--data_path", str(flat)])


def test_a_local_job_does_not_hold_the_pipe_of_its_launcher_and_ends_with_its_controller(tmp_path, image_folder):
    command = [sys.executable, str(ROOT / "run_with_submitit.py"), "--local", "--cpu", "--ngpus", "1", *SMALL]
    command += ["--data_path", str(image_folder), "--epochs", "100000", "--output_dir", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)  # until all have closed the pipe
    job = re.search(r"Submitted job (\d+)", done.stdout)[1]
    log = tmp_path / f"out/slurm/{job}_0_log.out"
    end = time.monotonic() + 60
    while not log.exists() or "epoch 2/" not in log.read_text():
        assert time.monotonic() < end
        time.sleep(0.1)
    os.kill(int(job), signal.SIGKILL)
    while not (tmp_path / f"out/slurm/{job}_0_end.json").exists():
        assert time.monotonic() < end
        time.sleep(0.1)
    assert "INTERRUPTED" in status(tmp_path / "out")[0]
