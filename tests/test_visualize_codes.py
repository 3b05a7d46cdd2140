"""The command: what it writes of every method and of any folder, and what it refuses."""

import html
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import eval_flags, train, write_images
from PIL import Image

import eval_cluster
import visualize_codes
from cplearn import checkpoints, tensor_files
from cplearn.data.datasets import Folder
from cplearn.errors import UserError
from cplearn.load import EvalTransform, load_pretrained


def buttons(page: str, words: str = "") -> list[dict[str, str]]:
    """Return the attributes of the shown images of a page, after these words."""
    found = re.findall(r"<li><button ([^>]*)>", page.partition(f"<h2>{words}")[2] if words else page)
    return [{k: html.unescape(v) for k, v in re.findall(r'data-(\w+)="([^"]*)"', x)} for x in found]


def test_the_page_of_a_run(run, tmp_path, image_folder):
    numbers = visualize_codes.main(eval_flags(run, tmp_path, "--codes", "4", "--per_code", "3"))
    page = (tmp_path / "codes.html").read_text()
    csv = eval_cluster.main(eval_flags(run, tmp_path, "--out_csv", str(tmp_path / "codes.csv")))
    rows = [line.split(",") for line in (tmp_path / "codes.csv").read_text().splitlines()[1:]]
    code_of = {name: code for name, _, code in rows}
    shown = buttons(page)
    assert len(shown) >= 4 and all(x["code"] == code_of[x["name"]] for x in shown)
    assert numbers["trained"]["used"] == csv["codes"]["used_codes"] and "random init" in numbers
    assert f"The 4 most used of the {numbers['trained']['used']} codes that 12 images chose, out of 40" in page
    assert f"{image_folder / 'val'} (3 classes)" in page and "images: 12, all of them" in page and "epoch 2" in page
    assert tensor_files.load_file_and_hash(run / "checkpoint.pth", [])[1] in page
    model = load_pretrained(run / "checkpoint.pth")
    (i,) = (i for i, name in enumerate(Folder(image_folder / "val").names) if name == shown[0]["name"])
    with torch.no_grad():
        pixels = EvalTransform(32)(Folder(image_folder / "val")[i][0])[None]
        h = model.method.embed(model.backbone(pixels))
        p = model.method.head.logits(h).softmax(1).max().item()
    assert f'["probability", "{p:.3f}"]' in shown[0]["facts"] or f"{p:.4f}" in shown[0]["facts"]
    sheet = Image.open(tmp_path / "codes.png")
    assert sheet.width > 600 and np.asarray(sheet.convert("L")).std() > 20
    visualize_codes.main(eval_flags(run, tmp_path, "--codes", "2", "--baseline", "false"))  # its own files are replaced
    assert "The 2 most used" in (tmp_path / "codes.html").read_text()


def test_a_folder_a_sample_and_neighbours(run, tmp_path, image_folder):
    photos = tmp_path / "photos"
    write_images(photos, 9, (300, 200), seed=5)
    for name in (b'\xff<x>".jpg', b"=cmd,'{{style}}.jpg"):
        shutil.copy(photos / "000.jpg", photos / os.fsdecode(name))
    asked = ["--images", str(photos), "--neighbours", str(photos / "000.jpg"), str(image_folder / "val/ant/001.jpg")]
    numbers = visualize_codes.main(eval_flags(run, tmp_path / "out", *asked, "--per_code", "5"))
    assert numbers["trained"]["purity"] is None
    page = (tmp_path / "out" / "codes.html").read_text()
    assert "images: 11, all of them" in page and "no labels" in page
    near = buttons(page, "Nearest to ")[:5]
    assert {x["name"] for x in near[:2]} == {
        '\\udcff<x>".jpg',
        "=cmd,'{{style}}.jpg",
    }  # the same pixels, and not itself
    assert '["cosine", "1.000"]' in near[0]["facts"] and "000.jpg" not in [x["name"] for x in near]
    more = ["--images", str(photos), "--max_images", "6", "--seed", "3", "--baseline", "false"]
    visualize_codes.main(eval_flags(run, tmp_path / "out", *more))
    page = (tmp_path / "out" / "codes.html").read_text()
    assert "images: 6, a random sample of 11, seed 3" in page


