"""Short runs of `benchmarks/stress.py` and `fuzz.py`: kill -9, a full disk, damaged and hostile files and flags."""

import subprocess
import sys

import pytest
from helpers import ROOT


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize(
    ("command", "words", "count"),
    [
        (["stress.py", "--kills", "5", "--seed", "1"], ": 1 kills", 5),
        (["fuzz.py", "--flags", "25", "--files", "13", "--images", "27", "--checkpoints", "150", "--sources",
          "40", "--seed", "1"], "|   258 |  258 |     0 |", 1),
    ],
)  # fmt: skip
def test_a_short_run_ends_well(command, words, count):
    script = str(ROOT / "benchmarks" / command[0])
    ended = subprocess.run([sys.executable, script, *command[1:]], capture_output=True, text=True, timeout=1500)
    assert ended.returncode == 0, ended.stdout + ended.stderr[-3000:]
    assert ended.stdout.count(words) == count
