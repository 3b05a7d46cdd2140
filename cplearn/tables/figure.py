"""TODO cplearn.tables.figure."""

from pathlib import Path

import numpy as np

from cplearn.errors import UserError

# --- picture ----------------------------------------------------------------------------------------------


def _draw(
    path: Path, table: int, scale: str, trained: list[dict], untrained: list[dict], names: dict[str, str]
) -> None:
    """NMI, AMI and linear accuracy against the size (or beta, or line); dotted, the paper's at its own scale."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    methods = list(dict.fromkeys(x["row"].method for x in trained))
    for axis, name, title in zip(
        axes, ("nmi", "ami", "linear"), ("NMI of the codes", "AMI of the codes", "linear, top-1"), strict=True
    ):
        for i, method in enumerate(methods):
            mine = sorted((x for x in trained if x["row"].method == method), key=lambda x: x["row"].x)
            style = {"color": f"C{i}", "marker": "o", "ms": 4, "capsize": 2, "ls": "-" if table in (3, 9) else ""}
            axis.errorbar(
                [x["row"].x for x in mine],
                [x[name][0] for x in mine],
                [x[name][1] for x in mine],
                label=names[method],
                **style,
            )
            there = [(x["row"].x, x["row"].paper[name]) for x in mine if isinstance(x["row"].paper.get(name), float)]
            if there and scale == "paper":  # or they would only stretch the axes
                axis.plot(
                    *np.array(there).T,
                    ls=":" if table in (3, 9) else "",
                    marker="x",
                    color=f"C{i}",
                    alpha=0.6,
                    lw=1,
                    ms=5,
                )
        grey = {"color": "0.5", "lw": 1}
        if table == 3 and name == "nmi":
            by_size = sorted(untrained, key=lambda x: x["row"].x)
            axis.plot([x["row"].x for x in by_size], [x["nmi"][0] for x in by_size], "--", **grey, label="untrained")
            axis.plot(
                [x["row"].x for x in by_size],
                [x["nmi_random_codes"][0] for x in by_size],
                "-.",
                **grey,
                label="random codes",
            )
        elif table == 3 and name == "ami":
            by_size = sorted(untrained, key=lambda x: x["row"].x)
            axis.plot([x["row"].x for x in by_size], [x["ami"][0] for x in by_size], "--", **grey, label="untrained")
        elif name == "linear" and any("linear" in x for x in untrained):
            level = next(x["linear"][0] for x in untrained if "linear" in x)
            axis.axhline(level, ls="--", **grey, label="untrained")
        axis.set(title=title, ylabel="percent", ylim=(None if name == "linear" else 0, None))
        if table == 3:
            sizes = sorted({x["row"].out_dim for x in trained})
            axis.set_xscale("log", base=2)
            axis.set_xticks(sizes, [f"{c:,}" for c in sizes], rotation=30, fontsize=8)
            axis.set_xlabel("out_dim c")
        elif table == 9:
            axis.set_xlabel("beta")
        else:
            axis.set_xticks(
                [x["row"].x for x in trained],
                [f"{names[x['row'].method]}, {x['row'].label}" for x in trained],
                rotation=90,
                fontsize=7,
            )
        axis.grid(alpha=0.3)
    if scale == "paper":
        axes[0].plot([], [], ":x", color="0.3", alpha=0.6, lw=1, ms=5, label="the paper's")
    axes[0].legend(fontsize=7)
    figure.suptitle(
        f"Table {table}" + " at small scale: not the paper's data, network or budget" * (scale == "small"), fontsize=10
    )
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
    finally:
        plt.close(figure)
