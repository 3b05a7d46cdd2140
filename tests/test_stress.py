"""A short run of `benchmarks/stress.py`: real kill -9, damaged files, a full disk."""

import subprocess
import sys

import pytest
from helpers import ROOT


@pytest.mark.slow
@pytest.mark.dist
def test_a_short_stress_test_ends_well():
    short = ["--kills", "5", "--images", "27", "--files", "150", "--seed", "1"]
    parts = ["kills", "images", "checkpoints", "disk"]
    command = [sys.executable, str(ROOT / "benchmarks" / "stress.py"), *short, "--parts", *parts]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count(": 1 kills") == 5 and "| damaged         |" in done.stdout


@pytest.mark.slow
def test_a_few_hostile_flags_and_lying_files_hold():
    command = [sys.executable, str(ROOT / "benchmarks" / "fuzz.py"), "--flags", "25", "--files", "13", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "| all   |" in done.stdout and "|    38 |   38 |     0 |" in done.stdout
