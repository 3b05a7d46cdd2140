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
    of_images = ("data", "data_hash", "images_sha256", "dataset", "data_path", "class_list")
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


def test_views_of_other_sizes(run, vit_run, tmp_path, photos):
    """Patches of square views have an axis of their own; a network without patches takes any size."""
    found = extract(vit_run, photos, tmp_path / "p.npz", "--tokens", "patches", "--image_size", "48")
    assert found["features"].shape == (6, 9, 64) and found["grid"].tolist() == [[3, 3]] * 6
    extract(vit_run, photos, tmp_path / "p.npy", "--tokens", "patches", "--image_size", "48")
    assert np.array_equal(np.load(tmp_path / "p.npy"), found["features"])
    assert json.loads((tmp_path / "p.json").read_text())["grid"] == [[3, 3]] * 6

    model = load_pretrained(run / "checkpoint.pth")
    found = extract(run / "checkpoint.pth", photos, tmp_path / "f.npz", "--keep_aspect", "--image_size", "37")
    for i, name in enumerate(found["names"]):
        expected = model.backbone(reference_view(photos / name, 37, 1))[0]
        np.testing.assert_allclose(found["features"][i], expected.numpy(), rtol=1e-4, atol=1e-6)


def test_weights_without_a_head(tmp_path, photos, run):
    torch.save(checkpoints.backbone_weights(checkpoints.load(run / "checkpoint.pth")), tmp_path / "plain.pth")
    for size in (32, 224):  # the second is what weights that say nothing are taken to be of
        more = ["--image_size", "32"] if size == 32 else []
        found = extract(tmp_path / "plain.pth", photos, tmp_path / f"{size}.npz", "--arch", "resnet8_w8", *more)
        assert found.keys() == {"features", "names", "source"} and found["features"].shape == (6, 8)
        assert found["source"]["image_size"] == size


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


def test_what_another_command_left_is_refused(run, tmp_path, image_folder, monkeypatch):
    weights, images = run / "checkpoint.pth", tmp_path / "images"
    shutil.copytree(image_folder / "val", images)
    with monkeypatch.context() as patch:
        kill_after(patch, 1)
        with pytest.raises(Killed):
            extract(weights, images, tmp_path / "f.npz")
    with pytest.raises(UserError, match="image_size 32, now 16"):
        extract(weights, images, tmp_path / "f.npz", "--image_size", "16")
    write_images(images, 1)
    with pytest.raises(UserError, match="data_hash 12 images .*, now 13 images"):
        extract(weights, images, tmp_path / "f.npz")
    (images / "000.jpg").unlink()
    part = tmp_path / ".f.npz.parts" / "part_0000000.npz"
    part.write_bytes(part.read_bytes()[:-30])
    with pytest.raises(UserError, match=part.name):
        extract(weights, images, tmp_path / "f.npz")
    assert part.exists()
    (tmp_path / ".g.npz.parts").mkdir()
    (tmp_path / ".g.npz.parts" / "mine.txt").write_text("x")
    with pytest.raises(UserError, match=".g.npz.parts"):
        extract(weights, images, tmp_path / "g.npz")


def test_only_files_of_this_command_are_replaced(run, tmp_path, image_folder):
    weights, images = run / "checkpoint.pth", image_folder / "val"
    for name in ("a.npy", "a.parquet", "b.json"):
        (tmp_path / name).write_bytes(b"mine")
    np.savez(tmp_path / "a.npz", features=np.zeros(3), source=np.array('{"script": "another"}'))
    (tmp_path / "link.npz").symlink_to(tmp_path / "elsewhere.npz")
    for name in ("a.npz", "a.npy", "a.parquet", "b.npy", "link.npz"):
        with pytest.raises(UserError, match="b.json" if name == "b.npy" else name):
            extract(weights, images, tmp_path / name)
    assert not (tmp_path / "elsewhere.npz").exists() and (tmp_path / "a.npy").read_bytes() == b"mine"
    for name in ("c.npz", "c.npy", "c.parquet"):
        extract(weights, images, tmp_path / name)
        before = (tmp_path / name).read_bytes()
        extract(weights, images, tmp_path / name, "--image_size", "16")
        assert (tmp_path / name).read_bytes() != before


