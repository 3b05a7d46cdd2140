"""Sheets: pictures in rows on one page, each with a line of text below it."""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from PIL import Image

from cplearn.pictures.style import pyplot

GAP = 0.06  # inches between pictures


class Cell(NamedTuple):
    """A picture with a line of text below it, or text alone."""

    text: str = ""
    picture: Image.Image | None = None

    def inches(self, side: float) -> tuple[float, float]:
        """Return width and height of the picture, `side` being the longer one."""
        return tuple(side * x / max(self.picture.size) for x in self.picture.size) if self.picture else (0, 0)


def draw_sheet(
    rows: Sequence[Sequence[Cell]],
    side: float,
    *,
    first: float | None = None,
    points: float = 6.5,
    head: Sequence[str] = (),
    foot: Sequence[str] = (),
    bar: str = "",
):
    """Return a figure with a row of pictures for each row of cells.

    side: inches of a picture's longer side; first: inches of the first column, if another; points: size of the text;
    head: names of the columns; foot: lines below all pictures, the first of them after the color map `bar`.
    """
    line = 1.75 * points / 72
    widths = [first or side] + [side] * (max(map(len, rows)) - 1)
    *lefts, width = accumulate([GAP, *(w + GAP for w in widths)])
    heights = [max(cell.inches(side)[1] for cell in row) + line + GAP for row in rows]
    height = sum(heights) + line * (bool(head) + len(foot)) + GAP
    figure = pyplot().figure(figsize=(width, height))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.axis("off")

    def write(x: float, y: float, text: str, where: str = "center") -> None:
        axis.text(x, y, text, fontsize=points, color="0.2", ha=where, va="center", parse_math=False)

    for left, wide, name in zip(lefts, widths, head, strict=False):
        write(left + wide / 2, line / 2, name)
    top = line * bool(head) + GAP / 2
    for row, high in zip(rows, heights, strict=True):
        for left, wide, cell in zip(lefts, widths, row, strict=False):
            if not cell.picture:
                write(left + wide, top + (high - line) / 2, cell.text, "right")
                continue
            across, down = cell.inches(side)
            x = left + (wide - across) / 2
            axis.imshow(np.asarray(cell.picture), extent=(x, x + across, top + down, top), aspect="auto")
            write(left + wide / 2, top + down + line / 2, fitted(cell.text, wide, points))
        top += high
    indent = 0.5 if bar else 0
    if bar:
        colors = np.linspace(0, 1, 256)[None]
        axis.imshow(colors, cmap=bar, extent=(GAP, indent, top + 0.8 * line, top + 0.2 * line), aspect="auto")
    for i, text in enumerate(foot):
        x = GAP + indent * (i == 0)
        write(x, top + (i + 0.5) * line, fitted(text, width - x, points), "left")
    axis.set(xlim=(0, width), ylim=(height, 0))
    return figure


def fitted(text: str, width: float, points: float) -> str:
    """Return the text, or its end behind dots where it is wider than so many inches."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font, text = FontProperties(size=points), text[-300:]
    inches = [text_to_path.get_text_width_height_descent(c, font, ismath=False)[0] / 72 for c in f"{text}…"]
    *from_end, whole = accumulate(reversed(inches))
    if whole - inches[-1] <= width:
        return text
    kept = sum(reached <= width for reached in from_end) - 1
    return f"…{text[-kept:]}" if kept > 0 else "…"
