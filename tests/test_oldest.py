"""The oldest versions that are installed by `make test-oldest` are those of pyproject.toml."""

import oldest
from helpers import ROOT


def test_every_lower_bound_is_pinned():
    pins = dict(pin.split("==") for pin in oldest.oldest())
    text = (ROOT / "pyproject.toml").read_text()
    assert pins["torch"] == "2.10" and f'"torch>={pins["torch"]}"' in text  # CVE-2026-24747
    lines = text.partition("dependencies = [")[2].partition("]")[0].splitlines()
    wanted = [line.strip().strip('",').split(">=")[0] for line in lines if ">=" in line]
    assert set(wanted) - {"faiss-cpu"} <= pins.keys() and {"pytest", "lightly"} <= pins.keys()
