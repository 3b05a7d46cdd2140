"""Images that are changed under their names are found out, by every kind of source, and by all that goes on later."""

import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import eval_flags, model_of, same_state, same_weights, train
from PIL import Image

import eval_linear
import extract_features
from cplearn.data import datasets, identity
from cplearn.data.identity import Identity
from cplearn.data.sources import Sample, build_dataset
from cplearn.errors import UserError
from cplearn.features.files import Parts

hf = pytest.importorskip("datasets")
LATER = 10**9  # ns


def paint(folder: Path, first: int = 0, count: int = 24, seed: int = 0) -> None:
    """Write images that all take the same bytes, whatever is on them: two classes in train/."""
    rng = np.random.default_rng(seed)
    for i in range(first, first + count):
        path = folder / "train" / ("owl" if i % 2 else "elk") / f"{i:03}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((24, 24), Image.Resampling.BICUBIC).save(path)


def pack(folder: Path, kind: str, out: Path) -> tuple[str, str | None]:
    """Keep the images of `folder` as a kind of source in `out`; return --dataset and --data_path."""
    out.mkdir(parents=True, exist_ok=True)
    paths = sorted((folder / "train").rglob("*.bmp"), key=lambda path: path.name)
    if kind == "folder":
        shutil.copytree(folder / "train", out / "train", dirs_exist_ok=True)
    elif kind == "list":
        shutil.copytree(folder / "train", out / "images", dirs_exist_ok=True)
        lines = [f"images/{path.parent.name}/{path.name}\t{path.parent.name}\n" for path in paths]
        (out / "train.txt").write_text("".join(lines))
    elif kind == "tar":
        for k, part in enumerate((paths[:16], paths[16:])):
            with tarfile.open(out / f"train-{k}.tar", "w") as tar:
                for path in part:
                    tar.add(path, f"{path.parent.name}/{path.name}")
    else:
        rows = {"image": [{"bytes": path.read_bytes(), "path": path.name} for path in paths],
                "label": [path.parent.name for path in paths]}  # fmt: skip
        if kind == "hf":
            shutil.rmtree(out)
            features = hf.Features({"image": hf.Image(), "label": hf.ClassLabel(names=["elk", "owl"])})
            hf.Dataset.from_dict(rows, features=features).save_to_disk(str(out))
            return f"hf:{out}", None
        for k, part in enumerate((slice(16), slice(16, None))):
            table = pa.table({name: column[part] for name, column in rows.items()})
            pq.write_table(table, out / f"train-{k}.parquet", compression="none", use_dictionary=False)
    return "folder", str(out)


def look(place) -> tuple[Identity, datasets.ImageDataset]:
    data = build_dataset(*place, "train")
    return Identity(**Identity.of(data).read_sample(data).state()), data


def shift_times(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + LATER))


@pytest.mark.parametrize("kind", ["folder", "list", "tar", "parquet", "hf"])
def test_what_has_changed_is_named(kind, tmp_path):
    paint(tmp_path / "images")
    place = pack(tmp_path / "images", kind, tmp_path / "data")
    before, data = look(place)
    assert look(place)[0].changes(before, data) == ("", [], 0)

    shift_times(tmp_path / "data")  # as a copy without times
    copy, data = look(place)
    assert copy.changes(before, data) == ("", [], 24) and copy.sha256(times=False) == before.sha256(times=False)
    assert copy.sha256(times=True) != before.sha256(times=True)

    paint(tmp_path / "images", first=5, count=3, seed=1)  # same names, same bytes
    pack(tmp_path / "images", kind, tmp_path / "data")
    shift_times(tmp_path / "data")
    changed, data = look(place)
    text, images, copied = changed.changes(before, data)
    assert f"3 images have changed since (the first: {data.names[images[0]]})" in text and copied == 0
    assert images == {"folder": [3, 14, 15]}.get(kind, [5, 6, 7])
    assert changed.sha256(times=False) != before.sha256(times=False)

    paint(tmp_path / "images", first=24, count=2, seed=2)
    pack(tmp_path / "images", kind, tmp_path / "data")
    more, data = look(place)
    assert "images gone: 0, new: 2 (the first: " in more.changes(before, data).text


