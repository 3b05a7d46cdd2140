"""How time and memory of a step grow with codes, batch, local crops and processes; one size varied at a time.

    python benchmarks/growth.py --json growth.json --figure figures/growth.png

ViT-S/16 at 96 pixels, forward, backward and optimizer on random images; medians, and the highest resident memory beyond
that before the method was built. Each cell in processes of its own.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from measure import peak_memory, run_cell, seconds, start_memory
from steps import TrainingStep, random_views

import main_cplearn
from cplearn import errors
from cplearn.distributed import launch
from cplearn.files import check_output_dir, write_text
from cplearn.flags import ArgumentParser, positive
from cplearn.host import git_commit, usable_cores
from cplearn.pictures.style import pyplot
from cplearn.text import format_table

CPU = torch.device("cpu")

BASE = {"out_dim": 16384, "batch": 16, "local": 0, "processes": 1}
SWEEPS = {
    "out_dim": (128, 8192, 65536, 262144, 1048576),
    "batch": (8, 16, 32, 64),
    "local": (0, 4, 8),
    "processes": (1, 2),
}


def sweep(args: argparse.Namespace) -> dict:
    """Measure every cell; print and return them."""
    cells = []
    for name, values in SWEEPS.items():
        for value in values:
            setting = BASE | {name: value}
            flags = [x for k, v in setting.items() for x in (f"--{k}", v)]
            cell, error = run_cell(__file__, "--cell", *flags, "--repeats", args.repeats)
            cells.append({"varied": name, **setting, **cell, **({"error": error} if error else {})})
            print(cells[-1], flush=True)
    rows = [(c["varied"], c[c["varied"]], f"{c['seconds']:.2f}", f"{c['mib']:.0f}") for c in cells if "seconds" in c]
    print(format_table(rows, ("varied", "value", "s a step", "MiB a process")))
    return {"commit": git_commit(), "torch": torch.__version__, "threads": torch.get_num_threads(), "cells": cells}


def measure(args: argparse.Namespace) -> None:
    """Measure one setting, in as many processes as it says, and print it for the process that sweeps."""
    with tempfile.TemporaryDirectory() as folder:
        where = f"file://{folder}/meet"
        mp.start_processes(step_of_rank, (args, where, f"{folder}/result"), nprocs=args.processes, start_method="spawn")
        print(Path(f"{folder}/result").read_text())


def step_of_rank(rank: int, args: argparse.Namespace, where: str, result: str) -> None:
    """Take steps on one rank; rank 0 writes what they took."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(args.processes), LOCAL_RANK=str(rank),
                      LOCAL_WORLD_SIZE=str(args.processes))  # fmt: skip
    torch.set_num_threads(max(1, usable_cores() // args.processes))
    if args.processes > 1:
        launch.init(where, "cpu")
    flags = ["--arch", "vit_small", "--image_size", "96", "--out_dim", str(args.out_dim), "--local_crops_number",
             str(args.local), "--batch_size_per_gpu", str(args.batch // args.processes)]  # fmt: skip
    images = random_views(main_cplearn.parse_args(flags), CPU)
    before = start_memory(CPU)
    step = TrainingStep(flags, CPU, images)
    times = [seconds(step, CPU) for _ in range(args.repeats + 1)][1:]
    if rank == 0:
        found = {"seconds": statistics.median(times), "mib": (peak_memory(CPU) - before) / 2**20}
        Path(result).write_text(json.dumps(found))
    del step.model  # DDP must be gone before its group is
    errors.leave_group()


def draw(report: dict, path: str) -> None:
    """Draw time and memory against each size."""
    titles = {"out_dim": "codes c", "batch": "images", "local": "local crops", "processes": "processes"}
    figure, axes = pyplot().subplots(2, 4, figsize=(11, 4.6), layout="constrained", sharey="row")
    for column, (name, title) in enumerate(titles.items()):
        cells = [c for c in report["cells"] if c["varied"] == name and "seconds" in c]
        x = [c[name] for c in cells]
        for row, (key, label) in enumerate((("seconds", "s a step"), ("mib", "MiB a process"))):
            axis = axes[row, column]
            axis.plot(x, [c[key] for c in cells], "o-", ms=4)
            axis.set(xlabel=title if row else None, ylabel=None if column else label)
            if name in ("out_dim", "batch"):
                axis.set_xscale("log", base=2)
            if name == "processes":
                axis.set_xticks(x)
            axis.grid(alpha=0.3)
    for axis in axes[:, 0]:  # shared by its row; set last, for it ends the scaling to what is drawn
        axis.set_ylim(bottom=0)
    base = ", ".join(f"{titles[k]} {v:,}" for k, v in BASE.items())
    figure.suptitle(f"A step of ViT-S/16 at 96 pixels, one size varied at a time; else {base}", fontsize=10)
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    """Sweep, or draw what an earlier sweep wrote, or measure one cell for the process that sweeps."""
    parser = ArgumentParser(prog="benchmarks/growth.py", description=__doc__)
    parser.add_argument("--json", default="growth.json", help="Where the cells go")
    parser.add_argument("--figure", default="growth.png")
    parser.add_argument("--draw", action="store_true", help="Measure nothing: draw the cells that are in --json")
    parser.add_argument("--repeats", type=positive(int), default=5)
    parser.add_argument("--cell", action="store_true", help=argparse.SUPPRESS)
    for name, value in BASE.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.cell:
        measure(args)
        return
    if not args.draw:
        check_output_dir(str(Path(args.json).parent), "--json: the folder")
        write_text(Path(args.json), json.dumps(sweep(args), indent=1) + "\n")
    draw(json.loads(Path(args.json).read_text()), args.figure)


if __name__ == "__main__":
    errors.run_script(main)
