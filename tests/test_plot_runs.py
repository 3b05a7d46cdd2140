"""plot_runs.py as typed: its files, what they may replace, and the page in a browser."""

import csv
import json
import os
import re
import subprocess
import time

import pytest
from browser import PROGRAM as BROWSER
from helpers import train
from PIL import Image

import plot_runs
from cplearn.errors import UserError

HOSTILE = "<img src=x onerror=alert(1)>&'\"$a_b$ </script>\n\udce9"


def log(folder, name="run", epochs=5, **more):
    """A log with every number that is drawn, falling or rising by epoch."""
    path = folder / name
    path.mkdir(parents=True)
    fields = ("train_loss", "uniform_to_floor", "usage_perplexity", "probe_codes_used", "information",
              "probe_features_rank", "probe_embedding_rank", "probe_features_cosine", "probe_embedding_cosine",
              "probe_agreement", "probe_agreement_chance", "probe_view_nearness", "probe_knn20", "lr",
              "train_grad_norm", "images_per_second", "data_wait")  # fmt: skip
    with open(path / "log.txt", "w") as f:
        for e in range(epochs):
            record = {name: 1 / (k + 2 + e) for k, name in enumerate(fields)}
            levels = {"loss_uniform": 2.0, "loss_floor": 0.1, "loss_one_code": 8.5, "out_dim": 4096}
            verdict = {"verdict": "cluster" if e == 2 else "learning", "verdict_line": f"line {e}"}
            f.write(
                json.dumps({"epoch": e, "step": e + 1, "seconds": 36.0, **record, **levels, **verdict, **more}) + "\n"
            )
    return path


def test_a_page_a_picture_and_numbers_of_a_real_run(run, tmp_path, capsys):
    paths = plot_runs.main([str(run), "--out", str(tmp_path / "a"), "--csv", str(tmp_path / "a.csv")])
    assert [p.name for p in paths] == [
        "a.html",
        "a.png",
        "a.csv",
    ] and f"Wrote {tmp_path}/a.html" in capsys.readouterr().out
    with Image.open(tmp_path / "a.png") as image:
        assert image.size[0] == 990 and len(image.convert("RGB").getcolors(1 << 24)) > 20
    with open(tmp_path / "a.csv") as f:
        rows = list(csv.DictReader(f))
    records = [json.loads(line) for line in (run / "log.txt").read_text().splitlines()]
    assert [float(r["train_loss"]) for r in rows] == [r["train_loss"] for r in records]
    assert [float(r["epochs"]) for r in rows] == [1, 2] and rows[0]["out_dim"] == "40.0"


