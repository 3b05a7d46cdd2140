"""Steps that are not finite, and images that cannot be read, in real runs."""

import json
import shutil

import pytest
import torch
from helpers import (
    SMALL,
    TORCHRUN,
    copy_with_broken,
    fork_script,
    log_of,
    model_of,
    run_in_processes,
    run_script,
    same_state,
    same_weights,
    spoil,
    train,
    without_time,
    write_images,
)
from torch import nn

import main_cplearn
from cplearn import checkpoints
from cplearn.data.loaders import BatchSampler
from cplearn.errors import NonFiniteError, UserError
from cplearn.lock import FolderLock
from cplearn.training.bad_batches import BadSteps, RunningStatistics
from cplearn.training.resume import save
from cplearn.training.stop import StopSignals


def test_running_statistics_are_as_before_a_skipped_step():
    module = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False))
    statistics = RunningStatistics(module)
    statistics.keep()
    module(torch.full((4, 3), float("nan")))
    assert module[0].running_mean.isnan().all()
    statistics.restore(torch.tensor(True))
    assert torch.equal(module[0].running_mean, torch.zeros(3)) and torch.equal(module[0].running_var, torch.ones(3))
    statistics.keep()
    module(torch.ones(4, 3))
    statistics.restore(torch.tensor(False))
    torch.testing.assert_close(module[0].running_mean, torch.full((3,), 0.1))


def test_bad_steps_are_counted_in_a_row_and_reported(tmp_path):
    bad = BadSteps(2, tmp_path, [f"{i}.jpg" for i in range(6)])

    def step(number, skipped):
        terms = {"loss": torch.tensor(float("nan") if skipped else 1.0), "prior": torch.tensor(2.0)}
        bad.remember(number, torch.tensor([number]), terms)
        bad.count(number, skipped, lambda: 8.0)

    for number, skipped in enumerate((True, True, False, True, True)):
        step(number, skipped)
    with pytest.raises(NonFiniteError, match=r"3 steps in a row were not finite \(loss\), the last 5: see .*bad_step"):
        step(5, True)
    report = json.loads((tmp_path / "bad_step.json").read_text())
    ranks = [{"terms": {"loss": "nan", "prior": 2.0}, "files": ["5.jpg"]}]
    assert report == {"step": 5, "in_a_row": 3, "not_finite": ["loss"], "loss_scale": 8.0, "ranks": ranks}


def test_an_overflow_in_half_precision_skips_a_step_and_is_counted(tmp_path, image_folder, monkeypatch):
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, **k: scaler(device, init_scale=2.0**60))
    record = train(tmp_path, "--data_path", str(image_folder), "--epochs", "1", "--precision", "fp16")
    assert record["skipped_steps"] == 3 and record["train_loss"] != record["train_loss"]  # no step counts
    line = json.loads((tmp_path / "log.txt").read_text())
    assert line["skipped_steps"] == 3 and line["train_loss"] is None
    assert all(v.isfinite().all() for v in model_of(tmp_path).values() if isinstance(v, torch.Tensor))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_that_is_not_finite_is_as_if_it_had_not_been(tmp_path, image_folder, monkeypatch, precision):
    """Weights, batch norm's statistics, the optimizer's state and the kept code usage."""
    common = ("--data_path", str(image_folder), "--epochs", "2", "--prior_buffer", "3", "--precision", precision)
    common += ("--optimizer", "adam", "--embed_dim", "16")
    train(tmp_path / "two", *common, "--max_steps", "2")
    spoil(monkeypatch, {2})  # the third of three
    record = train(tmp_path / "three", *common, "--max_steps", "3")
    assert record["skipped_steps"] == 1 and record["train_loss"] == log_of(tmp_path / "two")[0]["train_loss"]
    one, two = (checkpoints.load(tmp_path / name / "checkpoint.pth") for name in ("two", "three"))
    for a, b in ((one["model"], two["model"]), (one["optimizer"]["state"][0], two["optimizer"]["state"][0])):
        counters = {k for k in a if k.endswith("num_batches_tracked")}
        assert same_weights({k: a[k] for k in a.keys() - counters}, {k: b[k] for k in b.keys() - counters})
    assert train(tmp_path / "three", *common)["skipped_steps"] == 0  # and on it goes


def test_too_many_steps_that_are_not_finite_end_the_run_with_a_report(tmp_path, image_folder, monkeypatch):
    common = ("--data_path", str(image_folder), "--epochs", "3", "--saveckp_minutes", "0")
    train(tmp_path, *common, "--max_steps", "3")
    before = (tmp_path / "checkpoint.pth").read_bytes()
    spoil(monkeypatch, {0, 1})
    with pytest.raises(NonFiniteError, match=r"2 steps in a row were not finite \(entropy, grad_norm, .*loss, prior\)"):
        train(tmp_path, *common, "--max_skipped_steps", "1")
    report = json.loads((tmp_path / "bad_step.json").read_text())
    order = [i for i in next(iter(BatchSampler(48, 16, 0)))]
    assert (report["step"], report["in_a_row"], report["loss_scale"]) == (4, 2, 1.0) and len(order) == 16
    assert report["ranks"][0]["terms"]["loss"] == "nan" and len(report["ranks"][0]["files"]) == 16
    assert all((image_folder / "train" / name).is_file() for name in report["ranks"][0]["files"])
    assert (tmp_path / "checkpoint.pth").read_bytes() == before


