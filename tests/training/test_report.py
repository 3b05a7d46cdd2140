"""What a run says of its speed: the wait for images and its cure, the profile of twenty steps."""

import json
import math
import re
import shlex

import pytest
import torch
from helpers import run_script, train, views_of, write_images

from cplearn.data.datasets import Folder
from cplearn.data.pixels import CacheOptions, Pixels, open_pixels
from cplearn.training import report

VIEWS = views_of(16)
GPU, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def images(tmp_path) -> Pixels:
    write_images(tmp_path, 6)
    return Pixels(Folder(tmp_path), VIEWS)


@pytest.mark.parametrize(
    ("wait", "workers", "device", "cores", "words"),
    [
        (0.2, 4, GPU, 16, ""),
        (0.5, 4, GPU, 16, "50% of the time went into waiting for images: --num_workers 8 would keep up (now 4, this"),
        (0.75, 0, GPU, 16, "--num_workers 3 would keep up (now 0, "),  # one process reads for 3 parts and computes 1
        (0.9, 4, GPU, 16, "--cache disk decodes them once (0.0 GB in --cache_dir)"),
        (0.5, 0, CPU, 2, "--cache disk decodes them once"),
    ],
)
def test_a_long_wait_is_told_with_its_cure(monkeypatch, images, wait, workers, device, cores, words):
    monkeypatch.setattr(report, "cores_of_process", lambda processes: cores)
    said = report.loader_advice(wait, workers, device, images)
    assert words in said if words else said == ""


def test_a_cache_is_not_recommended_to_those_who_have_it(images):
    cached = open_pixels(images.dataset, VIEWS, CacheOptions("ram", "", 0))
    assert report.loader_advice(0.9, 0, CPU, cached) == ""
    assert "cores for --num_workers would keep up" in report.loader_advice(0.99, 10, GPU, cached)


def test_the_advice_stands_under_the_epoch_line(tmp_path, image_folder, monkeypatch, capsys):
    monkeypatch.setattr(report, "LONG_WAIT", 0.0)
    train(tmp_path, "--data_path", str(image_folder), "--epochs", "1", "--cache", "none")
    lines = capsys.readouterr().out.splitlines()
    (at,) = (k for k, line in enumerate(lines) if line.startswith("epoch 1/1  loss"))
    assert lines[at + 1].startswith("  too short to judge")
    assert lines[at + 2].startswith("  WARNING: ") and "of the time went into waiting for images" in lines[at + 2]


def test_the_memory_that_a_run_needs_and_takes(tmp_path, image_folder, capsys):
    train(tmp_path, "--data_path", str(image_folder), "--epochs", "1")
    said = capsys.readouterr().out
    assert "Memory: about 0." in said and len(re.findall(r"\n[\d.]+ GB of memory at most so far\n", said)) == 1


@pytest.mark.parametrize(("epochs", "steps"), [("20", 20), ("3", 4), ("1", None)])
def test_a_profile_leaves_out_the_first_steps(tmp_path, image_folder, capsys, epochs, steps):
    """Three steps per epoch: twenty are profiled, those that are there, or none."""
    train(tmp_path, "--data_path", str(image_folder), "--epochs", epochs, "--max_steps", "30", "--profile")
    said = capsys.readouterr().out
    if steps is None:
        assert "--profile: 3 steps are too few" in said and not (tmp_path / "profile.json").exists()
        return
    assert f"{steps} steps, the ten largest costs" in said
    rows = said.partition("largest costs")[2].partition("epoch")[0].splitlines()
    assert len([row for row in rows if row.startswith("| ") and "%" in row and "::" in row]) > 5
    assert json.loads((tmp_path / "profile.json").read_text())["traceEvents"]


def test_the_epoch_line_has_the_references_that_the_method_has(tmp_path, image_folder, capsys):
    """48 images, 40 codes, 16 per batch. No share of a way, which other runs could not be compared with."""
    train(tmp_path / "a", "--data_path", str(image_folder), "--epochs", "1")
    log_c, aligned = math.log(40), math.log(40 / 16)
    said = capsys.readouterr().out
    assert f"  (uniform {0.25 * log_c:.4f}, aligned {aligned:.4f}, bound {0.25 * aligned:.4f})  lr " in said
    assert "of the way" not in said
    record = json.loads((tmp_path / "a" / "log.txt").read_text())
    way = (0.25 * log_c - record["train_loss"]) / (0.25 * log_c - 0.25 * aligned)
    assert record["uniform_to_floor"] == pytest.approx(way)
    train(tmp_path / "zero", "--data_path", str(image_folder), "--epochs", "1", "--beta", "0")  # no way at all
    assert json.loads((tmp_path / "zero" / "log.txt").read_text())["uniform_to_floor"] is None
    train(tmp_path / "b", "--data_path", str(image_folder), "--epochs", "1", "--prior", "forward")
    assert f"  (uniform {1.25 * log_c:.4f}, bound {log_c:.4f})  lr " in capsys.readouterr().out


def test_the_start_names_what_was_changed_and_the_end_what_comes_next(tmp_path, image_folder, capsys, monkeypatch):
    out = tmp_path / "the run"
    train(out, "--data_path", str(image_folder / "train"), "--epochs", "1", "--seed", "3")
    said = capsys.readouterr().out
    (flags,) = (x for x in said.splitlines() if x.startswith("Flags that are not as by default"))
    assert f"--data_path {image_folder}/train" in flags and "--seed 3" in flags and "--beta" not in flags
    commands = [shlex.split(x) for x in said.partition("Next:\n")[2].splitlines() if x.startswith("  python ")]
    assert [x[1] for x in commands] == ["eval_knn.py", "visualize_codes.py", "extract_features.py", "plot_runs.py"]
    for command in commands:  # as typed; k-NN finds the val beside this train
        ended = run_script(*command[1:])
        assert ended.returncode == 0, ended.stderr
    assert (out / "features.npz").is_file()


def test_the_duration_of_a_short_epoch_leaves_out_its_first_step(tmp_path, image_folder, monkeypatch):
    """Three steps per epoch, where the second half begins after three."""
    told = []
    monkeypatch.setattr(report, "TIMED_STEPS", 6)
    monkeypatch.setattr(
        report.EpochReport,
        "_tell_duration",
        lambda self, x: told.append((x, self.first_step_seconds, self.run.epoch.seconds)),
    )
    train(tmp_path, "--data_path", str(image_folder), "--epochs", "1")
    ((seconds, first, epoch),) = told
    assert seconds == pytest.approx((epoch - first) / 2)
