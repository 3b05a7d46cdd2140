"""Folders with and without classes, class lists, the order of samples, and views that do not depend on workers."""

import multiprocessing
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from conftest import ROOT, write_images
from PIL import Image

from cplearn.data import datasets
from cplearn.data.augmentations import build_views
from cplearn.data.datasets import Digits, Folder, build_dataset, read_class_list
from cplearn.data.imagenet100 import link_imagenet100, main
from cplearn.data.loaders import BatchSampler, deadline, stop_workers, train_loader, worker_error
from cplearn.errors import UserError, WorkerError


def test_class_folders(image_folder):
    train, val = (build_dataset("folder", str(image_folder), split) for split in ("train", "val"))
    assert (len(train), len(val)) == (48, 12)
    assert train.classes == val.classes == ["ant", "bee", "cat"]
    image, label = train[17]
    assert image.mode == "RGB" and image.size == (40, 36) and label == 1 and train.names[17] == "bee/001.jpg"
    assert datasets.summary(train) == f"48 images, 3 classes, {image_folder}/train"


def test_a_root_without_splits_serves_pretraining_only(image_folder):
    assert len(build_dataset("folder", str(image_folder / "train"), "train")) == 48
    with pytest.raises(UserError, match="no val or test folder"):
        build_dataset("folder", str(image_folder / "train"), "val")


def test_flat_and_nested_folders_have_no_classes(tmp_path):
    write_images(tmp_path / "flat", 3)
    assert Folder(tmp_path / "flat").classes is None and Folder(tmp_path / "flat")[2][1] == -1
    write_images(tmp_path / "mixed", 2)
    write_images(tmp_path / "mixed" / "a" / "b", 3)
    assert len(Folder(tmp_path / "mixed")) == 5 and Folder(tmp_path / "mixed").classes is None
    write_images(tmp_path / "one" / "a", 2)
    assert Folder(tmp_path / "one").classes is None  # a single folder is no class


def test_linked_folders_are_followed(tmp_path, image_folder):
    (tmp_path / "links").mkdir()
    for name in ("ant", "cat"):
        (tmp_path / "links" / name).symlink_to(image_folder / "train" / name)
    assert Folder(tmp_path / "links").classes == ["ant", "cat"] and len(Folder(tmp_path / "links")) == 32


def test_class_list_chooses_and_orders(image_folder, tmp_path):
    (tmp_path / "list.txt").write_text("cat\nant\n")
    data = build_dataset("folder", str(image_folder), "train", str(tmp_path / "list.txt"))
    assert data.classes == ["cat", "ant"] and len(data) == 32
    assert {str(n).split("/")[0]: int(x) for n, x in zip(data.names, data.labels, strict=True)} == {
        "ant": 1,
        "cat": 0,
    }


def test_class_list_with_absent_folders(image_folder, tmp_path):
    (tmp_path / "list.txt").write_text("cat\ndog\nelk\n")
    with pytest.raises(UserError, match="lacks 2 of the 3 listed classes: dog, elk"):
        build_dataset("folder", str(image_folder), "train", str(tmp_path / "list.txt"))
    with pytest.raises(UserError, match="lacks 100 of the 100 listed classes: n01558993"):
        build_dataset("folder", str(image_folder), "train", "imagenet100.txt")


def test_imagenet100_list_is_the_known_one(tmp_path):
    names = read_class_list("imagenet100.txt")
    assert len(set(names)) == 100 and names == sorted(names) and all(n[0] == "n" and len(n) == 9 for n in names)
    shutil.copy(ROOT / "imagenet100.txt", tmp_path / "imagenet100.txt")
    with open(tmp_path / "imagenet100.txt", "a") as f:
        f.write("n00000000\n")
    with pytest.raises(UserError, match="not the ImageNet-100 list"):
        read_class_list(str(tmp_path / "imagenet100.txt"))


