"""Signals, the folder's lock, and steps that are not finite: with real signals, processes and files."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch
from conftest import ROOT
from torch import nn

from cplearn import errors
from cplearn.errors import ExpectedError, NonFiniteError, UserError
from cplearn.host import process_start, system_id
from cplearn.training.bad_batches import BadSteps, RunningStatistics
from cplearn.training.folder_lock import FolderLock
from cplearn.training.run_control import StopSignals

# --- signals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT"])
def test_a_signal_is_noted_and_the_old_handler_comes_back(name):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with StopSignals() as signals:
        assert signals.name is None
        os.kill(os.getpid(), number)
        time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)  # the first one counts
        assert signals.name == name
    assert signal.getsignal(number) is before


def test_ctrl_c_twice_ends_at_once_but_not_within_a_second(monkeypatch):
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # torchrun passes it on a second time
        assert signals.name == "SIGINT"
        signals._ctrl_c -= 2
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)


# --- lock ----------------------------------------------------------------------------------------------------


HOLD = """
import sys, time
sys.path.insert(0, {root!r})
from cplearn.training.folder_lock import FolderLock
with FolderLock({folder!r}):
    print("held", flush=True)
    time.sleep(60)
"""


def hold(folder):
    """A real process that has the lock."""
    code = HOLD.format(root=str(ROOT), folder=str(folder))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_refused_and_a_killed_one_is_replaced(tmp_path, capsys):
    process = hold(tmp_path)
    with pytest.raises(UserError, match=f"in use by process {process.pid} on {socket.gethostname()}: stop it, or"):
        FolderLock(tmp_path).__enter__()
    process.kill()
    process.wait()
    with FolderLock(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    assert f"taking over {tmp_path}/.lock of a run that is gone: process {process.pid}" in capsys.readouterr().out
    assert os.listdir(tmp_path) == []


def test_a_pid_that_was_given_to_another_process_is_not_the_run(tmp_path):
    lock = {"host": socket.gethostname(), "system": system_id(), "pid": os.getppid(), "started": "1"}
    (tmp_path / ".lock").write_text(json.dumps(lock))
    with FolderLock(tmp_path):
        pass
    assert process_start(os.getpid()) == process_start(os.getpid())
    assert process_start(2**22 + 1) is None


@pytest.mark.parametrize("content", ['{"host": "elsewhere", "pid": 7, "started": "1"}', "", "[]", '{"pid": "x"}'])
def test_a_lock_of_another_host_is_watched(tmp_path, monkeypatch, content):
    """Its process cannot be seen from here, but its heartbeat can."""
    monkeypatch.setattr(FolderLock, "QUIET", 0.6)
    path = tmp_path / ".lock"
    path.write_text(content)
    stop = threading.Event()

    def beat():
        while not stop.wait(0.05):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(UserError, match="is in use by process"):
        FolderLock(tmp_path).__enter__()
    stop.set()
    thread.join()
    with FolderLock(tmp_path):  # quiet now
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_a_lock_that_is_given_back_while_it_is_watched_is_free(tmp_path):
    """The host's name is the same, but its processes cannot be seen from this container."""
    lock = {
        "host": socket.gethostname(),
        "system": "another",
        "pid": os.getpid(),
        "started": process_start(os.getpid()),
    }
    (tmp_path / ".lock").write_text(json.dumps(lock))
    threading.Timer(0.3, (tmp_path / ".lock").unlink).start()
    with FolderLock(tmp_path) as mine:
        mine.check()
        (tmp_path / ".lock").write_text(json.dumps(lock))
        with pytest.raises(UserError, match="no longer this run's: another one took"):
            mine.check()
    assert json.loads((tmp_path / ".lock").read_text()) == lock  # and it is left alone


def test_the_heart_beats(tmp_path, monkeypatch):
    monkeypatch.setattr(FolderLock, "BEAT", 0.02)
    with FolderLock(tmp_path):
        os.utime(tmp_path / ".lock", (1, 1))
        time.sleep(0.3)
        assert (tmp_path / ".lock").stat().st_mtime > 1


def test_only_one_of_many_gets_a_dead_lock(tmp_path):
    dead = {"host": socket.gethostname(), "system": system_id(), "pid": 2**22 + 1, "started": "1"}
    (tmp_path / ".lock").write_text(json.dumps(dead))
    code = HOLD.format(root=str(ROOT), folder=str(tmp_path))
    many = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    deadline = time.monotonic() + 60
    while sum(p.poll() is None for p in many) > 1 and time.monotonic() < deadline:
        time.sleep(0.05)
    alive = [p for p in many if p.poll() is None]
    assert len(alive) == 1 and json.loads((tmp_path / ".lock").read_text())["pid"] == alive[0].pid
    alive[0].kill()
    for p in many:
        p.communicate()


# --- not finite ----------------------------------------------------------------------------------------------


def test_running_statistics_are_as_before_a_skipped_step():
    module = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False))
    statistics = RunningStatistics(module)
    statistics.keep()
    module(torch.full((4, 3), float("nan")))
    assert module[0].running_mean.isnan().all()
    statistics.restore(torch.tensor(True))
    assert torch.equal(module[0].running_mean, torch.zeros(3)) and torch.equal(module[0].running_var, torch.ones(3))
    statistics.keep()
    module(torch.ones(4, 3))
    statistics.restore(torch.tensor(False))
    torch.testing.assert_close(module[0].running_mean, torch.full((3,), 0.1))


def test_bad_steps_are_counted_in_a_row_and_reported(tmp_path):
    bad = BadSteps(2, tmp_path, [f"{i}.jpg" for i in range(6)])

    def step(number, skipped):
        terms = {"loss": torch.tensor(float("nan") if skipped else 1.0), "prior": torch.tensor(2.0)}
        bad.remember(number, torch.tensor([number]), terms)
        bad.count(number, skipped, lambda: 8.0)

    for number, skipped in enumerate((True, True, False, True, True)):
        step(number, skipped)
    with pytest.raises(NonFiniteError, match=r"3 steps in a row were not finite \(loss\), the last 5: see .*bad_step"):
        step(5, True)
    report = json.loads((tmp_path / "bad_step.json").read_text())
    assert report == {
        "step": 5,
        "in_a_row": 3,
        "not_finite": ["loss"],
        "loss_scale": 8.0,
        "ranks": [{"terms": {"loss": "nan", "prior": 2.0}, "files": ["5.jpg"]}],
    }


def test_every_error_has_its_own_exit_code():
    kinds = [x for x in vars(errors).values() if isinstance(x, type) and issubclass(x, ExpectedError)]
    codes = {error.__name__: error.exit_code for error in kinds}
    assert codes == {
        "ExpectedError": 1,
        "UserError": 2,
        "LocalError": 2,
        "NonFiniteError": 3,
        "WriteError": 4,
        "WorkerError": 5,
        "PeerError": 6,
        "CollapseError": 7,
        "Interrupted": 75,
    }
    page = (ROOT / "docs" / "errors.md").read_text()
    assert all(f"| {code} |" in page for code in set(codes.values()) | {0, 130})
