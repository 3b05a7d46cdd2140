"""The same images as folder, list, tar shards, parquet and a saved copy; which of them a path means; a run that is
killed and goes on from each kind."""

import io
import json
import os
import signal
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import LONG, Script, eval_flags, interrupt, last_result, same_state, train, write_images
from PIL import Image

import eval_knn
import main_cplearn
import reproduce_table3
import run_with_submitit
from cplearn.data import datasets, sources
from cplearn.data import pixels as pixels_module
from cplearn.data.datasets import Folder, fingerprint
from cplearn.data.sources import build_dataset, find_split, open_images
from cplearn.errors import UserError

CLASSES = ["ant", "bee", "cat"]


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.jpg"))


def as_list(images: Path, out: Path) -> Path:
    for split in ("train", "val"):
        lines = [f"{os.path.relpath(path, out)}\t{path.parent.name}\n" for path in files_of(images / split)]
        (out / f"{split}.txt").write_text("".join(lines))
    return out


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def as_tar(images: Path, out: Path, shards: int = 3) -> Path:
    """Shards of consecutive images, a number per class as WebDataset has it."""
    for split in ("train", "val"):
        for k, part in enumerate(np.array_split(files_of(images / split), shards)):
            with tarfile.open(out / f"data-{split}-{k:06}.tar", "w") as tar:
                for path in part:
                    add(tar, f"{path.parent.name}_{path.stem}.jpg", path.read_bytes())
                    add(tar, f"{path.parent.name}_{path.stem}.cls", str(CLASSES.index(path.parent.name)).encode())
    return out


FEATURES = {"image": {"_type": "Image"}, "label": {"names": CLASSES, "_type": "ClassLabel"}}


def image_table(paths: list[Path]) -> pa.Table:
    """As `datasets` writes it."""
    rows = [{"bytes": path.read_bytes(), "path": path.name} for path in paths]
    table = pa.table({
        "image": pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        "label": pa.array([CLASSES.index(path.parent.name) for path in paths], pa.int64()),
    })  # fmt: skip
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": FEATURES}})})


def as_parquet(images: Path, out: Path) -> Path:
    (out / "data").mkdir()
    for split, name in (("train", "train"), ("val", "validation")):
        for k, part in enumerate(np.array_split(files_of(images / split), 2)):
            table = image_table(list(part))
            pq.write_table(table, out / "data" / f"{name}-{k:05}-of-00002.parquet", row_group_size=5)
    return out


def as_saved_copy(images: Path, out: Path) -> str:
    hf = pytest.importorskip("datasets")
    features = hf.Features({"image": hf.Image(), "label": hf.ClassLabel(names=CLASSES)})
    splits = {}
    for split, name in (("train", "train"), ("val", "validation")):
        rows = [{"image": {"bytes": p.read_bytes(), "path": None}, "label": CLASSES.index(p.parent.name)}
                for p in files_of(images / split)]  # fmt: skip
        splits[name] = hf.Dataset.from_list(rows, features=features)
    hf.DatasetDict(splits).save_to_disk(str(out / "copy"))
    return f"hf:{out}/copy"


MAKE = {"list": as_list, "tar": as_tar, "parquet": as_parquet, "hf": as_saved_copy}


def flags_of(made: Path | str) -> tuple[str, str]:
    return ("--dataset", made) if isinstance(made, str) else ("--data_path", str(made))


def build(made: Path | str, split: str, class_list: str | None = None):
    return build_dataset(made, None, split, class_list) if isinstance(made, str) else build_dataset(
        "folder", str(made), split, class_list)  # fmt: skip


@pytest.mark.parametrize("kind", MAKE)
def test_the_same_images_as_in_a_folder(kind, image_folder, tmp_path):
    made = MAKE[kind](image_folder, tmp_path)
    for split, count in (("train", 48), ("val", 12)):
        folder, other = Folder(image_folder / split), build(made, split)
        assert len(other) == count and list(other.labels) == folder.labels.tolist()
        assert other.classes == (["0", "1", "2"] if kind == "tar" else CLASSES)
        for i in range(0, count, 5):
            (ours, label), (theirs, theirs_label) = other[i], folder[i]
            assert np.array_equal(np.asarray(ours), np.asarray(theirs)) and label == theirs_label
            assert other.size_of(i) == folder.size_of(i)
            half = other.read(i, lambda width, height: 2)[0]
            assert half.size == (20, 18)
            assert np.array_equal(np.asarray(half), np.asarray(folder.read(i, lambda width, height: 2)[0]))
        assert len({str(name) for name in other.names}) == count and fingerprint(other) != fingerprint(folder)
        assert fingerprint(other) == fingerprint(build(made, split)) and other.stamps() == build(made, split).stamps()


