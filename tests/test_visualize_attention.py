"""The command: what it writes of which weights and images, and what it refuses before it writes anything."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from helpers import train, write_images
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

import visualize_attention
from cplearn import checkpoints, load_backbone
from cplearn.backbones import build_backbone
from cplearn.errors import UserError
from cplearn.pictures import attention


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    write_images(folder / "ant", 2, (90, 60), seed=1)
    write_images(folder / "bee", 1, (50, 80), seed=2)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A vit_tiny's state dict with DINO's names, its attention far from even."""
    torch.manual_seed(0)
    network = build_backbone("vit_tiny", patch_size=8, image_size=32)
    for name, parameter in network.named_parameters():
        parameter.data.mul_(4.0 if "qkv.weight" in name else 1.0)
    path = tmp_path_factory.mktemp("weights") / "vit.pth"
    checkpoints.write(path, network.state_dict())
    return path


def flags(weights, images, out, *more):
    return ["--pretrained_weights", str(weights), "--images", str(images), "--output_dir", str(out), "--device", "cpu",
            *more]  # fmt: skip


BARE = ("--arch", "vit_tiny", "--patch_size", "8", "--image_size", "32")


def draw(weights, images, out, *more):
    return visualize_attention.main(flags(weights, images, out, *BARE, *more))


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_everything_is_written(weights, photos, tmp_path, capsys):
    records = draw(weights, photos, tmp_path, "--threshold", "0.6", "--pca", "--save_maps")
    maps = ["mean", "head1", "head2", "head3"]
    names = ["image", *maps, *(f"mask_{name}" for name in maps), "pca"]
    folders = ["0001_ant_000", "0002_ant_001", "0003_bee_000"]
    expected = {f"{folder}/{name}.png" for folder in folders for name in names}
    expected |= {"sheet.png", "attention.npz", "attention.json"}
    assert set(files(tmp_path)) == expected
    kept = np.load(tmp_path / "attention.npz")
    assert kept["names"].tolist() == ["ant/000.jpg", "ant/001.jpg", "bee/000.jpg"]
    assert kept["attention"].shape == (3, 3, 4, 4) and kept["prefix"].shape == (3, 3, 1)
    assert np.allclose(kept["attention"].sum((2, 3)) + kept["prefix"].sum(2), 1, atol=1e-5)
    loaded = load_backbone(weights, arch="vit_tiny", patch_size=8, image_size=32)
    x = loaded.transform(Image.open(photos / "bee" / "000.jpg"))[None]
    assert np.allclose(attention.last_block(loaded.model, x).attention[0].numpy(), kept["attention"][2], atol=1e-6)
    record = json.loads((tmp_path / "attention.json").read_text())
    assert record["images"] == records and record["arch"] == "vit_tiny" and len(record["weights_sha256"]) == 64
    assert records[2]["largest"] == pytest.approx((kept["attention"][2].max((1, 2)) * 17).tolist())
    assert max(records[2]["largest"]) > 1.5
    assert "| head 3 |" in capsys.readouterr().out


def test_the_same_command_writes_the_same_bytes(weights, photos, tmp_path):
    written = []
    for _ in range(2):
        draw(weights, photos, tmp_path, "--pca_foreground", "--keep_aspect", "--save_maps")
        written.append(files(tmp_path))
    assert written[0] == written[1] and len(written[0]) == 3 * 6 + 3
    kept = np.load(tmp_path / "attention.npz")
    assert kept["attention_1"].shape == (3, 4, 6) and kept["attention_2"].shape == (3, 6, 4)


def test_a_call_replaces_the_files_of_an_earlier_one_and_nothing_else(weights, photos, tmp_path):
    draw(weights, photos, tmp_path, "--save_maps")
    (tmp_path / "0001_ant_000" / "mine.png").write_text("kept")
    (tmp_path / "sheet.png").rename(tmp_path / "first.png")
    draw(weights, photos / "ant" / "001.jpg", tmp_path)
    expected = {f"0001_001/{name}.png" for name in ("image", "mean", "head1", "head2", "head3")}
    expected |= {"0001_ant_000/mine.png", "first.png", "sheet.png", "attention.json"}
    assert set(files(tmp_path)) == expected


@pytest.mark.parametrize("name", ["sheet.png", "0001_000/mean.png", "attention.json", "attention.npz"])
def test_files_of_others_are_in_the_way(weights, photos, tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=f"--output_dir .*{name}"):
        draw(weights, photos / "ant" / "000.jpg", tmp_path, "--save_maps")
    assert files(tmp_path) == {name: b"mine"}


def test_a_sample_is_chosen_by_seed(weights, photos, tmp_path, monkeypatch):
    class Hundred:
        names, labels, classes, where = [str(i) for i in range(100)], [-1] * 100, None, "numbers"

        def __len__(self):
            return 100

    def chosen(*more):
        args = visualize_attention.get_args_parser().parse_args(flags(weights, photos, tmp_path, *more))
        return [int(name) for name in visualize_attention.choose(Hundred(), args).names]

    assert chosen() == list(range(100)) == chosen("--sample", "500")
    assert len(set(chosen("--sample", "5"))) == 5 and chosen("--sample", "5") == chosen("--sample", "5")
    assert chosen("--sample", "5") != chosen("--sample", "5", "--seed", "1")
    assert len(draw(weights, photos, tmp_path, "--sample", "1")) == 1
    monkeypatch.setattr(visualize_attention, "MOST", 99)
    with pytest.raises(UserError, match="--images .* 100 images: add --sample"):
        chosen()