def test_single_images_are_named(tmp_path):
    paint(tmp_path)
    place = ("folder", str(tmp_path))
    before, data = look(place)
    paint(tmp_path, first=5, count=3, seed=1)
    for path in (tmp_path / "train").rglob("00[567].bmp"):
        os.utime(path, ns=(0, path.stat().st_mtime_ns + LATER))
    now, data = look(place)
    text, images, _ = now.changes(before, data)
    assert text == "3 images have changed since (the first: elk/006.bmp)" and len(images) == 3
    assert now.changes(before, data, {"elk/006.bmp"}).text == "2 images have changed since (the first: owl/005.bmp)"
    part = Sample(data, 20, 0)
    assert len(Identity.of(part).names) == 20 and len(Identity.of(part).read_sample(part).contents) == 20
    (tmp_path / "train" / "elk").rename(tmp_path / "train" / "yak")
    renamed, data = look(place)
    assert "images gone: 12, new: 12 (the first: yak/000.bmp)" in renamed.changes(before, data).text


def test_labels_that_have_changed(tmp_path):
    paint(tmp_path / "images")
    place = pack(tmp_path / "images", "list", tmp_path / "data")
    before, data = look(place)
    names = tmp_path / "data" / "train.txt"
    names.write_text(names.read_text().replace("\towl", "\tgnu"))  # numbered as before
    assert look(place)[0].changes(before, data).text == "labels or class names have changed since"


def test_a_sample_vouches_for_a_copy_and_not_for_a_few(tmp_path, monkeypatch):
    """Of 24 images 6 are in the sample, and 2 with other times are not enough of them, unless these are all."""
    monkeypatch.setattr(datasets, "SAMPLE", 6)
    monkeypatch.setattr(identity, "ENOUGH", 4)
    paint(tmp_path)
    before, data = look(("folder", str(tmp_path)))
    assert len(before.contents) == 6
    sample = [str(data.names[i]) for i in data.sample()]
    others = sorted(set(data.names) - set(sample))
    for names, text in ((sample[:2], ""), (sample[:2] + others[:3], "3 images have"), (sample + others, "")):
        for name in names:
            os.utime(tmp_path / "train" / name, ns=(0, LATER * (1 + len(names))))
        now, data = look(("folder", str(tmp_path)))
        assert text in (found := now.changes(before, data).text) and bool(text) == bool(found), found


@pytest.mark.parametrize("kind", ["folder", "tar", "parquet", "hf"])
def test_a_run_does_not_go_on_with_other_images(kind, tmp_path):
    paint(tmp_path / "images")
    name, path = pack(tmp_path / "images", kind, tmp_path / "data")
    flags = ["--dataset", name, *(["--data_path", path] if path else []), "--batch_size_per_gpu", "4", "--epochs", "2",
             "--cache", "none"]  # fmt: skip
    train(tmp_path / "whole", *flags)
    train(tmp_path / "cut", *flags, "--max_steps", "5")
    shift_times(tmp_path / "data")  # a copy
    shutil.copytree(tmp_path / "cut", tmp_path / "other")
    train(tmp_path / "cut", *flags)
    assert same_weights(model_of(tmp_path / "cut"), model_of(tmp_path / "whole"))

    paint(tmp_path / "images", first=20, count=2, seed=1)
    pack(tmp_path / "images", kind, tmp_path / "data")
    shift_times(tmp_path / "data")
    with pytest.raises(UserError, match=r"data: 2 images have changed since .*--resume_force data"):
        train(tmp_path / "other", *flags)
    train(tmp_path / "other", *flags, "--resume_force", "data")
    assert not same_weights(model_of(tmp_path / "other"), model_of(tmp_path / "whole"))


