"""How processes meet: addresses, devices, ranks that do not come, signals while they wait; and how one is lost."""

import json
import os
import signal
import socket
import sys
import time

import pytest
import torch
import torch.distributed as dist
from helpers import SERVER, SMALL, Script, eval_flags, fork_script, run_in_processes, wait_for

from cplearn import errors
from cplearn.distributed import collectives, launch
from cplearn.distributed.alive import Watch
from cplearn.errors import LocalError, PeerError, UserError
from cplearn.host import host_name

# --- devices and launcher variables ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "gpus", "env", "words"),
    [
        ("tpu", 1, {}, "--device tpu"),
        ("cuda", 0, {}, "--device cuda"),
        (None, 1, {"LOCAL_RANK": "2", "WORLD_SIZE": "4"}, "3 processes but 1 GPUs"),
        (None, 1, {"LOCAL_RANK": "2", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}, "4 processes but 1 GPUs"),
    ],
)
def test_devices_that_are_not_there(monkeypatch, device, gpus, env, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words):
        launch.init(**{"device": device} if device else {})


def test_two_ranks_on_one_gpu_are_refused():
    def rank(r, host, gpu):
        return {"rank": r, "host": host, "device": "cuda:0 H100", "gpu": gpu}

    launch.refuse_shared_gpus([rank(0, "a", "x"), rank(1, "a", "y"), rank(2, "b", "x"), rank(3, "b", None)])
    with pytest.raises(UserError, match="ranks 1 and 2 share cuda:0 H100 on a"):
        launch.refuse_shared_gpus([rank(0, "a", "x"), rank(1, "a", "y"), rank(2, "a", "y")])


@pytest.mark.parametrize("name_and_value", ["RANK=x", "RANK=", "RANK=-1", "RANK=5", "WORLD_SIZE=0", "LOCAL_RANK=x"])
def test_launcher_variables_that_cannot_be_meant(monkeypatch, name_and_value):
    name, _, value = name_and_value.partition("=")
    for variable, text in {"RANK": "0", "WORLD_SIZE": "2", name: value}.items():
        monkeypatch.setenv(variable, text)
    with pytest.raises(LocalError, match=f"{name}='{value}'"):
        launch.init("env://", "cpu")


def test_every_process_with_wrong_variables_says_so_in_one_line(tmp_path):
    done = fork_script(tmp_path / "said", "main_cplearn.py", *SMALL, "--output_dir", tmp_path, RANK="5", WORLD_SIZE="2")
    assert done.returncode == 2 and "RANK='5'" in done.stderr and done.stderr.count("\n") == 1


# --- addresses -----------------------------------------------------------------------------------------------


def _sum_of_ranks(rank):
    return collectives.sum_over_ranks(torch.tensor(rank + 1.0)).item()


@pytest.mark.parametrize("left", ["nobody listens", "somebody else listens"])
def test_an_address_left_by_an_earlier_start_does_no_harm(tmp_path, left):
    """The file of --dist_url file:// is there already, and rank 1 may read it before rank 0 has replaced it."""
    other = dist.TCPStore("127.0.0.1", 0, 2, True, wait_for_workers=False)
    other.set("theirs", "")
    port = other.port if left == "somebody else listens" else 9
    file = tmp_path / f"init_{_sum_of_ranks.__name__}"
    file.write_text(json.dumps({launch._OURS: "127.0.0.1", "port": port, "number": "mine"}))
    assert run_in_processes(tmp_path, _sum_of_ranks) == [3.0, 3.0]
    assert not file.exists()


@pytest.mark.parametrize("kind", ["text", "folder", "pipe"])
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_file_that_is_not_an_address_is_refused_and_stays(tmp_path, monkeypatch, rank, kind):
    file = tmp_path / "thesis.txt"
    {"text": lambda: file.write_text("my only copy"), "folder": file.mkdir, "pipe": lambda: os.mkfifo(file)}[kind]()
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--dist_url .*thesis.txt"):
        launch.init(f"file://{file}", "cpu", 0.02)
    assert {"text": file.is_file, "folder": file.is_dir, "pipe": file.is_fifo}[kind]()
    assert kind != "text" or file.read_text() == "my only copy"
    with pytest.raises(UserError, match="no folder .*nowhere"):
        launch.init(f"file://{tmp_path}/nowhere/meet", "cpu", 0.02)


@pytest.mark.parametrize(
    "url", ["tcp://host:99999", "tcp://host:0", "tcp://host", "tcp://:29500", "tcp://host:²", "env://"]
)
def test_an_address_that_cannot_be_one(monkeypatch, url):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "host", "MASTER_PORT": "99999"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"--dist_url {url} "):
        launch.init(url, "cpu", 0.02)


