"""Folders with and without classes, class lists, odd images, small data sets."""

import shutil

import numpy as np
import pytest
from helpers import ROOT, write_images
from PIL import Image

from cplearn.data import datasets
from cplearn.data.datasets import Digits, Folder, build_dataset, read_class_list
from cplearn.errors import UserError


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


def test_gray_and_transparent_images_become_rgb(tmp_path):
    Image.new("L", (8, 8), 90).save(tmp_path / "a.png")
    Image.new("RGBA", (8, 8), (1, 2, 3, 4)).save(tmp_path / "b.png")
    assert [Folder(tmp_path)[i][0].mode for i in range(2)] == ["RGB", "RGB"]


def test_deep_images_keep_their_gray_levels(tmp_path):
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


def test_a_decompression_bomb_is_refused_from_its_header(tmp_path):
    import time

    Image.new("1", (20000, 20000)).save(tmp_path / "bomb.png")  # 50 kB, 1.2 GB in RGB
    Image.new("L", (20000, 20)).save(tmp_path / "wide.png")
    start = time.perf_counter()
    with pytest.raises(UserError, match="bomb.png: .*pixels"):
        Folder(tmp_path)[0]
    assert time.perf_counter() - start < 1
    assert Folder(tmp_path)[1][0].size == (20000, 20)