def test_a_run_goes_on_after_images_were_repaired(tmp_path):
    paint(tmp_path)
    broken = tmp_path / "train" / "owl" / "007.bmp"
    content = broken.read_bytes()
    broken.write_bytes(b"no image")
    flags = ["--data_path", str(tmp_path), "--batch_size_per_gpu", "8", "--epochs", "3", "--max_bad_images", "0"]
    with pytest.raises(UserError, match="007.bmp"):
        train(tmp_path / "out", *flags)
    broken.write_bytes(content)
    train(tmp_path / "out", *flags)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_an_extraction_that_goes_on_mixes_no_rows(kind, tmp_path, monkeypatch, capsys):
    """Killed after two parts, then some images are replaced under their names and bytes: all rows are of the new."""
    paint(tmp_path / "images")
    train(tmp_path / "run", "--data_path", str(tmp_path / "images"), "--batch_size_per_gpu", "4", "--epochs", "1")
    _, path = pack(tmp_path / "images", kind, tmp_path / "data")
    command = ["--pretrained_weights", str(tmp_path / "run/checkpoint.pth"), "--images", path, "--device", "cpu",
               "--batch_size_per_gpu", "6", "--num_workers", "0"]  # fmt: skip
    write, count = Parts.write, []

    def two(self, k, rows):
        if len(count) == 2:
            raise Killed
        count.append(k)
        write(self, k, rows)

    monkeypatch.setattr(Parts, "write", two)
    with pytest.raises(Killed):
        extract_features.main([*command, "--out", str(tmp_path / "mixed.npz")])
    monkeypatch.setattr(Parts, "write", write)
    paint(tmp_path / "images", first=2, count=3, seed=1)
    pack(tmp_path / "images", kind, tmp_path / "data")
    shift_times(tmp_path / "data")
    capsys.readouterr()
    extract_features.main([*command, "--out", str(tmp_path / "mixed.npz")])
    assert "have changed since" in capsys.readouterr().out
    extract_features.main([*command, "--out", str(tmp_path / "clean.npz")])
    mixed, clean = (dict(np.load(tmp_path / f"{name}.npz")) for name in ("mixed", "clean"))
    assert all(np.array_equal(mixed[name], clean[name]) for name in clean) and len(clean["features"]) == 24


def test_a_linear_probe_begins_again_on_other_images(tmp_path, capsys):
    paint(tmp_path / "data")
    shutil.copytree(tmp_path / "data" / "train", tmp_path / "data" / "val")
    train(tmp_path / "run", "--data_path", str(tmp_path / "data"), "--batch_size_per_gpu", "4", "--epochs", "1")
    probe = eval_flags(tmp_path / "run", tmp_path, "--batch_size_per_gpu", "8", "--epochs", "2")
    first = eval_linear.main(probe)
    shift_times(tmp_path / "data" / "train")
    assert eval_linear.main(probe) == first and "after epoch 2" in capsys.readouterr().out
    paint(tmp_path / "data", seed=1)
    shift_times(tmp_path / "data" / "train")
    eval_linear.main(probe)
    assert "Resuming" not in capsys.readouterr().out


def test_old_checkpoints_go_on(tmp_path):
    """Of a time before images were kept in them."""
    paint(tmp_path / "data")
    flags = ["--data_path", str(tmp_path / "data"), "--batch_size_per_gpu", "4", "--epochs", "1"]
    train(tmp_path / "whole", *flags)
    train(tmp_path / "old", *flags, "--max_steps", "3")
    state = torch.load(tmp_path / "old/checkpoint.pth", weights_only=True)
    del state["images"], state["args"]["image_column"]
    torch.save(state, tmp_path / "old/checkpoint.pth")
    train(tmp_path / "old", *flags)
    assert same_state(tmp_path / "old", tmp_path / "whole")
