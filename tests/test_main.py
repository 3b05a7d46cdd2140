"""The training script on real images: results, resuming, two processes, wrong input."""

import json
import os
import pickle
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import main_cplearn
from cplearn import checkpoints
from cplearn.data import augmentations
from cplearn.data.loaders import BatchSampler
from cplearn.errors import NonFiniteError, UserError
from cplearn.files import append_json_line
from cplearn.methods import build_method
from cplearn.schedules import lr_at
from cplearn.training.folder_lock import FolderLock
from cplearn.training.optimizer import build_optimizer, clip_gradients, set_schedules
from cplearn.training.resume import save
from cplearn.training.run_control import StopSignals

SMALL = ["--arch", "resnet8_w8", "--image_size", "32", "--out_dim", "40", "--batch_size_per_gpu", "16",
         "--warmup_epochs", "0", "--num_workers", "0", "--device", "cpu"]  # fmt: skip


def train(out, *more):
    """main() in this process, at most 12 steps."""
    return main_cplearn.main([*SMALL, "--max_steps", "12", "--output_dir", str(out), *more])


def log_of(out):
    return [json.loads(line) for line in (out / "log.txt").read_text().splitlines()]


def model_of(out):
    return checkpoints.load(out / "checkpoint.pth")["model"]


def same_weights(a, b):
    tensors = [k for k, v in a.items() if isinstance(v, torch.Tensor)]
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in tensors)


def same_state(a, b):
    """Weights, optimiser and averages of two folders, bit by bit; times and paths apart."""

    def tensors(x, path=""):
        if isinstance(x, torch.Tensor):
            yield path, x
        elif isinstance(x, dict):
            for k, v in x.items():
                yield from tensors(v, f"{path}/{k}")
        elif isinstance(x, list):
            for k, v in enumerate(x):
                yield from tensors(v, f"{path}/{k}")
        elif not path.startswith(("/args", "/commit", "/progress/seconds", "/progress/waiting", "/log_bytes")):
            yield path, x

    one, two = (dict(tensors(checkpoints.load(folder / "checkpoint.pth"))) for folder in (a, b))
    return one.keys() == two.keys() and all(
        torch.equal(x, two[k]) if isinstance(x, torch.Tensor) else x == two[k] for k, x in one.items()
    )


def without_time(records):
    return [
        {
            k: v
            for k, v in r.items()
            if k not in ("images_per_second", "data_wait", "seconds", "monitor_seconds", "first_step_seconds")
        }
        for r in records
    ]


def run_script(*command, **env):
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **env},
    )  # fmt: skip


# --- a run ------------------------------------------------------------------------------------------------


def test_a_run_leaves_log_arguments_and_checkpoints(tmp_path, image_folder, capsys):
    record = train(tmp_path, "--data_path", str(image_folder), "--epochs", "2", "--saveckp_freq", "1")
    said = capsys.readouterr().out
    assert f"48 images, 3 classes, {image_folder}/train" in said and "loss_floor" in said
    log = log_of(tmp_path)
    assert [r["epoch"] for r in log] == [0, 1] and log[-1] == record and log[-1]["step"] == 6
    assert {"train_loss", "train_invariance", "train_prior", "train_entropy", "train_grad_norm", "lr"} <= set(record)
    assert sorted(p.name for p in tmp_path.glob("*.pth")) == [
        "checkpoint.pth",
        "checkpoint0001.pth",
        "checkpoint0002.pth",
        "checkpoint_previous.pth",
    ]
    saved = json.loads((tmp_path / "args.json").read_text())
    assert saved["args"]["out_dim"] == 40 and saved["derived"]["effective_batch"] == 16
    assert saved["derived"]["actual_lr"] == pytest.approx(0.0005 * 16 / 256)
    assert saved["derived"]["dictionary"].startswith("rademacher-splitmix64-v1 seed 0")
    state = checkpoints.load(tmp_path / "checkpoint.pth")
    assert not any("packed" in key for key in state["model"]) and state["epoch"] == 2
    assert sum(len(g["params"]) for g in state["optimizer"]["param_groups"]) == len(
        [
            k
            for k, v in state["model"].items()
            if isinstance(v, torch.Tensor) and "running" not in k and "tracked" not in k
        ]
    )


