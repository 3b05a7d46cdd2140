"""Figures as files."""

from PIL import Image

from cplearn.pictures.style import pyplot, save_figure, shortened


def test_a_figure_replaces_a_link_and_leaves_what_it_led_to(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "x.png").symlink_to(tmp_path / "precious")
    figure, axis = pyplot().subplots()
    axis.plot([0, 1], color="#117733", lw=8)
    save_figure(figure, tmp_path, "x")
    assert (tmp_path / "precious").read_text() == "mine" and not (tmp_path / "x.png").is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["precious", "x.png"]
    with Image.open(tmp_path / "x.png") as image:
        colors = {color for count, color in image.convert("RGB").getcolors(100_000) if count > 500}
    assert (0x11, 0x77, 0x33) in colors and (255, 255, 255) in colors


def test_shortened():
    assert shortened("abcdef", 6) == "abcdef" and shortened("abcdefg", 6) == "abc..."
