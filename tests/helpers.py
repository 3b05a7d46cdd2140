"""What the tests share: short runs with their logs and states, small images, real processes, small methods.

Nothing heavy is imported here: a spawned process imports this module to find the function it has to run.
"""

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing as mp
from PIL import Image
from torch import nn

ROOT = Path(__file__).resolve().parent.parent

# --- runs --------------------------------------------------------------------------------------------------

SMALL = ["--arch", "resnet8_w8", "--image_size", "32", "--out_dim", "40", "--batch_size_per_gpu", "16",
         "--warmup_epochs", "0", "--num_workers", "0", "--device", "cpu"]  # fmt: skip
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def train(out, *more):
    """Run main() in this process, for at most 12 steps."""
    import main_cplearn

    return main_cplearn.main([*SMALL, "--max_steps", "12", "--output_dir", str(out), *more])


def run_script(*command, **env):
    """Run `python command` to its end, as typed: a new interpreter, which takes seconds to start."""
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **env},
    )  # fmt: skip


def under_torchrun(out, *flags, processes=2):
    """Run a small training to its end in several processes; return its folder."""
    done = run_script("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
                      "main_cplearn.py", *SMALL, *flags, "--output_dir", str(out))  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out


def wait_for(condition, what: str = "it", seconds: float = 240, *, alive=lambda: True, pause: float = 0.02):
    """Wait until a condition holds, while a process lives; return its value."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert alive() and time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(pause)
    return value


def eval_flags(run, tmp_path, *more):
    """Flags of an evaluation of the run in the folder `run`."""
    return ["--pretrained_weights", str(run / "checkpoint.pth"), "--output_dir", str(tmp_path), "--num_workers", "0",
            "--device", "cpu", *more]  # fmt: skip


def last_result(folder):
    return json.loads((folder / "results.jsonl").read_text().splitlines()[-1])


def result(script: str, metrics: dict, *, random=False, sha="a") -> dict:
    """Return a line of results.jsonl."""
    source = {"random_init": random, "weights_sha256": sha, "data": "digits", "data_hash": "364 images"}
    return {"script": script, "metrics": metrics, **source}


def log_of(out):
    return [json.loads(line) for line in (out / "log.txt").read_text().splitlines()]


def without_time(records):
    """Log records without what differs from run to run."""
    measured = ("images_per_second", "data_wait", "seconds", "monitor_seconds", "first_step_seconds")
    return [{k: v for k, v in r.items() if k not in measured} for r in records]


def model_of(out):
    from cplearn import checkpoints

    return checkpoints.load(out / "checkpoint.pth")["model"]


def same_weights(a, b):
    tensors = [k for k, v in a.items() if isinstance(v, torch.Tensor)]
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in tensors)


# What two runs to the same weights may differ in.
DIFFERS = ("/args", "/commit", "/identity/threads", "/progress/seconds", "/progress/waiting", "/log_bytes")


def same_state(a, b):
    """Whether two folders hold the same weights, optimizer and averages, bit by bit; times and paths apart."""
    from cplearn import checkpoints

    def tensors(x, path=""):
        if isinstance(x, torch.Tensor):
            yield path, x
        elif isinstance(x, dict):
            for k, v in x.items():
                yield from tensors(v, f"{path}/{k}")
        elif isinstance(x, list):
            for k, v in enumerate(x):
                yield from tensors(v, f"{path}/{k}")
        elif not path.startswith(DIFFERS):
            yield path, x

    one, two = (dict(tensors(checkpoints.load(folder / "checkpoint.pth"))) for folder in (a, b))
    return one.keys() == two.keys() and all(
        torch.equal(x, two[k]) if isinstance(x, torch.Tensor) else x == two[k] for k, x in one.items()
    )


def spoil(monkeypatch, steps):
    """Turn the pixels of these steps into NaN on the device."""
    from cplearn.data import augmentations

    color, calls = augmentations.color, []

    def spoiled(*args):
        x = color(*args)
        if not torch.is_grad_enabled():  # the probe's
            return x
        calls.append(1)
        return x * float("nan") if len(calls) - 1 in steps else x  # once per step, for both views

    monkeypatch.setattr(augmentations, "color", spoiled)


# A run that is long enough to be interrupted.
LONG = ["main_cplearn.py", *SMALL, "--arch", "timm:test_vit", "--drop_path_rate", "0.3", "--epochs", "24",
        "--print_freq", "2", "--saveckp_freq", "0"]  # fmt: skip


def children_of(pid: int) -> list[int]:
    """Return the processes that `pid` has started, oldest first, without Python's own helper."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            command = stat.with_name("cmdline").read_text()
        except OSError:  # it has just ended
            continue
        if int(fields[1]) == pid and "resource_tracker" not in command:
            found.append((int(fields[19]), int(stat.parent.name)))
    return [number for _, number in sorted(found)]


def interrupt(process, out, name, count, rank=None):
    """Send a signal to a run, or to this rank of one below torchrun, some time after two checkpoints."""
    wait_for((out / "checkpoint_previous.pth").exists, alive=lambda: process.poll() is None)
    time.sleep(0.02 * count)
    pid = process.pid if rank is None else children_of(process.pid)[rank]
    os.kill(pid, getattr(signal, name))


# --- images --------------------------------------------------------------------------------------------------


