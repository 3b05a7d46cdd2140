"""Tables and durations as text."""

from collections.abc import Sequence


def format_duration(seconds: float) -> str:
    """Return the duration in hours, minutes or seconds."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"


def format_table(rows: Sequence[Sequence[object]], header: Sequence[str]) -> str:
    """Return a plain-text table, which is also a Markdown one; floats get four digits after the point."""
    text = [[f"{x:.4f}" if isinstance(x, float) else "" if x is None else str(x) for x in row] for row in rows]
    widths = [max(len(r[i]) for r in [list(header), *text]) for i in range(len(header))]
    lines = [
        "| "
        + " | ".join(x.ljust(w) if i == 0 else x.rjust(w) for i, (x, w) in enumerate(zip(r, widths, strict=True)))
        + " |"
        for r in [list(header), *text]
    ]
    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])
