"""Loader processes: room for them, images that hang, processes that die; none is ever left behind."""

import ctypes
import multiprocessing
import os
import resource
import signal
import time

import pytest
import torch
import torchvision.transforms.v2  # noqa: F401  now, as it takes longer than a timeout here and workers need it
from helpers import LONG, Script, children_of, write_images

from cplearn import checkpoints
from cplearn.data.augmentations import build_views
from cplearn.data.datasets import Folder
from cplearn.data.loaders import eval_loader, train_loader
from cplearn.data.pixels import CacheOptions, Pixels, open_pixels
from cplearn.data.workers import default_workers, watched
from cplearn.errors import UserError, WorkerError, exit_status


def small_loader(dataset, workers):
    views = build_views("dino", size=16, local_size=8, n_local=0, global_scale=(0.4, 1.0), local_scale=(0.1, 0.4))
    return train_loader(Pixels(dataset, views), views, batch_size=4, seed=5, num_workers=workers, pin_memory=False)


def evaluation_loader(dataset, workers):
    return eval_loader(dataset, 8, batch_size=2, num_workers=workers, device=torch.device("cpu"))


class Trouble(Folder):
    """Image 5 does something to the process that reads it."""

    def __init__(self, root, act):
        super().__init__(root)
        self.act = act

    def read(self, i, reduction=None):
        if i == 5:
            self.act()
        return super().read(i, reduction)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def end():
    os._exit(3)


def freeze():
    os.kill(os.getpid(), signal.SIGSTOP)


def hang():
    time.sleep(1000)


# --- processes that die or hang -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("act", "words"), [(die, "SIGKILL"), (end, "exit code 3"), (freeze, "6 seconds"), (hang, "6 seconds")]
)
@pytest.mark.parametrize("make", [small_loader, evaluation_loader])
def test_a_worker_that_dies_or_hangs_is_reported_with_its_file(tmp_path, make, act, words):
    write_images(tmp_path, 12)
    loader = make(Trouble(tmp_path, act), 2)
    with pytest.raises(WorkerError) as error, watched(loader, 6.0) as batches:
        list(batches)
    line = str(error.value)
    assert error.value.exit_code == 5 and words in line and "005.jpg" in line and "\n" not in line
    assert not [p for p in multiprocessing.active_children() if p.pid in loader.reading[:, 0].tolist()]


def test_a_worker_that_dies_while_its_batch_is_used(tmp_path):
    """torch raises wherever this process happens to be."""
    write_images(tmp_path, 12)
    loader = small_loader(Folder(tmp_path), 1)
    with pytest.raises(WorkerError, match="SIGKILL"), watched(loader) as batches:
        next(batches)
        os.kill(loader.processes[0].pid, signal.SIGKILL)
        time.sleep(10)


def test_other_errors_are_not_taken_for_a_workers(tmp_path):
    write_images(tmp_path, 12)
    with pytest.raises(RuntimeError, match="shapes"), watched(small_loader(Folder(tmp_path), 1)) as batches:
        next(batches)
        raise RuntimeError("shapes do not match")


def test_a_cache_names_the_image_that_hangs(tmp_path):
    write_images(tmp_path, 6)
    with pytest.raises(WorkerError, match="005.jpg"):
        open_pixels(Trouble(tmp_path, hang), [], CacheOptions("ram", "", 1, timeout=6.0))


@pytest.mark.parametrize("frozen", [False, True])
def test_workers_that_hang_end_at_once_and_others_can_start(tmp_path, frozen):
    write_images(tmp_path, 12)
    for _ in range(2):
        loader = evaluation_loader(Trouble(tmp_path, hang), 2)
        batches = loader.batches(30.0)
        next(batches)
        if frozen:
            os.kill(loader.processes[0].pid, signal.SIGSTOP)
        start = time.monotonic()
        loader.stop()
        assert time.monotonic() - start < 5 and not multiprocessing.active_children()


def test_time_in_which_all_are_stopped_hardly_counts(tmp_path):
    """As by Ctrl-Z: three seconds of four are spent stopped, of two that are allowed."""
    write_images(tmp_path, 6)
    child = os.fork()
    if child == 0:
        try:
            os.setpgid(0, 0)
            with watched(small_loader(Trouble(tmp_path, lambda: time.sleep(1.2)), 1), 2.0) as batches:
                list(batches)
            os._exit(0)
        finally:
            os._exit(1)
    time.sleep(0.7)
    os.killpg(child, signal.SIGSTOP)
    time.sleep(3)
    os.killpg(child, signal.SIGCONT)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("signal_name", ["SIGKILL", "SIGSTOP"])
