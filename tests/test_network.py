"""Importing, --help, training and evaluating where there is no network at all, not even a loopback device."""

import shutil
import subprocess

import pytest
from helpers import SMALL, last_result, run_script

UNSHARE = ["unshare", "--map-root-user", "--net"]


def permitted() -> bool:
    return bool(shutil.which("unshare")) and subprocess.run([*UNSHARE, "true"], capture_output=True).returncode == 0


def cut_off(*command: str) -> subprocess.CompletedProcess:
    """Run `python command` in a network name space of its own, in which nothing is up."""
    code = f"import os, sys; os.execvp('unshare', [*{UNSHARE}, sys.executable, *sys.argv[1:]])"
    return run_script("-c", code, *command)


@pytest.mark.slow
@pytest.mark.skipif(not permitted(), reason="no network name spaces here")
def test_training_and_evaluating_without_a_network(tmp_path):
    connect = "import socket; socket.create_connection(('127.0.0.1', 9), 5)"
    assert "Network is unreachable" in cut_off("-c", connect).stderr  # or the rest shows nothing
    done = cut_off("main_cplearn.py", *SMALL, "--max_steps", "4", "--output_dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    for script in ("eval_knn.py", "eval_cluster.py"):
        weights = ("--pretrained_weights", str(tmp_path / "checkpoint.pth"), "--device", "cpu", "--num_workers", "0")
        done = cut_off(script, *weights)
        assert done.returncode == 0 and last_result(tmp_path)["script"] == script[:-3], done.stderr
    assert cut_off("eval_linear.py", "--help").returncode == 0
    assert cut_off("-c", "import cplearn_head, vision_transformer, cplearn.methods").returncode == 0
