"""The lock of a run's folder, with real processes and files."""

import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest
from helpers import ROOT, train

from cplearn.errors import UserError
from cplearn.host import process_start, system_id
from cplearn.training.folder_lock import FolderLock

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


def test_a_folder_in_use_is_refused(tmp_path, image_folder):

    process = hold(tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path} is in use by process {process.pid}"):
        train(tmp_path, "--data_path", str(image_folder))
    process.kill()
    process.wait()