def test_the_same_seed_gives_the_same_run_and_another_one_does_not(tmp_path, image_folder):
    common = ("--data_path", str(image_folder), "--epochs", "2", "--arch", "vit_tiny", "--drop_path_rate", "0.5")
    for name, more in (("a", ()), ("b", ("--num_workers", "2")), ("c", ("--seed", "1"))):
        train(tmp_path / name, *common, *more)
    assert same_weights(model_of(tmp_path / "a"), model_of(tmp_path / "b"))  # workers do not matter
    assert without_time(log_of(tmp_path / "a")) == without_time(log_of(tmp_path / "b"))
    assert not same_weights(model_of(tmp_path / "a"), model_of(tmp_path / "c"))


def test_resuming_at_an_epoch_is_bit_identical(tmp_path, image_folder):
    common = (
        "--data_path",
        str(image_folder),
        "--epochs",
        "4",
        "--arch",
        "vit_tiny",
        "--drop_path_rate",
        "0.3",
    )
    train(tmp_path / "whole", *common)
    train(tmp_path / "cut", *common, "--max_steps", "6")  # two epochs of three steps
    assert len(log_of(tmp_path / "cut")) == 2
    train(tmp_path / "cut", *common)
    assert same_weights(model_of(tmp_path / "whole"), model_of(tmp_path / "cut"))
    assert without_time(log_of(tmp_path / "whole")) == without_time(log_of(tmp_path / "cut"))
    assert train(tmp_path / "cut", *common) == {}  # nothing left to do


@pytest.mark.parametrize("dictionary", ["rademacher", "hadamard"])
def test_resuming_with_a_prior_buffer_is_bit_identical(tmp_path, image_folder, dictionary):
    """The code usage of the last five steps reaches over the cut."""
    common = ("--data_path", str(image_folder), "--epochs", "4", "--prior_buffer", "5", "--dictionary", dictionary)
    common += ("--embed_dim", "12")
    train(tmp_path / "whole", *common)
    train(tmp_path / "cut", *common, "--max_steps", "6")
    train(tmp_path / "cut", *common)
    assert same_weights(model_of(tmp_path / "whole"), model_of(tmp_path / "cut"))
    assert model_of(tmp_path / "cut")["buffer.pushed"] == 12
    train(tmp_path / "none", *common, "--prior_buffer", "0")
    assert not torch.equal(
        model_of(tmp_path / "none")["head.linear.weight"], model_of(tmp_path / "cut")["head.linear.weight"]
    )


def test_a_checkpoint_from_before_a_flag_existed_goes_on_with_its_default(tmp_path, image_folder):
    common = ("--data_path", str(image_folder), "--epochs", "2")
    train(tmp_path, *common, "--max_steps", "3")
    state = checkpoints.load(tmp_path / "checkpoint.pth")
    del state["args"]["dictionary"], state["args"]["prior_buffer"]
    checkpoints.save(tmp_path / "checkpoint.pth", state)
    with pytest.raises(UserError, match="prior_buffer 0 there, 2 here"):
        train(tmp_path, *common, "--prior_buffer", "2")
    assert train(tmp_path, *common)["epoch"] == 1


def test_loss_forms_give_the_same_log(tmp_path, image_folder):
    """To rounding; and a run may go on with another form."""
    logs = []
    for form in ("auto", "recomputed", "plain"):
        train(
            tmp_path / form, "--data_path", str(image_folder), "--epochs", "2", "--loss_form", form, "--max_steps", "3"
        )
        train(tmp_path / form, "--data_path", str(image_folder), "--epochs", "2", "--loss_form", "auto")
        logs.append([r["train_loss"] for r in log_of(tmp_path / form)])
    assert logs[0] == logs[1] == pytest.approx(logs[2], rel=1e-5) and len(logs[0]) == 2


def test_resuming_with_workers_is_bit_identical(tmp_path, image_folder):
    """A loader's workers take their seed from its own generator, not from the one drop path draws from."""
    common = ("--data_path", str(image_folder), "--epochs", "2", "--arch", "vit_tiny", "--drop_path_rate", "0.5")
    train(tmp_path / "whole", *common, "--num_workers", "1")
    train(tmp_path / "cut", *common, "--max_steps", "3", "--num_workers", "1")
    train(tmp_path / "cut", *common, "--num_workers", "1")
    assert same_weights(model_of(tmp_path / "whole"), model_of(tmp_path / "cut"))