@pytest.mark.parametrize(
    ("name", "path", "words"),
    [
        ("folder", "nowhere", "nowhere is not a folder"),
        ("folder", None, "needs --data_path"),
        ("mnist", None, "--dataset mnist is unknown: folder, cifar10"),
        ("cifar10", "empty", "does not hold cifar10"),
        ("svhn", "empty", "does not hold svhn"),
        ("folder", "empty", "holds no images"),
    ],
)
def test_missing_or_empty_data(name, path, words, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=words):
        build_dataset(name, path and str(tmp_path / path), "train")


def test_unreadable_image_is_named(tmp_path):
    write_images(tmp_path, 2)
    (tmp_path / "000.jpg").write_bytes(b"not a picture")
    with pytest.raises(UserError, match="cannot read the image .*000.jpg"):
        Folder(tmp_path)[0]


def test_grey_and_transparent_images_become_rgb(tmp_path):
    Image.new("L", (8, 8), 90).save(tmp_path / "a.png")
    Image.new("RGBA", (8, 8), (1, 2, 3, 4)).save(tmp_path / "b.png")
    assert [Folder(tmp_path)[i][0].mode for i in range(2)] == ["RGB", "RGB"]


def test_deep_images_keep_their_grey_levels(tmp_path):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    Image.fromarray(ramp).save(tmp_path / "b.tif")
    Image.fromarray(ramp.astype(np.int32)).save(tmp_path / "c.tif")
    for i in range(3):
        got = np.asarray(Folder(tmp_path)[i][0])
        np.testing.assert_allclose(got[..., 0], ramp / 257, atol=0.51)
    Image.fromarray((ramp / 65535).astype(np.float32)).save(tmp_path / "d.tif")
    with pytest.raises(UserError, match="floating-point pixels"):
        Folder(tmp_path)[3]


def test_hidden_files_and_folders_are_no_images(tmp_path):
    write_images(tmp_path / "a", 2)
    write_images(tmp_path / "b", 2)
    write_images(tmp_path / ".ipynb_checkpoints", 1)
    (tmp_path / "a" / "._000.jpg").write_bytes(b"x")
    assert len(Folder(tmp_path)) == 4 and Folder(tmp_path).classes == ["a", "b"]


def test_class_list_files(tmp_path):
    (tmp_path / "spaces.txt").write_text("golden retriever\n\n  UP \n")
    assert read_class_list(str(tmp_path / "spaces.txt")) == ["golden retriever", "UP"]
    (tmp_path / "twice.txt").write_text("a\nb\na\n")
    with pytest.raises(UserError, match="names a more than once"):
        read_class_list(str(tmp_path / "twice.txt"))
    (tmp_path / "latin.txt").write_bytes("é\n".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        read_class_list(str(tmp_path / "latin.txt"))


def test_cifar10_as_torchvision_stores_it(tmp_path):
    """A tiny data set in the original binary layout, read through torchvision with its checksum set aside."""
    import pickle

    import torchvision

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.arange(4 * 3072, dtype=np.int64).reshape(4, 3072) % 256
    for name in [
        "data_batch_1",
        "data_batch_2",
        "data_batch_3",
        "data_batch_4",
        "data_batch_5",
        "test_batch",
    ]:
        content = {"data": pixels.astype(np.uint8), "labels": [3, 1, 4, 1]}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"c{i}" for i in range(10)]}))
    kind = torchvision.datasets.CIFAR10
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "_check_integrity", lambda self: True)
        patch.setattr("torchvision.datasets.cifar.check_integrity", lambda *a, **k: True)
        train, val = (build_dataset("cifar10", str(tmp_path), split) for split in ("train", "val"))
    assert (len(train), len(val)) == (20, 4) and train.labels[:4].tolist() == [3, 1, 4, 1]
    assert np.array_equal(np.asarray(train[1][0])[..., 0].flatten(), pixels[1, :1024])