def test_where_files_go(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log(tmp_path)
    (tmp_path / "there").mkdir()
    for out, expected in (
        ([], ["run/plots.html", "run/plots.png"]),
        (["--out", "x"], ["x.html", "x.png"]),
        (["--out", "v1.5"], ["v1.5.html", "v1.5.png"]),
        (["--out", "x.html"], ["x.html"]),
        (["--out", "new/x.png"], ["new/x.png"]),
        (["--out", "there"], ["there/plots.html", "there/plots.png"]),
        (["--out", "fresh/"], ["fresh/plots.html", "fresh/plots.png"]),
    ):
        args = plot_runs.get_args_parser().parse_args(["run", *out])
        assert [str(path) for path in plot_runs.outputs(args)] == expected
    before = time.time_ns()
    for _ in range(2):  # replaces its own files
        plot_runs.main(["run/log.txt", "--csv", "run/plots.csv"])
        made = sorted(p.name for p in (tmp_path / "run").iterdir() if p.stat().st_mtime_ns > before)
        assert made == ["plots.csv", "plots.html", "plots.png"]
        before = time.time_ns()


@pytest.mark.parametrize("name", ["a.html", "a.png", "a.csv"])
def test_files_of_others_are_left_alone(tmp_path, name):
    path, mine = str(log(tmp_path)), tmp_path / name
    flag = "--csv" if name == "a.csv" else "--out"
    mine.write_text("mine")
    with pytest.raises(UserError, match=f"^{flag} {mine}"):
        plot_runs.main([path, *(("--out", str(tmp_path / "b")) if flag == "--csv" else ()), flag, str(mine)])
    assert mine.read_text() == "mine" and sorted(x.name for x in tmp_path.iterdir()) == [name, "run"]


def test_hostile_names_are_only_names(tmp_path):
    path = log(tmp_path, HOSTILE.replace("/", "_"), verdict="<b>odd", verdict_line="</script><b>")
    formula = log(tmp_path, "=1+1")
    plot_runs.main([os.fspath(path), str(formula), "--out", str(tmp_path / "a"), "--csv", str(tmp_path / "a.csv")])
    html = (tmp_path / "a.html").read_text()  # proper UTF-8
    assert "<img" not in html and html.count("</script>") == 2 and "<b>odd" not in html
    assert "'=1+1," in (tmp_path / "a.csv").read_text(errors="surrogateescape")


def test_the_page_needs_no_network(tmp_path):
    plot_runs.main([str(log(tmp_path)), "--out", str(tmp_path / "a.html")])
    html = (tmp_path / "a.html").read_text()
    assert "default-src 'none'" in html and set(re.findall(r"https?://[^\"' ]+", html)) == {
        "http://www.w3.org/2000/svg"
    }
    assert re.findall(r"<(?:link|img|iframe)|\bsrc=|@import|url\(", html) == []


def test_a_new_panel_is_one_entry(tmp_path, monkeypatch):
    from cplearn.pictures import panels, runs, runs_page, runs_picture

    table = (panels.Panel("Within a code", {"probe_within_code": ""}),)
    for module in (runs_page, runs_picture):
        monkeypatch.setattr(module, "PANELS", table)
    monkeypatch.setattr(runs, "CURVES", ("probe_within_code",))
    plot_runs.main(
        [str(log(tmp_path, probe_within_code=0.25)), "--out", str(tmp_path / "a"), "--csv", str(tmp_path / "a.csv")]
    )
    assert "Within a code" in (tmp_path / "a.html").read_text() and (tmp_path / "a.png").stat().st_size > 5000
    assert "probe_within_code" in (tmp_path / "a.csv").read_text()


# --- in a browser --------------------------------------------------------------------------------------------

needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium here")


def browse(page, script="", *, size="1280,900"):
    """Open a page with a script at its end; return the DOM as text."""
    copy = page.with_name("copy.html")
    copy.write_text(page.read_text().replace("</body>", f"<script>{script}</script></body>"))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={size}",
               f"--user-data-dir={page.parent}/profile", "--dump-dom", copy.as_uri()]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


REPORT = """
document.title = JSON.stringify((() => {
  const say = {};
  const figures = [...document.querySelectorAll("figure")];
  const of = title => figures.find(f => f.querySelector("b").textContent === title);
  const box = document.querySelectorAll("#runs input"), loss = of("Loss"), svg = loss.querySelector("svg");
  say.titles = figures.map(f => f.querySelector("figcaption b").textContent);
  say.names = [...document.querySelectorAll("#runs label > span:last-child")].map(x => x.firstChild.textContent.trim());
  say.words = [...svg.querySelectorAll("text")].map(x => x.textContent);
  say.curves = loss.querySelectorAll("polyline").length;
  const key = name => svg.dispatchEvent(new KeyboardEvent("keydown", { key: name, cancelable: true }));
  key("End"); say.end = loss.querySelector(".tip").innerText;
  key("ArrowLeft"); say.left = loss.querySelector(".tip").innerText;
  key("Escape"); say.hidden = loss.querySelector(".tip").hidden;
  const place = svg.getBoundingClientRect();
  const at = x => ({ clientX: place.left + x * place.width, clientY: place.top + 9 });
  svg.dispatchEvent(new PointerEvent("pointermove", at(0.01))); say.first = loss.querySelector(".tip").innerText;
  const verdicts = of("Verdict").querySelector("svg");
  verdicts.dispatchEvent(new KeyboardEvent("keydown", { key: "End" }));
  say.verdict = of("Verdict").querySelector(".tip").innerText;
  say.filled = verdicts.querySelectorAll("rect").length;
  box[1].click(); say.one = loss.querySelectorAll("polyline").length;
  say.rows = verdicts.querySelectorAll("rect").length;
  box[0].click(); say.none = svg.textContent;
  box[0].click(); box[1].click(); say.both = loss.querySelectorAll("polyline").length;
  const select = document.getElementById("axis"); select.value = "steps"; select.dispatchEvent(new Event("change"));
  key("End"); say.steps = loss.querySelector(".tip").innerText;
  say.reachable = [...document.querySelectorAll("input, select, summary, figure svg")].every(x => x.tabIndex === 0);
  say.overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  document.getElementById("last").open = true;
  say.table = document.querySelector("#last table").innerText;
  return say;
})());
"""