@pytest.mark.parametrize("more", [(), ("--arch", "vit_tiny", "--drop_path_rate", "0.5", "--num_workers", "2")])
def test_resuming_inside_an_epoch_is_bit_identical(tmp_path, image_folder, more):
    """Cut by --max_steps after 1, 2, 4 and 5 of six steps; drop path, workers, the averages of the log line."""
    common = ("--data_path", str(image_folder), "--epochs", "2", "--print_freq", "2", "--optimizer", "adam", *more)
    train(tmp_path / "whole", *common)
    for steps in ("1", "2", "4", "5"):
        assert train(tmp_path / "cut", *common, "--max_steps", steps)["step"] == int(steps)
        assert checkpoints.load(tmp_path / "cut" / "checkpoint.pth")["epoch"] == int(steps) // 3
    train(tmp_path / "cut", *common)
    assert same_state(tmp_path / "whole", tmp_path / "cut")
    assert without_time(log_of(tmp_path / "whole")) == without_time(log_of(tmp_path / "cut"))


def test_an_overflow_in_half_precision_skips_a_step_and_is_counted(tmp_path, image_folder, monkeypatch):
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, **k: scaler(device, init_scale=2.0**60))
    record = train(tmp_path, "--data_path", str(image_folder), "--epochs", "1", "--precision", "fp16")
    assert record["skipped_steps"] == 3 and record["train_loss"] != record["train_loss"]  # no step counts
    line = json.loads((tmp_path / "log.txt").read_text())
    assert line["skipped_steps"] == 3 and line["train_loss"] is None
    assert all(v.isfinite().all() for v in model_of(tmp_path).values() if isinstance(v, torch.Tensor))


def spoil(monkeypatch, steps):
    """The pixels of these steps become NaN on the device."""
    colour, calls = augmentations.colour, []

    def spoiled(pixels, params, view):
        calls.append(1)
        x = colour(pixels, params, view)
        return x * float("nan") if (len(calls) - 1) // 2 in steps else x  # two views a step

    monkeypatch.setattr(augmentations, "colour", spoiled)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_that_is_not_finite_is_as_if_it_had_not_been(tmp_path, image_folder, monkeypatch, precision):
    """Weights, batch norm's statistics, the optimiser's state and the kept code usage."""
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
    """A finite gradient times an absurd learning rate: weights of 1e35 that are good for nothing, and infinite ones."""
    common = ("--data_path", str(image_folder), "--epochs", "9", "--optimizer", "sgd", "--clip_grad", "0")
    with pytest.raises(NonFiniteError, match="21 steps in a row were not finite"):
        train(tmp_path, *common, "--lr", "1e38", "--max_steps", "27")
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
    from conftest import run_in_processes

    out = tmp_path / "out"
    both = run_in_processes(tmp_path, _train_with_a_bad_rank, str(out), str(image_folder), 1)
    assert both[0] == both[1] and both[0]["skipped"] == 0  # the second epoch's
    assert [r["skipped_steps"] for r in log_of(out)] == [1, 0]
    assert all(v.isfinite().all() for v in model_of(out).values() if isinstance(v, torch.Tensor))


# --- interrupted ------------------------------------------------------------------------------------------

LONG = ["main_cplearn.py", *SMALL, "--arch", "timm:test_vit", "--drop_path_rate", "0.3", "--epochs", "24",
        "--print_freq", "2", "--saveckp_freq", "0"]  # fmt: skip


