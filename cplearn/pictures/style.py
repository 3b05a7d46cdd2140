"""What the figures share: matplotlib without a display, colors that everybody can tell apart, files that are whole."""

import io
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from cplearn.files import write_bytes

# Nine colors that also the color-blind tell apart (Paul Tol's "muted"), and black; ten more groups have other markers.
COLORS = ("#332288", "#CC6677", "#117733", "#88CCEE", "#882255", "#44AA99", "#AA4499", "#999933", "#000000", "#DDCC77")
MARKERS = ("o", "^")
OTHER = "0.82"  # gray of what has no color of its own


def pyplot():
    """Import matplotlib.pyplot, to draw without a display."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def style(network_label: str, i: int) -> dict[str, str]:
    """Return color and line of a network; the baseline is gray and dashed in all figures."""
    return (
        {"color": "0.45", "ls": "--"}
        if network_label == "random init"
        else {"color": COLORS[i % len(COLORS)], "ls": "-"}
    )


def as_text(label: str) -> str:
    """Return a user's words for matplotlib, which takes $ for a formula and leaves out what begins with _."""
    label = shortened(label, 60).replace("$", r"\$")
    return f" {label}" if label.startswith("_") else label


def diverging():
    """Return a color map from blue over white, for 0, to red, in steps that one can tell apart."""
    return pyplot().get_cmap("RdBu_r", 41)


def shortened(text: str, most: int) -> str:
    """Return at most so many characters."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def written_here() -> PngInfo:
    """Return what a figure's file says of its origin."""
    info = PngInfo()
    info.add_text("Software", "cplearn")
    return info


def is_own_figure(path: Path) -> bool:
    """Return whether a file is a figure of ours, by what it says; earlier ones name Matplotlib. A link is not."""
    if path.is_symlink() or not path.is_file():  # a pipe would not answer
        return False
    try:
        with Image.open(path, formats=("PNG",)) as image:
            return str(image.info.get("Software")).startswith(("cplearn", "Matplotlib"))
    except Exception:  # a damaged file can make Pillow raise anything
        return False


def save_figure(figure, out: Path, name: str) -> None:
    """Write a figure as PNG, whole or not at all, and forget it. Raises `WriteError`."""
    drawn, packed = io.BytesIO(), io.BytesIO()
    try:
        figure.savefig(drawn, format="png", dpi=120)
    finally:
        pyplot().close(figure)
    image = Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE)  # enough, in a third of the bytes
    image.save(packed, "PNG", optimize=True, pnginfo=written_here())
    write_bytes(out / f"{name}.png", packed.getvalue())