@pytest.mark.parametrize("kind", MAKE)
def test_class_list_chooses_and_orders(kind, image_folder, tmp_path):
    made = MAKE[kind](image_folder, tmp_path)
    names = ["2", "0"] if kind == "tar" else ["cat", "ant"]
    (tmp_path / "classes").write_text("\n".join(names))
    chosen, folder = build(made, "val", str(tmp_path / "classes")), Folder(image_folder / "val", ["cat", "ant"])
    assert chosen.classes == names and sorted(chosen.labels) == sorted(folder.labels)
    pictures = {np.asarray(folder[i][0]).tobytes(): folder[i][1] for i in range(len(folder))}
    assert [pictures[np.asarray(image).tobytes()] for image, _ in chosen] == list(chosen.labels)
    (tmp_path / "classes").write_text(f"{names[0]}\ndog\n")
    with pytest.raises(UserError, match="lacks 1 of the 2 listed classes: dog"):
        build(made, "val", str(tmp_path / "classes"))


# --- which images a path means -------------------------------------------------------------------------------


def test_one_file_is_for_pre_training(image_folder, tmp_path):
    as_tar(image_folder, tmp_path, shards=1)
    as_list(image_folder, tmp_path)
    for name, count in (("data-val-000000.tar", 12), ("train.txt", 48)):
        path = str(tmp_path / name)
        assert len(build_dataset("folder", path, "train")) == len(open_images(path)) == count
        with pytest.raises(UserError, match="one file, for pre-training only: an evaluation needs a folder"):
            build_dataset("folder", path, "val")


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


@pytest.mark.parametrize(
    ("names", "train", "val"),
    [
        (["train/a/x.jpg", "val/a/x.jpg", "train.txt"], ("folder", "train", []), ("folder", "val", [])),
        (["train/0.tar", "train/1.tar", "test/0.tar"], ("tar", "train", ["0.tar", "1.tar"]),
         ("tar", "test", ["0.tar"])),
        (["train.txt", "test.tsv"], ("list", ".", ["train.txt"]), ("list", ".", ["test.tsv"])),
        (["in-train-1.tar", "in-train-0.tar", "in-val-0.tar"], ("tar", ".", ["in-train-0.tar", "in-train-1.tar"]),
         ("tar", ".", ["in-val-0.tar"])),
        (["README.md", "data/train-0-of-1.parquet", "data/test-0-of-1.parquet", "data/validation-0-of-1.parquet"],
         ("parquet", "data", ["train-0-of-1.parquet"]), ("parquet", "data", ["validation-0-of-1.parquet"])),
        (["0.tar", "1.tar", "x-test.tar"], ("tar", ".", ["0.tar", "1.tar"]), ("tar", ".", ["x-test.tar"])),
        ([".hidden.tar", "0.tar", ".cache/x", "sizes.json"], ("tar", ".", ["0.tar"]), None),
        (["a/x.jpg", "b/x.jpg", "train.tar", "backup.tar"], ("folder", ".", []), None),
        (["_index/x.txt", "0.tar"], ("tar", ".", ["0.tar"]), None),
        (["0.tar", "0.parquet", "0_stats.json"], ("tar", ".", ["0.tar"]), None),
        (["train2017.tar", "val2017.tar"], ("tar", ".", ["train2017.tar"]), ("tar", ".", ["val2017.tar"])),
        (["x.jpg", "train-old.parquet"], ("folder", ".", []), None),
        (["trained.tar", "retrain.tar"], ("tar", ".", ["retrain.tar", "trained.tar"]), None),
    ],
)  # fmt: skip
def test_what_a_folder_holds(names, train, val, tmp_path):
    touch(tmp_path, *names)
    for split, expected in (("train", train), ("val", val)):
        if expected is None:
            assert not sources.has_split(str(tmp_path), split)
            with pytest.raises(UserError, match="has no val or test folder: an evaluation needs train/ and val/"):
                find_split(tmp_path, split)
        else:
            kind, folder, files = expected
            assert find_split(tmp_path, split) == (kind, tmp_path / folder, files) and sources.has_split(
                str(tmp_path), split
            )


def test_val_lies_beside_a_folder_called_train(image_folder):
    train = image_folder / "train"
    assert find_split(train, "val") == find_split(image_folder, "val") and find_split(train, "all").root == train
    assert sources.has_split(str(train), "val") and not sources.is_undivided(str(train))
    with pytest.raises(UserError, match="val"):
        find_split(train / "ant", "val")