def interrupted(out, name, count, number, command):
    """Start, signal rank `number` after `count` checkpoints by time, and return exit code and stderr."""
    import signal
    import time

    process = subprocess.Popen(
        [sys.executable, *command, "--output_dir", str(out)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (out / "checkpoint_previous.pth").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.02 * count)
    pid = process.pid
    if number is not None:  # a rank below torchrun
        children = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()
        pid = int(sorted(children, key=int)[number])
    os.kill(pid, getattr(signal, name))
    _, said = process.communicate(timeout=120)
    return process.returncode, said


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_saves_and_the_same_command_ends_like_an_undisturbed_run(tmp_path, image_folder, name):
    """In the middle of an epoch, with workers; resumed with another number of them."""
    command = [*LONG, "--data_path", str(image_folder), "--num_workers", "2"]
    code, said = interrupted(tmp_path / "cut", name, ord(name[3]) % 7, None, command)
    assert code == 75 and f"{name}: stopping after this step" in said, said
    assert "the same command goes on from there" in said and len(said.splitlines()) == 2
    step = checkpoints.load(tmp_path / "cut" / "checkpoint.pth")["step"]
    assert 6 <= step < 72 and f"stopped after step {step} of 72, saved after step {step} in" in said
    for out, workers in (("cut", "0"), ("whole", "1")):
        done = run_script(*command, "--num_workers", workers, "--output_dir", str(tmp_path / out))
        assert done.returncode == 0, done.stderr
    assert same_state(tmp_path / "whole", tmp_path / "cut")
    assert without_time(log_of(tmp_path / "whole")) == without_time(log_of(tmp_path / "cut"))


@pytest.mark.slow
@pytest.mark.dist
def test_a_signal_to_one_of_two_processes_stops_both_at_the_same_step(tmp_path, image_folder):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, *LONG, "--data_path", str(image_folder), "--batch_size_per_gpu", "8", "--num_workers", "1"]
    code, said = interrupted(tmp_path / "cut", "SIGUSR1", 3, 1, command)
    assert code == 1 and said.count("exitcode  : 75") == 2, said
    for out in ("cut", "whole"):
        done = run_script(*command, "--output_dir", str(tmp_path / out))
        assert done.returncode == 0, done.stderr
        assert "2 processes on 1 host, gloo, 1 MiB summed over all in" in done.stdout
        assert re.search(r"(?m)^\| 1 +\| +\S+ \| +1 \| +cpu \| +\d+ \|$", done.stdout)
    assert same_state(tmp_path / "whole", tmp_path / "cut")
    assert without_time(log_of(tmp_path / "whole")) == without_time(log_of(tmp_path / "cut"))


