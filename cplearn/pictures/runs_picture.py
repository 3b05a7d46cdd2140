"""The picture of runs as PNG: the panels of `panels.py`, with the verdicts above them."""

import math
from collections.abc import Iterator, Sequence

from cplearn.pictures import style
from cplearn.pictures.panels import DARK, OTHER, PANELS, VERDICTS, Panel
from cplearn.pictures.runs import RunLog
from cplearn.text import printable

STYLES = ("-", ":")  # of a panel's curves; dashed is the value at the start
MOST_NAMED = 4  # levels that a legend names
DPI = 90


def draw(runs: Sequence[RunLog], axis: str, *, only_verdict: bool = False):
    """Return a figure of all runs over training, by the name of an axis in `AXES`.

    `only_verdict`: leave out the panels that the verdict does not use.
    """
    from matplotlib.lines import Line2D

    asked = [panel for panel in PANELS if panel.verdict or not only_verdict]
    panels = [panel for panel in asked if any(curves(panel, runs, axis))]
    rows, tall = math.ceil(len(panels) / 3), 0.5 + 0.22 * len(runs)
    figure = style.pyplot().figure(figsize=(11, tall + 2.3 * rows + 0.5), layout="constrained")
    grid = figure.add_gridspec(rows + 1, 3, height_ratios=[tall, *[2.3] * rows])
    draw_verdicts(figure.add_subplot(grid[0, :]), runs, axis)
    for k, panel in enumerate(panels):
        draw_panel(figure.add_subplot(grid[1 + k // 3, k % 3]), panel, runs, axis)
    handles = [Line2D([], [], color=run.color, lw=3, label=as_text(run.name)) for run in runs]
    figure.legend(handles=handles, loc="outside upper left", ncols=max(1, min(4, len(runs))), fontsize=9, frameon=False)
    return figure


def draw_verdicts(axes, runs: Sequence[RunLog], axis: str) -> None:
    """Draw one row per run, colored by the verdict of each epoch, with the color of the run before it."""
    from matplotlib.patches import Patch

    longest = max(1e-9, *(x for run in runs for x in run.axes[axis] if x))
    shown = set()
    for i, run in enumerate(runs):
        for start, end, verdict in spans(run, axis):
            axes.barh(i, end - start, left=start, height=0.8, color=VERDICTS.get(verdict, OTHER))
            if (end - start) / longest > 0.008 * len(verdict):
                ink = "white" if verdict in DARK else "0.15"
                axes.text((start + end) / 2, i, as_text(verdict), ha="center", va="center", fontsize=8, color=ink)
            shown.add(verdict)
    axes.set_yticks(range(len(runs)), ["▬"] * len(runs))
    for label, run in zip(axes.get_yticklabels(), runs, strict=True):
        label.set_color(run.color)
    axes.tick_params(axis="y", length=0)
    axes.set(ylim=(len(runs) - 0.4, -0.6), xlim=(0, None))
    axes.tick_params(axis="x", labelsize=8)
    axes.set_title(f"Verdict, over {axis}", fontsize=10, loc="left")
    names = [*(x for x in VERDICTS if x in shown), *sorted(shown - VERDICTS.keys())]
    handles = [Patch(color=VERDICTS.get(x, OTHER), label=as_text(x)) for x in names]
    if handles:
        place = {"loc": "lower right", "bbox_to_anchor": (1, 1)}
        axes.legend(handles=handles, fontsize=8, ncols=len(handles), frameon=False, **place)


def spans(run: RunLog, axis: str) -> list[tuple[float, float, str]]:
    """Return from where to where each verdict held, neighbors with the same one joined."""
    joined: list[tuple[float, float, str]] = []
    before = 0.0
    for x, verdict in zip(run.axes[axis], run.verdicts, strict=True):
        if x is None:
            continue
        if joined and joined[-1][1:] == (before, verdict):
            joined[-1] = (joined[-1][0], x, verdict)
        elif verdict:
            joined.append((before, x, verdict))
        before = x
    return joined


def curves(panel: Panel, runs: Sequence[RunLog], axis: str) -> Iterator[tuple[RunLog, str, list[tuple[float, float]]]]:
    """Return the curves of a panel: run, field and points."""
    for run in runs:
        for field in panel.curves:
            if points := run.points(axis, field, positive=panel.log):
                yield run, field, points


def draw_panel(axes, panel: Panel, runs: Sequence[RunLog], axis: str) -> None:
    """Draw the curves of all runs, with their values at the start and the levels that belong to them."""
    from matplotlib.ticker import PercentFormatter

    drawn = list(curves(panel, runs, axis))
    names, styles = list(panel.curves.values()), dict(zip(panel.curves, STYLES, strict=False))
    for run, field, points in drawn:
        marker = {"marker": "o" if len(points) < 12 else None, "ms": 3}
        axes.plot(*zip(*points, strict=True), styles[field], color=run.color, lw=1.4, **marker)
        if (start := run.at_start(field)) is not None and len(points) > 1:
            axes.axhline(start, color=run.color, lw=0.9, ls="--", alpha=0.7)
    values = [y for *_, points in drawn for _, y in points]
    if panel.log and max(values) >= 10 * min(values):
        axes.set_yscale("log")
    for field, name in panel.curves.items() if len(names) > 1 else ():
        axes.plot([], [], styles[field], color="0.3", lw=1.2, label=name or "measured")
    if any(run.at_start(field) is not None for run, field, _ in drawn):
        axes.plot([], [], "--", color="0.3", lw=0.9, label="at the start")
    draw_levels(axes, panel, [run for run, *_ in drawn])
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=7, framealpha=0.6)
    axes.set_xlim(0, None)
    if panel.percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_title(panel.title + (f" ({names[0]})" if len(names) == 1 and names[0] else ""), fontsize=10, loc="left")
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)


def draw_levels(axes, panel: Panel, runs: Sequence[RunLog]) -> None:
    """Draw reference values as dotted lines, named in the legend; of those far away say on which side they lie."""
    for named, reached in ((panel.references, True), (panel.far, False)):
        levels = [(name, y) for field, name in named.items() for y in _levels(runs, field)]
        for name, y in levels:
            low, high = axes.get_ylim()
            look, where = {"color": "0.5", "lw": 0.9, "ls": ":"}, ""
            if reached or low <= y <= high:
                axes.axhline(y, **look)
            else:
                where = " ↑" if y > high else " ↓"
            if len(levels) <= MOST_NAMED:
                axes.plot([], [], **look, label=f"{name} {short(y)}{where}")


def _levels(runs: Sequence[RunLog], field: str) -> list[float]:
    return sorted({round(y, 6) for run in runs if (y := run.last(field)) is not None})


def short(y: float) -> str:
    """Return a number in few digits."""
    return f"{y:,.0f}" if abs(y) >= 100 else f"{y:.3g}"


def as_text(name: str) -> str:
    """Return a name, which may be any bytes, for matplotlib."""
    return style.as_text(printable(name))
