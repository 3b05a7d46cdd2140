"""Print the oldest versions that pyproject.toml allows, for pip: `name==version` each. Standard library only."""

import re
from pathlib import Path


def oldest() -> list[str]:
    """Return a pin for every lower bound, tests' own packages included."""
    text = (Path(__file__).resolve().parent.parent / "pyproject.toml").read_text()
    found = re.findall(r'"([\w-]+)(?:>=|==)([\d.]+)[^"]*"', text.partition("[build-system]")[0])
    return sorted({f"{name}=={version}" for name, version in found if name not in ("python", "faiss-cpu")})


if __name__ == "__main__":
    print(" ".join(oldest()))
