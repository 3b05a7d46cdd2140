"""Figures as files, and words in them."""

from matplotlib.cbook import is_math_text
from PIL import Image

from cplearn.files import replaceable
from cplearn.pictures.style import as_text, png_mark, pyplot, save_figure, shortened


def test_a_figure_keeps_its_colors_and_names_its_origin(tmp_path):
    figure, axis = pyplot().subplots()
    axis.plot([0, 1], color="#117733", lw=8)
    save_figure(figure, tmp_path, "x", software="plot_runs.py")
    with Image.open(tmp_path / "x.png") as image:
        colors = {color for count, color in image.convert("RGB").getcolors(100_000) if count > 500}
    assert (0x11, 0x77, 0x33) in colors and (255, 255, 255) in colors
    assert replaceable(tmp_path / "x.png", png_mark("plot_runs.py")) and not replaceable(tmp_path / "x.png", png_mark())


def test_words_of_others_are_shown_as_they_are():
    for words in ("$x$", r"\$x\$", "a$b", "$$$", "_hidden"):
        assert not is_math_text(as_text(words)) and not as_text(words).startswith("_")
    assert len(as_text("x" * 300)) == 60
    assert [shortened(x, 6) for x in ("abcdef", "abcdefg", "abcdefgh")] == ["abcdef", "ab...g", "ab...h"]