@needs_browser
@pytest.mark.browser
@pytest.mark.parametrize("size", ["1280,900", "400,800"])
def test_the_page_in_a_browser(tmp_path, size):
    log(tmp_path, "a<b>", epochs=5)
    log(tmp_path, "b", epochs=3)
    (page,) = plot_runs.main([str(tmp_path / "a<b>"), str(tmp_path / "b"), "--out", str(tmp_path / "p.html")])
    dom = browse(page, REPORT, size=size)
    title = re.search(r"<title>(.*?)</title>", dom, re.DOTALL)[1]
    said = json.loads(title.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert said["titles"][:2] == ["Verdict", "Score without labels"] and len(said["titles"]) == 16
    assert said["names"] == ["a<b>", "b"]
    assert {"uniform 2", "bound 0.1", "one code 8.5 ↑"} <= set(said["words"])
    assert said["curves"] == 2 and said["one"] == 1 and said["both"] == 2 and "no values" in said["none"]
    assert said["end"].split("\n") == ["epoch 5", "a<b>", "0.1667"]
    assert said["left"].split("\n") == ["epoch 4", "a<b>", "0.2"] and said["hidden"]
    assert said["first"].split("\n") == ["epoch 1", "a<b>", "0.5", "b", "0.5"]
    assert "line 4" in said["verdict"] and said["filled"] == 2 + 5 + 3 and said["rows"] == 1 + 5
    assert said["steps"].startswith("step 5") and said["reachable"] and said["overflow"] <= 0
    assert re.search(r"Learning rate\s+0\.05263\s+0\.05882", said["table"])


@needs_browser
@pytest.mark.browser
def test_hostile_names_in_a_browser(tmp_path):
    path = log(tmp_path, HOSTILE.replace("/", "_"))
    (page,) = plot_runs.main([os.fspath(path), "--out", str(tmp_path / "p.html")])
    dom = browse(
        page,
        "document.title = document.querySelectorAll('img').length + document.querySelector('#runs label').innerText",
    )
    assert (
        "<title>0&lt;img src=x onerror=alert(1)&gt;&amp;'\"$a_b$ &lt;_script&gt;\\n\\udce9 5 epochs, learning</title>"
        in dom
    )


@needs_browser
@pytest.mark.browser
def test_a_run_that_trains_in_a_browser(tmp_path, image_folder):
    """An epoch of a real run, old fields apart: nothing that is missing stops the page."""
    train(tmp_path / "run", "--data_path", str(image_folder), "--epochs", "1")
    record = json.loads((tmp_path / "run" / "log.txt").read_text())
    old = {k: v for k, v in record.items() if k in ("epoch", "train_loss", "lr")}
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "log.txt").write_text(json.dumps(old) + '\n{"epoch": 1, "tra')
    (page,) = plot_runs.main([str(tmp_path / "run"), str(tmp_path / "old"), "--out", str(tmp_path / "p.html")])
    dom = browse(page, "document.title = document.querySelectorAll('figure:first-of-type ~ figure polyline').length")
    assert int(re.search(r"<title>(\d+)</title>", dom)[1]) > 8 and "old" in dom
