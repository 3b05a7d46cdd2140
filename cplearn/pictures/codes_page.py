"""The page of `visualize_codes.py`, one HTML file with everything in it, and the sheet of codes for a paper.

The page is plain HTML that its script only filters, sorts and enlarges. No data stand in the script; names, which may
be any bytes, are escaped as text and attributes. Its content policy lets no other script run and nothing be loaded.
"""

import base64
import hashlib
import io
import json
from pathlib import Path

import jinja2
import numpy as np
from markupsafe import Markup, escape
from PIL import Image

from cplearn.pictures.gallery import Code, Gallery, spread
from cplearn.pictures.sheet import Cell, draw_sheet
from cplearn.pictures.style import shortened
from cplearn.text import printable

HERE = Path(__file__).parent
UNUSED_SHOWN = 500  # numbers of unused codes that are written out
# Facts that stand in the head of the page, and how.
ABOUT = {"method": "{}", "architecture": "{}", "image size": "{} px", "epoch": "epoch {}", "sha256": "sha256 {:.12}",
         "images": "images: {}", "data": "data: {}"}  # fmt: skip


# --- the page -----------------------------------------------------------------------------------------


def render(gallery: Gallery, facts: dict[str, str], title: str, thumb: int) -> str:
    """Return the page. `facts`: what it is of, by name; `thumb`: pixels of a thumbnail."""
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        finalize=_proper,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= FILTERS
    sizes = {"thumb": min(thumb, 120) * 19 // 20, "widest": max(thumb, 64) * 3 // 2}
    return templates.get_template("codes_page.html").render(
        gallery=gallery,
        title=title,
        facts=facts,
        about=[form.format(facts[name]) for name, form in ABOUT.items() if name in facts],
        style=Markup(templates.get_template("codes_page.css").render(sizes)),
        script=Markup((HERE / "codes_page.js").read_text("utf-8")),
        shown=lambda rows: [_image(gallery, i, gallery.certainty[i].item()) for i in rows],
        near_to=lambda query: [_image(gallery, i, cosine, "cosine") for i, cosine in query.nearest],
        **(_numbers(gallery) if gallery.use else {}),
    )


def _proper(value: object) -> object:
    """Return what a template prints: of strings, which may be any bytes, proper text. Jinja escapes it afterwards."""
    return "" if value is None else printable(value) if type(value) is str else value


def _image(gallery: Gallery, i: int, value: float, named: str = "") -> dict[str, object]:
    """Return what the page says of an image; `value`, which stands below it, is a fact if it has a name."""
    data, facts = gallery.data, {}
    if data.classes:
        facts["class"] = data.classes[data.labels[i]]
    if data.codes is not None:
        facts |= {"code": data.codes[i].item(), gallery.certainty_name: number(gallery.certainty[i].item())}
    if named:
        facts[named] = number(value)
    return {
        "name": data.names[i],
        "words": f"{data.names[i]} {facts.get('class', '')}".lower(),
        "alt": ", ".join([data.names[i], *(f"{name} {fact}" for name, fact in facts.items())]),
        "facts": [(name, printable(fact)) for name, fact in facts.items()],
        "code": facts.get("code"),
        "jpeg": gallery.thumbnails[i],
        "below": number(value),
    }


def _numbers(gallery: Gallery) -> dict[str, object]:
    """Return the numbers of all images: quantiles of the certainty, the largest class, unused codes."""
    data = gallery.data
    counts = np.bincount(data.codes.numpy(), minlength=data.out_dim)
    curve = np.sort(counts[counts > 0])[::-1]
    steps = [curve[round(i)] for i in np.linspace(0, len(curve) - 1, min(200, len(curve)))]
    points = "".join(f"V{40 - 39 * y / curve[0]:.2f}H{100 * (i + 1) / len(steps):.2f}" for i, y in enumerate(steps))
    low, middle, high = map(number, np.quantile(gallery.certainty.numpy(), (0.05, 0.5, 0.95)))
    return {
        "certainty": {"low": low, "middle": middle, "high": high},
        "largest_class": np.bincount(data.labels.numpy()).max() / len(data.labels) if data.classes else None,
        "unused": np.flatnonzero(counts == 0).tolist(),
        "singles": int((counts == 1).sum()),
        "curve": {"most": curve[0], "least": curve[-1], "path": f"M0 40{points}V40Z"},
        "UNUSED_SHOWN": UNUSED_SHOWN,
    }


# --- its words ----------------------------------------------------------------------------------------


def number(value: float) -> str:
    """Return a probability, cosine or standardized output in three to six characters."""
    if abs(value) >= 0.001 or value == 0:
        return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}" if abs(value) >= 0.1 else f"{value:.4f}"
    return f"{value:.0e}".replace("e-0", "e-")


def percent(value: float) -> str:
    """Return a share in two or three digits."""
    return f"{100 * value:.1f}%" if 0 < value < 0.01 or 0.995 <= value < 1 else f"{100 * value:.0f}%"


def counted(count: int, noun: str) -> str:
    """Return how many there are of something."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


FILTERS = {
    "base64": _base64,
    "counted": counted,
    "hash": lambda code: f"'sha256-{_base64(hashlib.sha256(code.encode()).digest())}'",
    "json": lambda facts: escape(json.dumps(facts)),
    "number": number,
    "percent": percent,
    "thousands": "{:,.0f}".format,
}


# --- the sheet ----------------------------------------------------------------------------------------


def draw_codes(gallery: Gallery, rows: int, columns: int):
    """Return a figure with a row for each of the first codes, its images from the most to the least certain."""
    return draw_sheet([_row(gallery, code, columns) for code in gallery.codes[:rows]], side=0.62, first=1.2)


def _row(gallery: Gallery, code: Code, columns: int) -> list[Cell]:
    lines = [f"code {code.number}", counted(code.count, "image")]
    if code.classes:
        lines.append(f"{percent(code.purity)} {shortened(printable(code.classes[0][0]), 16)}")
    images = [
        Cell(number(gallery.certainty[i].item()), Image.open(io.BytesIO(gallery.thumbnails[i])))
        for i in spread(code.images, columns)
    ]
    return [Cell("\n".join(lines)), *images]