@pytest.mark.slow
@pytest.mark.parametrize("signal_name", ["SIGKILL", "SIGSTOP"])
def test_a_worker_that_dies_or_hangs_ends_the_run(tmp_path, image_folder, signal_name):
    """A real worker of a real run, killed or stopped from outside."""
    import signal
    import time

    command = [*LONG, "--data_path", str(image_folder), "--num_workers", "1", "--worker_timeout", "2",
               "--epochs", "4000", "--output_dir", str(tmp_path / "out")]  # fmt: skip
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                               text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    deadline = time.monotonic() + 60
    while not (tmp_path / "out" / "log.txt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    found = subprocess.run(["pgrep", "-P", str(process.pid), "-f", "main_cplearn"], capture_output=True, text=True)
    os.kill(int(found.stdout.split()[-1]), getattr(signal, signal_name))
    _, said = process.communicate(timeout=60)
    assert process.returncode == 5 and len(said.splitlines()) == 1, said
    assert "DataLoader" in said and ("while reading" in said or "between two files" in said) and "--num_workers" in said
    assert checkpoints.load(tmp_path / "out" / "checkpoint.pth")["step"] >= 3 and not (tmp_path / "out/.lock").exists()


def test_a_damaged_checkpoint_costs_one_checkpoint(tmp_path, image_folder, capsys):
    common = ("--data_path", str(image_folder), "--epochs", "4")
    train(tmp_path / "whole", *common)
    train(tmp_path / "cut", *common, "--max_steps", "7")
    path = tmp_path / "cut" / "checkpoint.pth"
    path.write_bytes(path.read_bytes()[:-100])
    train(tmp_path / "cut", *common)
    said = capsys.readouterr()
    assert "WARNING:" in said.err and "checkpoint.pth is truncated" in said.err
    assert "Resuming the one before it" in said.err and "after epoch 2\n" in said.out
    assert same_state(tmp_path / "whole", tmp_path / "cut")
    assert without_time(log_of(tmp_path / "whole")) == without_time(log_of(tmp_path / "cut"))


def test_forced_differences(tmp_path, image_folder, capsys):
    common = ("--data_path", str(image_folder), "--epochs", "2")
    train(tmp_path, *common, "--max_steps", "4")
    with pytest.raises(UserError, match="beta 0.25 there, 0.5 here; use another .* or --resume_force beta$"):
        train(tmp_path, *common, "--lr", "0.1", "--beta", "0.5", "--resume_force", "lr")
    record = train(tmp_path, *common, "--lr", "0.1", "--beta", "0.5", "--resume_force", "lr", "beta")
    assert record["step"] == 6 and "forced although different: beta was 0.25, lr was 0.0005" in capsys.readouterr().out
    with pytest.raises(UserError, match="--resume_force bata: not the name of a flag"):
        train(tmp_path, *common, "--resume_force", "bata")


def test_another_batch_begins_the_epoch_anew(tmp_path, image_folder, capsys):
    common = ("--data_path", str(image_folder), "--epochs", "3")
    train(tmp_path, *common, "--max_steps", "5")  # one epoch of three steps, and two
    train(tmp_path, *common, "--batch_size_per_gpu", "8", "--resume_force", "batch_size_per_gpu", "--max_steps", "18")
    assert "after epoch 1\n" in capsys.readouterr().out
    assert [(r["epoch"], r["step"]) for r in log_of(tmp_path)] == [(0, 3), (1, 12), (2, 18)]


def test_a_folder_in_use_is_refused(tmp_path, image_folder):
    from test_run_control import hold

    process = hold(tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path} is in use by process {process.pid}"):
        train(tmp_path, "--data_path", str(image_folder))
    process.kill()
    process.wait()


def test_a_few_unreadable_images_are_replaced_listed_and_counted(tmp_path, image_folder, capsys):
    import shutil

    shutil.copytree(image_folder, tmp_path / "data")
    for name in ("ant/000.jpg", "bee/003.jpg"):
        (tmp_path / "data/train" / name).write_bytes(b"\xff\xd8 broken")
    common = ("--data_path", str(tmp_path / "data"), "--epochs", "3", "--max_bad_images", "0.1")
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


@pytest.mark.parametrize("url", ["env://", "file://"])
def test_a_rank_that_does_not_come_is_named(tmp_path, url):
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    done = run_script("main_cplearn.py", *SMALL, "--dist_timeout", "0.02", "--output_dir", str(tmp_path / "out"),
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
        done = run_script("main_cplearn.py", *SMALL, "--dist_timeout", "0.1", "--output_dir", str(tmp_path / "out"),
                          RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)  # fmt: skip
    assert done.returncode == 2 and "is taken on 127.0.0.1: choose another one" in done.stderr, done.stderr


def test_log_lines_of_an_epoch_without_checkpoint_are_written_once(tmp_path, image_folder):
    common = ("--data_path", str(image_folder), "--epochs", "3")
    train(tmp_path, *common, "--max_steps", "3")
    append_json_line(tmp_path / "log.txt", {"epoch": 1, "train_loss": float("nan")})  # died before its checkpoint
    train(tmp_path, *common)
    assert [r["epoch"] for r in log_of(tmp_path)] == [0, 1, 2] and log_of(tmp_path)[1]["train_loss"] > 0


def test_local_crops_and_other_precisions(tmp_path, image_folder):
    common = ("--data_path", str(image_folder), "--epochs", "1", "--max_steps", "2", "--image_size", "32",
              "--local_crops_number", "3", "--local_image_size", "16")  # fmt: skip
    for precision in ("fp32", "bf16"):
        record = train(tmp_path / precision, *common, "--precision", precision)
        assert record["step"] == 2 and record["train_loss"] > 0
    assert json.loads((tmp_path / "fp32" / "args.json").read_text())["args"]["global_crops_scale"] == [
        0.4,
        1.0,
    ]


def test_optimizers_and_tensorboard(tmp_path, image_folder):
    for optimizer in ("adam", "sgd", "lars"):
        out = tmp_path / optimizer
        train(out, "--data_path", str(image_folder), "--epochs", "1", "--max_steps", "1", "--optimizer", optimizer,
              "--tensorboard")  # fmt: skip
        assert list((out / "tensorboard").glob("events.*"))


def test_init_from_starts_from_the_backbone(tmp_path, image_folder):
    common = ("--data_path", str(image_folder), "--epochs", "1")
    train(tmp_path / "a", *common)
    train(
        tmp_path / "b",
        *common,
        "--out_dim",
        "64",
        "--init_from",
        str(tmp_path / "a" / "checkpoint.pth"),
        "--lr",
        "1e-12",
        "--min_lr",
        "0",
    )
    a, b = (checkpoints.backbone_weights(checkpoints.load(tmp_path / x / "checkpoint.pth")) for x in "ab")
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-6)


def test_schedules_are_dinos():
    """Written out for ten epochs of ten steps, two of warm-up."""
    import numpy as np

    warmup = np.linspace(0, 0.1, 20)
    rest = np.array([0.001 + 0.5 * (0.1 - 0.001) * (1 + np.cos(np.pi * i / 80)) for i in range(80)])
    got = [lr_at(s, lr=0.1, min_lr=0.001, warmup_steps=20, total_steps=100) for s in range(100)]
    np.testing.assert_allclose(got, np.concatenate([warmup, rest]))


def test_weight_decay_spares_biases_and_norms():
    args = main_cplearn.parse_args([*SMALL, "--arch", "vit_tiny"])
    method = build_method(args)
    optimizer = build_optimizer(method, args, torch.device("cpu"))
    names = {id(p): name for name, p in method.named_parameters()}
    decayed, exempt = ({names[id(p)] for p in g["params"]} for g in optimizer.param_groups)
    assert decayed | exempt == set(names.values()) and not decayed & exempt
    assert {"backbone.norm.weight", "head.linear.bias", "head.norm.weight"} <= exempt
    assert {"head.linear.weight", "backbone.blocks.0.attn.qkv.weight", "backbone.pos_embed"} <= decayed
    set_schedules(optimizer, 1, 10, args)
    assert optimizer.param_groups[0]["weight_decay"] > 0 and optimizer.param_groups[1]["weight_decay"] == 0


def test_gradients_are_clipped_one_parameter_at_a_time():
    module = torch.nn.Linear(4, 3)
    module.weight.grad, module.bias.grad = 5 * torch.ones(3, 4), 0.1 * torch.ones(3)
    norm = clip_gradients(module, 3.0)
    assert norm.item() == pytest.approx((12 * 25 + 0.03) ** 0.5)
    assert module.weight.grad.norm().item() == pytest.approx(3.0) and module.bias.grad[0].item() == pytest.approx(0.1)
    clip_gradients(module, 0)
    assert module.weight.grad.norm().item() == pytest.approx(3.0)


# --- as typed --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_torchrun_line_of_the_readme_starts_as_typed(tmp_path):
    """`torchrun main_cplearn.py --arch vit_small --out_dim 131072`, cut short."""
    done = run_script(
        "-m", "torch.distributed.run", "main_cplearn.py", "--arch", "vit_small", "--out_dim", "131072",
        "--max_steps", "1", "--batch_size_per_gpu", "4", "--output_dir", str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "WARNING: no --data_path" in done.stdout and "--data_path FOLDER" in done.stdout
    assert checkpoints.load(tmp_path / "checkpoint.pth")["args"]["out_dim"] == 131072


@pytest.mark.dist
@pytest.mark.slow
def test_two_processes_train_like_one(tmp_path, image_folder):
    """torchrun with 2 x 8 images follows one process with 16, step by step."""
    common = ["main_cplearn.py", *SMALL, "--data_path", str(image_folder), "--epochs", "2", "--beta", "0.5",
              "--optimizer", "sgd", "--lr", "0.5",  # Adam would blow up rounding noise in gradients that are zero
              "--local_crops_number", "1", "--local_image_size", "16"]  # fmt: skip
    two = run_script("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *common,
                     "--batch_size_per_gpu", "8", "--output_dir", str(tmp_path / "two"))  # fmt: skip
    assert two.returncode == 0, two.stderr[-2000:]
    one = run_script(*common, "--output_dir", str(tmp_path / "one"))
    assert one.returncode == 0, one.stderr[-2000:]
    for a, b in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True):
        for name in (
            "train_loss",
            "train_invariance",
            "train_prior",
            "train_entropy",
            "train_grad_norm",
            "lr",
        ):
            assert a[name] == pytest.approx(b[name], rel=2e-4), name
    a, b = model_of(tmp_path / "one"), model_of(tmp_path / "two")
    for name in a:
        if isinstance(a[name], torch.Tensor):
            torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("script", ["main_cplearn.py", "eval_knn.py", "eval_linear.py", "eval_cluster.py"])
def test_help(script):
    done = run_script(script, "--help")
    assert done.returncode == 0 and "--output_dir" in done.stdout and "python " in done.stdout


# --- wrong input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--data_path", "/nowhere"], "--data_path /nowhere is not a folder"),
        (["--out_dim", "1"], "out_dim 1 is too small"),
        (["--eps", "0.1"], "eps 0.1 must lie between 0 and 1/out_dim"),
        (["--beta", "-1"], "beta -1 must not be negative"),
        (["--knn_freq", "-1"], "--knn_freq -1 must not be negative"),
        (["--prior_buffer", "2", "--prior_group", "local"], "use --prior_group global, or --prior_buffer 0"),
        (["--loss_precision", "bf16"], "loss_precision bf16 needs --loss_form triton"),
        (["--prior_buffer", "-1"], "prior_buffer -1 must not be negative"),
        (["--dictionary", "hadamard", "--embed_dim", "30"], "order 30 is built here: use --embed_dim 28 or 32"),
        (
            ["--arch", "vit_small", "--image_size", "30"],
            "--image_size 30 is not a multiple of --patch_size 16: use 16",
        ),
        (
            ["--arch", "vit_tiny", "--local_crops_number", "1", "--local_image_size", "20"],
            "--local_image_size 20",
        ),
        (["--arch", "vgg"], "--arch vgg is unknown: vit_tiny"),
        (["--method", "moco"], "--method moco is unknown: cplearn"),
        (["--dataset", "mnist"], "--dataset mnist is unknown: folder"),
        (["--augmentation", "autoaugment"], "--augmentation autoaugment is unknown: dino"),
        (["--batch_size_per_gpu", "5000"], "larger than the data set of 1433"),
        (["--batch_size_per_gpu", "1"], "at least 2 images"),
        (["--batch_size_per_gpu", "0"], "--batch_size_per_gpu 0 must be positive"),
        (["--warmup_epochs", "400"], "--warmup_epochs 400 exceeds --epochs 300"),
        (["--global_crops_scale", "0.9", "0.3"], "--global_crops_scale 0.9 0.3"),
        (["--class_list", "none.txt"], "--class_list none.txt only goes with --dataset folder"),
        (["--output_dir", "/proc/none"], "--output_dir /proc/none cannot be written"),
        (["--init_from", "/none.pth"], "/none.pth does not exist"),
        (["--device", "tpu"], "--device tpu is unknown"),
        (["--num_workers", "-1"], "--num_workers -1"),
        (["--dist_url", "http://x"], "--dist_url"),
        (["--lr", "nan"], "--lr nan is not a finite number"),
        (["--drop_path_rate", "1"], "--drop_path_rate 1 must be"),
        (["--arch", "resnet8_w0"], "--arch resnet8_w0 has no width"),
        (["--arch", "resnet8", "--image_size", "2"], "cannot take images of 2 pixels"),
        (["--image_size", "4", "--augmentation", "cifar"], "--image_size 4 is too small"),
        (["--arch", "timm:vit_tiny_patch16_224", "--local_crops_number", "1", "--local_image_size", "20"], "20 pixels"),
        (["--data_path=~/none"], "/none is not a folder"),
    ],
)
def test_wrong_flags_are_one_line_errors_before_training(tmp_path, more, words):
    with pytest.raises(UserError) as error:
        train(tmp_path / "out", *more)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out" / "log.txt").exists()