@pytest.fixture
def port():
    """A port on which nobody listens."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def alone(tmp_path, *more, **env):
    """The one process that has come of several."""
    return fork_script(tmp_path / "said", "main_cplearn.py", *SMALL, "--dist_timeout", "0.02", "--output_dir",
                       tmp_path / "out", *more, MASTER_ADDR="127.0.0.1", **env)  # fmt: skip


@pytest.mark.parametrize("url", ["env://", "file://"])
@pytest.mark.parametrize(("rank", "world", "words"), [("0", "3", "rank 1, 2 of 3"), ("1", "2", "rank 0")])
def test_a_rank_that_does_not_come_is_named(tmp_path, url, port, rank, world, words):
    url += f"{tmp_path}/meet" * (url == "file://")
    done = alone(tmp_path, "--dist_url", url, RANK=rank, WORLD_SIZE=world, MASTER_PORT=port)
    assert done.returncode == 6 and words in done.stderr, done.stderr


def test_a_port_that_is_taken(tmp_path):
    with socket.socket() as s:
        s.bind(("0.0.0.0", 0))
        s.listen()
        taken = str(s.getsockname()[1])
        done = alone(tmp_path, RANK="0", WORLD_SIZE="2", MASTER_PORT=taken)
    assert done.returncode == 2 and f"127.0.0.1:{taken}" in done.stderr, done.stderr


def _wait_for_rank_1(meet):
    signal.signal(signal.SIGUSR2, lambda *_: sys.exit(7))
    os.environ.update(RANK="0", WORLD_SIZE="2")
    launch.init(f"file://{meet}", "cpu", 5.0)


def test_a_rank_that_waits_for_others_hears_signals(tmp_path):
    process = SERVER.Process(target=_wait_for_rank_1, args=(str(tmp_path / "meet"),))
    process.start()
    wait_for((tmp_path / "meet").exists, alive=process.is_alive)
    time.sleep(1)
    os.kill(process.pid, signal.SIGUSR2)
    process.join(10)
    assert process.exitcode == 7


# --- lost processes ------------------------------------------------------------------------------------------


def two_ranks(tmp_path, *command):
    """Both ranks of a script that prints its epochs, once the first one has begun."""
    flags = [*command, "--dist_url", f"file://{tmp_path}/meet"]
    ranks = [Script(tmp_path / f"said{r}", *flags, RANK=str(r), WORLD_SIZE="2", LOCAL_RANK=str(r), LOCAL_WORLD_SIZE="2")
             for r in range(2)]  # fmt: skip
    out = ranks[0].files[0]
    wait_for(lambda: out.exists() and "epoch " in out.read_text(), alive=lambda: ranks[0].poll() is None)
    return ranks


def hit(ranks, victim: int, name: str):
    """Send a signal to one of the ranks. Returns how the other one ended, and the name by which it has to call it."""
    try:
        os.kill(ranks[victim].pid, getattr(signal, name))
        done = ranks[1 - victim].wait(120)
        return done, f"rank {victim} (process {ranks[victim].pid} on {host_name()})"
    finally:
        for rank in ranks:
            rank.process.kill()


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("name", ["SIGSTOP", "SIGKILL"])
@pytest.mark.parametrize("victim", [0, 1])  # the ranks meet in rank 0's process
def test_a_frozen_and_a_killed_rank_are_named_by_the_other(tmp_path, name, victim):
    ranks = two_ranks(tmp_path, "main_cplearn.py", *SMALL, "--epochs", "100000", "--print_freq", "1",
                      "--peer_timeout", "0.2", "--output_dir", tmp_path / "out")  # fmt: skip
    done, called = hit(ranks, victim, name)
    assert done.returncode == 6, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("main_cplearn.py: error: ")]
    assert called in line and "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.dist
def test_a_killed_rank_is_named_in_an_evaluation(tmp_path, run):
    ranks = two_ranks(tmp_path, "eval_linear.py", *eval_flags(run, tmp_path / "out"), "--augment", "true",
                      "--epochs", "100000", "--batch_size_per_gpu", "8")  # fmt: skip
    done, called = hit(ranks, 1, "SIGKILL")
    assert done.returncode == 6 and called in done.stderr and "Traceback" not in done.stderr, done.stderr


def _watch(rank, minutes=0.06) -> Watch:
    """A watch of this test's own, which is quick."""
    errors.watch.stop(done=True)
    beats = dist.PrefixStore("test", dist.distributed_c10d._get_default_store())
    beats.set(str(rank), "0")
    dist.barrier()
    errors.watch = Watch(beats, rank, errors.watch.everyone, minutes)
    return errors.watch


def _ask_who_is_lost(rank, done):
    """What is told of a RuntimeError while both ranks are there, and when rank 1 has stopped to beat."""
    watch = _watch(rank, 0.5)
    error, answers = RuntimeError("NCCL error: no space left in /dev/shm"), []
    watch.everyone[1 - rank]["system"] = "another machine"  # where nobody can look for a process
    for _ in range(2):
        answers.append(errors.lost_peer(error) if rank == 0 else None)
        dist.barrier()
        if rank == 1:
            watch.stop(done=done)
        dist.barrier()
    assert errors.exit_status(error)[0] == 1 and errors.lost_peer(UserError("wrong")) is None
    return torch.tensor([isinstance(x, PeerError) and watch.names[1] in str(x) for x in answers])


@pytest.mark.dist
@pytest.mark.parametrize("done", [False, True])
def test_an_error_is_of_another_process_only_if_that_is_lost(tmp_path, done):
    assert run_in_processes(tmp_path, _ask_who_is_lost, done)[0].tolist() == [False, not done]


def _work_long_alone(rank):
    """Rank 1 waits for rank 0 in a collective for longer than a rank may be silent; then rank 1 has ended, and rank 0
    works on."""
    watch = _watch(rank)
    collectives.on_main(time.sleep, 5)
    if rank == 1:
        watch.stop(done=True)
    time.sleep(5)
    return torch.tensor(rank)


@pytest.mark.dist
def test_a_rank_that_works_long_or_has_ended_is_not_taken_for_frozen(tmp_path):
    assert run_in_processes(tmp_path, _work_long_alone) == [0, 1]
