"""The page in a real browser: search, keys, width, colors, and names that try to be code."""

import base64
import hashlib
import io
import json
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from browser import PROGRAM, Browser
from PIL import Image

from cplearn.features.splits import Features
from cplearn.pictures import codes_page
from cplearn.pictures import gallery as codes
from cplearn.pictures.style import drawn

HOSTILE = [
    "</script><script>document.title='taken'</script>.jpg",
    '"><img src=x onerror="document.title=\'taken\'">.jpg',
    "' autofocus onfocus='document.title=1'.jpg",
    "{{codes}} {{script}}.jpg",
    "caf\udce9\n<!--.jpg",
    "http://example.org/x.jpg",
]
CLASSES = ["<b>ant</b>", "bee & wasp", "$cat$"]


def jpeg(color: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), color).save(file, "JPEG")
    return file.getvalue()


def gallery_of(
    n: int = 120, used: int = 12, *, labels: bool = True, mixed: bool = False, barlow: bool = False
) -> codes.Gallery:
    """A made-up gallery: image i has code 10 (i % used); the first names are hostile."""
    generator = torch.Generator().manual_seed(0)
    names = [f"{i % 3}/image_{i:04}.jpg" for i in range(n)]
    names[: len(HOSTILE)] = HOSTILE
    classes = torch.randint(3, (n,), generator=generator) if mixed else torch.arange(n) % 3
    data = Features(
        features=torch.randn(n, 8, generator=generator),
        labels=classes if labels else torch.full((n,), -1),
        codes=10 * (torch.arange(n) % used),
        names=names,
        classes=CLASSES if labels else None,
        out_dim=200,
        arch="resnet8",
        source={},
    )
    certainty = torch.rand(n, generator=generator)
    table = torch.randn(200, 8, generator=generator)
    shown = codes.describe_codes(
        data, certainty, lambda k: None if barlow else table[k], count=used, per_code=6, seed=0
    )  # fmt: skip
    order = certainty.argsort(descending=True).tolist()
    use = codes.measure_use(data, 0)
    name = "standardized output" if barlow else "probability"
    gallery = codes.Gallery(data, certainty, name, use, use, shown, order[:6], order[::-1][:6])
    gallery.queries = [codes.Query("/a <i>query</i>.png", jpeg("green"), [(0, 0.9), (1, -0.5)])]
    gallery.thumbnails = {i: jpeg("red") for i in codes.images_shown(gallery)}
    return gallery


FACTS = {"weights": "run/<check>.pth", "sha256": "0123456789abcdef", "epoch": "3", "method": "cplearn"}


def page_of(gallery: codes.Gallery) -> str:
    return codes_page.render(gallery, FACTS, "Codes of run/<check>.pth", 96)


class Read(HTMLParser):
    """What a browser reads of a page: its words, its elements with their attributes, its style and script."""

    def __init__(self, page: str):
        super().__init__()
        self.elements, self.inside, self.words = [], {}, ""
        self.feed(page)
        self.words = " ".join(self.words.split())

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        if self.cdata_elem:
            self.inside[self.cdata_elem] = self.inside.get(self.cdata_elem, "") + data
        else:
            self.words += data

    def all(self, tag: str, attribute: str) -> list[str]:
        return [attributes[attribute] for name, attributes in self.elements if name == tag and attribute in attributes]


# --- its text ---------------------------------------------------------------------------------------------


def test_every_image_has_its_words_and_names_are_no_markup():
    gallery = gallery_of()
    page = Read(page_of(gallery))
    assert {tag for tag, _ in page.elements} & {"b", "i", "img", "script"} == {"b", "img", "script"}
    assert len(page.all("script", "src")) == 0 and len([tag for tag, _ in page.elements if tag == "script"]) == 1
    assert not any(name.startswith("on") or name == "autofocus" for _, given in page.elements for name in given)
    assert all(src.startswith("data:image/jpeg;base64,") for src in page.all("img", "src"))
    alts = [alt for alt in page.all("img", "alt") if alt]
    assert len(alts) == sum(len(code.images) for code in gallery.codes) + 12 + 1 + 2
    i = gallery.codes[1].images[0]
    name, certainty = gallery.data.names[i], f"{gallery.certainty[i]:.3f}"
    assert f"{name}, class {CLASSES[i % 3]}, code 10, probability {certainty}" in alts
    facts = [dict(json.loads(x)) for x in page.all("button", "data-facts")]
    assert {"class": CLASSES[i % 3], "code": "10", "probability": certainty} in facts
    assert {*HOSTILE[:4], "caf\\udce9\\n<!--.jpg"} <= set(page.all("button", "data-name"))
    assert "Nearest to /a <i>query</i>.png" in page.words and "<b>ant</b>" in page.words


