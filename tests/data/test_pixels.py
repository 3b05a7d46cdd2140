"""The pixel cache changes no pixel, is shared, is found again, and is made anew when its images change."""

import os
import pickle
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import Script, run_in_processes, same_state, write_images
from PIL import Image
from torch.utils.data import DataLoader

import main_cplearn
from cplearn.data import cachefile
from cplearn.data import pixels as pixels_module
from cplearn.data.augmentations import View, build_views
from cplearn.data.datasets import Folder
from cplearn.data.pixels import CachedPixels, CacheOptions, Pixels, content_key, open_pixels
from cplearn.data.sources import build_dataset
from cplearn.errors import Interrupted, LocalError, UserError, WriteError

VIEWS = build_views("dino", size=16, local_size=8, n_local=1, global_scale=(0.4, 1.0), local_scale=(0.1, 0.4))


def photos(folder):
    """Images of many sizes and kinds, one large, one broken."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for i, (size, suffix) in enumerate([((40, 30), "jpg"), ((7, 9), "png"), ((301, 200), "jpg"), ((250, 301), "png")]):
        small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        small.resize(size).save(folder / f"{i}.{suffix}")
    Image.new("L", (20, 20), 77).save(folder / "4.jpg")
    (folder / "5.jpg").write_bytes(b"no image")
    return Folder(folder)


def options(kind, folder="", workers=0, stop=lambda: False):
    return CacheOptions(kind, str(folder), workers, stop)


@pytest.mark.parametrize("kind", ["ram", "disk"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_cache_holds_the_same_pixels(tmp_path, kind, workers):
    dataset = photos(tmp_path / "photos")
    plain = Pixels(dataset, VIEWS)
    cached = open_pixels(dataset, VIEWS, options(kind, tmp_path / "cache", workers))
    assert isinstance(cached, CachedPixels) and len(cached) == 6 and "1 cannot be read" in cached.summary()
    for i in range(5):
        assert torch.equal(cached[i], plain[i])
    with pytest.raises(LocalError):
        cached[5]
    Image.new("RGB", (9, 5), "red").save(dataset.root / "5.jpg")  # repaired while the run goes on
    assert cached[5].shape == (3, 5, 9)


def test_large_images_are_reduced_when_they_are_decoded(tmp_path):
    plain = Pixels(photos(tmp_path / "photos"), VIEWS)
    assert plain[0].shape == (3, 30, 40) and plain[1].shape == (3, 9, 7)
    assert plain[2].shape == (3, 25, 38) and plain[3].shape == (3, 38, 32)  # by 8: a JPEG, and a PNG
    full = torch.from_numpy(np.array(Image.open(tmp_path / "photos/3.png"))).float()
    means = torch.nn.functional.avg_pool2d(full.permute(2, 0, 1)[None, :, :296, :248], 8)[0]
    assert (means - plain[3][:, :37, :31].float()).abs().max() <= 0.51
    side = plain.halved_from()
    assert plain._reduction(side, side) == 2 and plain._reduction(side - 1, side - 1) == 1


def test_a_cache_on_disk_is_found_again_until_something_changes(tmp_path, monkeypatch):
    dataset = photos(tmp_path / "photos")
    first = open_pixels(dataset, VIEWS, options("disk", tmp_path / "cache"))
    made = os.stat(first.path).st_mtime_ns
    again = open_pixels(Folder(dataset.root), VIEWS, options("disk", tmp_path / "cache"))
    assert again.path == first.path and os.stat(again.path).st_mtime_ns == made
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [os.path.basename(first.path)]
    other_views = build_views("dino", size=32, local_size=8, n_local=1, global_scale=(0.4, 1), local_scale=(0.1, 0.4))
    keys = {content_key(first), content_key(Pixels(dataset, other_views))}
    Image.new("RGB", (40, 30), "blue").save(dataset.root / "0.jpg")
    changed = open_pixels(Folder(dataset.root), VIEWS, options("disk", tmp_path / "cache"))
    assert len(keys | {content_key(changed)}) == 3 and changed[0][2].float().mean() > 200
    with open(changed.path, "r+b") as file:  # cut short
        file.truncate(os.path.getsize(changed.path) - 1)
    assert torch.equal(open_pixels(Folder(dataset.root), VIEWS, options("disk", tmp_path / "cache"))[0], changed[0])


def flip(path, offset):
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 255]))


@pytest.mark.parametrize("offset", [pixels_module.HEAD + 3, pixels_module.HEAD + 24 * 6 + 1000, -20, -1])
def test_a_damaged_cache_is_made_again(tmp_path, monkeypatch, capsys, offset):
    """In its index, its pixels (of several blocks), or its checksums."""
    monkeypatch.setattr(pixels_module, "BLOCK", 2)
    dataset = photos(tmp_path / "photos")
    path = open_pixels(dataset, VIEWS, options("disk", tmp_path / "cache")).path
    content = Path(path).read_bytes()
    flip(path, offset % len(content))
    again = open_pixels(dataset, VIEWS, options("disk", tmp_path / "cache"))
    assert again.path == path and Path(path).read_bytes() == content and "is damaged" in capsys.readouterr().out


def test_a_whole_cache_is_used_where_nothing_can_be_written(tmp_path, monkeypatch):
    """No lock is made, which a read-only folder would refuse (but not to root, as whom these tests may run)."""
    dataset = photos(tmp_path / "photos")
    path = open_pixels(dataset, VIEWS, options("disk", tmp_path / "cache")).path
    monkeypatch.setattr(cachefile, "Lock", None)
    assert open_pixels(dataset, VIEWS, options("disk", tmp_path / "cache")).path == path


def test_a_cache_is_not_written_through_a_link(tmp_path):
    dataset = photos(tmp_path / "photos")
    name = Path(open_pixels(dataset, VIEWS, options("disk", tmp_path / "other")).path).name
    (tmp_path / "cache").mkdir()
    victim = tmp_path / "thesis.txt"
    victim.write_text("mine")
    for link in (name, name.replace(".bin", ".partial"), name.replace(".bin", ".lock")):
        (tmp_path / "cache" / link).symlink_to(victim)
    open_pixels(dataset, VIEWS, options("disk", tmp_path / "cache"))
    assert victim.read_text() == "mine" and not (tmp_path / "cache" / name).is_symlink()


def test_what_is_small_is_cached_by_default(tmp_path, monkeypatch):
    write_images(tmp_path / "images", 12)
    assert open_pixels(Folder(tmp_path / "images"), VIEWS, options(None)).kind == "ram"
    assert open_pixels(build_dataset("digits", None, "train"), VIEWS, options(None)).kind == "ram"
    monkeypatch.setattr(pixels_module, "SMALL", 1000)
    assert open_pixels(Folder(tmp_path / "images"), VIEWS, options(None)).kind == "none"


def test_too_little_room_is_said_before_anything_is_decoded(tmp_path, monkeypatch):
    dataset = photos(tmp_path / "photos")
    monkeypatch.setattr(pixels_module, "available_memory", lambda: 1000)
    with pytest.raises(UserError, match="--cache ram"):
        open_pixels(dataset, VIEWS, options("ram"))
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="--cache_dir"):
        open_pixels(dataset, VIEWS, options("disk", tmp_path / "file" / "cache"))
    monkeypatch.setattr(cachefile.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    with pytest.raises(UserError, match="--cache_dir"):
        open_pixels(dataset, VIEWS, options("disk", tmp_path / "cache"))


def test_a_stop_while_images_are_decoded(tmp_path):
    dataset = photos(tmp_path / "photos")
    with pytest.raises(Interrupted):
        open_pixels(dataset, VIEWS, options("disk", tmp_path / "cache", stop=lambda: True))
    assert not list((tmp_path / "cache").iterdir())


def _shared(rank, folder):
    images = open_pixels(Folder(Path(folder)), VIEWS, options("ram"))
    return [images.path, images[2].long().sum()]


def test_two_processes_share_one_cache(tmp_path):
    dataset = photos(tmp_path / "photos")
    expected = Pixels(dataset, VIEWS)[2].long().sum()
    found = run_in_processes(tmp_path, _shared, str(dataset.root))
    assert all(total == expected for _, total in found) and found[0][0] == found[1][0]  # the memory of one of them


FLAGS = ["--arch", "resnet8_w8", "--image_size", "16", "--out_dim", "64", "--batch_size_per_gpu", "8", "--epochs", "2",
         "--augmentation", "dino", "--num_workers", "0", "--device", "cpu"]  # fmt: skip


def test_a_run_with_a_cache_comes_to_the_same_bits(tmp_path):
    write_images(tmp_path / "images", 24)
    for kind in ("none", "ram", "disk"):
        out = tmp_path / kind
        more = ["--data_path", str(tmp_path / "images"), "--cache", kind, "--cache_dir", str(tmp_path / "cache")]
        main_cplearn.main([*FLAGS, *more, "--output_dir", str(out)])
    assert same_state(tmp_path / "none", tmp_path / "ram") and same_state(tmp_path / "none", tmp_path / "disk")


@pytest.mark.slow
def test_a_kill_while_the_cache_is_made(tmp_path):
    """Neither a half-written file nor memory stays in use."""
    write_images(tmp_path / "images", 4000)
    more = ["--data_path", str(tmp_path / "images"), "--cache", "disk", "--cache_dir", str(tmp_path / "cache")]
    command = ["main_cplearn.py", *FLAGS, *more, "--max_steps", "2", "--output_dir", str(tmp_path / "out")]
    process = Script(tmp_path / "said", *command)
    end = time.monotonic() + 60
    while not list((tmp_path / "cache").glob("*.partial")):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(30)
    assert not list((tmp_path / "cache").glob("*.bin"))
    assert Script(tmp_path / "said2", *command).wait(120).returncode == 0
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".bin"]


def test_who_waits_for_a_file_that_is_given_up_makes_it(tmp_path):
    """Three processes want the file; the first fails while the others wait."""
    path, (waiting, made) = tmp_path / "file.bin", (threading.Event(), [])

    def fail(file):
        waiting.wait(30)
        time.sleep(0.2)  # for the others to stand in line
        raise Interrupted("stopped")

    def fill(file):
        made.append(1)
        file.write(b"x" * 10_000)

    def wanted(write):
        cachefile.make_once(path, "key", 1, "pixels", write, lambda path: True, "do without")

    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(wanted, fail)
        while not list(tmp_path.glob("*.partial")):
            time.sleep(0.01)
        others = [pool.submit(wanted, fill) for _ in range(2)]
        time.sleep(0.1)
        waiting.set()
        with pytest.raises(Interrupted):
            first.result(30)
        for other in others:
            other.result(30)
    assert made == [1] and path.stat().st_size == 10_000 and os.listdir(tmp_path) == ["file.bin"]


def test_sizes_that_no_image_reaches(tmp_path):
    dataset = photos(tmp_path / "photos")
    assert Pixels(dataset, [View(4000, scale=(0.01, 1.0))]).halved_from() is None
    assert Pixels(dataset, VIEWS).halved_from() < 1000


def test_processes_that_are_not_forked_map_the_same_cache(tmp_path):
    """Python 3.14 starts them by a server, which pickles what they are given: not a copy of all pixels."""
    write_images(tmp_path / "images", 40)
    cached = open_pixels(Folder(tmp_path / "images"), VIEWS, options("ram"))
    assert len(pickle.dumps(cached)) < 20_000 < cached.pixels.numel()
    loader = DataLoader(cached, batch_size=None, num_workers=1, multiprocessing_context="forkserver")
    assert all(torch.equal(a, cached[i]) for i, a in enumerate(loader))


def test_memory_without_a_memfd(tmp_path, monkeypatch):
    """As on macOS: a temporary file."""
    monkeypatch.delattr(os, "memfd_create")
    dataset = photos(tmp_path / "photos")
    cached = open_pixels(dataset, VIEWS, options("ram"))
    assert torch.equal(pickle.loads(pickle.dumps(cached))[2], Pixels(dataset, VIEWS)[2])
    path = cached.path
    del cached
    assert not os.path.exists(path)
