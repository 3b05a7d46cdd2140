"""The codes as one picture for a paper: a row per code, its images with their probability."""

import io

import numpy as np
from PIL import Image

from cplearn.pictures.codes_page import counted, number, percent
from cplearn.pictures.gallery import Code, Gallery, spread
from cplearn.text import printable

INCH = 0.62  # side of an image
LABEL, GAP, LINE = 1.35, 0.06, 0.17  # inches: room for the text of a row, between images, of a line of text


def draw_sheet(gallery: Gallery, rows: int, columns: int) -> bytes:
    """Return a PNG of the first codes, `columns` images each from the most to the least certain."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    codes = gallery.codes[:rows]
    columns = min(columns, max(len(code.images) for code in codes))
    width = LABEL + columns * (INCH + GAP)
    height = len(codes) * (INCH + LINE + GAP)
    figure = Figure(figsize=(width, height), dpi=300)
    FigureCanvasAgg(figure)
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, width), ylim=(height, 0))
    axis.axis("off")
    for row, code in enumerate(codes):
        top = GAP / 2 + row * (INCH + LINE + GAP)
        axis.text(0.05, top + INCH / 2, _label(code), fontsize=7, va="center", parse_math=False, linespacing=1.25)
        for column, i in enumerate(spread(code.images, columns)):
            left = LABEL + column * (INCH + GAP)
            pixels = np.asarray(Image.open(io.BytesIO(gallery.thumbnails[i])))
            axis.imshow(pixels, extent=(left, left + INCH, top + INCH, top), interpolation="antialiased", aspect="auto")
            value = number(gallery.certainty[i].item())
            axis.text(left + INCH / 2, top + INCH + LINE / 2, value, fontsize=6.5, ha="center", va="center")
    axis.set(xlim=(0, width), ylim=(height, 0))  # imshow moves them
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": "visualize_codes.py"})
    return file.getvalue()


def _label(code: Code) -> str:
    lines = [f"code {code.number}", counted(code.count, "image")]
    if code.classes:
        name = printable(code.classes[0][0])
        lines.append(f"{percent(code.purity)} {name if len(name) <= 16 else name[:14] + '...'}")
    return "\n".join(lines)