def test_shards_that_are_missing_are_said(tmp_path, capsys):
    touch(tmp_path, "train-00000-of-00004.parquet", "val-00000-of-00001.parquet")
    find_split(tmp_path, "val")
    assert not capsys.readouterr().out
    find_split(tmp_path, "train")
    assert "has 1 of the 4 files train-*-of-00004.parquet" in capsys.readouterr().out


def test_images_of_other_kinds_are_counted(tmp_path):
    write_images(tmp_path / "a", 2)
    touch(tmp_path / "a", "x.avif", "y.jfif", "z.JFIF", "notes.txt")
    assert datasets.summary(open_images(str(tmp_path))).startswith("2 images, 3 left out (.avif, .jfif), no classes")


def test_folders_that_mean_nothing(tmp_path):
    touch(tmp_path / "test_only", "test-0.tar")
    with pytest.raises(UserError, match="has no train split, but test-0.tar: name one file to train on it"):
        find_split(tmp_path / "test_only", "train")
    touch(tmp_path / "both", "0.tar", "1.parquet")
    with pytest.raises(UserError, match="holds tar and parquet files: move one kind away"):
        find_split(tmp_path / "both", "train")
    touch(tmp_path, "photo.jpg", "archive.zip")
    for name in ("photo.jpg", "archive.zip"):
        with pytest.raises(UserError, match="is not a folder that can be read .*, or name a list"):
            build_dataset("folder", str(tmp_path / name), "train")


def test_open_images_takes_all_kinds(image_folder, tmp_path):
    as_tar(image_folder, tmp_path, shards=1)
    as_list(image_folder, tmp_path)
    counts = {tmp_path: 60, tmp_path / "train.txt": 48, tmp_path / "data-val-000000.tar": 12, image_folder: 60}
    assert {path: len(open_images(str(path))) for path in counts} == counts
    one = open_images(str(image_folder / "val" / "ant" / "000.jpg"))
    assert len(one) == 1 and one[0][0].size == (40, 36)
    with pytest.raises(UserError, match="--images .*Makefile is no image: .* a list .*tar or parquet"):
        (tmp_path / "Makefile").touch()
        open_images(str(tmp_path / "Makefile"))


# --- scripts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MAKE)
def test_training_and_evaluation(kind, image_folder, tmp_path):
    """The weights are those of a run on the folder."""
    made = MAKE[kind](image_folder, tmp_path)
    more = ("--epochs", "1", "--out_dim", "16")
    train(tmp_path / "folder", *more, "--data_path", str(image_folder))
    train(tmp_path / "other", *more, *flags_of(made))
    one, other = (json.loads((tmp_path / x / "log.txt").read_text().splitlines()[-1]) for x in ("folder", "other"))
    assert one["train_loss"] == other["train_loss"]
    for name in ("folder", "other"):
        (tmp_path / f"of_{name}").mkdir()
        eval_knn.main(eval_flags(tmp_path / name, tmp_path / f"of_{name}", "--nb_knn", "5"))
    results = [last_result(tmp_path / f"of_{name}")["metrics"] for name in ("folder", "other")]
    assert results[0] == results[1]


