"""The page of `visualize_codes.py`: one HTML file with everything in it, and the sheet of codes for a paper.

The page is plain HTML that its script only filters, sorts and enlarges. No data stand in the script; names, which may
be any bytes, are escaped as text and attributes. Its content policy lets no other script run and nothing be loaded.
"""

import base64
import hashlib
import html
import json
import re
from pathlib import Path

import numpy as np

from cplearn.pictures.gallery import Code, Gallery, Query
from cplearn.text import printable

HERE = Path(__file__).parent
UNUSED_SHOWN = 500  # numbers of unused codes that are written out


def render(gallery: Gallery, facts: dict[str, str], title: str, thumb: int) -> str:
    """Return the page. `facts`: what it is of, by name; `thumb`: pixels of a thumbnail."""
    sizes = {"thumb": str(min(thumb, 120) * 19 // 20), "widest": str(max(thumb, 64) * 3 // 2)}
    style = fill((HERE / "codes_page.css").read_text("utf-8"), sizes)
    script = (HERE / "codes_page.js").read_text("utf-8")
    data = gallery.data
    parts = {
        "policy": f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}",
        "title": text(title),
        "lead": _lead(gallery),
        "about": _about(facts),
        "style": style,
        "script": script,
        "facts": "".join(f"<dt>{text(name)}</dt><dd>{text(value)}</dd>" for name, value in facts.items()),
        "tiles": _tiles(gallery) if gallery.use else "",
        "notes": _notes(gallery),
        "toolbar": _toolbar(gallery) if gallery.codes else "",
        "queries": "".join(_query(gallery, query) for query in gallery.queries),
        "codes": _codes(gallery) if gallery.codes else "",
        "extremes": _extremes(gallery) if gallery.codes else "",
        "unused": _unused(data.codes.numpy(), data.out_dim) if gallery.codes else "",
    }
    return fill((HERE / "codes_page.html").read_text("utf-8"), parts)


def fill(template: str, parts: dict[str, str]) -> str:
    """Put parts into a template's {{names}}, in one pass: what a part says of {{names}} stays as it is."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def _hash(code: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()}'"


def text(value: object) -> str:
    """Return any value as text of the page, also inside a quoted attribute."""
    return html.escape(printable(str(value)), quote=True)


def number(value: float) -> str:
    """Return a probability, cosine or standardized output in three to six characters."""
    if abs(value) >= 0.001 or value == 0:
        return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}" if abs(value) >= 0.1 else f"{value:.4f}"
    return f"{value:.0e}".replace("e-0", "e-")


def percent(value: float) -> str:
    return f"{100 * value:.1f}%" if 0 < value < 0.01 or 0.995 <= value < 1 else f"{100 * value:.0f}%"


def counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"


# --- the head of the page -----------------------------------------------------------------------------


def _lead(gallery: Gallery) -> str:
    data, images = gallery.data, counted(len(gallery.data.names), "image")
    if gallery.use is None:
        return f"The images nearest to the given ones, among {images}. These weights have no codes."
    shown, used = len(gallery.codes), gallery.use.used
    which = f"All {shown:,}" if shown == used else f"The {shown:,} most used of the {used:,}"
    return f"{which} codes that {images} chose, out of {data.out_dim:,}; with each, some of its images."


def _about(facts: dict[str, str]) -> str:
    """Return in one line what the page is of; the details have all of it."""
    named = {"method": "{}", "architecture": "{}", "image size": "{} px", "epoch": "epoch {}",
             "sha256": "sha256 {:.12}", "images": "images: {}", "data": "data: {}"}  # fmt: skip
    return text(" · ".join(form.format(facts[name]) for name, form in named.items() if name in facts))


def _tiles(gallery: Gallery) -> str:
    data, use, base = gallery.data, gallery.use, gallery.baseline
    values = gallery.certainty.numpy()
    low, middle, high = (number(x) for x in np.quantile(values, (0.05, 0.5, 0.95)))
    uniform = f"uniform: {number(1 / data.out_dim)}" if gallery.certainty_name == "probability" else ""
    tiles = [
        (
            "Codes used",
            f"{use.used:,}",
            f"of {data.out_dim:,}; unused: {data.out_dim - use.used:,}",
            base and f"random init: {base.used:,}",
        ),
        (
            "Perplexity",
            f"{use.perplexity:,.0f}",
            "codes, if used alike",
            base and f"random init: {base.perplexity:,.0f}",
        ),
        (gallery.certainty_name.capitalize(), middle, f"median; 5% to 95%: {low} to {high}", uniform),
    ]
    if use.purity is not None:
        largest = percent(np.bincount(data.labels.numpy()).max() / len(data.labels))
        beside = f"random codes with the same counts: {percent(use.chance)}; largest class: {largest}"
        of_base = base and f"random init: {percent(base.purity)}, its random codes: {percent(base.chance)}"
        tiles.append(("Purity", percent(use.purity), beside, of_base))
    rows = (
        f"<div><dt>{text(name)}</dt>"
        f"<dd><b>{text(value)}</b><small>{text(more)}</small><small>{text(other or '')}</small></dd></div>"
        for name, value, more, other in tiles
    )
    return f'<dl class="tiles">{"".join(rows)}</dl>'


def _notes(gallery: Gallery) -> str:
    notes = []
    if gallery.use:
        if gallery.certainty_name == "probability":
            notes.append(
                "Below an image stands the probability of its code: the largest entry of the softmax with which the "
                "method's loss predicts codes, at its temperature, in evaluation mode."
            )
        else:
            notes.append(
                "This method has no codes of its own: as in the paper, an image is given the output dimension whose "
                "standardized value is largest. Below an image stands this value, in standard deviations. It is no "
                "probability, and dimensions have no vectors that could be near one another."
            )
        notes.append(
            "The images of a code are evenly spaced from its most to its least certain one. Nearest codes are those "
            "among the shown ones, by the cosine of their vectors (of a frozen random dictionary, chance unless the "
            "embeddings adapted to it), and by the cosine of the mean features of their images, less the mean of all."
        )
        notes.append(
            "Purity is the share of the images that belong to the largest class of their code. It rises with the "
            "number of codes for no good reason: codes with one image are pure. So read it beside random codes with "
            "the same counts; on a card, the mark on the bar is that level for a code with as many images."
        )
    if gallery.queries:
        notes.append("Nearest images are those with the largest cosine of the backbone's features.")
    notes.append("Thumbnails show what the network sees: the fixed view of evaluations.")
    return "".join(f"<p>{text(note)}</p>" for note in notes)


def _toolbar(gallery: Gallery) -> str:
    purest = '<option value="purity">purest</option>' if gallery.data.classes else ""
    return (
        '<div class="toolbar" role="search">'
        '<input id="search" type="search" placeholder="Class, file name or code number" '
        'aria-label="Search by class, file name or code number" autocomplete="off" spellcheck="false">'
        '<label>Order <select id="order"><option value="count">most used</option>'
        f'{purest}<option value="certainty">most certain</option><option value="code">number</option></select></label>'
        '<span id="found" role="status"></span>'
        '<p class="keys"><kbd>/</kbd> search <kbd>j</kbd> <kbd>k</kbd> or <kbd>&larr;</kbd> <kbd>&rarr;</kbd> next, '
        "previous code <kbd>Esc</kbd> close</p></div>"
    )


# --- images and codes -----------------------------------------------------------------------------------


def _jpeg(content: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(content).decode()}"


def _image(gallery: Gallery, i: int, below: str, more: list[tuple[str, str]] = ()) -> str:
    """Return one image as an item of a list: a button that enlarges it."""
    data = gallery.data
    name, facts = printable(data.names[i]), []
    if data.classes:
        facts.append(("class", printable(data.classes[data.labels[i]])))
    if data.codes is not None:
        facts.append(("code", str(data.codes[i].item())))
        facts.append((gallery.certainty_name, number(gallery.certainty[i].item())))
    facts += more
    alt = ", ".join([name, *(f"{key} {value}" for key, value in facts)])
    words = " ".join([name, facts[0][1] if data.classes else ""]).lower()
    code = "" if data.codes is None else f' data-code="{data.codes[i].item()}"'
    return (
        f'<li><button type="button" data-name="{html.escape(name)}" data-text="{html.escape(words)}"{code} '
        f'data-facts="{html.escape(json.dumps(facts))}"><img src="{_jpeg(gallery.thumbnails[i])}" '
        f'alt="{html.escape(alt)}" decoding="async">{text(below)}</button></li>'
    )


def _images(gallery: Gallery, rows: list[int]) -> str:
    items = (_image(gallery, i, number(gallery.certainty[i].item())) for i in rows)
    return f'<ul class="images">{"".join(items)}</ul>'


def _query(gallery: Gallery, query: Query) -> str:
    name = printable(query.name)
    items = "".join(_image(gallery, i, number(c), [("cosine", number(c))]) for i, c in query.nearest)
    return (
        f'<section><h2>Nearest to {html.escape(name)}</h2><div class="query">'
        f'<figure><img src="{_jpeg(query.jpeg)}" alt="{html.escape(name)}">'
        "<figcaption>the given image</figcaption></figure>"
        f'<ul class="images">{items}</ul></div></section>'
    )


def _codes(gallery: Gallery) -> str:
    cards = "".join(_card(gallery, code) for code in gallery.codes)
    return (
        f'<h2>The most used codes</h2><section id="codes" aria-label="Codes">{cards}</section>'
        '<p id="nothing" class="none" hidden>No shown code, class or file name matches.</p>'
    )


def _card(gallery: Gallery, code: Code) -> str:
    about = [counted(code.count, "image"), f"mean {gallery.certainty_name} {number(code.certainty)}"]
    bar = ""
    if code.classes:
        named = [f"{percent(count / code.count)} {name}" for name, count in code.classes]
        about.insert(
            1,
            f"<b>{text(named[0])}</b> (chance {percent(code.chance)})"
            + text(f", {', '.join(named[1:])}" * (len(named) > 1)),
        )
        mark = min(0.995, code.chance)
        bar = (
            '<svg class="bar" viewBox="0 0 100 1" preserveAspectRatio="none" aria-hidden="true">'
            f'<rect class="own" width="{100 * code.purity:.1f}" height="1"/>'
            f'<rect class="chance" x="{100 * mark:.1f}" width="0.4" height="1"/></svg>'
        )  # fmt: skip
    near = _near("Nearest by vector", code.near_vectors) + _near("Nearest by images", code.near_images)
    classes = " ".join(printable(name) for name, _ in code.classes).lower()
    return (
        f'<article class="code" id="code-{code.number}" tabindex="-1" aria-labelledby="h-{code.number}" '
        f'data-code="{code.number}" data-count="{code.count}" data-purity="{code.purity or 0}" '
        f'data-certainty="{code.certainty}" data-classes="{html.escape(classes)}">'
        f'<header><h3 id="h-{code.number}">Code {code.number}</h3><p>{" &middot; ".join(about)}</p></header>{bar}'
        f"{_images(gallery, code.images)}{near}</article>"
    )


def _near(label: str, codes: list[tuple[int, float]]) -> str:
    if not codes:
        return ""
    links = (f'<span><a href="#code-{k}">code {k}</a> {cosine:.2f}</span>' for k, cosine in codes)
    return f'<p class="near"><span>{label}:</span> {" ".join(links)}</p>'


def _extremes(gallery: Gallery) -> str:
    return (
        f"<section><h2>The least certain images</h2>{_images(gallery, gallery.least)}</section>"
        f"<section><h2>The most certain images</h2>{_images(gallery, gallery.most)}</section>"
    )


def _unused(codes: np.ndarray, out_dim: int) -> str:
    """Return how many images each code has, as a curve, and the numbers of the codes that have none."""
    counts = np.bincount(codes, minlength=out_dim)
    free = np.flatnonzero(counts == 0)
    curve = np.sort(counts)[::-1][: out_dim - len(free)]
    steps = [curve[round(i)] for i in np.linspace(0, len(curve) - 1, min(200, len(curve)))]
    points = "".join(f"V{40 - 39 * y / curve[0]:.2f}H{100 * (i + 1) / len(steps):.2f}" for i, y in enumerate(steps))
    numbers = ", ".join(map(str, free[:UNUSED_SHOWN])) + (
        f" and {len(free) - UNUSED_SHOWN:,} more" if len(free) > UNUSED_SHOWN else ""
    )
    listed = f"<details><summary>Their numbers</summary><p>{numbers}</p></details>" if len(free) else ""
    return (
        f"<section><h2>Unused codes</h2><p>{len(free):,} of {out_dim:,} codes ({percent(len(free) / out_dim)}) were "
        f"chosen by none of these {len(codes):,} images, {int((counts == 1).sum()):,} by one. Images per used code, "
        f"from the most used ({curve[0]:,}) to the least:</p>"
        '<svg class="curve" viewBox="0 0 100 40" preserveAspectRatio="none" role="img" '
        f'aria-label="Images per used code, from {curve[0]} to {curve[-1]}"><path d="M0 40{points}V40Z"/></svg>{listed}'
        "</section>"
    )
