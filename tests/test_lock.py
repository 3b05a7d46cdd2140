"""The lock of a run's folder, with real processes and files."""

import json
import os
import socket
import threading
import time

import pytest
from helpers import SERVER, train

from cplearn.errors import UserError
from cplearn.host import process_start, system_id
from cplearn.lock import FolderLock


def _hold(folder, held):
    with FolderLock(folder):
        held.send("held")
        time.sleep(60)


def start(folder):
    """Start a real process that takes the lock; return it, and what tells that it has it."""
    told, held = SERVER.Pipe(duplex=False)
    process = SERVER.Process(target=_hold, args=(folder, held))
    process.start()
    return process, told


def hold(folder):
    process, told = start(folder)
    assert told.recv() == "held"
    return process


def end(process):
    process.kill()
    process.join()


def test_a_second_process_is_refused_and_a_killed_one_is_replaced(tmp_path, capsys):
    process = hold(tmp_path)
    with pytest.raises(UserError, match=f"in use by process {process.pid} on {socket.gethostname()}: stop it, or"):
        FolderLock(tmp_path).__enter__()
    end(process)
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
    started = [start(tmp_path) for _ in range(4)]  # with the pipes, which have to stay open
    many = [process for process, _ in started]
    deadline = time.monotonic() + 60
    while sum(p.exitcode is None for p in many) > 1 and time.monotonic() < deadline:
        time.sleep(0.05)
    alive = [p for p in many if p.exitcode is None]
    assert len(alive) == 1 and json.loads((tmp_path / ".lock").read_text())["pid"] == alive[0].pid
    for p in many:
        end(p)


@pytest.mark.parametrize("what", ["pipe", "dangling link", "link", "zero", "folder"])
def test_what_cannot_be_a_lock_is_refused_and_stays(tmp_path, what):
    """None of it may hang the start, as reading a pipe or /dev/zero would."""
    path = tmp_path / ".lock"
    victim = tmp_path / "victim"
    victim.write_text("{}")
    {
        "pipe": os.mkfifo,
        "dangling link": lambda x: x.symlink_to(tmp_path / "nowhere"),
        "link": lambda x: x.symlink_to(victim),
        "zero": lambda x: x.symlink_to("/dev/zero"),
        "folder": os.mkdir,
    }[what](path)
    with pytest.raises(UserError, match="is a link or no file, so it is no run's lock: remove it"):
        FolderLock(tmp_path).__enter__()
    assert os.path.lexists(path) and victim.read_text() == "{}"


@pytest.mark.parametrize("content", ["[" * 60_000, "x" * 70_000, '{"pid": true}', '{"pid": -1, "host": 7}', "\x00"])
def test_a_damaged_lock_belongs_to_nobody(tmp_path, monkeypatch, content):
    monkeypatch.setattr(FolderLock, "QUIET", 0.1)
    (tmp_path / ".lock").write_text(content)
    os.utime(tmp_path / ".lock", (2**33, 2**33))  # in the future
    with FolderLock(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_a_folder_in_use_is_refused(tmp_path, image_folder):

    process = hold(tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path} is in use by process {process.pid}"):
        train(tmp_path, "--data_path", str(image_folder))
    end(process)
