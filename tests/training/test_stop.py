"""Signals: noted, and a run that one stops resumes as if nothing had happened."""

import json
import os
import re
import signal
import time

import pytest
from helpers import LONG, TORCHRUN, Script, fork_script, interrupt, log_of, run_script, same_state, without_time

from cplearn import checkpoints
from cplearn.training.stop import StopSignals


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGINT"])
def test_a_signal_is_noted_and_the_old_handler_comes_back(name):
    number = getattr(signal, name)
    before = signal.signal(number, signal.SIG_DFL)  # these tests may run under nohup
    try:
        with StopSignals() as signals:
            assert signals.name is None
            os.kill(os.getpid(), number)
            time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGTERM)  # the first one counts
            assert signals.name == name
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)


def test_under_nohup_a_closed_terminal_stops_nothing():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.05)
            assert signals.name is None and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_ctrl_c_twice_ends_at_once_but_not_within_a_second(monkeypatch):
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # torchrun passes it on a second time
        assert signals.name == "SIGINT"
        signals._ctrl_c -= 2
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, image_folder):
    """The folder of the run that is interrupted below, undisturbed and with another number of workers."""
    out = tmp_path_factory.mktemp("undisturbed")
    done = fork_script(out / "said", *LONG, "--data_path", image_folder, "--num_workers", "1", "--output_dir", out)
    assert done.returncode == 0, done.stderr
    return out


def assert_resumes_like(undisturbed, out, *command):
    done = fork_script(out / "said", *command, "--num_workers", "0", "--output_dir", out)
    assert done.returncode == 0, done.stderr
    assert same_state(undisturbed, out)
    assert without_time(log_of(undisturbed)) == without_time(log_of(out))


NOHUP = pytest.mark.skipif(signal.getsignal(signal.SIGHUP) is signal.SIG_IGN, reason="under nohup SIGHUP is ignored")


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGHUP", marks=NOHUP), "SIGINT"])
def test_a_signal_saves_and_the_same_command_ends_like_an_undisturbed_run(tmp_path, image_folder, undisturbed, name):
    """In the middle of an epoch, with workers; resumed with another number of them."""
    command = [*LONG, "--data_path", str(image_folder), "--num_workers", "2"]
    process = Script(tmp_path / "said", *command, "--output_dir", tmp_path)
    interrupt(process, tmp_path, name, ord(name[3]) % 7)
    done = process.wait()
    said = done.stderr
    assert done.returncode == 75 and f"{name}: stopping after this step" in said, said
    assert "the same command goes on from there" in said and len(said.splitlines()) == 2
    step = checkpoints.load(tmp_path / "checkpoint.pth")["step"]
    assert 6 <= step < 72 and f"stopped after step {step} of 72, saved after step {step} in" in said
    assert_resumes_like(undisturbed, tmp_path, *command)


def test_a_killed_run_resumes_from_its_last_checkpoint(tmp_path, image_folder, undisturbed):
    """kill -9, in the middle of an epoch: nothing but the steps since the checkpoint is lost."""
    command = [*LONG, "--data_path", str(image_folder), "--num_workers", "2"]
    process = Script(tmp_path / "said", *command, "--output_dir", tmp_path)
    interrupt(process, tmp_path, "SIGKILL", 3)
    assert process.wait().returncode == -9
    assert 6 <= checkpoints.load(tmp_path / "checkpoint.pth")["step"] < 72
    assert_resumes_like(undisturbed, tmp_path, *command)


def test_a_run_that_was_frozen_and_taken_over_writes_nothing_when_it_wakes(tmp_path, image_folder):
    process = Script(tmp_path / "said", *LONG, "--data_path", str(image_folder), "--num_workers", "0",
                     "--output_dir", tmp_path)  # fmt: skip
    interrupt(process, tmp_path, "SIGSTOP", 1)
    lock = {"host": "elsewhere", "system": "", "pid": 7, "started": "1"}
    os.replace(tmp_path / ".lock", tmp_path / "old_lock")
    (tmp_path / ".lock").write_text(json.dumps(lock))
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != "said"}
    os.kill(process.pid, signal.SIGCONT)
    done = process.wait()
    assert done.returncode == 2 and ".lock is no longer this run's: another one took" in done.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != "said"} == kept


@pytest.mark.slow
@pytest.mark.dist
def test_a_signal_to_one_of_two_processes_stops_both_at_the_same_step(tmp_path, image_folder):
    command = [*TORCHRUN, *LONG, "--data_path", str(image_folder), "--batch_size_per_gpu", "8", "--num_workers", "1"]
    process = Script(tmp_path / "said", *command, "--output_dir", tmp_path / "cut", OMP_NUM_THREADS="1")
    interrupt(process, tmp_path / "cut", "SIGUSR1", 3, rank=1)
    stopped = process.wait()
    code, said = stopped.returncode, stopped.stderr
    assert code == 1 and said.count("exitcode  : 75") == 2, said
    for out in ("cut", "whole"):
        done = run_script(*command, "--output_dir", str(tmp_path / out))
        assert done.returncode == 0, done.stderr
        assert "2 processes on 1 host, gloo, 1 MiB summed over all in" in done.stdout
        assert re.search(r"(?m)^\| 1 +\| +\S+ \| +1 \| +cpu \| +\d+ \|$", done.stdout)
    assert same_state(tmp_path / "whole", tmp_path / "cut")
    assert without_time(log_of(tmp_path / "whole")) == without_time(log_of(tmp_path / "cut"))
