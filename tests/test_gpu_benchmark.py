"""`benchmarks/gpu.py`: its own logic, on the CPU with the same code; and whether it finds what is wrong."""

import json
import subprocess
import sys
import time

import gpu
import gpu_fast
import gpu_right
import pytest
import torch
from helpers import ROOT

SCRIPT = str(ROOT / "benchmarks" / "gpu.py")
CPU = torch.device("cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_this_gpu_is_right(tmp_path):
    command = [sys.executable, SCRIPT, "--json", str(tmp_path / "gpu.json"), "--parts", *gpu_right.PARTS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.dist
def test_all_parts_on_a_cpu(tmp_path):
    # These take two minutes more; tests/distributed has the like.
    parts = [name for name in gpu.PARTS if name not in ("processes", "ranks")]
    flags = ["--device", "cpu", "--tiny", "--json", str(tmp_path / "gpu.json"), "--parts", *parts]
    done = subprocess.run([sys.executable, SCRIPT, *flags], capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert list(report["parts"]) == parts
    again = subprocess.run([sys.executable, SCRIPT, *flags], capture_output=True, text=True, timeout=60)
    assert again.returncode == 0 and json.loads((tmp_path / "gpu.json").read_text()) == report  # nothing is repeated
    for name, part in report["parts"].items():
        assert part["cells"] and part["rows"] and not part["misses"], name
        assert f"\n{name}: {'as expected' if name in gpu_right.PARTS else 'ran'}" in done.stdout
        assert f"\n## {name}\n" in (tmp_path / "gpu.md").read_text()
    checked = [cell for name in parts if name in gpu_right.PARTS for cell in report["parts"][name]["cells"]]
    assert len(checked) > 40 and sum(cell["right"] is True for cell in checked) > 38
    forms = {cell["kind"]: cell for cell in report["parts"]["forms"]["cells"]}
    assert forms["stored"]["ms"] > 0 and forms["plain"]["mib"] > 0
    steps = report["parts"]["steps"]["cells"]
    assert all(cell["rate"] > 0 for cell in steps) and steps[0]["ratio"] == steps[0]["rate"] / steps[1]["rate"]


def test_without_a_gpu_it_says_so_and_ends_with_2():
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, env={"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "torch sees no GPU here" in done.stderr


def test_what_was_not_checked_for_lack_of_time_has_a_code_of_its_own(tmp_path):
    flags = ["--device", "cpu", "--tiny", "--json", str(tmp_path / "gpu.json"), "--minutes", "1e-9", "--parts", "loss"]
    done = subprocess.run([sys.executable, SCRIPT, *flags], capture_output=True, text=True, timeout=60)
    assert done.returncode == 3 and "loss: left out: no time left" in done.stdout


def test_a_wrong_loss_is_found(monkeypatch):
    right = gpu_right.streamed_loss

    def wrong(h, dictionary, scale, spec, *, form, precision):
        loss, *rest = right(h, dictionary, scale, spec, form=form, precision=precision)
        return (loss * (1 + 5e-5) if form == "stored" else loss), *rest

    monkeypatch.setattr(gpu_right, "streamed_loss", wrong)
    monkeypatch.setattr(gpu_right, "LOSS_FORMS", (("plain", "ieee"), ("stored", "ieee"), ("recomputed", "ieee")))
    found = gpu_right.outcome(gpu_right.loss_forms(CPU, tiny=True))
    assert [cell["right"] for cell in found.cells] == [True, False, True, True, True, True]  # +-150: a bound of 1.2e-4
    assert found.says == "5 of 6 within their bounds" and found.misses[0].startswith("stored, ieee: 5")
    line = gpu.verdict("loss", {**found._asdict()})
    assert line.startswith("loss: NOT as expected: stored, ieee: 5")


def test_a_wrong_color_is_found(monkeypatch):
    right, calls = gpu_right.color.color, []

    def wrong(pixels, params, noise):
        calls.append(1)
        return right(pixels, params, noise) + 1e-3 * (len(calls) == 8)  # hue, the second time: on the device

    monkeypatch.setattr(gpu_right.color, "color", wrong)
    wrong_ones = [check.what for check in gpu_right.color_transforms(CPU, tiny=True) if not check.right]
    assert wrong_ones == ["hue"]


def test_a_number_that_is_none_is_not_right():
    assert gpu_right.Check("x", float("nan"), 1.0).right is False
    assert gpu_right.left_out("x", "why").right is None


def test_a_part_that_crashes_or_hangs_is_a_verdict(tmp_path, monkeypatch):
    args = gpu.get_args_parser().parse_args(["--json", str(tmp_path / "gpu.json")])
    (tmp_path / "part.py").write_text("import sys, time\nprint('loss', file=sys.stderr)\nsys.exit(7)\n")
    monkeypatch.setattr(gpu, "__file__", str(tmp_path / "part.py"))
    part = gpu.start_part(args, "loss", until=time.time() + 20)
    assert gpu.verdict("loss", part) == "loss: NOT as expected: ended with code 7: loss"
    (tmp_path / "part.py").write_text("import time\ntime.sleep(100)\n")
    monkeypatch.setattr(gpu, "GRACE", 0.5)
    part = gpu.start_part(args, "loss", until=time.time() + 0.5)
    assert gpu.verdict("loss", part) == "loss: NOT as expected: no end after 1 s"
    part = gpu.start_part(args, "loss", until=0)
    assert gpu.verdict("loss", part) == "loss: left out: no time left"


def test_a_slow_pick_of_auto_is_found(monkeypatch):
    times = {"plain": 9.0, "stored": 4.0, "recomputed": 5.0, "triton": 2.0, "stored_tf32": 1.0, "triton_tf32": 1.1}

    def measure(kind, *_, **__):
        if kind not in times:
            raise RuntimeError("out of memory")
        return {"ms": times[kind], "mib": 1.0}

    monkeypatch.setattr(gpu_fast.loss_benchmark, "measure", measure)
    found = gpu_fast.loss_forms(CPU, False, {}, until=10**11)
    assert len(found.misses) == 12  # at every size, in float32; stored_tf32 is fast enough
    assert found.misses[0] == "auto picks stored (4.00 ms) at 64 x 384 x 131072; triton takes 2.00 ms"
