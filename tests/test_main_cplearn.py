"""The training script on real images: results, precisions, processes, the commands as typed, wrong input."""

import gc
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from helpers import (
    ROOT,
    SMALL,
    Script,
    fork_script,
    log_of,
    model_of,
    run_in_processes,
    run_script,
    same_weights,
    train,
    under_torchrun,
    without_time,
)

import main_cplearn
from cplearn import checkpoints
from cplearn.errors import UserError


def test_a_run_leaves_log_arguments_and_checkpoints(tmp_path, image_folder, capsys):
    record = train(tmp_path, "--data_path", str(image_folder), "--epochs", "2", "--saveckp_freq", "1")
    said = capsys.readouterr().out
    assert f"48 images, 3 classes, {image_folder}/train" in said and "loss_floor" in said
    log = log_of(tmp_path)
    assert [r["epoch"] for r in log] == [0, 1] and log[-1] == record and log[-1]["step"] == 6
    assert {"train_loss", "train_invariance", "train_prior", "train_entropy", "train_grad_norm", "lr"} <= set(record)
    assert {x.name for x in tmp_path.glob("*.pth")} == {f"checkpoint{x}.pth" for x in ("", "0001", "0002", "_previous")}
    saved = json.loads((tmp_path / "args.json").read_text())
    assert saved["args"]["out_dim"] == 40 and saved["derived"]["effective_batch"] == 16
    assert saved["derived"]["actual_lr"] == pytest.approx(0.0005 * 16 / 256)
    assert saved["derived"]["dictionary"].startswith("rademacher-splitmix64-v1 seed 0")
    state = checkpoints.load(tmp_path / "checkpoint.pth")
    assert not any("packed" in key for key in state["model"]) and state["epoch"] == 2
    tensors = list(state["model"])
    trained = [k for k in tensors if not re.search("running|tracked|_extra_state", k)]
    assert sum(len(g["params"]) for g in state["optimizer"]["param_groups"]) == len(trained)


def test_the_same_seed_gives_the_same_run_and_another_one_does_not(tmp_path, image_folder):
    common = ("--data_path", str(image_folder), "--epochs", "2", "--arch", "vit_tiny", "--drop_path_rate", "0.5")
    for name, more in (("a", ()), ("b", ("--num_workers", "2")), ("c", ("--seed", "1"))):
        train(tmp_path / name, *common, *more)
    assert same_weights(model_of(tmp_path / "a"), model_of(tmp_path / "b"))  # workers do not matter
    assert without_time(log_of(tmp_path / "a")) == without_time(log_of(tmp_path / "b"))
    assert not same_weights(model_of(tmp_path / "a"), model_of(tmp_path / "c"))


def test_loss_forms_give_the_same_log(tmp_path, image_folder):
    """To rounding; and a run may go on with another form."""
    logs, common = [], ("--data_path", str(image_folder), "--epochs", "2", "--loss_form")
    for form in ("auto", "recomputed", "plain"):
        train(tmp_path / form, *common, form, "--max_steps", "3")
        train(tmp_path / form, *common, "auto")
        logs.append([r["train_loss"] for r in log_of(tmp_path / form)])
    assert logs[0] == logs[1] == pytest.approx(logs[2], rel=1e-5) and len(logs[0]) == 2


def test_local_crops_and_other_precisions(tmp_path, image_folder):
    common = ("--data_path", str(image_folder), "--epochs", "1", "--max_steps", "2", "--image_size", "32",
              "--local_crops_number", "3", "--local_image_size", "16")  # fmt: skip
    for precision in ("fp32", "bf16"):
        record = train(tmp_path / precision, *common, "--precision", precision)
        assert record["step"] == 2 and record["train_loss"] > 0
    args = json.loads((tmp_path / "fp32" / "args.json").read_text())["args"]
    assert args["global_crops_scale"] == [0.4, 1.0]


def test_optimizers_and_tensorboard(tmp_path, image_folder):
    for optimizer in ("adam", "sgd", "lars"):
        out = tmp_path / optimizer
        train(out, "--data_path", str(image_folder), "--epochs", "1", "--max_steps", "1", "--optimizer", optimizer,
              "--tensorboard")  # fmt: skip
        assert list((out / "tensorboard").glob("events.*"))


def test_init_from_starts_from_the_backbone(tmp_path, image_folder):
    common = ("--data_path", str(image_folder), "--epochs", "1")
    train(tmp_path / "a", *common)
    weights = ("--init_from", str(tmp_path / "a" / "checkpoint.pth"))
    train(tmp_path / "b", *common, *weights, "--out_dim", "64", "--lr", "1e-12", "--min_lr", "0")
    a, b = (checkpoints.backbone_weights(checkpoints.load(tmp_path / x / "checkpoint.pth")) for x in "ab")
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-6)


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