def test_files_of_earlier_versions_are_known(tmp_path):
    """Their source begins with the script's name; now it ends with it."""
    source = json.dumps({"script": "extract_features", "weights_sha256": "a", "unreadable": {}})
    np.savez(tmp_path / "f.npz", features=np.zeros((2, 3)), source=np.array(source))
    np.save(tmp_path / "f.npy", np.zeros((2, 3)))
    (tmp_path / "f.json").write_text(f'{{"source": {source}, "names": ["a"]}}')
    for name in ("f.npz", "f.npy"):
        files.check_out(tmp_path / name)
        assert files.source_of(tmp_path / name)["weights_sha256"] == "a"
    assert files.source_of(tmp_path / "g.npz") == files.source_of(tmp_path / "g.npy") == {}


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
    """Of parts that are done, those with an image that could not be read are made again."""
    folder = tmp_path / "images"
    shutil.copytree(image_folder / "val", folder)
    name = Folder(folder).names[5]
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(b"no image")
    with pytest.raises(UserError, match="1 of 12 images cannot be read"):
        extract(run / "checkpoint.pth", folder, tmp_path / "f.npz")
    (folder / name).write_bytes(content)
    made = kill_after(monkeypatch, 9)
    assert len(extract(run / "checkpoint.pth", folder, tmp_path / "f.npz")["names"]) == 12 and made == [1, 2]


def test_images_too_long_and_no_image_at_all(run, tmp_path, image_folder):
    folder = tmp_path / "images"
    shutil.copytree(image_folder / "val" / "ant", folder)
    Image.new("RGB", (400, 20)).save(folder / "wide.png")
    found = extract(run / "checkpoint.pth", folder, tmp_path / "f.npz", "--keep_aspect", "--max_bad_images", "0.5")
    assert list(found["source"]["unreadable"]) == ["wide.png"] and len(found["names"]) == 4
    assert len(extract(run / "checkpoint.pth", folder, tmp_path / "g.npz")["names"]) == 5  # a square is cut from it
    (tmp_path / "a.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match="a.jpg"):
        extract(run / "checkpoint.pth", tmp_path / "a.jpg", tmp_path / "h.npz", "--max_bad_images", "1")
    assert not (tmp_path / "h.npz").exists()


# --- wrong input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("out", "more", "named"),
    [
        ("f.txt", [], "f.txt"),
        ("f.npz", ["--tokens", "mean"], "--tokens mean .* resnet8_w8"),
        ("f.npz", ["--images", "/nowhere"], "--images /nowhere"),
        ("f.npz", ["--images", "EMPTY"], "empty"),
        ("/proc/x/f.npz", [], "--out /proc/x"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(run, tmp_path, image_folder, out, more, named):
    (tmp_path / "empty").mkdir()
    more = [str(tmp_path / "empty") if x == "EMPTY" else x for x in more]
    with pytest.raises(UserError, match=named) as error:
        extract(run / "checkpoint.pth", image_folder / "val", tmp_path / out, *more)
    assert "\n" not in str(error.value) and os.listdir(tmp_path) == ["empty"]


def test_a_network_of_one_size_has_neither_whole_images_nor_patches(tmp_path, photos):
    import timm

    torch.save(timm.create_model("levit_128s", num_classes=0).state_dict(), tmp_path / "levit.pth")
    common = ("--arch", "timm:levit_128s", "--image_size", "224")
    for more in (["--keep_aspect"], ["--tokens", "patches"]):
        with pytest.raises(UserError, match=f"{' '.join(more)}.* timm:levit_128s"):
            extract(tmp_path / "levit.pth", photos, tmp_path / "f.npz", *common, *more)


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
