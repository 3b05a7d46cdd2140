"""The figure of a table: NMI, AMI and linear accuracy of every line."""

from pathlib import Path

import numpy as np

from cplearn.pictures.style import pyplot, save_figure
from cplearn.tables.grid import Settings
from cplearn.tables.rows import NAMES, OF_SIZES, title

PANELS = {"nmi": "NMI of the codes", "ami": "AMI of the codes", "linear": "linear, top-1"}
GRAY = {"color": "0.5", "lw": 1}


def draw(path: Path, settings: Settings, trained: list, untrained: list) -> None:
    """Draw three measures of the table's lines against the size (or beta, or the line). Raises `WriteError`.

    At the paper's scale its values are dotted; at small scale they would only stretch the axes.
    """
    figure, axes = pyplot().subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    for axis, (name, measure) in zip(axes, PANELS.items(), strict=True):
        _draw_trained(axis, name, settings, trained)
        _draw_untrained(axis, name, settings.table, untrained)
        axis.set(title=measure, ylabel="percent", ylim=(None if name == "linear" else 0, None))
        _label_x(axis, settings.table, trained)
        axis.grid(alpha=0.3)
    if settings.scale == "paper":
        axes[0].plot([], [], ":x", color="0.3", alpha=0.6, lw=1, ms=5, label="the paper's")
    axes[0].legend(fontsize=7)
    note = " at small scale: not the paper's data, network or budget" * (settings.scale == "small")
    figure.suptitle(f"{title(settings.table)}{note}", fontsize=10)
    save_figure(figure, path.parent, path.stem)


def _draw_trained(axis, name: str, settings: Settings, trained: list) -> None:
    joined = settings.table in (*OF_SIZES, 9)  # their lines differ in one number
    for i, method in enumerate(dict.fromkeys(x.row.method for x in trained)):
        mine = sorted((x for x in trained if x.row.method == method and name in x.numbers), key=lambda x: x.row.x)
        means, spreads = ([x.numbers[name][k] for x in mine] for k in (0, 1))
        style = {"color": f"C{i}", "marker": "o", "ms": 4, "capsize": 2, "ls": "-" if joined else ""}
        axis.errorbar([x.row.x for x in mine], means, spreads, label=NAMES[method], **style)
        paper = [(x.row.x, x.row.paper[name]) for x in mine if isinstance(x.row.paper.get(name), float)]
        if paper and settings.scale == "paper":
            style = {"color": f"C{i}", "marker": "x", "ms": 5, "lw": 1, "alpha": 0.6, "ls": ":" if joined else ""}
            axis.plot(*np.array(paper).T, **style)


def _draw_untrained(axis, name: str, table: int | str, untrained: list) -> None:
    """Draw the untrained networks as gray lines: per size for measures of codes, one level for linear accuracy."""
    if name == "linear":
        for x in [x for x in untrained if name in x.numbers][:1]:
            axis.axhline(x.numbers[name][0], ls="--", **GRAY, label="untrained")
    elif table in OF_SIZES:
        by_size = sorted(untrained, key=lambda x: x.row.x)
        shown = {"nmi": {"nmi": "untrained", "nmi_random_codes": "random codes"}, "ami": {"ami": "untrained"}}[name]
        for (measure, label), style in zip(shown.items(), ("--", "-."), strict=False):
            points = [(x.row.x, x.numbers[measure][0]) for x in by_size if measure in x.numbers]
            axis.plot(*np.array(points).reshape(-1, 2).T, style, **GRAY, label=label)


def _label_x(axis, table: int | str, trained: list) -> None:
    if table in OF_SIZES:
        sizes = sorted({x.row.out_dim for x in trained})
        axis.set_xscale("log", base=2)
        axis.set_xticks(sizes, [f"{c:,}" for c in sizes], rotation=30, fontsize=8)
        axis.set_xlabel("out_dim c")
    elif table == 9:
        axis.set_xlabel("beta")
    else:
        labels = [f"{NAMES[x.row.method]}, {x.row.label}" for x in trained]
        axis.set_xticks([x.row.x for x in trained], labels, rotation=90, fontsize=7)
