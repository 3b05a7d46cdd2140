"""How processes meet: addresses, devices, ranks that do not come, signals while they wait."""

import json
import os
import signal
import sys
import time

import pytest
import torch
from helpers import SERVER, SMALL, fork_script, run_in_processes

from cplearn.distributed import collectives, launch
from cplearn.errors import UserError


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
    address = json.dumps({"host": "127.0.0.1", "port": port, "number": "mine"})
    file = tmp_path / f"init_{_sum_of_ranks.__name__}"
    file.write_text(address[:20] if left == "cut" else address)
    assert run_in_processes(tmp_path, _sum_of_ranks) == [3.0, 3.0]
    assert not file.exists()


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