def test_a_worker_that_dies_or_hangs_ends_the_run(tmp_path, image_folder, signal_name):
    """A real worker of a real run, killed or stopped from outside."""
    command = [*LONG, "--data_path", str(image_folder), "--num_workers", "1", "--worker_timeout", "8",
               "--epochs", "4000", "--output_dir", str(tmp_path / "out")]  # fmt: skip
    process = Script(tmp_path / "said", *command)
    end = time.monotonic() + 60
    while not (tmp_path / "out" / "checkpoint.pth").exists():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    os.kill(children_of(process.pid)[0], getattr(signal, signal_name))
    done = process.wait(60)
    assert done.returncode == 5 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "loader process" in done.stderr and "--num_workers" in done.stderr
    assert checkpoints.load(tmp_path / "out" / "checkpoint.pth")["step"] >= 3 and not (tmp_path / "out/.lock").exists()


# --- what the machine has no room for ----------------------------------------------------------------


def test_more_workers_than_a_machine_can_use_are_refused_with_the_number():
    assert default_workers(0) == 0 and default_workers(None, no_gain=True) == 0
    assert default_workers(3, no_gain=True) == 3 and 1 <= default_workers(None) <= 10
    for number in (1_000_000_000, 10**30, 100 + 4 * os.cpu_count()):
        with pytest.raises(UserError, match=f"--num_workers {number}.* at most"):
            default_workers(number)


def in_a_child(function, *args) -> str:
    """Run a function in a forked process, for what cannot be undone; return its exit code and line, and who is left.

    It forks its own workers, which must be gone: none holds its end of the pipe.
    """
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            signal.alarm(30)
            function(*args)
            line = "done"
        except BaseException as error:
            line = str(exit_status(error))
        os.write(write, f"{line} {len(multiprocessing.active_children())} left".encode())
        os._exit(0)
    os.close(write)
    with open(read) as said:
        text = said.read()  # ends when nobody can write any more
    os.waitpid(pid, 0)
    return text


def few_open_files(limit: int, function, *args) -> None:
    used = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + limit, used + limit))
    function(*args)


def read_all(data, workers) -> None:
    loader = small_loader(Folder(data), workers)
    list(loader)
    loader.stop()


def evaluate_all(data, workers) -> None:
    loader = evaluation_loader(Folder(data), workers)
    list(loader)
    loader.stop()


def cache_all(data, workers) -> None:
    views = build_views("dino", size=16, local_size=8, n_local=0, global_scale=(0.4, 1.0), local_scale=(0.1, 0.4))
    open_pixels(Folder(data), views, CacheOptions("ram", "", workers))


@pytest.mark.parametrize("function", [read_all, evaluate_all, cache_all])
def test_too_few_open_files_are_refused_before_a_worker_starts(tmp_path, function):
    write_images(tmp_path, 8)
    for limit in (24, 64):
        said = in_a_child(few_open_files, limit, function, tmp_path, 4)
        assert "(2, '--num_workers 4 needs 104 open files" in said and said.endswith("0 left"), said
        assert f"(ulimit -n), or --num_workers {1 if limit == 64 else 0}" in said
        assert in_a_child(few_open_files, limit, function, tmp_path, 1 if limit == 64 else 0) == "done 0 left"


def raised_limit() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))


def test_a_soft_limit_is_raised_where_that_is_allowed(tmp_path):
    write_images(tmp_path, 8)
    assert in_a_child(lambda: (raised_limit(), read_all(tmp_path, 4))) == "done 0 left"


def start_without_room(data) -> None:
    """The check has passed, but others take the files meanwhile."""
    loader = small_loader(Folder(data), 4)
    few_open_files(6, next, iter(loader))


def test_workers_that_cannot_all_start_leave_none_behind(tmp_path):
    write_images(tmp_path, 16)
    said = in_a_child(start_without_room, tmp_path)
    assert "(2, " in said and "--num_workers 4: they cannot be started ([Errno 24]" in said, said
    assert said.endswith(" 0 left")


def small_shared_memory(size: str, function, *args) -> None:
    """Mount a small /dev/shm for this process alone."""
    libc, new_mounts, private = ctypes.CDLL(None, use_errno=True), 0x20000, 0x44000
    if (
        libc.unshare(new_mounts)
        or libc.mount(b"none", b"/", None, private, None)
        or libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, f"size={size}".encode())
    ):
        raise RuntimeError("no mounts here")
    function(*args)


@pytest.mark.parametrize("function", [read_all, evaluate_all, cache_all])
def test_a_small_shared_memory_is_refused_before_a_worker_starts(tmp_path, function):
    write_images(tmp_path, 8)
    for size, workers in (("4k", 1), ("600k", 10)):
        said = in_a_child(small_shared_memory, size, function, tmp_path, workers)
        if "no mounts here" in said:
            pytest.skip("cannot mount")
        assert f"(2, '--num_workers {workers} hands over batches in" in said and said.endswith(" 0 left"), said
        assert "/dev/shm are free: enlarge it (docker run --shm-size=8g), --num_workers " in said
        fit = int(said.partition("8g), --num_workers ")[2].split(",")[0])
        assert fit == 0 if size == "4k" else 0 < fit < 10
        assert in_a_child(small_shared_memory, size, function, tmp_path, fit) == "done 0 left"
