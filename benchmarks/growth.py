"""How time and memory of a step grow with codes, batch, local crops and processes; one size varied at a time.

    python benchmarks/growth.py --json growth.json --figure figures/growth.png

ViT-S/16 at 96 pixels, forward, backward and optimizer on random images; medians, and the highest resident memory beyond
that before the method was built. Each cell in processes of its own.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from measure import CPU, median_seconds, peak_memory, rows_of, run_cell, start_memory
from steps import TrainingStep, random_views

import main_cplearn
from cplearn import errors
from cplearn.distributed import launch
from cplearn.files import check_output_dir, write_text
from cplearn.flags import ArgumentParser, positive
from cplearn.host import git_commit, usable_cores
from cplearn.pictures.style import pyplot
from cplearn.text import format_table

BASE = {"out_dim": 16384, "batch": 16, "local": 0, "processes": 1}
SWEEPS = {
    "out_dim": (128, 8192, 65536, 262144, 1048576),
    "batch": (8, 16, 32, 64),
    "local": (0, 4, 8),
    "processes": (1, 2),
}
TITLES = {"out_dim": "codes c", "batch": "images", "local": "local crops", "processes": "processes"}
COLUMNS = {"varied": ("varied", ""), "value": ("value", ""), "s a step": ("seconds", ".2f"),
           "MiB a process": ("mib", ".0f")}  # fmt: skip


def sweep(repeats: int) -> dict:
    """Measure every cell; print and return them."""
    cells = []
    for name, values in SWEEPS.items():
        for value in values:
            setting = BASE | {name: value}
            cell, error = run_cell(__file__, "--cell", json.dumps(setting), "--repeats", repeats)
            cells.append({"varied": name, **setting, **cell, **({"error": error} if error else {})})
            print(cells[-1], flush=True)
    rows = rows_of([c | {"value": c[c["varied"]]} for c in cells if "seconds" in c], COLUMNS)
    print(format_table(rows, tuple(COLUMNS)))
    return {"commit": git_commit(), "torch": torch.__version__, "threads": torch.get_num_threads(), "cells": cells}


def measure(setting: dict[str, int], repeats: int) -> None:
    """Measure one setting, in as many processes as it says, and print it for the process that sweeps."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (setting, repeats, f"file://{folder}/meet", f"{folder}/result")
        mp.start_processes(step_of_rank, arguments, nprocs=setting["processes"], start_method="spawn")
        print(Path(f"{folder}/result").read_text())


def step_of_rank(rank: int, setting: dict[str, int], repeats: int, where: str, result: str) -> None:
    """Take steps on one rank; rank 0 writes what they took."""
    world = setting["processes"]
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
    torch.set_num_threads(max(1, usable_cores() // world))
    if world > 1:
        launch.init(where, "cpu")
    flags = ["--arch", "vit_small", "--image_size", "96", "--out_dim", str(setting["out_dim"]), "--local_crops_number",
             str(setting["local"]), "--batch_size_per_gpu", str(setting["batch"] // world)]  # fmt: skip
    images = random_views(main_cplearn.parse_args(flags), CPU)
    before = start_memory(CPU)
    step = TrainingStep(flags, CPU, images)
    took = median_seconds(step, CPU, repeats)
    if rank == 0:
        Path(result).write_text(json.dumps({"seconds": took, "mib": (peak_memory(CPU) - before) / 2**20}))
    del step.model  # DDP must be gone before its group is
    errors.leave_group()


def draw(report: dict, path: str) -> None:
    """Draw time and memory against each size."""
    figure, axes = pyplot().subplots(2, 4, figsize=(11, 4.6), layout="constrained", sharey="row")
    for column, (name, title) in enumerate(TITLES.items()):
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
    base = ", ".join(f"{TITLES[k]} {v:,}" for k, v in BASE.items())
    figure.suptitle(f"A step of ViT-S/16 at 96 pixels, one size varied at a time; else {base}", fontsize=10)
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    """Sweep, or draw what an earlier sweep wrote, or measure one cell for the process that sweeps."""
    parser = ArgumentParser(prog="benchmarks/growth.py", description=__doc__)
    parser.add_argument("--json", default="growth.json", help="Where the cells go")
    parser.add_argument("--figure", default="growth.png")
    parser.add_argument("--draw", action="store_true", help="Measure nothing: draw the cells that are in --json")
    parser.add_argument("--repeats", type=positive(int), default=5)
    parser.add_argument("--cell", type=json.loads, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.cell:
        measure(args.cell, args.repeats)
        return
    if not args.draw:
        check_output_dir(str(Path(args.json).parent), "--json: the folder")
        write_text(Path(args.json), json.dumps(sweep(args.repeats), indent=1) + "\n")
    draw(json.loads(Path(args.json).read_text()), args.figure)


if __name__ == "__main__":
    errors.run_script(main)