@pytest.mark.parametrize(
    ("flag", "method", "owner"),
    [
        ("--momentum_teacher", "cplearn", "dino"),
        ("--use_bn_in_head", "swav", "dino"),
        ("--epsilon", "cplearn", "swav"),
        ("--dictionary_seed", "dino", "cplearn or self_classifier"),
        ("--sgld_steps", "gedi", "gedi_gen"),
    ],
)
def test_a_flag_of_another_method_names_its_owner(flag, method, owner):
    words = f"^{flag} belongs to --method {owner}, not to {method}: leave it out$"
    for argv in ([flag, "0.9"], [f"{flag}=0.9"]):
        with pytest.raises(UserError, match=words):
            main_cplearn.parse_args([*argv, "--method", method])


def test_an_unknown_flag_is_one_line():
    with pytest.raises(UserError, match=r"^unrecognized arguments: --outdim 10 \(--help lists the flags\)$"):
        main_cplearn.parse_args(["--outdim", "10"])


def test_an_error_is_one_line_on_stderr_and_code_2():
    done = run_script("main_cplearn.py", "--data_path", "/nowhere")
    assert done.returncode == UserError.exit_code
    assert done.stderr == "main_cplearn.py: error: --data_path /nowhere is not a folder: check the path\n"


@pytest.mark.parametrize("workers", ["0", "2"])
def test_too_many_unreadable_images_end_the_run_in_one_line(tmp_path, image_folder, workers):
    import shutil

    shutil.copytree(image_folder, tmp_path / "data")
    (tmp_path / "data/train/ant/000.jpg").write_bytes(b"\xff\xd8 broken")
    done = run_script("main_cplearn.py", *SMALL, "--data_path", str(tmp_path / "data"), "--epochs", "1",
                      "--num_workers", workers, "--output_dir", str(tmp_path / "out"))  # fmt: skip
    assert done.returncode == UserError.exit_code
    warning, error = done.stderr.splitlines()
    assert warning.startswith("WARNING: replaced by another image: cannot read the image") and "000.jpg" in warning
    assert "1 of 48 images cannot be read, more than --max_bad_images 0.001 allows (0)" in error and "000.jpg" in error


