"""Numbers to TensorBoard and Weights & Biases: the same ones, in one run across continuations, and never in the way."""

import argparse
import http.server
import json
import os
import pty
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers import ROOT, children_of, log_of, run_in_processes, same_state, train

from cplearn.errors import UserError
from cplearn.training import writers

RECORD = {"epoch": 0, "step": 8, "train_loss": 1.0625, "verdict": "learning", "loss_one_code": None, "flag": True}


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """No account, no network, and a home that must stay empty."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(name, str(home))
    monkeypatch.setenv("WANDB_MODE", "offline")
    yield
    assert list(home.iterdir()) == []


def flags(out, **more):
    out.mkdir(exist_ok=True)
    common = {"output_dir": str(out), "tensorboard": False, "wandb": True, "wandb_project": "cplearn"}
    return argparse.Namespace(**common | more)


def written(out) -> list[bytes]:
    """What each start has kept, oldest first."""
    pytest.importorskip("wandb")
    return [path.read_bytes() for path in sorted(out.glob("wandb/offline-run-*/run-*.wandb"), key=os.path.getmtime)]


def test_the_same_numbers_in_one_run_across_a_continuation(tmp_path, image_folder, capsys):
    pytest.importorskip("wandb")
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    common = ("--data_path", str(image_folder), "--epochs", "4")
    train(tmp_path / "plain", *common)
    out = tmp_path / "out"
    train(out, *common, "--wandb", "--tensorboard", "--max_steps", "6")
    (run_id,) = (out / "wandb_id.txt").read_text().split()
    train(out, *common, "--wandb", "--tensorboard", "--wandb_project", "other")
    assert (out / "wandb_id.txt").read_text().split() == [run_id]
    assert capsys.readouterr().out.count(f"Weights & Biases: run {run_id}, {out}/wandb") == 2
    assert same_state(tmp_path / "plain", out)

    records = log_of(out)
    assert [r["epoch"] for r in records] == [0, 1, 2, 3]
    kept = written(out)
    assert len(kept) == 2 and all(run_id.encode() in content for content in kept)
    for content, mine in zip(kept, (records[:2], records[2:]), strict=True):
        for record in records:
            held = [repr(record[name]).encode() in content for name in ("train_loss", "train_grad_norm")]
            assert held == [record in mine] * 2
    assert b"n_ref" in kept[0] and b"cplearn" in kept[0] and b"other" in kept[1]

    events = reader.EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    found = events.Scalars("train_loss")
    assert [x.step for x in found] == [0, 1, 2, 3]
    assert [x.value for x in found] == pytest.approx([r["train_loss"] for r in records])
    numbers = {k for k, v in records[0].items() if isinstance(v, int | float) and not isinstance(v, bool)}
    assert set(events.Tags()["scalars"]) == numbers and all(name.encode() in kept[0] for name in numbers)


def test_only_numbers_are_written_and_nothing_is_left_running(tmp_path):
    pytest.importorskip("wandb")
    before = children_of(os.getpid())
    with writers.Writers(flags(tmp_path / "out"), 0) as opened:
        assert len(children_of(os.getpid())) > len(before)
        opened.write(RECORD)
    assert children_of(os.getpid()) == before
    (content,) = written(tmp_path / "out")
    assert b"1.0625" in content and b"learning" not in content and b"loss_one_code" not in content


ASKING = """
import argparse, sys
from cplearn.training import writers
args = argparse.Namespace(output_dir=sys.argv[1], tensorboard=False, wandb=True, wandb_project="cplearn")
with writers.Writers(args, 0) as opened:
    opened.write({"epoch": 0, "train_loss": 1.0625})
"""


def test_nobody_is_asked_for_an_account(tmp_path, monkeypatch):
    """On a terminal, where it would wait for an answer."""
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE")
    (tmp_path / "out").mkdir()
    terminal, end = pty.openpty()
    asking = subprocess.Popen(
        [sys.executable, "-c", ASKING, str(tmp_path / "out")], stdin=end, stdout=end, stderr=end, cwd=ROOT
    )
    os.close(end)
    try:
        assert asking.wait(timeout=60) == 0
        said = os.read(terminal, 10_000).decode()
    finally:
        asking.kill()
        os.close(terminal)
    assert "did not start" in said and "choice" not in said
    assert b"1.0625" in written(tmp_path / "out")[0]


@pytest.mark.parametrize(
    "server", [{}, {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40}], ids=["no account", "no answer"]
)
def test_without_account_or_network_the_numbers_are_kept(tmp_path, monkeypatch, capsys, server):
    monkeypatch.delenv("WANDB_MODE")
    for name, value in server.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(writers, "START", 1)
    with writers.Writers(flags(tmp_path / "out"), 0) as opened:
        opened.write(RECORD)
    assert b"1.0625" in written(tmp_path / "out")[0]
    assert capsys.readouterr().err.count("WARNING: Weights & Biases") == 1


class Server(http.server.BaseHTTPRequestHandler):
    """Answers as much as a run needs to begin."""

    def do_POST(self):
        self.rfile.read(int(self.headers.get("content-length") or 0))
        project = {"id": "p", "name": "cplearn", "entity": {"id": "e", "name": "me"}}
        bucket = {"id": "UnVuOnYx", "name": "n", "displayName": "n", "description": None, "config": None,
                  "historyLineCount": 0, "sweepName": None, "project": project}  # fmt: skip
        viewer = {"id": "v", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}
        data = {"viewer": viewer, "model": {"bucket": None}, "upsertBucket": {"bucket": bucket, "inserted": True},
                "serverInfo": {"cliVersionInfo": {}}}  # fmt: skip
        body = json.dumps({"data": data} if self.path == "/graphql" else {}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_a_network_that_goes_away(tmp_path, monkeypatch, capsys):
    pytest.importorskip("wandb")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(writers, "END", 2)
    with writers.Writers(flags(tmp_path / "out"), 0) as opened:
        said = capsys.readouterr()
        assert f":{server.server_port}/me/cplearn/runs/" in said.out and "WARNING" not in said.err
        server.shutdown()
        server.server_close()
        opened.write(RECORD)
        start = time.monotonic()
    assert time.monotonic() - start < 20
    assert capsys.readouterr().err.count("WARNING: Weights & Biases") == 1
    (kept,) = (tmp_path / "out").glob("wandb/run-*/run-*.wandb")
    assert b"1.0625" in kept.read_bytes()


def test_the_id_may_be_chosen(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "mine-1")
    pytest.importorskip("wandb")
    with writers.Writers(flags(tmp_path / "out"), 0):
        assert (tmp_path / "out" / "wandb_id.txt").read_text() == "mine-1\n"


@pytest.mark.parametrize(("package", "module"), writers.MODULES.items())
def test_a_missing_package_is_told_before_any_work(tmp_path, monkeypatch, package, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"--{package} .*pip install -U {package}"):
        train(tmp_path / "out", f"--{package}")
    assert not (tmp_path / "out").exists()


def test_a_folder_named_wandb_is_no_package(tmp_path, monkeypatch):
    """Such as those that wandb itself leaves in the current folder."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in [name for name in sys.modules if name.partition(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(UserError, match="--wandb"):
        writers.check_writers(flags(tmp_path / "out"))


def _write(rank, out):
    with writers.Writers(flags(Path(out)), 0) as opened:
        opened.write(RECORD)


@pytest.mark.dist
def test_only_the_first_process_writes(tmp_path):
    run_in_processes(tmp_path, _write, str(tmp_path / "out"))
    (content,) = written(tmp_path / "out")
    assert b"1.0625" in content