def test_one_image_at_any_resolution(weights, photos, tmp_path):
    image = photos / "ant" / "000.jpg"
    draw(weights, image, tmp_path, "--image_size", "64", "--keep_aspect")
    assert Image.open(tmp_path / "0001_000" / "head1.png").size == (480, 320)
    assert np.asarray(Image.open(tmp_path / "sheet.png")).std() > 10


def test_many_images_make_several_sheets(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(visualize_attention.figures, "ROWS", 2)
    write_images(tmp_path / "images", 3)
    draw(weights, tmp_path / "images", tmp_path / "out", "--tile", "40")
    heights = [Image.open(tmp_path / "out" / f"sheet_0{k}.png").height for k in (1, 2)]
    assert heights[0] > heights[1] and not (tmp_path / "out" / "sheet_03.png").exists()


def test_a_run_and_its_random_initialization(photos, tmp_path):
    train(tmp_path, "--arch", "timm:test_vit", "--max_steps", "1", "--lr", "0.05")
    common = flags(tmp_path / "checkpoint.pth", photos / "ant" / "000.jpg", tmp_path / "out", "--image_size", "64")
    trained, random = visualize_attention.main(common), visualize_attention.main([*common, "--random_init"])
    assert trained != random and len(trained[0]["largest"]) == 2
    record = json.loads((tmp_path / "out" / "attention.json").read_text())
    assert record["random_init"] and record["image_size"] == 64 and record["epoch"] == 0


def test_weights_of_dino(weights, photos, tmp_path):
    """Its training checkpoint: networks under student and teacher, with its wrappers' prefixes."""
    state = checkpoints.load_file(weights)
    torch.save({"teacher": {f"backbone.{k}": v for k, v in state.items()}, "student": {}}, tmp_path / "dino.pth")
    image = photos / "ant" / "000.jpg"
    assert draw(tmp_path / "dino.pth", image, tmp_path / "a") == draw(weights, image, tmp_path / "b")


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (("--images", "/nowhere"), "--images /nowhere"),
        (("--images", "pyproject.toml"), "--images pyproject.toml"),
        (("--images", ""), "--images"),
        (("--pretrained_weights", "/nowhere.pth"), "/nowhere.pth"),
        (("--output_dir", "/proc/x"), "--output_dir /proc/x"),
        (("--threshold", "1.5"), "--threshold 1.5"),
        (("--threshold", "0"), "--threshold 0"),
        (("--sample", "0"), "--sample 0"),
        (("--image_size", "30"), "--image_size 30"),
        (("--tile", "2"), "--tile 2"),
        (("--arch", "resnet8_w8"), "--arch"),
        (("--checkpoint_key", "student"), "--checkpoint_key student"),
    ],
)
def test_wrong_flags(weights, photos, tmp_path, more, named):
    with pytest.raises(UserError, match=named) as caught:
        draw(weights, photos, tmp_path / "out", *more)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_a_cnn_is_told_what_has_attention(run, photos, tmp_path):
    with pytest.raises(UserError, match="--arch resnet8_w8 .*vit_tiny"):
        visualize_attention.main(flags(run / "checkpoint.pth", photos, tmp_path / "out"))


def test_a_network_for_squares(weights, photos, tmp_path):
    args = visualize_attention.get_args_parser().parse_args(flags(weights, photos, tmp_path, *BARE))
    model, cpu = visualize_attention.cli.open_network(args, "cpu"), torch.device("cpu")
    assert visualize_attention.check_network(model, True, cpu) == 3
    small = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=4, num_classes=0)
    model = dataclasses.replace(model, backbone=small.eval(), arch="timm:small")
    assert visualize_attention.check_network(model, False, cpu) == 4
    with pytest.raises(UserError, match="--keep_aspect.* timm:small"):
        visualize_attention.check_network(model, True, cpu)


@pytest.mark.parametrize("wrong", ["damaged", "strip", "none"])
def test_images_are_checked_first(weights, photos, tmp_path, wrong):
    """One that cannot be read, one that is too long to be shown whole, and none at all."""
    folder = tmp_path / "images"
    if wrong == "none":
        folder.mkdir()
    else:
        shutil.copytree(photos, folder)
        Image.new("RGB", (600, 20)).save(folder / "bee" / "strip.png")
    if wrong == "damaged":
        content = (folder / "bee" / "strip.png").read_bytes()
        (folder / "bee" / "strip.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="images" if wrong == "none" else "bee/strip.png"):
        draw(weights, folder, tmp_path / "out", "--keep_aspect")
    assert not (tmp_path / "out").exists()


def test_names_of_any_bytes(weights, photos, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("<b>&.jpg", "\udce9.jpg", "=1+1.jpg", "a\nb.jpg", "漢字$x_$.jpg"):
        shutil.copy(photos / "ant" / "000.jpg", folder / name)
    records = draw(weights, folder, tmp_path / "out", "--save_maps")
    assert len(records) == 5 and "\\udce9.jpg" in [r["image"] for r in records]
    assert all((tmp_path / "out" / r["folder"] / "mean.png").is_file() for r in records)