def test_digits_splits_do_not_overlap():
    train, val = Digits("train"), Digits("val")
    assert (len(train), len(val)) == (1433, 364)
    assert not set(train.names) & set(val.names)
    image, label = val[5]
    assert image.size == (32, 32) and image.mode == "RGB" and 0 <= label < 10
    assert np.bincount(val.labels, minlength=10).min() in (35, 36, 37)


# --- order and views ------------------------------------------------------------------------------------


def test_batches_cover_each_epoch_once_in_a_new_order():
    batches = BatchSampler(23, 5, seed=0)
    seen = []
    for epoch in (0, 1):
        batches.epoch = epoch
        found = list(batches)
        assert len(found) == len(batches) == 4 and {e for batch in found for e, _ in batch} == {epoch}
        seen.append([i for batch in found for _, i in batch])
        assert len(set(seen[-1])) == 20 and set(seen[-1]) <= set(range(23))
    assert seen[0] != seen[1]
    batches.epoch = 0
    assert [i for batch in batches for _, i in batch] == seen[0]
    assert [i for batch in BatchSampler(23, 5, seed=1) for _, i in batch] != seen[0]


def test_two_ranks_share_the_batches_of_one():
    whole = list(BatchSampler(50, 8, seed=3))
    parts = [list(BatchSampler(50, 4, seed=3, rank=r, world_size=2)) for r in range(2)]
    assert [a + b for a, b in zip(*parts, strict=True)] == whole