def write_images(folder: Path, count: int, size: tuple[int, int] = (40, 36), seed: int = 0) -> None:
    """Write smooth random images, so that JPEG keeps them and crops differ."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).save(folder / f"{i:03}.jpg", quality=95)


def write_splits(root: Path, **counts: int) -> Path:
    """Write three classes of so many images each into every split."""
    for split, count in counts.items():
        for k, name in enumerate(("ant", "bee", "cat")):
            write_images(root / split / name, count, seed=100 * k + len(split))
    return root


def copy_with_broken(images: Path, copy: Path, *names: str) -> str:
    """Copy a folder of images, some of which cannot be read then; return the copy's path."""
    shutil.copytree(images, copy)
    for name in names:
        (copy / "train" / name).write_bytes(b"\xff\xd8 broken")
    return str(copy)


def views_of(size, local_size=None, n_local=0, name="dino", global_scale=(0.4, 1), local_scale=(0.05, 0.4)):
    """Build the views of one augmentation; local crops have half the size if nothing else is said."""
    from cplearn.data import augmentations

    scales = {"global_scale": tuple(global_scale), "local_scale": tuple(local_scale)}
    return augmentations.build_views(name, size=size, local_size=local_size or size // 2, n_local=n_local, **scales)


# --- processes -----------------------------------------------------------------------------------------------

# Processes are forked from a server that has imported everything and used nothing, which takes milliseconds; a new
# interpreter takes seconds.
SERVER = mp.get_context("forkserver")
SERVER.set_forkserver_preload(["torch", "main_cplearn", "eval_knn", "eval_linear", "eval_cluster"])


def _begin(environment: dict) -> None:
    """Make a process from the server like one that has just been started as typed."""
    os.environ.clear()
    os.environ.update(environment)
    mp.set_start_method(environment["START_METHOD"], force=True)  # of loaders' workers; here it is the server's own
    torch.set_num_threads(1)


def _environment(**more: str) -> dict[str, str]:
    return {**os.environ, "START_METHOD": mp.get_start_method(), **more}


def _entry(rank: int, world: int, init_file: str, environment: dict, function, args, results: str) -> None:
    from cplearn.distributed import launch

    _begin(environment)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
    launch.init(f"file://{init_file}", "cpu")
    torch.save(function(rank, *args), f"{results}.{rank}")
    if world > 1:
        torch.distributed.destroy_process_group()


def run_in_processes(tmp_path: Path, function, *args, world: int = 2) -> list:
    """Run function(rank, *args) in `world` gloo processes and return its values in rank order."""
    results = str(tmp_path / f"results_{function.__name__}")
    init_file = str(tmp_path / f"init_{function.__name__}")
    common = (world, init_file, _environment(), function, args, results)
    mp.start_processes(_entry, common, nprocs=world, start_method="forkserver")
    return [torch.load(f"{results}.{rank}", weights_only=True) for rank in range(world)]


class Script:
    """A script of the checkout in a process of its own, its output in files. Like subprocess.Popen in what it has."""

    def __init__(self, folder: Path, *command, **env):
        self.args, self.files = [str(x) for x in command], [folder / f"std{name}.txt" for name in ("out", "err")]
        folder.mkdir(parents=True, exist_ok=True)
        environment = _environment(CUDA_VISIBLE_DEVICES="", **env)
        self.process = SERVER.Process(target=_script, args=(self.args, environment, *map(str, self.files)))
        self.process.start()
        self.pid = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float = 300) -> subprocess.CompletedProcess:
        """Wait for its end, and return its exit code and what it wrote."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(f"{self.args}: {[path.read_text()[-1000:] for path in self.files]}")
        return subprocess.CompletedProcess(self.args, self.process.exitcode, *(path.read_text() for path in self.files))


def fork_script(folder: Path, *command, **env) -> subprocess.CompletedProcess:
    """Run a script to its end in a process of its own, quickly; its output goes to files in `folder`."""
    return Script(folder, *command, **env).wait()


def _script(command: list[str], environment: dict, out: str, err: str) -> None:
    _begin(environment)
    os.chdir(ROOT)
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
    if command[0] == "-m":
        sys.argv = command[1:]
        sys.modules.pop(command[1], None)  # imported already: runpy would warn
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        runpy.run_path(str(ROOT / command[0]), run_name="__main__")


# --- methods -------------------------------------------------------------------------------------------------

GEN = ["--out_dim", "6"]  # for gedi_gen


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def arguments(method, *more):
    import main_cplearn

    small = ["--image_size", "16", "--sgld_buffer", "40", "--sgld_steps", "2"] if method == "gedi_gen" else []
    return main_cplearn.parse_args(["--method", method, "--arch", "resnet8_w16", "--out_dim", "30", *small, *more])


def make(method, *more):
    """Build a small method in float64."""
    from cplearn.methods import build_method

    torch.manual_seed(0)
    return build_method(arguments(method, *more)).double()


def logits_of(views=2, n=6, c=11, seed=0):
    return [2 * randn(n, c, seed=100 * seed + v) for v in range(views)]


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, tensors, retain_graph=True)


def all_close(got, expected, tolerance=1e-10):
    return all(torch.allclose(a, b, rtol=tolerance, atol=tolerance) for a, b in zip(got, expected, strict=True))


def has_gradient(method, weight, *, step: int) -> bool:
    """Whether this step would change the weight; 10 steps per epoch."""
    method.zero_grad()
    method.before_step(step, 10, 20)
    method([randn(6, 3, 16, 16, seed=v) for v in range(2)])[0].backward()
    method.after_backward()
    return weight.grad is not None


class FakeBackbone(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.num_features = width
