"""`python -m cplearn`: the version and the scripts of this checkout."""

import ast

import cplearn
from cplearn.host import ROOT, git_commit


def main() -> None:
    """Print what can be run, and what for."""
    print(f"cplearn {cplearn.__version__}, commit {git_commit()}: each with --help\n")
    rows = []
    for path in sorted(ROOT.glob("*.py")):
        said = ast.get_docstring(ast.parse(path.read_text())) or ""
        if "__main__" in path.read_text():
            rows.append((f"python {path.name}", said.splitlines()[0]))
    print("\n".join(f"{command:<34}{said}" for command, said in rows) or "the scripts are in the checkout")


if __name__ == "__main__":
    main()