def test_its_policy_lets_nothing_else_run():
    page = Read(page_of(gallery_of()))
    own = [base64.b64encode(hashlib.sha256(page.inside[x].encode()).digest()).decode() for x in ("style", "script")]
    expected = "default-src 'none'; img-src data:; style-src 'sha256-{}'; script-src 'sha256-{}'".format(*own)
    assert page.all("meta", "content")[0] == expected


def test_the_head_says_what_it_is_of():
    words = Read(page_of(gallery_of())).words
    assert "All 12 codes that 120 images chose, out of 200" in words
    assert "cplearn · epoch 3 · sha256 0123456789ab" in words and "0123456789abcdef" in words
    assert "of 200; unused: 188" in words and "188 of 200 codes (94%) were chosen by none of these 120 images" in words
    assert "random codes with the same counts" in words and "random init: " in words and "uniform: 0.0050" in words


def test_what_is_not_known_is_not_said():
    """Without labels no purity; where outputs are no codes, no probability; without codes, neighbours only."""
    words = Read(page_of(gallery_of(labels=False))).words
    assert "largest class" not in words and "purest" not in words and "(chance" not in words
    words = Read(page_of(gallery_of(barlow=True))).words
    assert "This method has no codes of its own" in words and "mean standardized output" in words
    assert "Nearest by vector" not in words and "Nearest by images" in words and "uniform:" not in words
    data = gallery_of().data
    data.codes = data.out_dim = None
    query = codes.Query("q.png", jpeg("green"), [(0, 0.9)])
    page = page_of(codes.Gallery(data, queries=[query], thumbnails={0: jpeg("red")}))
    words = Read(page).words
    assert "Nearest to q.png" in words and "0.900" in words and "search" not in words and "unused" not in words.lower()


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.97312, "0.973"), (1.0, "1.000"), (0.00345, "0.0034"), (1e-5, "1e-5"), (0, "0.0000"), (12.34, "12.3")],
)
def test_numbers_are_short(value, expected):
    assert codes_page.number(value) == expected


def test_the_sheet_has_a_row_per_code():
    gallery = gallery_of()
    wide, tall = (drawn(codes_page.draw_codes(gallery, *shape), 300) for shape in ((3, 6), (6, 3)))
    assert wide.width > tall.width > 900 and tall.height == pytest.approx(2 * wide.height, abs=30)
    red = (torch.from_numpy(np.asarray(wide, dtype=np.int64)) - torch.tensor([254, 0, 0])).abs()
    assert 0.3 < (red.sum(2) < 30).float().mean() < 0.8  # images, and room for the words


# --- in a browser -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if PROGRAM is None:
        pytest.skip("no chromium")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "codes.html"
    path.write_text(page_of(gallery_of()), encoding="utf-8")
    return path


VISIBLE = "[...document.querySelectorAll('.code:not([hidden])')].map(x => Number(x.dataset.code))"
FOCUS = "document.activeElement.id"


@pytest.mark.browser
def test_it_runs_alone_and_names_are_no_code(browser, page):
    browser.open(page)
    assert browser.complaints() == [] and browser.requests() == []
    assert browser.run("document.title") == "Codes of run/<check>.pth"
    assert (
        browser.run("document.scripts.length") == 1 and browser.run("document.querySelectorAll('b img, i').length") == 0
    )
    assert browser.run("found.textContent") == "12 codes"  # its own script ran, though the policy lets no other
    browser.run("document.body.append(Object.assign(document.createElement('script'), {textContent: 'var taken = 1'}))")
    assert browser.run("typeof taken") == "undefined"
    names = browser.run("[...document.querySelectorAll('.images button')].map(x => x.dataset.name)")
    assert set(HOSTILE[:4]) <= set(names)
    assert browser.run("[...document.images].filter(x => x.id == '' && !x.naturalWidth).length") == 0