def test_broken_weights_are_not_saved(tmp_path, image_folder):
    """A finite gradient times an absurd learning rate: weights of 1e27 that are good for nothing, and infinite ones."""
    common = ("--data_path", str(image_folder), "--epochs", "9", "--optimizer", "sgd", "--clip_grad", "0")
    with pytest.raises(NonFiniteError, match="21 steps in a row were not finite"):
        train(tmp_path, *common, "--lr", "1e30", "--max_steps", "27")
    assert not (tmp_path / "checkpoint.pth").exists() and len(log_of(tmp_path)) == 7
    args = main_cplearn.parse_args([*SMALL, "--data_path", str(image_folder), "--output_dir", str(tmp_path)])
    main_cplearn.choose_precision(args, torch.device("cpu"))
    with StopSignals() as signals, FolderLock(tmp_path) as lock:
        run = main_cplearn.build(args, torch.device("cpu"), lock, signals)
        run.method.head.linear.weight.data[3, 2] = float("inf")
        with pytest.raises(NonFiniteError, match="weights became infinite or NaN by step 0: not saved"):
            save(run)
    assert not (tmp_path / "checkpoint.pth").exists() and not (tmp_path / ".lock").exists()


def _train_with_a_bad_rank(rank, out, data, bad_rank):
    with pytest.MonkeyPatch.context() as patch:
        if rank == bad_rank:
            spoil(patch, {1})
        record = main_cplearn.main([*SMALL, "--data_path", data, "--epochs", "2", "--batch_size_per_gpu", "8",
                                    "--output_dir", out, "--max_steps", "4"])  # fmt: skip
    return {"skipped": record["skipped_steps"], "log": record["train_loss"]}


@pytest.mark.dist
def test_one_rank_that_is_not_finite_makes_all_skip(tmp_path, image_folder):
    out = tmp_path / "out"
    both = run_in_processes(tmp_path, _train_with_a_bad_rank, str(out), str(image_folder), 1)
    assert both[0] == both[1] and both[0]["skipped"] == 0  # the second epoch's
    assert [r["skipped_steps"] for r in log_of(out)] == [1, 0]
    assert all(v.isfinite().all() for v in model_of(out).values() if isinstance(v, torch.Tensor))


def test_a_few_unreadable_images_are_replaced_listed_and_counted(tmp_path, image_folder, capsys):
    data = copy_with_broken(image_folder, tmp_path / "data", "ant/000.jpg", "bee/003.jpg")
    common = ("--data_path", data, "--epochs", "3", "--max_bad_images", "0.1")
    train(tmp_path / "whole", *common)
    said = capsys.readouterr()
    assert said.err.count("WARNING: replaced by another image: cannot read the image") == 2  # once each
    assert "replaced" in said.out
    log = log_of(tmp_path / "whole")
    assert all(2 <= r["replaced_images"] <= 4 for r in log)  # a replacement may be unreadable itself
    listed = [x.split("\t") for x in (tmp_path / "whole" / "bad_images.txt").read_text().splitlines()]
    assert sorted(name for name, _ in listed) == ["ant/000.jpg", "bee/003.jpg"]
    train(tmp_path / "cut", *common, "--num_workers", "2", "--max_steps", "4")
    capsys.readouterr()
    train(tmp_path / "cut", *common)
    assert capsys.readouterr().err == ""  # known already
    assert same_state(tmp_path / "whole", tmp_path / "cut")
    assert without_time(log) == without_time(log_of(tmp_path / "cut"))


@pytest.mark.parametrize("workers", ["0", "2"])
def test_too_many_unreadable_images_end_the_run_in_one_line(tmp_path, image_folder, workers):
    data = copy_with_broken(image_folder, tmp_path / "data", "ant/000.jpg")
    done = fork_script(tmp_path / "said", "main_cplearn.py", *SMALL, "--data_path", data, "--epochs", "1",
                       "--num_workers", workers, "--output_dir", str(tmp_path / "out"))  # fmt: skip
    assert done.returncode == UserError.exit_code
    warning, error = done.stderr.splitlines()
    assert warning.startswith("WARNING: replaced by another image: cannot read the image") and "000.jpg" in warning
    assert "1 of 48 images cannot be read, more than --max_bad_images 0.001 allows (0)" in error and "000.jpg" in error


def test_a_repaired_image_is_taken_off_the_list(tmp_path, image_folder):
    data = copy_with_broken(image_folder, tmp_path / "data", "ant/000.jpg")
    common = ("--data_path", data, "--max_bad_images", "0.1", "--epochs", "2")
    train(tmp_path / "out", *common, "--max_steps", "6")
    assert (tmp_path / "out/bad_images.txt").read_text().count("000.jpg") == 2  # its name and the reason
    shutil.copy(image_folder / "train/ant/000.jpg", tmp_path / "data/train/ant/000.jpg")
    train(tmp_path / "out", *common)
    assert (tmp_path / "out/bad_images.txt").read_text() == ""


@pytest.mark.dist
@pytest.mark.slow
def test_an_unreadable_image_is_named_by_whichever_rank_meets_it(tmp_path):
    write_images(tmp_path / "data", 8)
    names = sorted((tmp_path / "data").iterdir())
    order = [i for batch in BatchSampler(8, 4, 0, rank=1, world_size=2) for _, i in batch]
    names[order[0]].write_bytes(b"no image")  # in the first batch of rank 1
    done = run_script(*TORCHRUN, "main_cplearn.py", *SMALL,
                      "--batch_size_per_gpu", "4", "--data_path", str(tmp_path / "data"), "--epochs", "1",
                      "--output_dir", str(tmp_path / "out"))  # fmt: skip
    assert done.returncode != 0
    assert "main_cplearn.py: error: 1 of 8 images cannot be read" in done.stderr and str(names[order[0]]) in done.stderr
    assert names[order[0]].name in (tmp_path / "out" / "bad_images.txt").read_text()