def test_views_do_not_depend_on_the_number_of_workers(image_folder):
    dataset = build_dataset("folder", str(image_folder), "train")
    views = build_views("dino", size=32, local_size=16, n_local=2, global_scale=(0.4, 1.0), local_scale=(0.05, 0.4))

    def epochs(num_workers):
        loader = train_loader(dataset, views, batch_size=8, seed=5, num_workers=num_workers, pin_memory=False)
        found = []
        for epoch in (0, 1):
            loader.batch_sampler.epoch = epoch
            found += [
                [pixels for pixels, _ in crops] + [params["hue"] for _, params in crops] for crops, _, _, _ in loader
            ]
        return found

    one, two = epochs(0), epochs(2)
    assert len(one) == len(two) == 12
    for a, b in zip(one, two, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(one[0][0], one[6][0])  # another epoch, other views
    assert [tuple(x.shape) for x in one[0][:4]] == [(8, 3, 32, 32)] * 2 + [(8, 3, 16, 16)] * 2


def test_batch_larger_than_the_data(image_folder):
    dataset = build_dataset("folder", str(image_folder), "train")
    with pytest.raises(UserError, match="batch of 64 images .* larger than the data set of 48"):
        train_loader(dataset, [], batch_size=64, seed=0, num_workers=0, pin_memory=False)


# --- images that cannot be read, workers that cannot read ------------------------------------------------


def small_loader(dataset, workers):
    views = build_views("dino", size=16, local_size=8, n_local=0, global_scale=(0.4, 1.0), local_scale=(0.1, 0.4))
    return train_loader(dataset, views, batch_size=4, seed=5, num_workers=workers, pin_memory=False)


def test_an_unreadable_image_is_replaced_by_a_drawn_one(tmp_path):
    """The same one with any number of workers, another one in another epoch."""
    write_images(tmp_path, 12)
    names = sorted(p.name for p in tmp_path.iterdir())
    for i in (2, 7):
        (tmp_path / names[i]).write_bytes(b"")
    found = {}
    for workers in (0, 2):
        loader = small_loader(Folder(tmp_path), workers)
        for epoch in range(4):
            loader.batch_sampler.epoch = epoch
            found[workers, epoch] = [(used.tolist(), why) for _, _, used, why in loader]
            order = [i for batch in loader.batch_sampler for _, i in batch]
            used = [j for js, _ in found[workers, epoch] for j in js]
            reasons = [r for _, rs in found[workers, epoch] for r in rs]
            for i, j, why in zip(order, used, reasons, strict=True):
                assert (i == j and why == "") if i not in (2, 7) else (j not in (2, 7) and f"[{i}, " in why)
    assert all(found[0, e] == found[2, e] for e in range(4)) and len({str(found[0, e]) for e in range(4)}) == 4


def test_a_folder_without_a_readable_image(tmp_path):
    for i in range(8):
        (tmp_path / f"{i}.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="20 images in a row cannot be read; the last: cannot read the image"):
        next(iter(small_loader(Folder(tmp_path), 0)))


def test_a_decompression_bomb_is_refused_from_its_header(tmp_path):
    import time

    Image.new("1", (20000, 20000)).save(tmp_path / "bomb.png")  # 50 kB, 1.2 GB in RGB
    Image.new("L", (20000, 20)).save(tmp_path / "wide.png")
    start = time.perf_counter()
    with pytest.raises(UserError, match="bomb.png: .*pixels"):
        Folder(tmp_path)[0]
    assert time.perf_counter() - start < 1
    assert Folder(tmp_path)[1][0].size == (20000, 20)


class Trouble(Folder):
    """Image 5 ends or stops the process that reads it."""

    how = ""

    def __getitem__(self, i):
        if i == 5 and self.how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if i == 5 and self.how == "hangs":
            os.kill(os.getpid(), signal.SIGSTOP)
        return super().__getitem__(i)


@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_a_worker_that_dies_or_hangs_is_reported_with_its_file(tmp_path, how):
    write_images(tmp_path, 12)
    dataset = Trouble(tmp_path)
    dataset.how = how
    loader = small_loader(dataset, 2)
    with pytest.raises(RuntimeError) as error, deadline(3.0):
        list(loader)
    told = worker_error(error.value, loader)
    assert isinstance(told, WorkerError) and told.exit_code == 5 and "\n" not in str(told)
    assert "while reading 005.jpg" in str(told) or (how == "hangs" and "005.jpg" in str(told)), str(told)
    stop_workers(loader)
    pids = loader.dataset.reading[:, 0].tolist()
    assert min(pids) > 0 and not [p for p in multiprocessing.active_children() if p.pid in pids]
    assert worker_error(RuntimeError("shapes do not match"), loader) is None


# --- ImageNet-100 as links -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """One image in each of the 100 classes, and in one more."""
    root = tmp_path_factory.mktemp("imagenet")
    write_images(root / "one", 1, (8, 8))
    for name in [*read_class_list("imagenet100.txt"), "n00000000"]:
        for split in ("train", "val"):
            (root / split / name).mkdir(parents=True)
            os.link(root / "one" / "000.jpg", root / split / name / "000.jpg")
    return root


def test_the_imagenet100_tree_is_links_to_the_listed_classes(imagenet, tmp_path, capsys):
    command = ["--imagenet", str(imagenet), "--out", str(tmp_path / "out"), "--allow_incomplete"]
    main(command)
    said = capsys.readouterr().out
    main(command)  # again: nothing to do
    assert capsys.readouterr().out == said
    made = datasets.build_dataset("folder", str(tmp_path / "out"), "train")
    listed = datasets.build_dataset("folder", str(imagenet), "train", "imagenet100.txt")
    assert len(made) == 100 and list(made.names) == list(listed.names) and made.classes == listed.classes
    assert f"train: 100 classes, {datasets.fingerprint(listed)}" in said
    assert (tmp_path / "out/val" / made.classes[7]).resolve() == imagenet / "val" / made.classes[7]


def test_an_incomplete_imagenet_is_refused_before_a_link_is_made(imagenet, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="has 100 images of the 100 classes, the data set 126,689"):
        link_imagenet100(str(imagenet), str(out))
    with pytest.raises(UserError, match="has no train folder"):
        link_imagenet100(str(tmp_path), str(out), incomplete=True)
    assert not out.exists()
    (out / "train" / "n99999999").mkdir(parents=True)
    with pytest.raises(UserError, match="other things in train: n99999999"):
        link_imagenet100(str(imagenet), str(out), incomplete=True)
