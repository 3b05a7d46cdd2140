"""Pictures of attention: what is bright, what is dark, one scale; and that no file of somebody else is touched."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from cplearn.errors import UserError
from cplearn.pictures import attention
from cplearn.pictures import attention_figures as figures


def array(picture):
    return np.asarray(picture).astype(float)


def photo(width=80, height=40):
    return Image.new("RGB", (width, height), (200, 40, 40))


def test_attention_is_bright_where_it_is():
    shares = torch.zeros(4, 8)
    shares[1, 6] = 9.0
    seen = array(figures.overlay(photo(), shares)).sum(-1)
    row, column = np.unravel_index(seen.argmax(), seen.shape)
    assert 10 <= row < 20 and 60 <= column < 70
    assert seen.shape == (40, 80) and seen[:, :40].max() < 0.4 * seen.max()


def test_even_attention_does_not_look_like_a_find():
    even, little, much = (figures.overlay(photo(), torch.full((2, 2), x)) for x in (1.0, 1.1, 3.0))
    assert np.abs(array(even) - array(little)).max() < 20 < np.abs(array(even) - array(much)).max()
    assert np.array_equal(array(much), array(figures.overlay(photo(), torch.full((2, 2), 50.0))))


def test_a_mask_keeps_the_photo_inside_only():
    mask = torch.tensor([[True, False]])
    seen = array(figures.cut_out(photo(), mask))
    assert (seen[:, :40] == [200, 40, 40]).all() and (seen[:, 40:].sum(-1) < 220).all()


def test_components_are_red_green_and_blue():
    scores = torch.tensor([[[2.0, -2.0, 0.0], [torch.nan] * 3]])
    seen = array(figures.component_colors(scores, (20, 10)))
    assert (seen[:, :10] == [255, 0, 128]).all() and (seen[:, 10:] == 255).all()


def test_the_photo_is_the_part_that_the_network_sees():
    image = Image.new("RGB", (400, 200), "white")
    image.paste("red", (100, 0, 300, 200))  # the middle square
    square = attention.plan_view(image.size, 224, (16, 16))
    shown = figures.photo_of(image, square, 100)
    assert shown.size == (100, 100) and (array(shown) == [255, 0, 0]).all()
    whole = attention.plan_view(image.size, 64, (16, 16), keep_aspect=True)
    assert figures.photo_of(image, whole, 100).size == (100, 50)
    squeezed = attention.plan_view(image.size, 32, (16, 16))  # is shown as it was before
    assert figures.photo_of(image, squeezed, 100).size == (100, 50)


def seen(**more):
    maps = figures.by_name(torch.rand(3, 2, 4, generator=torch.Generator().manual_seed(0)))
    return figures.Seen("a/b.jpg", photo(), maps, **{"masks": None, "components": None, **more})


@pytest.mark.parametrize("with_masks", [False, True])
@pytest.mark.parametrize("with_pca", [False, True])
def test_pictures_and_their_names(with_masks, with_pca):
    masks = {name: m > 0.5 for name, m in seen().maps.items()} if with_masks else None
    one = seen(masks=masks, components=torch.zeros(2, 4, 3) if with_pca else None)
    drawn = figures.pictures(one)
    assert sorted(drawn) == sorted(figures.picture_names(3, with_masks, with_pca))
    sheet = figures.Sheet(80, "title", 0.6 if with_masks else None)
    sheet.add(one)
    sheet.add(one)
    assert sheet.headings == ["image", "mean", "head 1", "head 2", "head 3", *(["components"] if with_pca else [])]
    page = sheet.draw()
    assert page.width == 6 + 86 * len(sheet.headings)
    assert sum(row.height for row in sheet.rows) < page.height
    place = (6 + 86 * 2, round(2 * sheet.font.size))  # head 1 of the first row
    cell = page.crop((*place, place[0] + 80, place[1] + 40))
    assert np.array_equal(array(cell), array(drawn["head1"]))


def test_the_mean_is_that_of_the_heads():
    maps = torch.rand(3, 2, 4)
    assert torch.equal(figures.by_name(maps)["mean"], maps.mean(0))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cat/003.jpg", "0007_cat_003"),
        ("x.y.png", "0007_x.y"),
        ("<a href=x>.jpg", "0007__a_href_x_"),
        ("\udce9\n.jpg", "0007___"),
        ("ä" * 300 + ".jpg", "0007_" + "ä" * 50),
        ("../../etc.png", "0007_.._.._etc"),
    ],
)
def test_folder_names(name, expected):
    assert figures.folder_name(7, name) == expected and len(expected.encode()) < 250


# --- files ------------------------------------------------------------------------------------------------


def write_all(folder, *names):
    out = figures.OutputFolder(str(folder), list(names))
    out.open()
    for name in names:
        out.write(name, name.encode())
    out.close({"more": 1})


def test_a_second_call_replaces_the_first_ones_files_only(tmp_path):
    write_all(tmp_path, "sheet.png", "0001_a/mean.png", "0001_a/head1.png", "attention.npz")
    (tmp_path / "0001_a" / "mine.txt").write_text("kept")
    write_all(tmp_path, "sheet.png", "0001_b/mean.png")
    left = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert left == ["0001_a/mine.txt", "0001_b/mean.png", "attention.json", "sheet.png"]
    record = json.loads((tmp_path / "attention.json").read_text())
    assert record["more"] == 1 and record["files"] == ["0001_b/mean.png", "attention.json", "sheet.png"]


def test_a_killed_call_can_be_repeated(tmp_path):
    out = figures.OutputFolder(str(tmp_path), ["sheet.png", "0001_a/mean.png"])
    out.open()
    out.write("0001_a/mean.png", b"")
    write_all(tmp_path, "sheet.png", "0001_a/mean.png")


@pytest.mark.parametrize("name", ["sheet.png", "0001_a/mean.png", "attention.json"])
def test_files_of_somebody_else_are_in_the_way(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=f"--output_dir .*: {name} was not written by visualize_attention.py"):
        figures.OutputFolder(str(tmp_path), ["sheet.png", "0001_a/mean.png"])
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize("name", ["sheet.png", "0001_a", "attention.json"])
def test_nothing_is_written_through_a_link(tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is a link: choose another folder"):
        figures.OutputFolder(str(tmp_path / "out"), ["sheet.png", "0001_a/mean.png"])


def test_a_list_that_names_files_outside_removes_none(tmp_path):
    out = tmp_path / "out"
    write_all(out, "sheet.png")
    for name in ("victim.png", "out/kept.txt"):
        (tmp_path / name).write_text("")
    listed = ["../victim.png", str(tmp_path / "victim.png"), "kept.txt", 3, "sheet.png"]
    (out / "attention.json").write_text(json.dumps({"script": "visualize_attention", "files": listed}))
    write_all(out, "0001_a/mean.png")
    assert (tmp_path / "victim.png").exists() and (out / "kept.txt").exists() and not (out / "sheet.png").exists()
