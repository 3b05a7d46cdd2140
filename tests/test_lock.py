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
from cplearn.lock import FolderLock, Lock, in_use


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


def lock_of(folder, **changed) -> None:
    """Write a lock of this process, but for what is changed."""
    own = {"host": socket.gethostname(), "system": system_id(), "pid": os.getpid(),
           "started": process_start(os.getpid())}  # fmt: skip
    (folder / ".lock").write_text(json.dumps(own | changed))


def holder_of(folder) -> int:
    return json.loads((folder / ".lock").read_text())["pid"]


def test_a_second_process_is_refused_and_a_killed_one_is_replaced(tmp_path, image_folder, capsys):
    assert not in_use(tmp_path)
    process = hold(tmp_path)
    assert in_use(tmp_path)
    with pytest.raises(UserError, match=f"process {process.pid} on {socket.gethostname()}"):
        train(tmp_path, "--data_path", str(image_folder))
    end(process)
    assert not in_use(tmp_path)
    with FolderLock(tmp_path):
        assert holder_of(tmp_path) == os.getpid() and in_use(tmp_path)
    assert f"process {process.pid}" in capsys.readouterr().out
    assert os.listdir(tmp_path) == []


def test_a_pid_that_was_given_to_another_process_is_not_the_run(tmp_path):
    lock_of(tmp_path, pid=os.getppid(), started="1")
    assert not in_use(tmp_path)
    with FolderLock(tmp_path):
        pass
    assert process_start(os.getpid()) == process_start(os.getpid())
    assert process_start(2**22 + 1) is None


@pytest.mark.parametrize("content", ['{"host": "elsewhere", "pid": 7, "started": "1"}', "", "[]", '{"pid": "x"}'])
def test_a_lock_of_another_host_is_watched(tmp_path, monkeypatch, content):
    """Its process cannot be seen from here, but its heartbeat can. So it is with a damaged one."""
    monkeypatch.setattr(Lock, "QUIET", 0.6)
    path = tmp_path / ".lock"
    path.write_text(content)
    stop = threading.Event()

    def beat():
        while not stop.wait(0.05):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(UserError):
        FolderLock(tmp_path).__enter__()
    assert in_use(tmp_path)
    stop.set()
    thread.join()
    os.utime(path, (1, 1))
    assert not in_use(tmp_path)
    os.utime(path, (2**33, 2**33))  # in the future
    with FolderLock(tmp_path):  # quiet now
        assert holder_of(tmp_path) == os.getpid()


def test_a_lock_that_is_given_back_while_it_is_watched_is_free(tmp_path):
    """The host's name is the same, but its processes cannot be seen from this container."""
    lock_of(tmp_path, system="another")
    threading.Timer(0.3, (tmp_path / ".lock").unlink).start()
    with FolderLock(tmp_path) as lock:
        lock.check()
        lock_of(tmp_path, system="another")
        with pytest.raises(UserError):
            lock.check()
    assert json.loads((tmp_path / ".lock").read_text())["system"] == "another"  # and it is left alone


def test_the_heart_beats(tmp_path, monkeypatch):
    monkeypatch.setattr(Lock, "BEAT", 0.02)
    with FolderLock(tmp_path):
        os.utime(tmp_path / ".lock", (1, 1))
        time.sleep(0.3)
        assert (tmp_path / ".lock").stat().st_mtime > 1


def test_only_one_of_many_gets_a_dead_lock(tmp_path):
    lock_of(tmp_path, pid=2**22 + 1, started="1")
    started = [start(tmp_path) for _ in range(4)]  # with the pipes, which have to stay open
    many = [process for process, _ in started]
    deadline = time.monotonic() + 60
    while sum(p.exitcode is None for p in many) > 1 and time.monotonic() < deadline:
        time.sleep(0.05)
    alive = [p for p in many if p.exitcode is None]
    assert len(alive) == 1 and holder_of(tmp_path) == alive[0].pid
    for p in many:
        end(p)
