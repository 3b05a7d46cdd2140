"""On a GPU that computes nothing: no tensor of the host is mixed in, nothing in a step waits, no kernel is added.

What a step comes to is kept in counts.json; a rise is committed on purpose:

    python tests/fake_cuda/test_fake_cuda.py
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
KEPT = json.loads((HERE / "counts.json").read_text())
MUTATIONS = ("mutation: .item() in the votes", "mutation: a tensor of the host")
MAY_WAIT = ("features, codes and certainty", "the probe", "the linear probe")  # they give numbers to the host
pytestmark = pytest.mark.fakecuda


def build(folder: Path) -> dict[str, str]:
    """Compile the runtime; return the environment in which it is found. Raises CalledProcessError."""
    import triton  # has CUDA's headers

    headers = next(Path(triton.__path__[0]).glob("backends/nvidia/**/driver_types.h")).parent
    library = folder / "libcuda.so.1"  # the driver, and before all others the runtime
    command = [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-w", "-o", library, HERE / "runtime.c", "-I", headers]
    subprocess.run(command, check=True)
    where = f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}"
    found = {"LD_PRELOAD": str(library), "LD_LIBRARY_PATH": where, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    return os.environ | found


def count(folder: Path, *names: str) -> dict[str, dict]:
    """Run cases (all, if none is named); return what each comes to."""
    command = [sys.executable, HERE / "cases.py", *names]
    done = subprocess.run(command, env=build(folder), capture_output=True, text=True, cwd=folder)
    lines = [json.loads(line[5:]) for line in done.stdout.splitlines() if line.startswith("CASE ")]
    assert done.returncode == 0, done.stderr[-3000:]
    return {line.pop("name"): line for line in lines}


@pytest.fixture(scope="module")
def counts(tmp_path_factory):
    if not shutil.which(os.environ.get("CC", "cc")) or sys.platform != "linux":
        pytest.skip("needs a C compiler on Linux")
    pytest.importorskip("triton.backends.nvidia")
    return count(tmp_path_factory.mktemp("fake_cuda"))


@pytest.mark.parametrize("name", KEPT)
def test_a_step_is_no_more_than_it_was(counts, name):
    found, kept = counts[name], KEPT[name]
    assert "error" not in found, found["error"] + found["trace"]
    assert found["kernels"] <= kept["kernels"] and found["copies"] <= kept["copies"], found
    assert name in MAY_WAIT or found["waits"] == [], found["waits"]


def test_every_case_is_kept(counts):
    assert counts.keys() == KEPT.keys() | set(MUTATIONS)


def test_what_waits_and_what_mixes_devices_is_found(counts):
    """These tests see what they are for."""
    item, host = (counts[name] for name in MUTATIONS)
    assert len(item["waits"]) == 1 and item["waits"][0].startswith("item() at main_cplearn.py:")
    assert "FakeTensorDeviceMismatchError" in host["error"] and "cuda:0 and cpu" in host["error"]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        found = count(Path(folder))
    kept = {name: {key: found[name][key] for key in ("kernels", "copies", "megabytes")} for name in found
            if name not in MUTATIONS}  # fmt: skip
    (HERE / "counts.json").write_text(json.dumps(kept, indent=1) + "\n")
