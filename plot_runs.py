"""Plot what runs have logged: loss beside its reference values, verdicts, use of codes, rank, k-NN, speed.

    python plot_runs.py output/digits
    python plot_runs.py output/a output/b output/c --labels "c = 1024" "c = 4096" "c = 16384" --out output/sizes

Writes a page (HTML, needs nothing but a browser) and a picture (PNG), --csv also the numbers. Only `log.txt` is read,
so runs may still train; run it again for newer epochs.
"""

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path

from cplearn import errors, files
from cplearn.flags import check_path
from cplearn.pictures import runs, runs_page, runs_picture
from cplearn.pictures.style import png_mark, save_figure
from utils import ArgumentParser, check_output_dir, expand_paths

SOFTWARE = "plot_runs.py"
MARKS = {".html": f'content="{SOFTWARE}"'.encode(), ".png": png_mark(SOFTWARE)}
CSV_MARK = b"run," + ",".join(runs.AXES).encode()


def get_args_parser() -> argparse.ArgumentParser:
    # fmt: off
    parser = ArgumentParser(prog="plot_runs.py", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="Output folder of main_cplearn.py, or its log.txt")
    parser.add_argument("--labels", nargs="+", default=None, help="Names of the runs (default: their folders)")
    parser.add_argument("--x", default="epochs", choices=runs.AXES, help="What training is measured in (the page can switch)")
    parser.add_argument("--out", default=None, metavar="NAME", help="Write NAME.html and NAME.png, only one of them if NAME ends so, or plots.* in the folder NAME (default: in the first run's)")
    parser.add_argument("--csv", default=None, metavar="FILE", help="Also write the numbers: one row per run and epoch")
    # fmt: on
    return parser


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Plot; return the files."""
    args = get_args_parser().parse_args(argv)
    expand_paths(args, "out", "csv")
    logs = runs.read_runs(args.runs, args.labels)
    paths = outputs(args)
    for path in paths:
        if path.suffix == ".html":
            epochs = max(len(run.verdicts) - run.start for run in logs)
            now = time.strftime("%Y-%m-%d %H:%M")
            note = f"{len(logs)} run{'s' * (len(logs) > 1)}, up to {epochs} epochs, as of {now}"
            files.write_text(path, runs_page.page(logs, args.x, note))
        else:
            figure = runs_picture.draw(logs, args.x)
            save_figure(figure, path.parent, path.stem, dpi=runs_picture.DPI, software=SOFTWARE)
    if args.csv:
        files.write_csv(Path(args.csv), *runs.csv_table(logs))
        paths.append(Path(args.csv))
    print(f"Wrote {', '.join(map(str, paths))}")
    return paths


def outputs(args: argparse.Namespace) -> list[Path]:
    """Return the files to write, --csv apart. Raises `UserError` for what cannot be written, or is somebody else's."""
    if args.out is None:
        first = Path(args.runs[0]).expanduser()
        base = (first if first.is_dir() else first.parent) / "plots"
    else:
        base = Path(args.out) / "plots" if os.path.isdir(args.out) or args.out.endswith("/") else Path(args.out)
    paths = [base] if base.suffix in MARKS else [base.with_name(base.name + suffix) for suffix in MARKS]
    check_output_dir(str(base.parent), "--out")
    for path in paths:
        check_path("--out", str(path))
        files.check_replaceable(path, MARKS[path.suffix], "--out")
    if args.csv:
        check_output_dir(str(Path(args.csv).parent), "--csv")
        files.check_replaceable(Path(args.csv), CSV_MARK, "--csv")
    return paths


if __name__ == "__main__":
    errors.run_script(main)
