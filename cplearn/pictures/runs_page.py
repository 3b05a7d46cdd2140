"""The page of runs: one HTML file with everything in it, drawn by the script in `runs_page.html`."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from cplearn.pictures.panels import OTHER, PANELS, VERDICTS
from cplearn.pictures.runs import RunLog
from cplearn.text import printable

TEMPLATE = Path(__file__).with_name("runs_page.html")


def page(runs: Sequence[RunLog], axis: str, note: str) -> str:
    """Return the HTML of all runs over training, by the name of an axis in `AXES`; `note`: a line below its title."""
    drawn = [p for p in PANELS if any(run.last(field) is not None for run in runs for field in p.curves)]
    data = {
        "axis": axis,
        "note": note,
        "panels": [dataclasses.asdict(panel) for panel in drawn],
        "verdicts": VERDICTS,
        "other": OTHER,
        "runs": [
            {
                "name": printable(run.name),
                "color": run.color,
                "axes": _rounded(run.axes),
                "values": _rounded(run.values),
                "verdicts": [printable(x) for x in run.verdicts],
                "lines": [printable(x) for x in run.verdict_lines],
                "start": run.start,
            }
            for run in runs
        ],
    }
    # Nothing in it can end the script element, whatever the names are.
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    head, tail = TEMPLATE.read_text(encoding="utf-8").split("DATA")
    return head + text + tail


def _rounded(columns: dict[str, list[float | None]]) -> dict[str, list[float | None]]:
    return {name: [x if x is None else float(f"{x:.7g}") for x in column] for name, column in columns.items()}
