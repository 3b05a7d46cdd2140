"""How processes meet: addresses, devices, ranks that do not come, signals while they wait."""

import json
import os
import signal
import sys
import time

import pytest
import torch
from helpers import SERVER, SMALL, Script, fork_script, run_in_processes

from cplearn.distributed import alive, collectives, launch
from cplearn.errors import LocalError, UserError
from cplearn.host import host_name


def test_devices_that_are_not_there(monkeypatch):
    with pytest.raises(UserError, match="--device tpu is unknown"):
        launch.init(device="tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="torch sees no GPU"):
        launch.init(device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(UserError, match="4 processes but 1 GPUs"):
        launch.init()


def test_two_ranks_on_one_gpu_are_refused():
    def rank(r, host, gpu):
        return {"rank": r, "host": host, "pid": 1, "device": "cuda:0 H100", "gpu": gpu}

    launch._refuse_shared_gpus([rank(0, "a", "x"), rank(1, "a", "y"), rank(2, "b", "x")])
    with pytest.raises(UserError, match="ranks 1 and 2 share cuda:0 H100 on a: start one process per GPU"):
        launch._refuse_shared_gpus([rank(0, "a", "x"), rank(1, "a", "y"), rank(2, "a", "y")])


def _sum_of_ranks(rank):
    return collectives.sum_over_ranks(torch.tensor(rank + 1.0)).item()


@pytest.mark.parametrize("left", ["nobody listens", "somebody else listens", "cut"])
def test_an_address_left_by_an_earlier_start_does_no_harm(tmp_path, left):
    """The file of --dist_url file:// is there already, and rank 1 may read it before rank 0 has replaced it."""
    other = torch.distributed.TCPStore("127.0.0.1", 0, 2, True, wait_for_workers=False)
    other.set("number", "theirs")
    port = other.port if left == "somebody else listens" else 9
    address = json.dumps({launch._OURS: "127.0.0.1", "port": port, "number": "mine"})
    file = tmp_path / f"init_{_sum_of_ranks.__name__}"
    file.write_text(address[:40] if left == "cut" else address)
    assert run_in_processes(tmp_path, _sum_of_ranks) == [3.0, 3.0]
    assert not file.exists()


@pytest.mark.parametrize("content", ["my only copy", '{"host": "a", "number": 1}', '{"cplearn_results": 1}', None])
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_file_that_is_not_an_address_is_refused_and_stays(tmp_path, monkeypatch, rank, content):
    file = tmp_path / "thesis.txt"
    file.mkdir() if content is None else file.write_text(content)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"--dist_url file:///.*thesis.txt is there already.*: name a new file"):
        launch.init(f"file://{file}", "cpu", 0.02)
    assert file.is_dir() if content is None else file.read_text() == content
    with pytest.raises(UserError, match="there is no folder .*nowhere, create it"):
        launch.init(f"file://{tmp_path}/nowhere/meet", "cpu", 0.02)


@pytest.mark.parametrize("url", ["tcp://host:99999", "tcp://host:0", "tcp://host", "tcp://:29500", "tcp://host:x", "tcp://",
                                 "tcp://host:²", "env://"])  # fmt: skip
def test_an_address_that_cannot_be_one(monkeypatch, url):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "host", "MASTER_PORT": "99999"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"--dist_url {url} names no host and port from 1 to 65535"):
        launch.init(url, "cpu", 0.02)


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK='x' is not a whole number of at least 0"),
        ({"RANK": "", "WORLD_SIZE": "2"}, "RANK='' is not a whole number"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK='-1' is not a whole number"),
        ({"RANK": "0", "WORLD_SIZE": "1e3"}, "WORLD_SIZE='1e3' is not a whole number of at least 1"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE='0' is not a whole number of at least 1"),
        ({"RANK": "1"}, "RANK=1 without WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 without RANK"),
        ({"RANK": "5", "WORLD_SIZE": "2"}, "RANK=5 and WORLD_SIZE=2: ranks count from 0 to 1"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK='x' is not a whole number"),
        ({"LOCAL_WORLD_SIZE": "many"}, "LOCAL_WORLD_SIZE='many' is not a whole number"),
    ],
)
def test_launcher_variables_that_cannot_be_meant(monkeypatch, tmp_path, variables, words):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LocalError, match=words):
        launch.init("env://", "cpu")


