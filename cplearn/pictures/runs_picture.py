"""The picture of runs as PNG: the panels of `panels.py`, with the verdicts above them."""

import io
import math
from collections.abc import Sequence

from cplearn.pictures import style
from cplearn.pictures.panels import PANELS, Panel
from cplearn.pictures.runs import RunLog
from cplearn.text import printable

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#7a5195", "#6b6b6b")
VERDICTS = {"learning": "#8fd0a8", "no better than at the start": "#f2c14e", "losing dimensions": "#f4a6c0",
            "no alarm": "#bfd7ea", "too short to judge": "#dddddd", "stuck at uniform": "#a0a0a0",
            "representation": "#c1272d", "cluster": "#ee8833", "dimensional": "#7a3fa0",
            "intracluster": "#2f5fb3"}  # fmt: skip
DARK = ("representation", "dimensional", "intracluster")  # of these, on which words are white
OTHER = "#d6e685"  # a verdict of another version
STYLES = ("-", ":")  # of a panel's curves; dashed is the value at the start
SMALL = {"fontsize": 7, "color": "0.35"}
SOFTWARE = "plot_runs.py"  # in the file, so that it is known as ours


def draw(runs: Sequence[RunLog], axis: str, *, only_verdict: bool = False) -> bytes:
    """Return the PNG of all runs over training, by the name of an axis in `AXES`.

    `only_verdict`: leave out the panels that the verdict does not use.
    """
    from matplotlib.lines import Line2D

    asked = [p for p in PANELS if p.verdict or not only_verdict]
    panels = [p for p in asked if any(run.points(axis, f, positive=p.log) for run in runs for f in p.curves)]
    rows, tall = math.ceil(len(panels) / 3), 0.5 + 0.22 * len(runs)
    figure = style.pyplot().figure(figsize=(11, tall + 2.3 * rows + 0.5), layout="constrained")
    grid = figure.add_gridspec(rows + 1, 3, height_ratios=[tall, *[2.3] * rows])
    draw_verdicts(figure.add_subplot(grid[0, :]), runs, axis)
    for k, panel in enumerate(panels):
        draw_panel(figure.add_subplot(grid[1 + k // 3, k % 3]), panel, runs, axis)
    handles = [Line2D([], [], color=color, lw=3, label=as_text(run.name)) for run, color in _colored(runs)]
    figure.legend(handles=handles, loc="outside upper left", ncols=max(1, min(4, len(runs))), fontsize=9, frameon=False)
    content = io.BytesIO()
    figure.savefig(content, dpi=90, metadata={"Software": SOFTWARE})
    style.pyplot().close(figure)
    return content.getvalue()


def draw_verdicts(axes, runs: Sequence[RunLog], axis: str) -> None:
    """Draw one row per run, colored by the verdict of each epoch, with the color of the run before it."""
    from matplotlib.patches import Patch

    shown = set()
    for i, run in enumerate(runs):
        for start, end, verdict in spans(run, axis):
            color = VERDICTS.get(verdict, OTHER)
            axes.barh(i, end - start, left=start, height=0.8, color=color)
            if (end - start) / max(1e-9, *(x for run in runs for x in run.axes[axis] if x)) > 0.008 * len(verdict):
                ink = "white" if verdict in DARK else "0.15"
                axes.text((start + end) / 2, i, as_text(verdict), ha="center", va="center", fontsize=8, color=ink)
            shown.add(verdict)
    axes.set_yticks(range(len(runs)), ["▬"] * len(runs))
    for label, (_, color) in zip(axes.get_yticklabels(), _colored(runs), strict=True):
        label.set_color(color)
    axes.tick_params(axis="y", length=0)
    axes.set(ylim=(len(runs) - 0.4, -0.6), xlim=(0, None))
    axes.tick_params(axis="x", labelsize=8)
    axes.set_title(f"Verdict, over {axis}", fontsize=10, loc="left")
    names = [*(x for x in VERDICTS if x in shown), *sorted(shown - VERDICTS.keys())]
    handles = [Patch(color=VERDICTS.get(x, OTHER), label=as_text(x)) for x in names]
    if handles:
        axes.legend(
            handles=handles, fontsize=8, ncols=len(handles), loc="lower right", bbox_to_anchor=(1, 1), frameon=False
        )


def spans(run: RunLog, axis: str) -> list[tuple[float, float, str]]:
    """Return from where to where each verdict held, neighbors with the same one joined."""
    found: list[tuple[float, float, str]] = []
    before = 0.0
    for x, verdict in zip(run.axes[axis], run.verdicts, strict=True):
        if x is None:
            continue
        if found and found[-1][1:] == (before, verdict):
            found[-1] = (found[-1][0], x, verdict)
        elif verdict:
            found.append((before, x, verdict))
        before = x
    return found


def draw_panel(axes, panel: Panel, runs: Sequence[RunLog], axis: str) -> None:
    """Draw the curves of all runs, and the levels that belong to them."""
    from matplotlib.ticker import PercentFormatter

    shown = [run for run in runs if any(run.points(axis, field, positive=panel.log) for field in panel.curves)]
    for run, color in _colored(runs):
        for field, dashes in zip(panel.curves, STYLES, strict=False):
            points = run.points(axis, field, positive=panel.log)
            axes.plot(*zip(*points, strict=True) if points else ((), ()), dashes, color=color, lw=1.4,
                      marker="o" if len(points) < 12 else None, ms=3)  # fmt: skip
            if (start := run.at_start(field)) is not None and len(points) > 1:
                axes.axhline(start, color=color, lw=0.9, ls="--", alpha=0.7)
    values = [y for run in shown for field in panel.curves for _, y in run.points(axis, field, positive=panel.log)]
    if panel.log and max(values) >= 10 * min(values):
        axes.set_yscale("log")
    names = [name for name in panel.curves.values() if name]
    if len(panel.curves) > 1:
        for name, dashes in zip(panel.curves.values(), STYLES, strict=True):
            axes.plot([], [], dashes, color="0.3", lw=1.2, label=name or "measured")
    if any(run.at_start(field) is not None for run in shown for field in panel.curves):
        axes.plot([], [], "--", color="0.3", lw=0.9, label="at the start")
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=7, framealpha=0.6)
    draw_levels(axes, panel, shown, axis)
    axes.set_xlim(0, None)
    if panel.percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_title(
        panel.title + (f" ({names[0]})" if len(panel.curves) == 1 and names else ""), fontsize=10, loc="left"
    )
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)


def draw_levels(axes, panel: Panel, runs: Sequence[RunLog], axis: str) -> None:
    """Draw the reference values as dotted lines, or name them at the edge beyond which they lie."""
    near = [(name, y) for field, name in panel.references.items() for y in _levels(runs, field)]
    for _, y in near:
        axes.axhline(y, color="0.5", lw=0.9, ls=":")
    low, high = axes.get_ylim()
    far = [(name, y) for field, name in panel.far.items() for y in _levels(runs, field)]
    for name, y in near + [level for level in far if low <= level[1] <= high]:
        axes.axhline(y, color="0.5", lw=0.9, ls=":")
        # Its name stands at the end from which the curves are further away.
        curves = [run.points(axis, next(iter(panel.curves))) for run in runs]
        first, last = (min(abs(curve[k][1] - y) for curve in curves if curve) for k in (0, -1))
        at = {"x": 0.01, "ha": "left"} if first > last else {"x": 0.99, "ha": "right"}
        va = "top" if y > low + 0.9 * (high - low) else "bottom"  # inside the panel
        axes.text(s=f"{name} {short(y)}", y=y, va=va, transform=axes.get_yaxis_transform(), **at, **SMALL)
    for outside, y, va, arrow in (([x for x in far if x[1] > high], 0.97, "top", "↑"),
                                  ([x for x in far if x[1] < low], 0.03, "bottom", "↓")):  # fmt: skip
        words = "  ".join(f"{name} {short(level)} {arrow}" for name, level in outside[:3])
        axes.text(0.5, y, words, ha="center", va=va, transform=axes.transAxes, **SMALL)


def _levels(runs: Sequence[RunLog], field: str) -> list[float]:
    return sorted({round(y, 6) for run in runs if (y := run.last(field)) is not None})


def short(y: float) -> str:
    """Return a number in few digits."""
    return f"{y:,.0f}" if abs(y) >= 100 else f"{y:.3g}"


def _colored(runs: Sequence[RunLog]) -> list[tuple[RunLog, str]]:
    return [(run, COLORS[i % len(COLORS)]) for i, run in enumerate(runs)]


def as_text(name: str) -> str:
    """Return a name for matplotlib, the middle of a long one left out: names of runs often differ at their ends."""
    name = printable(name)
    return style.as_text(name if len(name) <= 60 else f"{name[:28]}...{name[-28:]}")
