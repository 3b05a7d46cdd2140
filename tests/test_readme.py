"""Documents against the code: every command parses, every make target and link exists, every file has its line."""

import importlib
import re
import shlex
from pathlib import Path

import estimate
import generate
import pytest
from helpers import ROOT

import main_cplearn
import reproduce_table3
import run_with_submitit
from cplearn import checkpoints
from cplearn.data import imagenet100
from cplearn.errors import UserError

PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("results/*.md")], key=lambda p: str(p.relative_to(ROOT))
)
RECIPES = sorted(ROOT.glob("recipes/*.txt"))
EVALUATIONS = ("eval_knn.py", "eval_linear.py", "eval_cluster.py", "eval_collapse.py")
TAKE_AWAY = ("extract_features.py", "visualize_attention.py", "visualize_codes.py", "export.py", "plot_runs.py")


def commands(text: str) -> list[str]:
    """Return lines that start python or torchrun, continuation lines joined, comment marks removed."""
    lines = re.sub(r"^#\s?", "", text, flags=re.MULTILINE)
    joined = re.sub(r"\\\n\s*", " ", lines)
    return [x.strip() for x in joined.splitlines() if re.match(r"\s*(\S*/)?(python|torchrun) ", x)]


def everything() -> list[str]:
    return sorted({x for page in (*PAGES, *RECIPES) for x in commands(page.read_text())})


def split(command: str) -> tuple[str, list[str]]:
    """Return what is run, a file or a module, and its flags."""
    words = shlex.split(command, comments=True)
    if "-m" in words:
        at = words.index("-m") + 1
    else:
        (at,) = (i for i, word in enumerate(words) if word.endswith(".py"))
    return words[at], words[at + 1 :]


@pytest.mark.parametrize("command", everything())
def test_commands_parse(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    script, flags = split(command)
    if script == "main_cplearn.py":
        assert main_cplearn.parse_args(flags).out_dim > 1
    elif script == "run_with_submitit.py":
        args, rest = run_with_submitit.parse_args(flags)
        assert args.status or run_with_submitit.check_flags(args, rest)
    elif script == "reproduce_table3.py":
        reproduce_table3.parse_args(flags)
    elif script in (*EVALUATIONS, *TAKE_AWAY):
        importlib.import_module(script[:-3]).get_args_parser().parse_args(flags)
    elif script == "cplearn.data.imagenet100":
        imagenet100.get_args_parser().parse_args(flags)
    elif script == "cplearn.checkpoints":
        with pytest.raises(UserError, match="does not exist"):  # the flags are right, the file is not here
            checkpoints.main(flags)
    elif script == "benchmarks/loader.py":
        main_cplearn.parse_args(flags)
    elif script == "benchmarks/estimate.py":
        main_cplearn.parse_args(estimate.get_args_parser().parse_known_args(flags)[1])
    elif script != "venv":
        source = (ROOT / script).read_text()
        assert script == "demo.py" or script.startswith(("benchmarks/", "experiments/"))
        names = [flag.split("=")[0] for flag in flags if flag.startswith("--")]
        assert [name for name in names if f'"{name}"' not in source] == []


def test_commands_of_every_script_are_shown():
    shown = {split(command)[0] for page in PAGES for command in commands(page.read_text())}
    assert {"main_cplearn.py", "run_with_submitit.py", "reproduce_table3.py", *EVALUATIONS, *TAKE_AWAY} <= shown
    assert {"cplearn.data.imagenet100", "cplearn.checkpoints"} <= shown
    assert "torchrun main_cplearn.py --arch vit_small --out_dim 131072" in (ROOT / "README.md").read_text()


def test_the_page_of_files_is_what_their_docstrings_say():
    """`python docs/generate.py` writes it anew."""
    assert generate.PAGE.read_text() == generate.page()
    named = generate.page()
    assert all(f"`{path.name}`" in named for path in ROOT.glob("cplearn/*/*.py") if path.name != "__init__.py")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    gone = {"torture"} if page.name == "CHANGELOG.md" else set()
    named = {
        a or b for a, b in re.findall(r"`make ([a-z-]+)|^(?: {4}|\t)make ([a-z-]+)", page.read_text(), re.MULTILINE)
    }
    assert "  ".join(sorted(named - targets - gone)) == ""


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)", text, flags=re.MULTILINE)
    plain = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", x) for x in headings)
    return {re.sub(r"[^\w\- ]", "", x.strip().lower()).replace(" ", "-") for x in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_resolve(page):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert "  ".join(broken) == ""


@pytest.mark.parametrize("name", ["README.md", "RESULTS.md"])
def test_the_first_pages_are_read_in_one_sitting(name):
    text = (ROOT / name).read_text()
    assert len(text.split()) <= 1010
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    plain = (re.sub(r"\(.*?\)|\[.*?\]", "", cell) for row in rows for cell in row)
    assert [cell for cell in plain if len(re.findall(r"\d[\d.,]*", cell)) > 4] == []