@pytest.mark.browser
@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("10", [10]),
        ("code 30", [30]),
        ("IMAGE_0007", [70]),
        ("0008", [80]),  # no code: part of a file name
        ("wasp", [10, 40, 70, 100]),  # images of a class: i % 3 == 1
        ("wasp image_0007", [70]),
        ("zebra", []),
    ],
)
def test_search(browser, page, typed, expected):
    browser.open(page)
    browser.press("/", typed)
    assert browser.run("search.value") == typed and browser.run(VISIBLE) == expected
    assert browser.run("found.textContent") == f"{len(expected)} of 12 codes"
    assert browser.run("document.getElementById('nothing').hidden") == bool(expected)
    hits = browser.run("document.querySelectorAll('.code:not([hidden]) .hit').length")
    assert (hits > 0) == (bool(expected) and "code" not in typed and typed != "10")
    browser.press("Escape")
    assert browser.run("search.value") == "" and len(browser.run(VISIBLE)) == 12


@pytest.mark.browser
def test_keys_move_between_codes(browser, page):
    browser.open(page)
    for key, expected in (("j", 0), ("j", 10), ("ArrowRight", 20), ("k", 10), ("ArrowLeft", 0), ("k", 0)):
        browser.press(key)
        assert browser.run(FOCUS) == f"code-{expected}"
        top = browser.run(f"document.getElementById('code-{expected}').getBoundingClientRect().top")
        assert browser.run("document.querySelector('.toolbar').getBoundingClientRect().bottom") <= top < 200
    browser.press("/", "jk")
    assert browser.run("search.value") == "jk" and browser.run(FOCUS) == "search"
    browser.press("Escape", "/", "wasp", "Enter", "j")  # the first match, then the next
    assert browser.run(FOCUS) == "code-40"


@pytest.mark.browser
def test_an_image_opens_and_closes(browser, page):
    browser.open(page)
    browser.press("j", "Tab")
    assert browser.run("document.activeElement.matches('#code-0 li:first-child button:focus-visible')")
    assert browser.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    first, second = browser.run("[...document.querySelectorAll('#code-0 button')].slice(0, 2).map(x => x.dataset.name)")
    browser.press("Enter")
    said = "document.getElementById('detail').innerText"
    assert first in browser.run(said) and "probability" in browser.run(said)
    browser.press("ArrowRight")
    assert second in browser.run(said) and first not in browser.run(said)
    browser.press("ArrowLeft", "ArrowLeft", "ArrowRight", "Escape")
    assert browser.run("document.getElementById('detail').open") is False
    browser.wait("document.activeElement.dataset.name", first)  # back where it was
    code = browser.run(
        "(x => { x.click(); return x.dataset.code })([...document.querySelectorAll('.images button')].at(-1))"
    )
    browser.press("Tab", "Tab", "Enter")
    browser.wait(FOCUS, f"code-{code}")


@pytest.mark.browser
def test_links_lead_to_near_codes_also_to_hidden_ones(browser, page):
    browser.open(page)
    browser.press("/", "#50")
    target = browser.run("document.querySelector('#code-50 .near a').hash.slice(1)")
    browser.run("document.querySelector('#code-50 .near a').click()")
    assert browser.run(FOCUS) == target and len(browser.run(VISIBLE)) == 2


@pytest.mark.browser
def test_order(browser, tmp_path):
    (tmp_path / "codes.html").write_text(page_of(gallery_of(mixed=True)), encoding="utf-8")
    browser.open(tmp_path / "codes.html")
    for key in ("purity", "certainty"):
        browser.run(f"order.value = '{key}', order.dispatchEvent(new Event('change'))")
        values = browser.run(f"[...document.querySelectorAll('.code')].map(x => Number(x.dataset.{key}))")
        assert len(set(values)) > 3 and values == sorted(values, reverse=True)
    browser.run("order.value = 'code', order.dispatchEvent(new Event('change'))")
    assert browser.run(VISIBLE) == list(range(0, 120, 10))


@pytest.mark.browser
@pytest.mark.parametrize("width", [400, 320, 1280])
def test_it_fits_its_width(browser, page, width):
    browser.open(page, width=width)
    browser.run("document.querySelectorAll('details').forEach(x => { x.open = true })")
    assert browser.run("document.documentElement.scrollWidth") <= width
    small = "[...document.querySelectorAll('.code img')].filter(x => x.getBoundingClientRect().width < 44).length"
    assert browser.run(small) == 0
    browser.run("document.querySelector('.images button').click()")
    box = browser.run("(({left, right}) => [left, right])(document.getElementById('detail').getBoundingClientRect())")
    assert 0 <= box[0] < box[1] <= width