def _train_without_garbage_collection(rank, data, out):
    gc.disable()  # what is in a reference cycle then stays, as it may in any run that is short enough
    main_cplearn.main(
        [*SMALL, "--batch_size_per_gpu", "8", "--max_steps", "2", "--data_path", data, "--output_dir", out]
    )
    return [type(x).__name__ for x in gc.get_objects() if isinstance(x, torch.nn.parallel.DistributedDataParallel)]


@pytest.mark.dist
def test_ddp_is_gone_before_its_process_group(tmp_path, image_folder):
    """Left to the end of the interpreter, it aborted every other run of two processes after their last line."""
    out = str(tmp_path / "out")
    assert run_in_processes(tmp_path, _train_without_garbage_collection, str(image_folder), out) == [[], []]


@pytest.mark.dist
def test_two_processes_train_like_one(tmp_path, image_folder):
    """torchrun with 2 x 8 images follows one process with 16, step by step."""
    flags = ["--data_path", str(image_folder), "--epochs", "2", "--beta", "0.5", "--optimizer", "sgd", "--lr", "0.1",
             "--local_crops_number", "1", "--local_image_size", "16"]  # fmt: skip
    # Adam would blow up rounding noise in gradients that are zero.
    under_torchrun(tmp_path / "two", *flags, "--batch_size_per_gpu", "8")
    one = fork_script(tmp_path / "said", "main_cplearn.py", *SMALL, *flags, "--output_dir", str(tmp_path / "one"))
    assert one.returncode == 0, one.stderr[-2000:]
    terms = [f"train_{name}" for name in ("loss", "invariance", "prior", "entropy", "grad_norm")]
    for a, b in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True):
        for name in (*terms, "lr"):
            assert a[name] == pytest.approx(b[name], rel=2e-4), name
    a, b = model_of(tmp_path / "one"), model_of(tmp_path / "two")
    for name in a:
        if isinstance(a[name], torch.Tensor):
            torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--data_path", "/nowhere"], "--data_path /nowhere"),
        (["--out_dim", "1"], "out_dim 1 is too small"),
        (["--eps", "0.1"], "eps 0.1 must lie between 0 and 1/out_dim"),
        (["--prior_buffer", "2", "--prior_group", "local"], "use --prior_group global, or --prior_buffer 0"),
        (["--loss_precision", "bf16"], "loss_precision bf16 needs --loss_form triton"),
        (["--dictionary", "hadamard", "--embed_dim", "30"], "order 30 is built here: use --embed_dim 28 or 32"),
        (["--arch", "vit_tiny", "--local_crops_number", "1", "--local_image_size", "20"], "--local_image_size 20"),
        (["--arch", "vgg"], "--arch vgg is unknown: vit_tiny"),
        (["--dataset", "mnist"], "--dataset mnist is unknown: folder"),
        (["--augmentation", "autoaugment"], "--augmentation autoaugment is unknown: dino"),
        (["--batch_size_per_gpu", "5000"], "larger than the data set of 1433"),
        (["--batch_size_per_gpu", "1"], "at least 2 images"),
        (["--batch_size_per_gpu", "0"], "--batch_size_per_gpu 0 must be positive"),
        (["--warmup_epochs", "400"], "--warmup_epochs 400"),
        (["--global_crops_scale", "0.9", "0.3"], "--global_crops_scale 0.9 0.3"),
        (["--augmentation", "svhn", "--global_crops_scale", "0.2", "1"], "--global_crops_scale 0.2 1"),
        (["--class_list", "none.txt"], "--class_list none.txt only goes with --dataset folder"),
        (["--output_dir", "/proc/none"], "--output_dir /proc/none cannot be written"),
        (["--init_from", "/none.pth"], "/none.pth"),
        (["--device", "tpu"], "--device tpu is unknown"),
        (["--dist_url", "http://x"], "--dist_url"),
        (["--arch", "resnet8_w0"], "--arch resnet8_w0"),
        (["--arch", "resnet8", "--image_size", "2"], "cannot take images of 2 pixels"),
        (["--image_size", "4", "--augmentation", "cifar"], "--image_size 4 is too small"),
        (["--arch", "timm:vit_tiny_patch16_224", "--local_crops_number", "1", "--local_image_size", "20"], "20 pixels"),
        (["--data_path=~/none"], "/none is not a folder"),
        (["--data_path", ""], "--data_path '' is empty"),
        (["--init_from", ""], "--init_from '' is empty"),
        (["--cache_dir", "x" * 300], "--cache_dir xxx"),
        (["--dataset", "digits", "--data_path", "."], "is not read with --dataset digits"),
        (["--precision", "fp16", "--use_fp16", "false"], "--use_fp16 false means --precision fp32, not fp16"),
        (["--worker_timeout", "1e30"], "--worker_timeout 1e+30 must be at most 1e7"),
        (["--arch", "resnet500"], "did you mean timm:resnet50"),
        (["--norm_last_layer=0.9"], "--norm_last_layer"),  # DINO's, without meaning here
        (["--best_by", "knn"], "--best_by knn needs --knn_freq"),
        (["--freeze_backbone_epochs", "2"], "--freeze_backbone_epochs 2 would freeze random weights"),
        (["--freeze_backbone_epochs", "5", "--epochs", "4", "--init_from", "x.pth"], "5 exceeds --epochs 4"),
        (["--accum", "3"], "--accum 3"),
        (["--lr", "1e-9"], "--lr 1e-09 is 6.25e-11 at a batch of 16, below --min_lr 1e-06: lower --min_lr, or take"),
        (["--grad_checkpointing"], "--arch resnet8_w8"),  # it has no blocks
        (["--wandb", "--wandb_project", "a/b"], "--wandb_project 'a/b'"),
        (["--image_size", "20000"], "--image_size 20000"),  # absurd sizes, before anything is made
        (["--local_crops_number", "1000000000"], "--local_crops_number 1000000000"),
        (["--num_workers", "1000000000"], "--num_workers 1000000000"),
        (["--arch", "resnet8_w999999999"], "--arch resnet8_w999999999"),
    ],
)
def test_wrong_flags_are_one_line_errors_before_training(tmp_path, more, words):
    with pytest.raises(UserError) as error:
        train(tmp_path / "out", *more)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out" / "log.txt").exists()