@pytest.mark.parametrize("variables", [{"RANK": "x"}, {"RANK": "5", "WORLD_SIZE": "2"}])
def test_every_process_with_wrong_variables_says_so_in_one_line(tmp_path, variables):
    done = fork_script(tmp_path / "said", "main_cplearn.py", *SMALL, "--output_dir", str(tmp_path / "out"), **variables)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("main_cplearn.py: error: environment variable")


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("frozen", [0, 1])  # the ranks meet in rank 0's process
def test_a_frozen_rank_is_named_by_the_other(tmp_path, frozen):
    out = tmp_path / "out"
    flags = ["main_cplearn.py", *SMALL, "--epochs", "100000", "--print_freq", "1", "--peer_timeout", "0.2",
             "--output_dir", out, "--dist_url", f"file://{tmp_path}/meet"]  # fmt: skip
    ranks = [Script(tmp_path / f"said{r}", *flags, RANK=str(r), WORLD_SIZE="2", LOCAL_RANK=str(r), LOCAL_WORLD_SIZE="2")
             for r in range(2)]  # fmt: skip
    try:
        end = time.monotonic() + 120
        while not ranks[0].files[0].exists() or "epoch 1/" not in ranks[0].files[0].read_text():
            assert ranks[0].poll() is None and time.monotonic() < end
            time.sleep(0.05)
        os.kill(ranks[frozen].pid, signal.SIGSTOP)
        done = ranks[1 - frozen].wait()
        assert done.returncode == 6, done.stderr
        name = f"rank {frozen} (process {ranks[frozen].pid} on {host_name()})"
        assert f"{name} gives no sign of life for 0.2 minutes" in done.stderr
    finally:
        for rank in ranks:
            rank.process.kill()


def test_a_pipe_in_the_place_of_an_address_does_not_hang(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "meet")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="meet is there already, and not from an earlier start"):
        launch.init(f"file://{tmp_path}/meet", "cpu", 0.02)
    assert (tmp_path / "meet").is_fifo()


def _work_long_alone(rank):
    """Rank 1 waits for rank 0 in a collective for longer than a rank may be silent; then rank 1 has ended, and rank 0
    works on."""
    alive.start(torch.distributed.distributed_c10d._get_default_store(), rank, ["rank 0", "rank 1"], 0.06)
    collectives.on_main(time.sleep, 5)
    if rank == 1:
        alive.stop(done=True)
    time.sleep(5)
    return torch.tensor(rank)


@pytest.mark.dist
def test_a_rank_that_works_long_or_has_ended_is_not_taken_for_frozen(tmp_path):
    assert run_in_processes(tmp_path, _work_long_alone) == [0, 1]


def _wait_for_rank_1(meet):
    signal.signal(signal.SIGUSR2, lambda *_: sys.exit(7))
    os.environ.update(RANK="0", WORLD_SIZE="2")
    launch.init(f"file://{meet}", "cpu", 5.0)


def test_a_rank_that_waits_for_others_hears_signals(tmp_path):
    process = SERVER.Process(target=_wait_for_rank_1, args=(str(tmp_path / "meet"),))
    process.start()
    end = time.monotonic() + 60
    while not (tmp_path / "meet").exists():
        assert process.is_alive() and time.monotonic() < end
        time.sleep(0.05)
    time.sleep(1)
    os.kill(process.pid, signal.SIGUSR2)
    process.join(10)
    assert process.exitcode == 7


@pytest.mark.parametrize("url", ["env://", "file://"])
def test_a_rank_that_does_not_come_is_named(tmp_path, url):
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    done = fork_script(tmp_path / "said", "main_cplearn.py", *SMALL, "--dist_timeout", "0.02",
                           "--output_dir", str(tmp_path / "out"),
                      "--dist_url", url if url == "env://" else f"{url}{tmp_path}/meet",
                      RANK="0", WORLD_SIZE="3", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)  # fmt: skip
    assert done.returncode == 6, done.stderr
    assert "rank 1, 2 of 3 did not come within 0.02 minutes (1 did, rank 0 on" in done.stderr


def test_a_port_that_is_taken(tmp_path):
    import socket

    with socket.socket() as s:
        s.bind(("0.0.0.0", 0))
        s.listen()
        port = str(s.getsockname()[1])
        done = fork_script(tmp_path / "said", "main_cplearn.py", *SMALL, "--dist_timeout", "0.1",
                           "--output_dir", str(tmp_path / "out"),
                          RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)  # fmt: skip
    assert done.returncode == 2 and "is taken on 127.0.0.1: choose another one" in done.stderr, done.stderr
