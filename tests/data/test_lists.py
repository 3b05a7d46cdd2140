"""Lists of paths: separators, labels, odd names, and lines that lie."""

import os
import shutil
import time

import numpy as np
import pytest
from helpers import write_images

from cplearn.data import scan
from cplearn.data.datasets import Folder, fingerprint
from cplearn.data.lists import Listed, read_list
from cplearn.data.sources import build_dataset, open_images
from cplearn.errors import UserError


@pytest.fixture
def images(tmp_path):
    """000.jpg .. 005.jpg in a folder."""
    write_images(tmp_path / "images", 6)
    return tmp_path


def listed(folder, text: str | bytes, name: str = "list.txt"):
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder / name


def test_paths_alone(images, monkeypatch):
    path = listed(images, f"images/003.jpg\n\nimages/000.jpg\n{images}/images/001.jpg")
    monkeypatch.chdir("/")  # relative to the list, not to where one is
    data, folder = open_images(str(path)), Folder(images / "images")
    assert list(data.names) == ["images/003.jpg", "images/000.jpg", f"{images}/images/001.jpg"]
    assert data.classes is None and list(data.labels) == [-1] * 3 and data.where == str(path)
    for i, j in enumerate((3, 0, 1)):
        assert np.array_equal(np.asarray(data[i][0]), np.asarray(folder[j][0]))


@pytest.mark.parametrize(
    ("text", "names", "labels"),
    [
        ("a b.jpg\tgolden owl\nc\t.jpg\telk\n", ["a b.jpg", "c\t.jpg"], ["golden owl", "elk"]),
        ("\ufeffa.jpg\t1\r\nb.jpg\t0\r\n", ["a.jpg", "b.jpg"], ["1", "0"]),
        ("a.jpg 1\nb c.JPEG  0\n", ["a.jpg", "b c.JPEG"], ["1", "0"]),  # as lists of ImageNet have it
        ("a.jpg 1\nb.jpg\n", ["a.jpg 1", "b.jpg"], None),
        ("a 1.jpg\nb 2.jpg\n", ["a 1.jpg", "b 2.jpg"], None),
        ("#1.jpg\n a.jpg \n", ["#1.jpg", " a.jpg "], None),
    ],
)
def test_separators(text, names, labels, tmp_path):
    assert read_list(listed(tmp_path, text)) == (names, labels)


@pytest.mark.parametrize(
    ("name", "text", "names", "labels"),
    [
        ("a.csv", 'id,Path,label\r\n1,"a, b.jpg",owl\r\n2,c.jpg,"e""k"\r\n', ["a, b.jpg", "c.jpg"], ["owl", 'e"k']),
        ("a.csv", "\ufefffile_name\na.jpg\n\nb.jpg\n", ["a.jpg", "b.jpg"], None),
        ("a.TSV", "target\timage\n7\ta b.jpg\n", ["a b.jpg"], ["7"]),
        ("a.tsv", "a.jpg\t7\n", ["a.jpg"], ["7"]),  # no header
    ],
)  # fmt: skip
def test_tables_with_a_header(name, text, names, labels, tmp_path):
    assert read_list(listed(tmp_path, text, name)) == (names, labels)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a.jpg,owl\nb.jpg,elk\n", "has the columns a.jpg, owl: a header names path and label"),
        ("path,label\n", "has no rows"),
        ("", "no table that can be read"),
        ("path,label\na.jpg,1\nb.jpg\n,2\n", "2 rows are not as the header says (3, 4)"),
        ('path,label\n"a.jpg,1\n', "no table that can be read (unexpected end of data)"),
    ],
)
def test_tables_that_are_none_are_refused(text, words, tmp_path):
    with pytest.raises(UserError) as error:
        read_list(listed(tmp_path, text, "a.csv"))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_csv_is_a_data_set(images):
    path = listed(images, "label,path\n" + "".join(f"{k % 2},images/00{k}.jpg\n" for k in range(6)), "train.csv")
    data = open_images(str(path))
    assert data.classes == ["0", "1"] and list(data.labels) == [0, 1] * 3 and len(data[0][0].getbands()) == 3
    assert build_dataset("folder", str(images), "train").names[5] == "images/005.jpg"  # by its name in the folder
    listed(images, "image_id,label\n000,3\n", "train.csv")  # as competitions have them, beside the images
    assert build_dataset("folder", str(images), "train").where == str(images)