def test_one_image_and_a_folder_that_is_not_split(run, tmp_path, image_folder):
    visualize_codes.main(eval_flags(run, tmp_path / "one", "--images", str(image_folder / "val/ant/000.jpg")))
    assert "All 1 codes that 1 image chose, out of 40" in (tmp_path / "one/codes.html").read_text()
    write_images(tmp_path / "flat", 40)
    train(tmp_path / "run", "--data_path", str(tmp_path / "flat"), "--epochs", "1", "--max_steps", "1")
    visualize_codes.main(eval_flags(tmp_path / "run", tmp_path / "run/codes", "--baseline", "false"))
    page = (tmp_path / "run/codes/codes.html").read_text()
    assert f"data: {tmp_path / 'flat'} (no labels)" in page and "images: 40, all of them" in page


@pytest.mark.parametrize("method", ["dino", "swav", "barlow_twins", "gedi", "gedi_gen", "self_classifier"])
def test_every_method(tmp_path, method):
    small = ("--image_size", "32", "--sgld_buffer", "40", "--sgld_steps", "1") if method == "gedi_gen" else ()
    train(tmp_path, "--method", method, "--dataset", "digits", *small, "--max_steps", "1")
    more = ["--max_images", "80", "--codes", "5", "--per_code", "4", "--baseline", "false"]
    numbers = visualize_codes.main(eval_flags(tmp_path, tmp_path, *more))
    page = (tmp_path / "codes.html").read_text()
    assert numbers["trained"]["used"] >= 1 and f" {method}" in page or f"{method} " in page
    facts = "".join(x["facts"] for x in buttons(page))
    assert ('"standardized output"' in facts, '"probability"' in facts) == (
        method == "barlow_twins",
        method != "barlow_twins",
    )
    if numbers["trained"]["used"] > 1:
        assert ("Nearest by vector" in page) == (method != "barlow_twins")
    assert ("dino (teacher)" in page) == (method == "dino")


def test_weights_without_a_head(run, tmp_path, image_folder):
    state = checkpoints.load(run / "checkpoint.pth")["model"]
    backbone = {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
    torch.save(backbone, tmp_path / "backbone.pth")
    flags = ["--pretrained_weights", str(tmp_path / "backbone.pth"), "--arch", "resnet8_w8", "--image_size", "32",
             "--output_dir", str(tmp_path / "out"), "--num_workers", "0", "--device", "cpu"]  # fmt: skip
    with pytest.raises(UserError, match="backbone.pth .*--neighbours"):
        visualize_codes.main(flags)
    query = ["--neighbours", str(image_folder / "val/bee/002.jpg")]
    with pytest.raises(UserError, match="--images"):
        visualize_codes.main([*flags, *query])
    assert visualize_codes.main([*flags, *query, "--images", str(image_folder / "val")]) == {}
    page = (tmp_path / "out/codes.html").read_text()
    assert len(buttons(page)) == 11 and "bee/002.jpg" not in [x["name"] for x in buttons(page)]
    assert not (tmp_path / "out/codes.png").exists()


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--images", "/nowhere"], "--images /nowhere"),
        (["--images", "README.md"], "--images README.md"),
        (["--images", "docs"], "docs"),
        (["--images", "docs", "--split", "val"], "--split val"),
        (["--neighbours", "/nowhere.jpg"], "--neighbours /nowhere.jpg"),
        (["--neighbours", "docs"], "--neighbours docs"),
        (["--neighbours", "README.md"], "README.md"),
        (["--codes", "0"], "--codes 0"),
        (["--codes", "5000", "--thumbnail", "224"], "--codes 5000"),
        (["--output_dir", "/proc/x"], "--output_dir /proc/x"),
        (["--pretrained_weights", "/nowhere.pth"], "/nowhere.pth"),
        (["--pretrained_weights", ""], "--pretrained_weights"),
        (["--image_size", "1"], "--image_size 1"),
    ],
)
def test_wrong_input_is_one_line(run, tmp_path, more, named, monkeypatch):
    monkeypatch.chdir(Path(__file__).resolve().parent.parent)
    with pytest.raises(UserError, match=named) as caught:
        visualize_codes.main(eval_flags(run, tmp_path / "out", *more))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize("name", ["codes.html", "codes.png"])
def test_files_of_others_are_left_alone(run, tmp_path, name):
    (tmp_path / name).write_text("my own")
    with pytest.raises(UserError, match=f"--output_dir .*{name}"):
        visualize_codes.main(eval_flags(run, tmp_path))
    assert [path.read_text() for path in tmp_path.iterdir()] == ["my own"]
