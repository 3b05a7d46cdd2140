"""Fixtures: no Slurm's programs in PATH, small image folders, a trained run."""

import os
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run on the CPU; read when Triton is first imported

torch.set_num_threads(1)  # everything here is small: more threads would only wait for one another

TESTS = Path(__file__).resolve().parent
for folder in (TESTS, TESTS.parent / "benchmarks", TESTS.parent / "experiments", TESTS.parent / "docs", TESTS.parent):
    sys.path.insert(0, str(folder))
# For spawned processes.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(TESTS.parent), os.environ.get("PYTHONPATH", ""))))

from helpers import train, write_splits  # noqa: E402

# What Slurm installs. A test that is not marked `slurm` must pass on a machine that has none of it.
SLURM = ("sacct", "sacctmgr", "salloc", "sattach", "sbatch", "sbcast", "scancel", "scontrol", "sdiag", "sinfo", "sprio",
         "squeue", "sreport", "srun", "sshare", "sstat", "strigger")  # fmt: skip


def path_without_slurm(spare: Path) -> str:
    """Return PATH in which each folder that holds Slurm's programs is replaced by links to its others, in `spare`."""
    folders = []
    for k, folder in enumerate(os.environ.get("PATH", "").split(os.pathsep)):
        if any(os.path.exists(os.path.join(folder, name)) for name in SLURM):
            links = spare / f"path{k}"
            links.mkdir()
            for name in set(os.listdir(folder)) - set(SLURM):
                (links / name).symlink_to(os.path.join(folder, name))
            folder = str(links)
        folders.append(folder)
    return os.pathsep.join(folders)


@pytest.fixture(scope="session", autouse=True)
def paths(tmp_path_factory) -> dict[bool, str]:
    """PATH with Slurm and without it, by whether a test may use it; without it from the start."""
    found = {True: os.environ.get("PATH", ""), False: path_without_slurm(tmp_path_factory.mktemp("bin"))}
    os.environ["PATH"] = found[False]
    return found


@pytest.fixture(autouse=True)
def hide_slurm(request, monkeypatch, paths) -> None:
    monkeypatch.setenv("PATH", paths[request.node.get_closest_marker("slurm") is not None])


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """root/train and root/val with three classes, 16 and 4 images each. To be read only."""
    return write_splits(tmp_path_factory.mktemp("images"), train=16, val=4)


@pytest.fixture(scope="session")
def run(tmp_path_factory, image_folder) -> Path:
    """The folder of a run of two epochs on the image folder. To be read only."""
    out = tmp_path_factory.mktemp("run")
    train(out, "--data_path", str(image_folder), "--epochs", "2")
    return out
