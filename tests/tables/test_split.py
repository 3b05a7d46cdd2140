"""The tuning split: what is held out, and that trials see nothing else."""

from pathlib import Path

import numpy as np
import pytest
from helpers import write_images

import main_cplearn
from cplearn.data import sources
from cplearn.errors import UserError
from cplearn.tables.split import held_out, open_training_images, write_split


@pytest.fixture
def folder(tmp_path):
    """Three classes of 10, 7 and 2 training images, and one test image each."""
    for name, count in (("cat", 10), ("dog", 7), ("10", 2)):
        write_images(tmp_path / "data" / "train" / name, count, (8, 8))
        write_images(tmp_path / "data" / "test" / name, 1, (8, 8), seed=9)
    return tmp_path / "data"


def cell_args(folder, *more):
    return main_cplearn.parse_args(["--data_path", str(folder), *more])


def split(folder, place, *more) -> dict[str, int]:
    return write_split(open_training_images(cell_args(folder, *more)), place)


def test_a_fifth_of_every_class_by_a_fixed_seed():
    labels = np.array([0] * 50 + [1] * 12 + [2] * 3 + [3] * 2)[np.random.default_rng(0).permutation(67)]
    chosen = held_out(labels)
    assert np.bincount(labels[chosen]).tolist() == [10, 2, 1, 1]
    assert (held_out(labels) == chosen).all()
    # A class's choice does not depend on the other classes.
    assert (held_out(labels[labels != 2]) == chosen[labels != 2]).all()


def test_both_lists_together_are_the_training_images(folder, tmp_path):
    split(folder, tmp_path / "lists")
    # Read the way a trial reads them.
    parts = {x: sources.build_dataset("folder", str(tmp_path / "lists"), x) for x in ("train", "val")}
    names = {x: {(Path("/") / str(name)).resolve() for name in part.names} for x, part in parts.items()}
    assert not names["train"] & names["val"]
    assert names["train"] | names["val"] == set((folder / "train").rglob("*.jpg"))
    assert not any("/test/" in str(name) for part in names.values() for name in part)
    for part in parts.values():
        assert sorted(part.classes) == ["10", "cat", "dog"]
        for i in range(len(part)):
            image, label = part.read(i)
            assert image.size == (8, 8) and part.classes[label] == Path(str(part.names[i])).parent.name


def test_a_list_of_images_can_be_split_too(folder, tmp_path):
    lines = [f"{path}\t{path.parent.name}\n" for path in sorted((folder / "train").rglob("*.jpg"))]
    (tmp_path / "listed").mkdir()
    for name in ("train", "val"):
        (tmp_path / "listed" / f"{name}.txt").write_text("".join(lines))
    assert split(folder, tmp_path / "a") == split(tmp_path / "listed", tmp_path / "b") == {"train": 15, "val": 4}
    assert (tmp_path / "a" / "val.txt").read_text() == (tmp_path / "b" / "val.txt").read_text()


def test_a_class_list_chooses_first(folder, tmp_path):
    (tmp_path / "classes.txt").write_text("dog\ncat\n")
    classes = str(tmp_path / "classes.txt")
    assert split(folder, tmp_path / "lists", "--class_list", classes) == {"train": 14, "val": 3}
    assert sources.build_dataset("folder", str(tmp_path / "lists"), "val", classes).classes == ["dog", "cat"]


def test_other_images_are_not_mixed_in(folder, tmp_path):
    split(folder, tmp_path / "lists")
    split(folder, tmp_path / "lists")  # the same again
    before = (tmp_path / "lists" / "train.txt").read_text()
    write_images(folder / "train" / "emu", 5, (8, 8))
    with pytest.raises(UserError, match="train.txt does not list the images of .*as they are now"):
        split(folder, tmp_path / "lists")
    assert (tmp_path / "lists" / "train.txt").read_text() == before


def test_names_in_other_encodings(folder, tmp_path):
    bad = bytes(folder / "train" / "cat") + b"/\xff\t.jpg"
    Path(str(folder / "train" / "cat" / "000.jpg")).rename(Path(bad.decode("utf-8", "surrogateescape")))
    split(folder, tmp_path / "lists")
    parts = [sources.build_dataset("folder", str(tmp_path / "lists"), x) for x in ("train", "val")]
    assert sum("\udcff\t" in str(name) for part in parts for name in part.names) == 1
    (folder / "train" / "cat" / "001.jpg").rename(folder / "train" / "cat" / "a\nb.jpg")
    with pytest.raises(UserError, match="cannot hold 1 names of") as error:
        open_training_images(cell_args(folder))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "flags", "words"),
    [
        (lambda f: None, "--dataset digits", "--dataset digits has none; save it as images"),
        (lambda f: (f / "train/10/001.jpg").unlink(), "", r"1 classes of .* fewer than two images \(10\)"),
        (lambda f: (f / "train/dog").rename(f / "train/dog "), "", r"cannot hold 1 names of .*\(dog \)"),
        (lambda f: [p.rename(f / "train" / f"{p.parent.name}{p.name}") for p in f.glob("train/*/*")], "", "has none"),
    ],
)
def test_what_cannot_be_split_is_one_line(folder, change, flags, words):
    change(folder)
    args = main_cplearn.parse_args(flags.split()) if flags else cell_args(folder)
    with pytest.raises(UserError, match=words) as error:
        open_training_images(args)
    assert "\n" not in str(error.value)


def test_tar_shards_are_refused(tmp_path):
    (tmp_path / "train-0.tar").write_bytes(b"")
    with pytest.raises(UserError, match="has them in tar files; unpack"):
        open_training_images(cell_args(tmp_path))
