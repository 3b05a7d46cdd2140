"""`python -m cplearn`: the version and the scripts of this checkout."""

import ast

import cplearn
from cplearn.host import ROOT, git_commit


def main() -> None:
    """Print what can be run, and what for."""
    print(f"cplearn {cplearn.__version__}, commit {git_commit()}: each with --help\n")
    rows = []
    for path in sorted(ROOT.glob("*.py")):
        text = path.read_text()
        if "__main__" in text:
            rows.append((f"python {path.name}", ast.get_docstring(ast.parse(text)).splitlines()[0]))
    print("\n".join(f"{command:<34}{said}" for command, said in rows) or "the scripts are in the checkout")


if __name__ == "__main__":
    main()
