"""The loops of docs/own-loop.md and README, run as they are printed, beside files that bear our modules' names."""

import os
import re
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, write_images

import eval_knn

PAGE = (ROOT / "docs" / "own-loop.md").read_text()


def block(page: str, heading: str) -> str:
    """Return the first Python code below a heading."""
    return re.search(r"```python\n(.*?)```", page.partition(f"\n## {heading}")[2], re.DOTALL)[1]


@pytest.fixture
def folder(tmp_path):
    for k, name in enumerate(("ant", "bee")):
        write_images(tmp_path / "pictures" / name, 40, (80, 72), seed=k)
    for name in ("utils", "errors", "datasets", "files", "flags", "text"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('this is not the file that was meant')\n")
    return tmp_path


def run(folder, code, *launcher):
    (folder / "own_loop.py").write_text(code)
    hidden = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.run(
        [sys.executable, *launcher, "own_loop.py"], cwd=folder, capture_output=True, text=True, timeout=300,
        env={**hidden, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.slow
def test_the_plain_loop(folder, tmp_path):
    code = block(PAGE, "Plain PyTorch")
    assert len(code.splitlines()) <= 32 and code.count("cplearn") == 1  # one import
    ended = run(folder, code.replace("range(20)", "range(4)"))
    assert ended.returncode == 0, ended.stderr
    losses = [float(x) for x in re.findall(r"'loss': ([\d.]+)", ended.stdout)]
    assert len(losses) == 4 and losses[-1] < losses[0]
    weights = torch.load(folder / "backbone.pth", weights_only=True)
    assert weights["conv1.weight"].shape == (64, 3, 7, 7)
    for split in ("train", "val"):
        (folder / "split").mkdir(exist_ok=True)
        (folder / "split" / split).symlink_to(folder / "pictures")
    metrics = eval_knn.main(["--pretrained_weights", str(folder / "backbone.pth"), "--arch", "timm:resnet18",
                             "--image_size", "64", "--data_path", str(folder / "split"), "--num_workers", "0",
                             "--device", "cpu", "--output_dir", str(tmp_path / "out"), "--nb_knn", "1"])  # fmt: skip
    assert metrics["knn1_top1"] == 1  # each image is its own neighbor


def test_the_loop_of_the_readme():
    """Its second block, with two views of random images that stay the same: the loss falls."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    torch.manual_seed(0)
    images = torch.randn(8, 3, 32, 32)
    names = {"loader": [(images, images + 0.1 * torch.randn_like(images))]}
    exec(blocks[1], names)
    first = names["loss"].item()
    for _ in range(5):
        exec(blocks[1].rsplit("\n\n", 1)[1], names)
    assert names["loss"].item() < first - 0.01 and {"invariance", "prior"} <= names["terms"].keys()


@pytest.mark.slow
def test_the_loop_with_lightly(folder):
    ended = run(folder, block(PAGE, "With lightly").replace("range(10)", "range(1)"))
    assert ended.returncode == 0, ended.stderr
    assert float(ended.stdout.split()[-1]) > 0


@pytest.mark.slow
@pytest.mark.dist
def test_the_loop_in_two_processes(folder):
    code = block(PAGE, "In several processes (DDP)")
    ended = run(folder, code, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    assert ended.returncode == 0, ended.stderr
    assert 0 < float(ended.stdout.split()[-1]) < 12