def test_an_error_is_one_line_on_stderr_and_code_2():
    done = run_script("main_cplearn.py", "--data_path", "/nowhere")
    assert done.returncode == UserError.exit_code
    assert done.stderr.startswith("main_cplearn.py: error: --data_path /nowhere") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("recipe", sorted(p.name for p in (ROOT / "recipes").glob("*.txt")))
def test_recipes_parse(recipe, image_folder):
    data = [] if recipe == "digits.txt" else ["--data_path", str(image_folder)]
    args = main_cplearn.parse_args([f"@{ROOT}/recipes/{recipe}", *data])
    assert args.epochs > 1


def test_the_largest_numbers_that_are_let_through_train(tmp_path):
    large = str(2**63 - 1)
    record = train(tmp_path, "--max_steps", "2", "--epochs", large, "--seed", large, "--dictionary_seed", large,
                   "--lr", "1e30", "--print_freq", large, "--saveckp_freq", large)  # fmt: skip
    assert record["step"] == 2


def test_the_flag_of_torch_distributed_launch_changes_nothing(tmp_path):
    train(tmp_path, "--max_steps", "1", "--local_rank", "0", "--local-rank=0")
    assert "local_rank" not in json.loads((tmp_path / "args.json").read_text())["args"]


# --- output that nobody reads ------------------------------------------------------------------------------


def read_a_line_and_leave(folder, *command):
    """Run a script as `script | head -1` does. Returns the line, and how it ended."""
    folder.mkdir()
    pipe = folder / "stdout.txt"
    os.mkfifo(pipe)
    script = Script(folder, *command)
    with open(pipe) as reader:
        line = reader.readline()
    pipe.unlink()
    pipe.touch()
    return line, script.wait()


def test_a_run_goes_on_when_its_reader_leaves(tmp_path):
    common = ["main_cplearn.py", *SMALL, "--max_steps", "12"]
    line, done = read_a_line_and_leave(tmp_path / "said", *common, "--output_dir", str(tmp_path / "out"))
    assert line and (done.returncode, done.stderr) == (0, "")
    assert [r["step"] for r in log_of(tmp_path / "out")] == [12] and model_of(tmp_path / "out")


def test_a_run_goes_on_when_its_output_cannot_be_written(tmp_path):
    (tmp_path / "said").mkdir()
    (tmp_path / "said" / "stdout.txt").symlink_to("/dev/full")
    command = ["main_cplearn.py", *SMALL, "--max_steps", "2", "--output_dir", str(tmp_path / "out")]
    run = Script(tmp_path / "said", *command)
    run.process.join(300)
    assert (run.poll(), (tmp_path / "said" / "stderr.txt").read_text()) == (0, "")
    assert len(log_of(tmp_path / "out")) == 1


@pytest.mark.parametrize("script", ["main_cplearn", "eval_knn", "eval_linear", "eval_cluster", "reproduce_table3"])
def test_help_to_a_reader_who_leaves(tmp_path, script):
    line, done = read_a_line_and_leave(tmp_path / "said", f"{script}.py", "--help")
    assert line.startswith("usage: ") and (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_a_run_whose_output_is_closed_from_the_start(tmp_path):
    command = [sys.executable, "main_cplearn.py", *SMALL, "--max_steps", "2", "--output_dir", str(tmp_path)]
    for closed in (">&-", "<&- >&- 2>&-"):
        done = subprocess.run(["bash", "-c", f'exec "$@" {closed}', "-", *command], cwd=ROOT, stderr=subprocess.PIPE,
                              text=True, timeout=300)  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
    assert len(log_of(tmp_path)) == 1 and model_of(tmp_path)