@pytest.mark.parametrize("kind", MAKE)
def test_a_stopped_run_goes_on_to_the_same_bits(kind, image_folder, tmp_path):
    flags = ("--epochs", "3", "--cache", "none", *flags_of(MAKE[kind](image_folder, tmp_path)))
    train(tmp_path / "whole", *flags, "--max_steps", "8")
    for steps in (2, 5, 8):
        train(tmp_path / "cut", *flags, "--max_steps", str(steps))
    assert same_state(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_a_killed_run_goes_on_to_the_same_bits(kind, image_folder, tmp_path):
    made = MAKE[kind](image_folder, tmp_path)
    flags = [*LONG, "--arch", "resnet8_w8", "--num_workers", "2", "--cache", "none", *flags_of(made)]
    whole = Script(tmp_path / "whole", *flags, "--output_dir", str(tmp_path / "a"))
    cut = Script(tmp_path / "cut", *flags, "--output_dir", str(tmp_path / "b"))
    interrupt(cut, tmp_path / "b", "SIGKILL", 3)
    assert cut.wait().returncode == -signal.SIGKILL
    assert whole.wait().returncode == 0
    again = Script(tmp_path / "again", *flags, "--output_dir", str(tmp_path / "b")).wait()
    assert again.returncode == 0 and "esum" in again.stdout, again.stderr
    assert same_state(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_an_unreadable_image_is_named_and_replaced(kind, tmp_path, capsys):
    for k, name in enumerate(CLASSES):
        write_images(tmp_path / "images" / "train" / name, 8, seed=k)
        write_images(tmp_path / "images" / "val" / name, 1, seed=k)
    (tmp_path / "images" / "train" / "bee" / "003.jpg").write_bytes(b"broken")
    (tmp_path / "data").mkdir() if kind == "tar" else None
    made = MAKE[kind](tmp_path / "images", tmp_path / "data" if kind == "tar" else tmp_path)
    flags = ("--data_path", str(made), "--epochs", "1", "--batch_size_per_gpu", "12")
    train(tmp_path / "out", *flags, "--max_bad_images", "0.1")
    name = {"tar": "data-train-000001.tar/bee_003.jpg", "parquet": "train-00000-of-00002.parquet#11/003.jpg"}[kind]
    listed = (tmp_path / "out" / "bad_images.txt").read_text()
    assert listed.startswith(f"{name}\tcannot read the image {tmp_path}/") and "cannot identify image file\n" in listed
    assert f"WARNING: replaced by another image: cannot read the image {made}" in capsys.readouterr().err
    with pytest.raises(UserError, match="1 of 24 images cannot be read, more than --max_bad_images 0.001"):
        train(tmp_path / "out2", *flags)


def test_a_run_on_parquet_that_is_copied_comes_to_the_same_bits(image_folder, tmp_path, monkeypatch):
    huggingface = pytest.importorskip("cplearn.data.huggingface")
    made = as_parquet(image_folder, tmp_path)
    flags = ("--data_path", str(made), "--cache", "none", "--epochs", "2", "--cache_dir", str(tmp_path / "cache"))
    train(tmp_path / "read", *flags)
    train(tmp_path / "copied", *flags, "--max_steps", "2")
    monkeypatch.setattr(huggingface, "SMALL", 0)
    train(tmp_path / "copied", *flags)  # goes on
    assert len(list((tmp_path / "cache").rglob("*.arrow"))) == 1
    assert same_state(tmp_path / "read", tmp_path / "copied")


def test_checks_before_a_job_or_a_table_accept_them(image_folder, tmp_path):
    made = as_list(image_folder, tmp_path)
    submit, _ = run_with_submitit.parse_args(["--then", "eval", "--dry_run"])
    rest = ["--data_path", str(made), "--output_dir", str(tmp_path / "out"), "--arch", "resnet8_w8",
            "--out_dim", "16"]  # fmt: skip
    assert run_with_submitit.check_flags(submit, rest) == tmp_path / "out"
    table = ["--data_path", str(made), "--output_dir", str(tmp_path / "t"), "--scale", "small"]
    args, _ = reproduce_table3.parse_args(table)
    reproduce_table3.check_data(args)
    args, _ = reproduce_table3.parse_args([*table[:-1], "paper", "--table", "1"])
    with pytest.raises(UserError, match="has 3 classes, CIFAR-10 has 10"):
        reproduce_table3.check_data(args)
    (tmp_path / "val.txt").unlink()
    with pytest.raises(UserError, match="--then eval needs a val or test split"):
        run_with_submitit.check_flags(submit, rest)
    with pytest.raises(UserError, match="needs train/ and val/ .*, or lists, tar"):
        reproduce_table3.check_data(args)


def test_a_name_of_a_copy_that_makes_no_sense(tmp_path):
    with pytest.raises(UserError, match="--dataset hf: "):
        build_dataset("hf:", None, "train")
    with pytest.raises(UserError, match="--data_path .*/x .*hf:/x"):
        main_cplearn.main(["--dataset", "hf:/x", "--data_path", "x", "--output_dir", str(tmp_path / "out")])


def test_a_copy_is_found_from_any_folder(image_folder, tmp_path, monkeypatch):
    made = as_saved_copy(image_folder, tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main_cplearn.parse_args(["--dataset", "hf:copy"]).dataset == made
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main_cplearn.parse_args(["--dataset", "hf:~/copy"]).dataset == made


def test_small_sets_of_all_kinds_are_kept_in_memory(image_folder, tmp_path):
    views = main_cplearn.augmentations.views_of(main_cplearn.parse_args(["--data_path", "/x", "--arch", "resnet8_w8"]))
    data = build_dataset("folder", str(as_tar(image_folder, tmp_path)), "train")
    cached = pixels_module.open_pixels(data, views, pixels_module.CacheOptions(None, "", 2))
    plain = pixels_module.Pixels(Folder(image_folder / "train"), views)
    assert cached.kind == "ram" and all((cached[i] == plain[i]).all() for i in range(48))
    assert Image.fromarray(cached[0].permute(1, 2, 0).numpy()).size == (40, 36)
