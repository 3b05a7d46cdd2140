"""extract_features.py: the same features as the evaluations, in three formats, killed and resumed, of odd images."""

import json
import os
import re
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from helpers import ROOT, eval_flags, run_in_processes, train, write_images
from PIL import Image

import eval_knn
import extract_features
from cplearn import checkpoints
from cplearn.data.color import normalize, to_float
from cplearn.data.datasets import Folder
from cplearn.errors import UserError
from cplearn.features import files, splits
from cplearn.features.cli import request_of
from cplearn.load import load_model, load_pretrained


def flags(weights, images, out, *more):
    return ["--pretrained_weights", str(weights), "--images", str(images), "--out", str(out), "--num_workers", "0",
            "--device", "cpu", "--batch_size_per_gpu", "4", *more]  # fmt: skip


def extract(weights, images, out, *more):
    """Run the command; return what a .npz holds."""
    extract_features.main(flags(weights, images, out, *more))
    if out.suffix == ".npz":
        with np.load(out) as f:
            return {name: f[name] for name in f} | {"source": json.loads(str(f["source"]))}


@pytest.fixture(scope="module")
def vit_run(tmp_path_factory, image_folder):
    """The checkpoint of a small ViT with a head: patches of 16, images of 32 pixels."""
    out = tmp_path_factory.mktemp("vit")
    train(out, "--data_path", str(image_folder), "--arch", "timm:test_vit", "--max_steps", "1", "--epochs", "1")
    return out / "checkpoint.pth"


@pytest.fixture
def photos(tmp_path):
    """Six images of three sizes."""
    for k, size in enumerate(((64, 48), (48, 64), (100, 40))):
        write_images(tmp_path / "photos" / str(k), 2, size=size, seed=k)
    return tmp_path / "photos"


# --- what is in it --------------------------------------------------------------------------------------


def test_features_are_those_of_the_evaluations_in_every_format(run, tmp_path, image_folder, capsys):
    """Names and order, too; and a file says what it is of."""
    images = image_folder / "val"
    args = eval_knn.get_args_parser().parse_args(eval_flags(run, tmp_path, "--batch_size_per_gpu", "4"))
    model = load_model(request_of(args, "digits"), torch.device("cpu"))
    expected = splits.extract_features(model, Folder(images), args, torch.device("cpu"))
    found = extract(run / "checkpoint.pth", images, tmp_path / "f.npz")
    assert np.array_equal(found["features"], expected.features.numpy())
    assert np.array_equal(found["codes"], expected.codes.numpy())
    assert np.array_equal(found["embedding"], model.method.embed(expected.features).numpy())
    assert found["names"].tolist() == expected.names and len(expected.names) == 12
    source = found["source"]
    of_images = ("data", "data_hash", "dataset", "data_path", "class_list")
    of_weights = {name: value for name, value in expected.source.items() if name not in of_images}
    assert of_weights.items() <= source.items() and source["data"] == str(images)
    assert source["image_size"] == 32 and source["out_dim"] == 40 and source["unreadable"] == {}
    assert source["transform"].startswith("32 x 32, bicubic") and source["head"] == "cplearn"
    assert "embedding of 8, codes of 40" in capsys.readouterr().out

    extract(run / "checkpoint.pth", images, tmp_path / "f.npy")
    kept = np.load(tmp_path / "f.npy", mmap_mode="r")
    beside = json.loads((tmp_path / "f.json").read_text())
    assert np.array_equal(kept, found["features"]) and beside["names"] == expected.names
    assert beside["source"]["weights_sha256"] == source["weights_sha256"] and beside["source"]["head"] is None

    extract(run / "checkpoint.pth", images, tmp_path / "f.parquet")
    table = pq.read_table(tmp_path / "f.parquet")
    assert table["name"].to_pylist() == expected.names and table["code"].to_pylist() == expected.codes.tolist()
    for name in ("features", "embedding"):
        assert np.array_equal(np.array(table[name].to_pylist(), dtype=np.float32), found[name])
    assert json.loads(table.schema.metadata[b"cplearn"]) == source
    assert sorted(os.listdir(tmp_path)) == ["f.json", "f.npy", "f.npz", "f.parquet"]  # no part is left


