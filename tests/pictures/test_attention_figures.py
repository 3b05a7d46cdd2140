"""Pictures of attention: what is bright, what is dark, one scale."""

import numpy as np
import pytest
import torch
from PIL import Image

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


def test_the_photo_is_the_region_that_the_network_sees():
    image = Image.new("RGB", (400, 200), "white")
    image.paste("red", (100, 0, 300, 200))  # the middle square
    shown = figures.photo_of(image, (112.5, 12.5, 287.5, 187.5), 100)
    assert shown.size == (100, 100) and (array(shown) == [255, 0, 0]).all()
    assert figures.photo_of(image, (0, 0, 400, 200), 100).size == (100, 50)


@pytest.mark.parametrize("with_masks", [False, True])
@pytest.mark.parametrize("with_pca", [False, True])
def test_pictures_and_the_sheet_of_them(with_masks, with_pca):
    maps = figures.by_name(torch.rand(3, 2, 4, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(maps["mean"], torch.stack([maps[f"head{k}"] for k in (1, 2, 3)]).mean(0))
    masks = {name: m > 0.5 for name, m in maps.items()} if with_masks else {}
    one = figures.Seen("a/b.jpg", photo(), maps, masks, torch.zeros(2, 4, 3) if with_pca else None)
    drawn = figures.pictures(one)
    assert list(drawn) == figures.picture_names(3, with_masks, with_pca)
    columns = figures.headings(drawn)
    assert columns == ["image", "mean", "head1", "head2", "head3", *(["pca"] if with_pca else [])]
    rows = figures.sheet_rows(one, drawn, 80, 0.6)
    assert [len(row) for row in rows] == [len(columns), *([5] if with_masks else [])]
    assert [cell.text for cell in rows[0]][0] == "a/b.jpg" and rows[0][1].text == f"{maps['mean'].max():.1f}×"
    page = figures.draw(rows * 2, list(drawn), 80, 0.6, "title")
    assert page.width == pytest.approx(86 * len(columns) + 6, abs=1) and page.height > 40 * 2 * len(rows)
    head = page.crop((86 * 2 + 8, 18, 86 * 2 + 84, 50))  # head1 of the first row
    assert np.abs(array(head).mean((0, 1)) - array(drawn["head1"]).mean((0, 1))).max() < 12


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
