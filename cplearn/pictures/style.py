"""What the figures share: matplotlib without a display, colors that everybody can tell apart, one writer of PNG."""

import io
import warnings
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from cplearn.files import write_bytes
from cplearn.text import printable

# Nine colors that also the color-blind tell apart (Paul Tol's "muted"), and black; ten more groups have other markers.
COLORS = ("#332288", "#CC6677", "#117733", "#88CCEE", "#882255", "#44AA99", "#AA4499", "#999933", "#000000", "#DDCC77")
MARKERS = ("o", "^")
OTHER = "0.82"  # gray of what has no color of its own
SOFTWARE = "cplearn"  # what a picture names as its origin, unless a script names itself


def pyplot():
    """Import matplotlib.pyplot, to draw without a display; a letter that the font lacks is a box, without a warning."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
    return matplotlib.pyplot


def style(network_label: str, i: int) -> dict[str, str]:
    """Return color and line of a network; the baseline is gray and dashed in all figures."""
    if network_label == "random init":
        return {"color": "0.45", "ls": "--"}
    return {"color": COLORS[i % len(COLORS)], "ls": "-"}


def as_text(label: str) -> str:
    """Return a user's words for matplotlib, which takes $ for a formula and leaves out what begins with _."""
    label = shortened(printable(label), 60).replace("$", r"\$")
    return f" {label}" if label.startswith("_") else label


def shortened(text: str, most: int) -> str:
    """Return at most so many characters, without the middle: names often differ at their ends."""
    kept = most - 3
    return text if len(text) <= most else f"{text[: kept - kept // 2]}...{text[-(kept // 2) :]}"


def panels(columns: int, rows: int = 1, *, width: float = 5, height: float = 4, aside: float = 0):
    """Return a figure and its axes (rows, columns), which have this size in inches; `aside`: for a color bar."""
    size = (width * columns + aside, height * rows)
    return pyplot().subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)


def finish(axis, **labels) -> None:
    """Label an axis with curves; draw its grid and its legend."""
    axis.set(**labels)
    axis.grid(alpha=0.3)
    if axis.lines:
        axis.legend(fontsize=8)


def png_mark(software: str = SOFTWARE) -> bytes:
    """Return what the PNG files of `save_picture` hold: see `cplearn.files.replaceable`."""
    return b"Software\0" + software.encode()


def save_picture(picture: Image.Image, path: Path, software: str = SOFTWARE) -> None:
    """Write a picture as PNG, marked with its origin, whole or not at all. Raises `WriteError`."""
    content, origin = io.BytesIO(), PngInfo()
    origin.add_text("Software", software)
    picture.save(content, "PNG", pnginfo=origin)
    write_bytes(path, content.getvalue())


def drawn(figure, dpi: int = 120) -> Image.Image:
    """Return the pixels of a figure, and forget it."""
    content = io.BytesIO()
    try:
        figure.savefig(content, format="png", dpi=dpi)
    finally:
        pyplot().close(figure)
    return Image.open(content).convert("RGB")


def save_figure(figure, folder: Path, name: str, *, dpi: int = 120, software: str = SOFTWARE) -> None:
    """Write a figure as FOLDER/NAME.png in 256 colors, a third of the bytes, and forget it. Raises `WriteError`."""
    picture = drawn(figure, dpi).quantize(256, dither=Image.Dither.NONE)
    save_picture(picture, folder / f"{name}.png", software)
