"""Folders with and without classes, class lists, odd images, small data sets."""

import os
import re
import shutil
import socket
import subprocess
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, eval_flags, train, write_images
from PIL import Image

import eval_knn
import eval_linear
from cplearn.data import datasets, scan
from cplearn.data.datasets import Digits, Folder, read_class_list
from cplearn.data.images import ImageError
from cplearn.data.sources import build_dataset
from cplearn.errors import UserError, exit_status
from cplearn.text import from_printable, printable


def test_class_folders(image_folder):
    train, val = (build_dataset("folder", str(image_folder), split) for split in ("train", "val"))
    assert (len(train), len(val)) == (48, 12)
    assert train.classes == val.classes == ["ant", "bee", "cat"]
    image, label = train[17]
    assert image.mode == "RGB" and image.size == (40, 36) and label == 1 and train.names[17] == "bee/001.jpg"
    assert datasets.summary(train) == f"48 images, 3 classes, {image_folder}/train"


def test_a_root_without_splits_serves_pretraining_only(image_folder):
    assert len(build_dataset("folder", str(image_folder / "train" / "ant"), "train")) == 16
    with pytest.raises(UserError, match="no val or test folder"):
        build_dataset("folder", str(image_folder / "train" / "ant"), "val")


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


def test_links_that_lead_in_circles_count_no_image_twice(tmp_path, capsys):
    for name in ("ant", "bee", "cat"):
        write_images(tmp_path / "images" / name, 3)
        (tmp_path / "images" / name / "up").symlink_to("..")  # each class below each other one, without an end
        (tmp_path / "images" / name / "here").symlink_to(".")
    (tmp_path / "images" / "aaa").symlink_to("bee")  # comes first, but is only another name
    (tmp_path / "images" / "itself").symlink_to("itself")
    found = Folder(tmp_path / "images")
    assert found.classes == ["ant", "bee", "cat"] and len(found) == 9
    assert capsys.readouterr().out == f"{found.root}: 7 links to folders were left out, whose images count already\n"


def test_of_two_links_to_one_folder_the_first_by_name_counts(tmp_path, image_folder):
    for name in ("z", "b", "c", "a"):
        (tmp_path / name).symlink_to(image_folder / "train" / ("bee" if name == "z" else "ant"))
    assert Folder(tmp_path).classes == ["a", "z"] and len(Folder(tmp_path)) == 32


def test_a_scan_that_takes_long_says_so(image_folder, monkeypatch, capsys):
    Folder(image_folder / "train")
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(scan, "SAY_AFTER", 0.0)
    Folder(image_folder / "train")
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 4 and said[-1] == f"Still scanning {image_folder}/train, 48 images"


def _as_nobody(path, result) -> None:
    """In a process of its own: root may read everything."""
    os.setgid(65534)
    os.setuid(65534)
    try:
        build_dataset("folder", path, "train")
        line = "found"
    except BaseException as error:
        line = str(exit_status(error))
    os.write(result, line.encode())


def nobody_sees(path) -> str:
    if os.getuid() != 0:
        pytest.skip("only root can become another user")
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            _as_nobody(str(path), write)
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(pid, 0)
    with open(read) as said:
        return said.read()


def test_folders_that_may_not_be_read_are_named():
    """Not below pytest's own folder, which is closed to others."""
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        root.chmod(0o755)
        for part in ("ant", "bee", "cat"):
            write_images(root / "data" / part, 2)
        assert nobody_sees(root / "data") == "found"
        (root / "data" / "bee").chmod(0o000)
        (root / "data" / "cat").chmod(0o444)  # lists its images, opens none
        said = nobody_sees(root / "data")
        assert "(2, " in said and "has 2 folders that cannot be read: bee (Permission denied), cat (Perm" in said
        (root / "data" / "bee").chmod(0o755)
        (root / "data" / "cat").chmod(0o755)
        for mode, path in ((0o000, root / "data"), (0o444, root / "data"), (0o000, root)):
            path.chmod(mode)
            said = nobody_sees(root / "data")
            path.chmod(0o755)
            assert "(2, " in said and "data is not a folder that can be read (Permission denied): check" in said, said


def test_what_only_has_an_images_name_cannot_be_read(tmp_path, image_folder):
    """Opening a pipe must not wait for ever."""
    write_images(tmp_path / "data", 1)
    os.mkfifo(tmp_path / "data" / "pipe.jpg")
    (tmp_path / "data" / "device.png").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(tmp_path / "data" / "s.jpg"))
        (tmp_path / "data" / "link.jpg").symlink_to(image_folder / "train" / "ant" / "000.jpg")
        (tmp_path / "data" / "gone.jpg").symlink_to("nowhere")
        data = Folder(tmp_path / "data")
        assert data.names.tolist() == ["000.jpg", "device.png", "gone.jpg", "link.jpg", "pipe.jpg", "s.jpg"]
        for i in (1, 2, 4, 5):
            with pytest.raises(ImageError) as error:
                data[i]
            assert error.value.path == f"{tmp_path}/data/{data.names[i]}"
    assert data[3][0].size == (40, 36) and data.stamps()[2] == ("gone.jpg", 0, 0)