def test_labels_and_class_list(images):
    path = listed(images, "".join(f"images/00{k}.jpg\t{x}\n" for k, x in enumerate([10, 9, 10, 2, 9, 9])))
    data = open_images(str(path))
    assert data.classes == ["2", "9", "10"] and list(data.labels) == [2, 1, 2, 0, 1, 1]
    chosen = listed(images, "10\n2\n", "classes")
    data = build_dataset("folder", str(path), "train", str(chosen))
    assert data.classes == ["10", "2"] and list(data.labels) == [0, 0, 1]
    assert list(data.names) == ["images/000.jpg", "images/002.jpg", "images/003.jpg"]
    assert np.array_equal(np.asarray(data[1][0]), np.asarray(Folder(images / "images")[2][0]))
    with pytest.raises(UserError, match="has no labels for --class_list to choose by"):
        build_dataset("folder", str(listed(images, "images/000.jpg\n")), "train", str(chosen))
    assert open_images(str(listed(images, "images/000.jpg\tx\nimages/001.jpg\tx\n"))).classes is None  # one is none


def test_names_of_any_bytes(images):
    odd = os.fsdecode(b"caf\xe9 \xff.jpg")
    shutil.copy(images / "images" / "000.jpg", images / odd)
    data = open_images(str(listed(images, os.fsencode(f"{odd}\towl\nimages/001.jpg\telk\n"))))
    assert data.names[0] == odd and data[0][0].size == (40, 36) and data.classes == ["elk", "owl"]
    assert fingerprint(data) and data.stamps()[0][:2] == (odd, os.path.getsize(images / odd))


def test_lists_that_lie(images, capsys):
    os.mkfifo(images / "pipe.jpg")
    (images / "zero.jpg").symlink_to("/dev/zero")
    cases = [
        ("", "list.txt"),
        ("\n \r\n", "list.txt"),
        ("images/000.jpg\0\n", "list.txt"),
        ("images/000.jpg\n".encode("utf-16"), "list.txt"),
        ("images/000.jpg\t1\nimages/001.jpg\n\nimages/002.jpg\t\n", "line 2, 4"),
        ("\t1\n", "line 1"),
        ("images/000.jpg\nnope.jpg\n", "1 of 2 lines name no file: nope.jpg;"),
        ("images/000.jpg 1\nnope\n", "2 of 2 lines name no file: images/000.jpg 1, nope;"),
        ("images\n", "images;"),
        ("pipe.jpg\nzero.jpg\n", "pipe.jpg, zero.jpg;"),
        ("../../../../nowhere.jpg\n", "../../../../nowhere.jpg;"),
        ("x" * 5000 + "\n", "xxx...xxx"),
        ("a\x1b[31mb\n", r"a\x1b[31mb;"),
        ("images/000.jpg\nimages/000.jpg\n", "(images/000.jpg)"),
    ]
    for text, named in cases:
        with pytest.raises(UserError) as error:
            open_images(str(listed(images, text)))
        assert named in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 700
    assert capsys.readouterr().out == ""


def test_what_is_no_list(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(UserError, match="pipe.txt is no image"):
        open_images(str(tmp_path / "pipe.txt"))
    with pytest.raises(UserError, match="the list .*pipe.txt cannot be read"):
        Listed(tmp_path / "pipe.txt")
    with pytest.raises(UserError, match="is not a folder that can be read"):
        build_dataset("folder", str(tmp_path / "nowhere.txt"), "train")
    (tmp_path / "gone.txt").symlink_to("nowhere")
    with pytest.raises(UserError, match="is not a folder that can be read"):
        build_dataset("folder", str(tmp_path / "gone.txt"), "train")


def test_a_hundred_thousand_lines(images, monkeypatch, capsys):
    """Hard links to six images."""
    (images / "many").mkdir()
    for k in range(1000):
        os.link(images / "images" / f"00{k % 6}.jpg", images / "many" / f"{k}.jpg")
    lines = [f"many/{'./' * (k // 1000)}{k % 1000}.jpg\t{k % 7}\n" for k in range(100_000)]
    path = listed(images, "".join(lines))
    monkeypatch.setattr(scan, "SAY_AFTER", 0.05)
    start = time.process_time()
    data = open_images(str(path))
    assert time.process_time() - start < 5 and len(data) == 100_000
    assert data.names[99_999].endswith("/999.jpg") and data.labels[99_999] == 99_999 % 7
    assert f"Still looking for the files of {path}, " in capsys.readouterr().out