def test_a_repaired_image_is_taken_off_the_list(tmp_path, image_folder):
    import shutil

    shutil.copytree(image_folder, tmp_path / "data")
    image = tmp_path / "data/train/ant/000.jpg"
    whole_image = image.read_bytes()
    image.write_bytes(b"broken")
    common = ("--data_path", str(tmp_path / "data"), "--max_bad_images", "0.1", "--epochs", "2")
    train(tmp_path / "out", *common, "--max_steps", "6")
    assert (tmp_path / "out/bad_images.txt").read_text().count("000.jpg") == 2  # its name and the reason
    image.write_bytes(whole_image)
    train(tmp_path / "out", *common)
    assert (tmp_path / "out/bad_images.txt").read_text() == ""


def test_changed_images_are_refused_on_resume(tmp_path, image_folder):
    import shutil

    shutil.copytree(image_folder, tmp_path / "data")
    common = ("--data_path", str(tmp_path / "data"), "--epochs", "2")
    train(tmp_path / "out", *common, "--max_steps", "3")
    (tmp_path / "data/train/ant/000.jpg").rename(tmp_path / "data/train/ant/999.jpg")
    with pytest.raises(UserError, match="data 48 images .* there, 48 images .* here"):
        train(tmp_path / "out", *common)


def test_a_recipe_that_cannot_be_read(tmp_path):
    (tmp_path / "r.txt").write_text("--data_path /tmp/user's\n")
    with pytest.raises(UserError, match="recipe's line cannot be read .*user's"):
        main_cplearn.parse_args([f"@{tmp_path}/r.txt"])