def test_folders_that_are_too_deep_for_the_system(tmp_path):
    write_images(tmp_path / "data", 2)
    before = os.getcwd()
    os.chdir(tmp_path / "data")
    try:
        for k in range(2050):
            os.mkdir("d")
            os.chdir("d")
            if k == 1200:
                shutil.copy(tmp_path / "data" / "000.jpg", "deep.jpg")
    finally:
        os.chdir(before)
    with pytest.raises(
        UserError, match=r"has 1 folders that cannot be read: d/d/.*\.\.\..*d/d \(File name too long\);"
    ) as e:
        Folder(tmp_path / "data")
    assert len(str(e.value)) < 600
    os.rename(tmp_path / "data" / ("d/" * 1201) / "d", tmp_path / "rest")
    assert len(Folder(tmp_path / "data")) == 3 and Folder(tmp_path / "data")[2][0].size == (
        40,
        36,
    )  # deeper than Python
    subprocess.run(["rm", "-rf", str(tmp_path / "rest"), str(tmp_path / "data")], check=True)  # shutil cannot


ODD = os.fsdecode(b"caf\xe9")  # not UTF-8


@pytest.mark.parametrize("name", ["plain ü", ODD, "a\nb\tc\r\x1b\u2028", "back\\slash \\n", "\U0001f600"])
def test_names_as_text_and_back(name):
    text = printable(name)
    assert len(text.splitlines()) == 1 and "\t" not in text and text.encode() and from_printable(text) == name
    assert printable("plain ü/000.jpg") == "plain ü/000.jpg"


def odd_images(root):
    """train and val whose classes and files are not UTF-8, or have line ends and tabs."""
    for split, count in (("train", 8), ("val", 2)):
        for k, name in enumerate((ODD, "two\nlines", "tab\t")):
            write_images(root / split / name, count, seed=k)
            for file in (root / split / name).iterdir():
                file.rename(file.with_name(f"{ODD}\n{file.name}"))
    return root


def test_names_that_are_no_text_train_and_evaluate(tmp_path, capsys):
    """With outputs that take UTF-8 only, as capsys; one image cannot be read, so its name is written."""
    data = odd_images(tmp_path / "da\nta")
    broken = data / "train" / "tab\t" / f"{ODD}\n003.jpg"
    broken.write_bytes(b"broken")
    more = ("--data_path", str(data), "--max_bad_images", "0.1", "--epochs", "2", "--batch_size_per_gpu", "12")
    out = tmp_path / "out"
    train(out, *more, "--max_steps", "2")
    assert r"caf\udce9\n003.jpg" in capsys.readouterr().err
    listed = [line.split("\t")[0] for line in (out / "bad_images.txt").read_text().splitlines()]
    assert [from_printable(name) for name in listed] == [f"tab\t/{ODD}\n003.jpg"]
    train(out, *more)  # resumes
    with pytest.raises(UserError, match=r"caf.udce9.n003.jpg: "):
        eval_knn.main(eval_flags(out, tmp_path, "--nb_knn", "3"))
    broken.unlink()
    eval_knn.main(eval_flags(out, tmp_path, "--nb_knn", "3"))
    eval_linear.main(eval_flags(out, tmp_path, "--epochs", "1", "--batch_size_per_gpu", "8"))


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
    with pytest.raises(ImageError) as error:
        Folder(tmp_path)[0]
    assert error.value.path == str(tmp_path / "000.jpg") and error.value.reason in str(error.value)
    again = type(error.value)(str(error.value))  # as torch raises it again for a worker
    assert str(again) == str(error.value) == again.reason


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


def test_class_list_files(tmp_path, image_folder):
    (tmp_path / "spaces.txt").write_text("golden retriever\n\n  UP \n")
    assert read_class_list(str(tmp_path / "spaces.txt")) == ["golden retriever", "UP"]
    (tmp_path / "twice.txt").write_text("a\nb\na\n")
    with pytest.raises(UserError, match="names a more than once"):
        read_class_list(str(tmp_path / "twice.txt"))
    (tmp_path / "slashes.txt").write_bytes(b"\xef\xbb\xbfcat/\r\n./ant\r\n")  # as an editor or a shell writes it
    assert read_class_list(str(tmp_path / "slashes.txt")) == ["cat", "ant"]
    data = build_dataset("folder", str(image_folder), "train", str(tmp_path / "slashes.txt"))
    assert set(data.labels.tolist()) == {0, 1}
    (tmp_path / "same.txt").write_text("cat\ncat/\n")
    with pytest.raises(UserError, match="names cat more than once"):
        read_class_list(str(tmp_path / "same.txt"))
    for line in (".", "..", "./", str(image_folder / "train" / "cat"), "cat/more", "../cat", ".hidden"):
        (tmp_path / "wrong.txt").write_text(f"ant\n{line}\n")
        with pytest.raises(UserError, match=rf"lines that are no name of a class folder: {re.escape(line)}; write"):
            read_class_list(str(tmp_path / "wrong.txt"))
    (tmp_path / "long.txt").write_text("x" * 300)
    with pytest.raises(UserError, match="lacks 1 of the 1 listed classes: xxx"):
        build_dataset("folder", str(image_folder), "train", str(tmp_path / "long.txt"))
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
