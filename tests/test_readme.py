"""Every command in the README and in the recipes' comments parses; every file has its line."""

import re
import shlex

import pytest
from helpers import ROOT

import demo
import eval_cluster
import eval_collapse
import eval_knn
import eval_linear
import main_cplearn
import reproduce_table3
import run_with_submitit

README = (ROOT / "README.md").read_text()
PARSERS = {
    "eval_knn.py": eval_knn.get_args_parser().parse_args,
    "eval_linear.py": eval_linear.get_args_parser().parse_args,
    "eval_cluster.py": eval_cluster.get_args_parser().parse_args,
    "eval_collapse.py": eval_collapse.get_args_parser().parse_args,
}


BENCHMARKS = [f"benchmarks/{name}.py" for name in ("augment", "collapse", "loss", "methods", "stress")]


def commands(text: str) -> list[str]:
    """Lines that start python or torchrun, continuation lines joined, comment marks removed."""
    lines = re.sub(r"^#\s?", "", text, flags=re.MULTILINE)
    joined = re.sub(r"\\\n\s*", " ", lines)
    return [x.strip() for x in joined.splitlines() if re.match(r"\s*(\S*/)?(python|torchrun) ", x)]


def everything() -> list[str]:
    found = commands(README) + commands((ROOT / "RESULTS.md").read_text())
    for path in sorted((ROOT / "recipes").glob("*.txt")):
        found += commands(path.read_text())
    return sorted(set(found))


@pytest.mark.parametrize("command", everything())
def test_commands_parse(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command, comments=True)
    (script,) = [w for w in words if w.endswith(".py")]
    flags = words[words.index(script) + 1 :]
    if script == "main_cplearn.py":
        args = main_cplearn.parse_args(flags)
        assert args.out_dim > 1
    elif script == "run_with_submitit.py":
        args, rest = run_with_submitit.parse_args(flags)
        assert args.status or run_with_submitit.check_flags(args, rest)
    elif script == "reproduce_table3.py":
        reproduce_table3.parse_args(flags)
    elif script in PARSERS:
        PARSERS[script](flags)
    else:
        assert (ROOT / script).is_file() and script in ("demo.py", "datasets.py", *BENCHMARKS)


def test_the_readme_shows_commands_of_every_script():
    text = "\n".join(commands(README))
    for script in ("main_cplearn.py", "run_with_submitit.py", "reproduce_table3.py", *PARSERS):
        assert script in text
    assert "torchrun main_cplearn.py --arch vit_small --out_dim 131072" in text
    assert callable(demo.main)


def test_the_readme_lists_every_file():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.txt"), *ROOT.glob("recipes/*"), *ROOT.glob("*.md")]:
        if path.name != "README.md":
            assert f"`{path.name}`" in README or f"`recipes/{path.name}`" in README, path.name


def test_make_targets_of_the_readme_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"make ([a-z-]+)\b", README)) - {"sure"} <= targets
