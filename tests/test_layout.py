"""What the package may depend on: no script, no circle, no generic name on top, no network."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

TOP = [path.stem for path in ROOT.glob("*.py")]
LIBRARY = {"cplearn_head", "vision_transformer"}  # on top too, but made to be imported
BENCHMARKS = sorted([*ROOT.glob("benchmarks/*.py"), *ROOT.glob("experiments/*.py")])


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in [*ROOT.glob("*.py"), *ROOT.glob("cplearn/**/*.py")]}


def at_import(node: ast.AST):
    """Yield the statements that run when a module is imported: none in functions, none for type checkers only."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from at_import(child)


def imports(name: str, nodes) -> set[str]:
    """Return which of our modules these statements of module `name` import."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
            for _ in range(node.level - 1):
                package = package.rpartition(".")[0]
            base = ".".join(filter(None, (package, node.module))) if node.level else node.module
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return (found & MODULES.keys()) - {name}


DOWNLOADS = {"hub", "load_state_dict_from_url", "download_url_to_file", "download_url", "urlopen", "urlretrieve",
             "hf_hub_download", "snapshot_download"}  # fmt: skip


def downloads(source: str) -> list[str]:
    """Return what in a module's code (not its text: torch.hub calls hubconf.py) would fetch something."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = [getattr(node, "attr", None), getattr(node, "id", None)]
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [part for alias in node.names for part in alias.name.split(".")]
            names += (getattr(node, "module", None) or "").split(".")
        found += [name for name in names if name in DOWNLOADS]
        if isinstance(node, ast.keyword) and node.arg in ("pretrained", "download"):
            found += [node.arg] if ast.unparse(node.value) != "False" else []
    return found


def test_no_script_needs_the_network():
    for name, path in MODULES.items():
        assert (name, downloads(path.read_text())) == (name, [])
    found = [
        "torch.hub.load('x')",
        "from torch.hub import y",
        "timm.create_model('x', pretrained=True)",
        "urlopen('x')",
    ]
    assert [downloads(source)[0] for source in found] == ["hub", "hub", "pretrained", "urlopen"]
    assert downloads("'torch.hub.load reads this'; timm.create_model('x', pretrained=False)") == []


def test_the_package_imports_no_script():
    """Anywhere, also inside functions; `cplearn_head` and `vision_transformer` obey the same rule."""
    upward = []
    for name, path in MODULES.items():
        if "." in name or name in LIBRARY | {"cplearn"}:
            wrong = imports(name, ast.walk(ast.parse(path.read_text()))) & (set(TOP) - LIBRARY)
            upward += [f"{name} imports {other}" for other in sorted(wrong)]
    assert "; ".join(upward) == ""


def test_no_import_circle():
    edges = {}
    for name, path in MODULES.items():
        found = imports(name, at_import(ast.parse(path.read_text())))
        if path.name == "__init__.py":  # a package that hands out its members makes no circle by itself
            found = {other for other in found if not other.startswith(f"{name}.")}
        edges[name] = found
    done, circles = set(), []

    def visit(name: str, way: list[str]) -> None:
        if name in way:
            circles.append(" -> ".join([*way[way.index(name) :], name]))
        elif name not in done:
            for other in sorted(edges[name]):
                visit(other, [*way, name])
            done.add(name)

    for name in edges:
        visit(name, [])
    assert "; ".join(circles) == ""


@pytest.mark.parametrize("path", [p for p in BENCHMARKS if "__main__" in p.read_text()], ids=lambda p: p.name)
def test_a_benchmark_finds_the_package_from_any_folder(path):
    """It puts the checkout into sys.path before it imports anything of ours."""
    for node in ast.parse(path.read_text()).body:
        if ast.unparse(node).startswith("sys.path.insert("):
            return
        modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", "")]
        ours = {(m or "").partition(".")[0] for m in modules} & {"cplearn", *TOP, *(p.stem for p in BENCHMARKS)}
        assert not ours, f"line {node.lineno} imports {', '.join(ours)} before sys.path is set"


LOOP = """
import torch
import datasets, errors, utils  # the user's own
import cplearn_head, vision_transformer, cplearn

loss, terms = cplearn_head.CPLearnHead(8, 64, 32).loss([torch.randn(16, 8) for _ in range(4)], beta=0.25)
print(loss.item() > 0, *sorted(terms), *(module.OWNER for module in (datasets, errors, utils)))
"""


SAID = "True entropy invariance loss prior user user user\n"


def test_head_and_backbones_in_a_folder_with_its_own_utils(tmp_path):
    """In a user's code, beside modules with generic names of their own."""
    for name in ("utils", "errors", "datasets"):
        (tmp_path / f"{name}.py").write_text("OWNER = 'user'\n")
    (tmp_path / "loop.py").write_text(LOOP)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "loop.py"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == SAID, done.stdout + done.stderr
