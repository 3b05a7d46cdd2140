"""Fixtures: small image folders, and functions that run in two real processes."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from PIL import Image

from cplearn.distributed import launch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run on the CPU; read when Triton is first imported

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"  # for spawned processes


# What Slurm installs. A test that is not marked `slurm` must pass on a machine that has none of it.
SLURM = ("sacct", "sacctmgr", "salloc", "sattach", "sbatch", "sbcast", "scancel", "scontrol", "sdiag", "sinfo", "sprio",
         "squeue", "sreport", "srun", "sshare", "sstat", "strigger")  # fmt: skip


def path_without_slurm(spare: Path) -> str:
    """PATH in which each folder that holds Slurm's programs is replaced by links, made in `spare`, to its others."""
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


def write_images(folder: Path, count: int, size: tuple[int, int] = (40, 36), seed: int = 0) -> None:
    """Smooth random images, so that JPEG keeps them and crops differ."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).save(folder / f"{i:03}.jpg", quality=95)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """root/train and root/val with three classes, 16 and 4 images each."""
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 16), ("val", 4)):
        for k, name in enumerate(("ant", "bee", "cat")):
            write_images(root / split / name, count, seed=100 * k + len(split))
    return root


def _entry(rank: int, world: int, init_file: str, function, args, results: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    pass  # import moved up

    launch.init(f"file://{init_file}", "cpu")
    torch.save(function(rank, *args), f"{results}.{rank}")
    torch.distributed.destroy_process_group()


def run_in_processes(tmp_path: Path, function, *args, world: int = 2) -> list:
    """function(rank, *args) in `world` gloo processes; its return values, in rank order."""
    results = str(tmp_path / f"results_{function.__name__}")
    init_file = str(tmp_path / f"init_{function.__name__}")
    mp.spawn(_entry, (world, init_file, function, args, results), nprocs=world)
    return [torch.load(f"{results}.{rank}", weights_only=True) for rank in range(world)]