def reference_view(path, size, multiple):
    """The view of --keep_aspect by Pillow alone."""
    image = Image.open(path).convert("RGB")
    width, height = image.size
    scale = size / min(width, height)
    image = image.resize((int(width * scale), int(height * scale)), Image.Resampling.BICUBIC)
    w, h = (side - side % multiple for side in image.size)
    left, top = round((image.width - w) / 2), round((image.height - h) / 2)
    pixels = np.asarray(image.crop((left, top, left + w, top + h)))
    return normalize(to_float(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]))


def test_patches_of_whole_images_one_after_another(vit_run, tmp_path, photos):
    """Against timm's own way to the tokens, image by image; mean and class token belong to the same pass."""
    model = load_pretrained(vit_run)
    found = extract(vit_run, photos, tmp_path / "p.npz", "--tokens", "patches", "--keep_aspect")
    mean = extract(vit_run, photos, tmp_path / "m.npz", "--tokens", "mean", "--keep_aspect")
    cls = extract(vit_run, photos, tmp_path / "c.npz", "--keep_aspect")
    extract(vit_run, photos, tmp_path / "p.parquet", "--tokens", "patches", "--keep_aspect")
    rows = pq.read_table(tmp_path / "p.parquet").to_pylist()
    assert found["grid"].tolist() == [[2, 2], [2, 2], [2, 2], [2, 2], [2, 5], [2, 5]]
    starts = np.concatenate([[0], found["grid"].prod(1).cumsum()])
    for i, name in enumerate(found["names"]):
        x = reference_view(photos / name, 32, 16)
        with torch.no_grad():
            tokens = model.backbone.get_intermediate_layers(x, 1, norm=True)[0][0].numpy()
            own = model.backbone(x)
            code = model.method.predict(own)
        patches = found["features"][starts[i] : starts[i + 1]]
        np.testing.assert_allclose(patches, tokens, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(mean["features"][i], tokens.mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(cls["features"][i], own[0].numpy(), rtol=1e-4, atol=1e-5)
        assert found["codes"][i] == mean["codes"][i] == cls["codes"][i] == code
        assert np.array_equal(np.float32(rows[i]["features"]), patches.reshape(-1))
        assert (rows[i]["grid_rows"], rows[i]["grid_columns"]) == tuple(found["grid"][i])
    assert np.abs(mean["features"] - cls["features"]).max() > 0.01


def test_patches_of_square_views_have_an_axis_of_their_own(vit_run, tmp_path, photos):
    found = extract(vit_run, photos, tmp_path / "p.npz", "--tokens", "patches", "--image_size", "48")
    assert found["features"].shape == (6, 9, 64) and found["grid"].tolist() == [[3, 3]] * 6
    extract(vit_run, photos, tmp_path / "p.npy", "--tokens", "patches", "--image_size", "48")
    assert np.array_equal(np.load(tmp_path / "p.npy"), found["features"])
    assert json.loads((tmp_path / "p.json").read_text())["grid"] == [[3, 3]] * 6


def test_a_network_without_patches_takes_any_size(run, tmp_path, photos):
    model = load_pretrained(run / "checkpoint.pth")
    found = extract(run / "checkpoint.pth", photos, tmp_path / "f.npz", "--keep_aspect", "--image_size", "37")
    for i, name in enumerate(found["names"]):
        expected = model.backbone(reference_view(photos / name, 37, 1))[0]
        np.testing.assert_allclose(found["features"][i], expected.numpy(), rtol=1e-4, atol=1e-6)


def test_weights_without_a_head(tmp_path, photos, run, capsys):
    torch.save(checkpoints.backbone_weights(checkpoints.load(run / "checkpoint.pth")), tmp_path / "plain.pth")
    found = extract(tmp_path / "plain.pth", photos, tmp_path / "f.npz", "--arch", "resnet8_w8", "--image_size", "32")
    assert found.keys() == {"features", "names", "source"} and found["features"].shape == (6, 8)
    assert (
        extract(tmp_path / "plain.pth", photos, tmp_path / "g.npz", "--arch", "resnet8_w8")["source"]["image_size"]
        == 224
    )
    assert "no head in these weights" in capsys.readouterr().out


def test_names_of_any_bytes(run, tmp_path):
    folder = tmp_path / "odd"
    write_images(folder, 2)
    names = [b"caf\xe9\n1.jpg", b"back\\slash.jpg"]
    for path, name in zip(sorted(folder.iterdir()), names, strict=True):
        os.rename(path, os.path.join(os.fsencode(folder), name))
    found = extract(run / "checkpoint.pth", folder, tmp_path / "f.npz")
    assert [os.fsencode(str(name)) for name in found["names"]] == sorted(names)
    extract(run / "checkpoint.pth", folder, tmp_path / "f.npy")
    assert [os.fsencode(name) for name in json.loads((tmp_path / "f.json").read_text())["names"]] == sorted(names)
    extract(run / "checkpoint.pth", folder, tmp_path / "f.parquet")
    assert pq.read_table(tmp_path / "f.parquet")["name"].to_pylist() == ["back\\\\slash.jpg", "caf\\udce9\\n1.jpg"]


# --- killed, resumed, again -----------------------------------------------------------------------------


class Killed(BaseException):
    pass


def kill_after(monkeypatch, parts, name="write"):
    """End the command as it begins to write its next part after so many; return those that were written."""
    before, made = getattr(files.Parts, name), []

    def write(self, k, *rest):
        if len(made) == parts:
            raise Killed
        made.append(k)
        before(self, k, *rest)

    monkeypatch.setattr(files.Parts, name, write)
    return made


@pytest.mark.parametrize("name", ["f.npz", "f.npy", "f.parquet"])
def test_the_same_command_goes_on_after_a_kill(run, tmp_path, image_folder, monkeypatch, name, capsys):
    weights, images = run / "checkpoint.pth", image_folder / "val"
    (tmp_path / "whole").mkdir()
    extract(weights, images, tmp_path / "whole" / name)
    with monkeypatch.context() as patch:
        made = kill_after(patch, 2)
        with pytest.raises(Killed):
            extract(weights, images, tmp_path / name)
    assert made == [0, 1] and not (tmp_path / name).exists()
    (tmp_path / f".{name}.parts" / ".part_x.tmp").write_bytes(b"half")
    made = kill_after(monkeypatch, 9)
    capsys.readouterr()
    extract(weights, images, tmp_path / name)
    assert made == [2] and "8 images are done already" in capsys.readouterr().out
    assert (tmp_path / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / f".{name}.parts").exists()
    extract(weights, images, tmp_path / name)
    assert made == [2] and "is there already, of the same weights and images" in capsys.readouterr().out
    others = tmp_path / "images"  # of the same names in the same place
    for images in (image_folder / "train", image_folder / "val"):
        shutil.rmtree(others, ignore_errors=True)
        for name_of_class in ("ant", "bee", "cat"):
            (others / name_of_class).mkdir(parents=True)
            shutil.copy2(images / name_of_class / "000.jpg", others / name_of_class)
        extract(weights, others, tmp_path / name)
        assert "is there already" not in capsys.readouterr().out


def test_a_part_that_was_damaged_is_made_again(run, tmp_path, image_folder, monkeypatch):
    weights, images = run / "checkpoint.pth", image_folder / "val"
    with monkeypatch.context() as patch:
        kill_after(patch, 2)
        with pytest.raises(Killed):
            extract(weights, images, tmp_path / "f.npz")
    part = tmp_path / ".f.npz.parts" / "part_0000001.npz"
    part.write_bytes(part.read_bytes()[:-30])
    made = kill_after(monkeypatch, 9)
    extract(weights, images, tmp_path / "f.npz")
    assert made == [1, 2]


def test_what_another_command_left_is_refused(run, tmp_path, image_folder, monkeypatch):
    weights, images = run / "checkpoint.pth", tmp_path / "images"
    shutil.copytree(image_folder / "val", images)
    with monkeypatch.context() as patch:
        kill_after(patch, 1)
        with pytest.raises(Killed):
            extract(weights, images, tmp_path / "f.npz")
    with pytest.raises(UserError, match="is what another command has left .image_size 32, now 16.: finish that one"):
        extract(weights, images, tmp_path / "f.npz", "--image_size", "16")
    write_images(images, 1)
    with pytest.raises(UserError, match="data_hash 12 images .*, now 13 images"):
        extract(weights, images, tmp_path / "f.npz")
    assert (tmp_path / ".f.npz.parts" / "part_0000000.npz").exists()
    (tmp_path / ".g.npz.parts").mkdir()
    (tmp_path / ".g.npz.parts" / "mine.txt").write_text("x")
    with pytest.raises(UserError, match=".g.npz.parts holds no parts of this command: move it away"):
        extract(weights, images, tmp_path / "g.npz")


def test_only_files_of_this_command_are_replaced(run, tmp_path, image_folder):
    weights, images = run / "checkpoint.pth", image_folder / "val"
    for name in ("a.npz", "a.npy", "a.parquet", "b.json"):
        (tmp_path / name).write_bytes(b"mine")
    for name in ("a.npz", "a.npy", "a.parquet", "b.npy"):
        with pytest.raises(UserError, match=r"is there and no file of extract_features.py: choose another name"):
            extract(weights, images, tmp_path / name)
    np.savez(tmp_path / "a.npz", features=np.zeros(3), source=np.array('{"script": "another"}'))
    with pytest.raises(UserError, match="is there and no file of"):
        extract(weights, images, tmp_path / "a.npz")
    for name in ("c.npz", "c.npy", "c.parquet"):
        extract(weights, images, tmp_path / name)
        before = (tmp_path / name).read_bytes()
        extract(weights, images, tmp_path / name, "--image_size", "16")
        assert (tmp_path / name).read_bytes() != before


def on_rank(rank, *commands):
    for arguments in commands:
        extract_features.main(arguments)
    return rank


@pytest.mark.dist
def test_two_processes_write_one_file(run, tmp_path, image_folder):
    images = image_folder / "train"
    one = extract(run / "checkpoint.pth", images, tmp_path / "one.npz")
    first = images / one["names"][0]  # of one image the second process has nothing
    commands = [flags(run / "checkpoint.pth", images, tmp_path / "two.npz"),
                flags(run / "checkpoint.pth", first, tmp_path / "first.npy")]  # fmt: skip
    run_in_processes(tmp_path, on_rank, *commands)
    np.testing.assert_allclose(np.load(tmp_path / "first.npy"), one["features"][:1], rtol=1e-4, atol=1e-6)
    with np.load(tmp_path / "two.npz") as two:
        assert np.array_equal(one["features"], two["features"]) and np.array_equal(one["names"], two["names"])
        assert np.array_equal(one["codes"], two["codes"])


# --- images that cannot be read -------------------------------------------------------------------------


def test_few_unreadable_images_are_left_out_and_named(run, tmp_path, image_folder, capsys):
    """In a part of their own even; repaired, they are in it."""
    folder = tmp_path / "images"
    shutil.copytree(image_folder / "val", folder)
    names = Folder(folder).names.tolist()
    good = extract(run / "checkpoint.pth", folder, tmp_path / "good.npz")
    whole = {name: (folder / name).read_bytes() for name in names[:5]}
    for name in whole:
        (folder / name).write_bytes(b"no image")
    with pytest.raises(UserError, match="4 of 12 images cannot be read, more than --max_bad_images 0.001 allows .0."):
        extract(run / "checkpoint.pth", folder, tmp_path / "f.npz")
    capsys.readouterr()
    for name in ("f.npz", "f.npy", "f.parquet"):
        extract(run / "checkpoint.pth", folder, tmp_path / name, "--max_bad_images", "0.5")
    shown = capsys.readouterr()
    assert shown.err.count("WARNING: left out: cannot read the image") == 15 and names[0] in shown.err
    assert "7 images, 5 left out (they are named in it)" in shown.out
    with np.load(tmp_path / "f.npz") as f:
        assert f["names"].tolist() == names[5:] and np.array_equal(f["features"], good["features"][5:])
        assert list(json.loads(str(f["source"]))["unreadable"]) == names[:5]
    assert json.loads((tmp_path / "f.json").read_text())["names"] == names[5:]
    assert pq.read_table(tmp_path / "f.parquet")["code"].to_pylist() == good["codes"][5:].tolist()


def test_a_repaired_image_is_read_again(run, tmp_path, image_folder, monkeypatch):
    folder = tmp_path / "images"
    shutil.copytree(image_folder / "val", folder)
    name = Folder(folder).names[0]
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(b"no image")
    with pytest.raises(UserError, match="1 of 12 images cannot be read"):
        extract(run / "checkpoint.pth", folder, tmp_path / "f.npz")
    (folder / name).write_bytes(whole)
    made = kill_after(monkeypatch, 9)
    assert len(extract(run / "checkpoint.pth", folder, tmp_path / "f.npz")["names"]) == 12 and made == [0, 1, 2]


def test_images_too_long_to_be_kept_whole(run, tmp_path, image_folder, capsys):
    folder = tmp_path / "images"
    shutil.copytree(image_folder / "val" / "ant", folder)
    Image.new("RGB", (400, 20)).save(folder / "wide.png")
    found = extract(run / "checkpoint.pth", folder, tmp_path / "f.npz", "--keep_aspect", "--max_bad_images", "0.5")
    assert found["source"]["unreadable"] == {
        "wide.png": "wide.png: 400 x 20 pixels are more than 16 to 1, too long to keep"
    }
    assert len(extract(run / "checkpoint.pth", folder, tmp_path / "g.npz")["names"]) == 5  # a square is cut from it


def test_no_image_at_all(run, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match="none of the 1 images could be read: cannot read the image .*a.jpg"):
        extract(run / "checkpoint.pth", tmp_path / "images", tmp_path / "f.npz", "--max_bad_images", "1")
    assert not (tmp_path / "f.npz").exists()


# --- wrong input ----------------------------------------------------------------------------------------


def test_nothing_is_drawn_where_nobody_looks(run, tmp_path, image_folder, capsys):
    extract(run / "checkpoint.pth", image_folder / "val", tmp_path / "f.npz")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("out", "more", "message"),
    [
        ("f.txt", [], "the name has to end in .npz, .npy, .parquet"),
        ("f.npz", ["--tokens", "mean"], "--tokens mean is for ViTs, and --arch resnet8_w8 is none"),
        ("f.npz", ["--images", "/nowhere"], "--images /nowhere does not exist"),
        ("f.npz", ["--images", "EMPTY"], "holds no images"),
        ("f.npz", ["--images", ""], "--images is missing"),
        ("/proc/x/f.npz", [], "--out /proc/x cannot be written"),
        ("link.npz", [], "link.npz is a link, through which nothing is written"),
        ("f.npz", ["--pretrained_weights", "/nowhere.pth"], "/nowhere.pth does not exist"),
        ("f.npz", ["--max_bad_images", "2"], "--max_bad_images 2 must lie between 0 and 1"),
        ("f.npz", ["--image_size", "2"], "cannot take such images"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(run, tmp_path, image_folder, out, more, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link.npz").symlink_to(tmp_path / "elsewhere.npz")
    more = [str(tmp_path / "empty") if x == "EMPTY" else x for x in more]
    with pytest.raises(UserError, match=message) as error:
        extract(run / "checkpoint.pth", image_folder / "val", tmp_path / out, *more)
    assert "\n" not in str(error.value) and sorted(os.listdir(tmp_path)) == ["empty", "link.npz"]


def test_a_network_of_one_size_cannot_keep_the_aspect(tmp_path, photos):
    import timm

    torch.save(timm.create_model("levit_128s", num_classes=0).state_dict(), tmp_path / "levit.pth")
    with pytest.raises(UserError, match="--keep_aspect: --arch timm:levit_128s takes no 224 x "):
        extract(tmp_path / "levit.pth", photos, tmp_path / "f.npz", "--arch", "timm:levit_128s", "--image_size", "224",
                "--keep_aspect")  # fmt: skip
    with pytest.raises(UserError, match="--tokens patches is for ViTs"):
        extract(tmp_path / "levit.pth", photos, tmp_path / "f.npz", "--arch", "timm:levit_128s", "--image_size", "224",
                "--tokens", "patches")  # fmt: skip


def test_the_page_runs_as_written(vit_run, tmp_path, photos, monkeypatch):
    """Every block of Python in docs/features.md, on files of the names it uses."""
    monkeypatch.chdir(tmp_path)
    extract(vit_run, photos, tmp_path / "features.npz")
    extract(vit_run, photos, tmp_path / "patches.npz", "--tokens", "patches", "--keep_aspect")
    for name, image in zip(("a.jpg", "b.jpg"), sorted(photos.rglob("*.jpg")), strict=False):
        shutil.copy(image, tmp_path / name)
    (tmp_path / "output" / "pictures").mkdir(parents=True)
    shutil.copy(vit_run, tmp_path / "output" / "pictures" / "checkpoint.pth")
    shutil.copy(vit_run, tmp_path / "checkpoint.pth")
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "features.md").read_text(), re.MULTILINE | re.DOTALL)
    text = "".join(blocks).replace("/path/to/cplearn", str(ROOT)).replace('"vit_small"', '"backbone"')
    names = {}
    exec(text.replace("224, 224", "32, 32"), names)
    assert len(blocks) == 5 and names["codes"].shape == (2,) and names["width"] == 64
    assert [x.shape[:2] for x in names["maps"]] == [(2, 2)] * 4 + [(2, 5)] * 2