@pytest.mark.dist
@pytest.mark.slow
def test_an_unreadable_image_is_named_by_whichever_rank_meets_it(tmp_path):
    from conftest import write_images

    write_images(tmp_path / "data", 8)
    names = sorted((tmp_path / "data").iterdir())
    order = [i for batch in BatchSampler(8, 4, 0, rank=1, world_size=2) for _, i in batch]
    names[order[0]].write_bytes(b"no image")  # in the first batch of rank 1
    done = run_script("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "main_cplearn.py", *SMALL,
                      "--batch_size_per_gpu", "4", "--data_path", str(tmp_path / "data"), "--epochs", "1",
                      "--output_dir", str(tmp_path / "out"))  # fmt: skip
    assert done.returncode != 0
    assert "main_cplearn.py: error: 1 of 8 images cannot be read" in done.stderr and str(names[order[0]]) in done.stderr
    assert names[order[0]].name in (tmp_path / "out" / "bad_images.txt").read_text()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--arch", "resnet8_w16"], "arch resnet8_w8 there, resnet8_w16 here"),
        (["--out_dim", "41"], "out_dim 40 there, 41 here"),
        (["--dictionary_seed", "3"], "dictionary_seed 0 there, 3 here"),
        (["--lr", "0.1", "--beta", "0.5"], "beta 0.25 there, 0.5 here, lr 0.0005 there, 0.1 here"),
        (["--epochs", "9"], "epochs 2 there, 9 here"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, image_folder, more, words):
    common = ("--data_path", str(image_folder), "--epochs", "2", "--max_steps", "1")
    train(tmp_path, *common)
    before = (tmp_path / "checkpoint.pth").read_bytes()
    with pytest.raises(UserError, match=words):
        train(tmp_path, *common, *more)
    assert (tmp_path / "checkpoint.pth").read_bytes() == before
    train(tmp_path, *common, "--num_workers", "1", "--print_freq", "3")  # what does not matter may differ


def test_damaged_and_malicious_checkpoints_are_refused_on_resume(tmp_path, image_folder):
    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/executed",)

    common = ("--data_path", str(image_folder), "--epochs", "2")
    for content in (b"", b"PK\x03\x04 not a checkpoint", pickle.dumps({"args": Attack()})):
        (tmp_path / "checkpoint.pth").write_bytes(content)
        with pytest.raises(UserError, match="checkpoint.pth is"):
            train(tmp_path, *common)
        assert (tmp_path / "checkpoint.pth").read_bytes() == content  # nothing is overwritten
    assert not (tmp_path / "executed").exists()


# --- recipes and README ------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", sorted(p.name for p in (ROOT / "recipes").glob("*.txt")))
def test_recipes_parse(recipe, image_folder):
    args = main_cplearn.parse_args([f"@{ROOT}/recipes/{recipe}", "--data_path", str(image_folder)])
    assert args.epochs > 1
