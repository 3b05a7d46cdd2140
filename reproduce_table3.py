"""The paper's Table 3 (or another one): train and evaluate every cell, and write the table beside the paper's values.

    python reproduce_table3.py --data_path /data/imagenet --output_dir output/table3 --dry_run          # plan and price
    python reproduce_table3.py --data_path /data/imagenet --output_dir output/table3 --launcher slurm --partition gpu
    python reproduce_table3.py --data_path ~/cifar10 --output_dir output/small --scale small --minutes_per_cell 10
    python reproduce_table3.py --data_path ~/cifar10 --output_dir output/fair --scale small --epochs 12 --tune 6 \
        --seeds 0 1 2                                                  # the same tuning budget for every method
    python reproduce_table3.py --output_dir output/table3 --status                                      # progress

A cell is a pre-training and its evaluations, one command (cplearn/tables/cell.py) in output_dir/CELL. The same command
again continues a grid that was stopped or killed; more --methods, --out_dims or --seeds add cells. The table
(table3.md, .csv, .png) is written after every cell, with --launcher slurm by --status. docs/tables.md says more.
"""

import argparse
import dataclasses
import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import run_with_submitit
from cplearn import errors
from cplearn.errors import UserError
from cplearn.slurm.checks import check_partition, check_slurm, parse_flags
from cplearn.slurm.submit import Resources
from cplearn.tables import trial_rule, tuning
from cplearn.tables.grid import Grid, Settings, timed_epochs
from cplearn.tables.plan import epochs_within, print_plan, time_steps
from cplearn.tables.report import update
from cplearn.tables.rows import NAMES, OF_SIZES, TABLES, stem
from cplearn.tables.run import Share, device_name, gpus, run_here, run_on_slurm
from cplearn.tables.status import State, refuse_unfinished, snapshot, status_lines
from utils import (
    ArgumentParser,
    check_output_dir,
    check_unread_path,
    expand_paths,
    expand_recipes,
    positive,
    seed_below,
)

# Flags of main_cplearn.py that the grid sets itself.
GRIDS_OWN = ("--output_dir", "--seed", "--out_dim", "--method", "--epochs", "--batch_size_per_gpu", "--data_path")


def get_args_parser() -> argparse.ArgumentParser:
    # fmt: off
    p = ArgumentParser(prog="reproduce_table3.py", description=__doc__)
    p.add_argument("--output_dir", required=True, help="One folder per cell, and the table")
    p.add_argument("--status", action="store_true", help="State of every cell, and the table so far; starts nothing")
    p.add_argument("--dry_run", action="store_true", help="Cells, commands, hours, price and disk, from a few timed steps of every line; starts nothing")
    g = p.add_argument_group("grid")
    g.add_argument("--table", type=table_name, default=3, choices=TABLES, help="Of the paper; falcon is its earlier version's grid: ImageNet-100, 100 epochs, ten sizes, DINO and CPLearn")
    g.add_argument("--scale", default="paper", choices=("paper", "small"), help="The paper's setting, or ResNet-10 on images of 32 pixels")
    g.add_argument("--methods", nargs="+", default=[], choices=NAMES, metavar="METHOD", help=f"Of {', '.join(NAMES)} (default: the table's)")
    g.add_argument("--out_dims", nargs="+", type=positive(int), default=[], metavar="C", help="Sizes (default: the table's; small: 16 128 1024 4096 16384)")
    g.add_argument("--seeds", nargs="+", type=seed_below(2**31), default=[0])
    g.add_argument("--epochs", type=positive(int), default=None, help="Instead of the recipe's")
    g.add_argument("--minutes_per_cell", type=positive(float), default=None, help="As many epochs for every cell as its slowest can train in this time, by a few timed steps of each (without the evaluations)")
    g.add_argument("--data_path", default=None, help="Images in train/ and val/ (or test/) class folders, lists, tar shards or parquet (docs/data.md), or the downloaded data set's folder")
    g.add_argument("--dataset", default=None, help="As in main_cplearn.py (default: folder). Tables 1 and 4: cifar10, cifar100 and svhn name the paper's column")
    g.add_argument("--train_flags", default="", metavar="'FLAGS'", help="More flags of main_cplearn.py for every cell, in quotes")
    g = p.add_argument_group("the same tuning budget for every method (Table 3 and falcon)")
    g.add_argument("--tune", type=int, default=None, metavar="N", help="First N trials of every method on a part of the training images, scored by 20-NN on the rest; the best one's settings are then used for all its cells (docs/tables.md)")
    g.add_argument("--tune_out_dim", type=positive(int), default=None, metavar="C", help=f"Size of every trial (default: {trial_rule.OUT_DIM})")
    g.add_argument("--tune_epochs", type=positive(int), default=None, help="Of every trial (default: as many as the cells)")
    g = p.add_argument_group("launch")
    g.add_argument("--launcher", default="local", choices=("local", "slurm"), help="Side by side on this machine, or a job for each cell: then all other flags go to run_with_submitit.py")
    g.add_argument("--jobs", type=positive(int), default=None, help="Cells side by side (default: 1, 4 with slurm, as many as fit with --cells_per_gpu)")
    g.add_argument("--cells_per_gpu", type=positive(int), default=1, metavar="N", help="Cells that share a GPU, for networks too small to fill one (then --jobs is N times the GPUs here)")
    g.add_argument("--ngpus", type=positive(int), default=None, help="GPUs (without any: processes) per cell, which share its batch: 512 for Table 3, else 64 (default: 8 for Table 3 where there are so many, else 1)")
    g = p.add_argument_group("plan")
    g.add_argument("--price", type=positive(float), default=None, help="Euros per GPU-hour, for --dry_run")
    g.add_argument("--probe_steps", type=positive(int), default=None, help="Timed steps of every line (default: 60, without a GPU 10)")
    g.add_argument("--probe_images", type=positive(int), default=None, help="Images per process in them, where a whole batch would take too long; the time is scaled up")
    # fmt: on
    return p


def table_name(text: str) -> int | str:
    """Return a table's number, or the word that was given."""
    return int(text) if text.isdecimal() else text


def parse_args(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Parse the flags; return them and those of run_with_submitit.py. Raises `UserError`."""
    parser = get_args_parser()
    args, rest = parser.parse_known_args(argv)
    expand_paths(args, "output_dir", "data_path")
    args.output_dir = os.path.abspath(args.output_dir)
    args.data_path = os.path.abspath(args.data_path) if args.data_path is not None else None
    if args.dataset and args.dataset.startswith("hf:"):
        args.dataset = "hf:" + os.path.abspath(os.path.expanduser(args.dataset.removeprefix("hf:")))
    if rest and args.launcher != "slurm":
        parser.refuse(rest)
    if args.epochs and args.minutes_per_cell:
        raise UserError("--epochs and --minutes_per_cell both say how long to train: leave one out")
    for name in ("methods", "out_dims", "seeds"):
        given = getattr(args, name)
        if len(set(given)) < len(given):
            raise UserError(f"--{name} {' '.join(map(str, given))} names one twice")
    try:
        words = shlex.split(args.train_flags)
    except ValueError as error:
        raise UserError(f"--train_flags {args.train_flags}: {error}") from None
    words = {x.split("=")[0] for x in expand_recipes(words)}
    taken = sorted(words & {*GRIDS_OWN, "--help", "-h"})
    if taken:
        raise UserError(f"--train_flags '{args.train_flags}': {', '.join(taken)} is not for the cells: leave it out")
    check_tuning_flags(args, words)
    if args.cells_per_gpu > 1:
        check_sharing(args)
    args.jobs = args.jobs or (4 if args.launcher == "slurm" else 1)
    return args, rest


def check_tuning_flags(args: argparse.Namespace, words: set[str]) -> None:
    """Check --tune and what belongs to it; `words`: the flags in --train_flags. Raises `UserError`."""
    if args.tune is None:
        for name in ("tune_out_dim", "tune_epochs"):
            if getattr(args, name):
                raise UserError(f"--{name} {getattr(args, name)} is of the trials, of which there are none: add --tune")
        return
    if args.tune < 2:
        raise UserError(f"--tune {args.tune} leaves nothing to choose from (trial 0 is the recipe): at least 2")
    tuned = sorted(words & trial_rule.own_settings())
    if tuned:
        raise UserError(f"--train_flags '{args.train_flags}': --tune chooses {', '.join(tuned)}: leave it out")
    args.tune_out_dim = args.tune_out_dim or trial_rule.OUT_DIM


def check_sharing(args: argparse.Namespace) -> None:
    """Check --cells_per_gpu, and let as many cells run as fit. Raises `UserError`."""
    given = f"--cells_per_gpu {args.cells_per_gpu}"
    if args.launcher == "slurm":
        raise UserError(
            f"{given} is of this machine's GPUs, a SLURM job has its own: leave it out, or use a job's shell"
        )
    if (args.ngpus or 1) > 1:
        raise UserError(f"{given} with --ngpus {args.ngpus}: a cell either shares a GPU or has several")
    args.ngpus = 1
    args.jobs = args.jobs or args.cells_per_gpu * max(1, len(gpus()))


def parse_launcher_flags(rest: list[str]) -> argparse.Namespace:
    """Parse the flags of run_with_submitit.py. Raises `UserError` for those that the grid sets itself."""
    launcher, unknown = run_with_submitit.parse_args(rest)
    fixed = {"nodes": 1, "script": "main_cplearn", "then": None, "local": False, "status": None, "name": None}
    wrong = unknown or [f"--{x} {getattr(launcher, x)}" for x, value in fixed.items() if getattr(launcher, x) != value]
    if wrong:
        raise UserError(f"{' '.join(wrong)} is no flag of the grid, nor of a cell's job: leave it out")
    return launcher


def main(argv: Sequence[str] | None = None) -> None:
    """Run the grid, or print its plan or its status."""
    args, rest = parse_args(argv)
    launcher = parse_launcher_flags(rest) if args.launcher == "slurm" else None
    if args.status:
        print_status(Path(args.output_dir))
        return
    check_data(args)
    settings = choose_settings(args)
    check_output_dir(args.output_dir)
    grid = build_grid(args, settings)
    images = tuning_images(grid) if args.tune else None
    if args.dry_run:
        show_plan(args, grid, rest)
        return
    from cplearn.lock import FolderLock  # loads torch

    share = Share(settings.ngpus, args.jobs, args.cells_per_gpu)
    submit = submitter(args, settings.ngpus, launcher) if launcher else None
    with FolderLock(args.output_dir):
        best = tuning.find_best(grid, images, share, submit) if args.tune else {}
        if best is None:
            return
        if best:
            grid = build_grid(args, grid.settings, best)
        whole = grid.save()  # with the cells of earlier commands
        if submit:
            submit(snapshot(grid))
            return
        run_here(snapshot(grid), share, lambda: update(whole, snapshot(whole)))
        states = snapshot(whole)
        update(whole, states)
    left = [x for x in states if x.cell in grid.cells and not x.complete]
    refuse_unfinished("cells", left, len(grid.cells))
    print(f"Done: {args.output_dir}/{stem(args.table)}.md, .csv, .png")


def submitter(args: argparse.Namespace, ngpus: int, launcher: argparse.Namespace) -> Callable:
    """Return what submits the cells of a grid. Raises `UserError` if this cluster cannot run them."""
    resources = dataclasses.replace(Resources.from_args(launcher), ngpus=ngpus)
    check_slurm(resources, "main_cplearn")
    check_partition(resources)

    def submit(states: Sequence[State]) -> None:
        run_on_slurm(states, args.jobs, resources, launcher.dependency)
        print(f"State: reproduce_table3.py --output_dir {shlex.quote(args.output_dir)} --status")

    return submit


def print_status(folder: Path) -> None:
    """Print the state of every trial and cell, and the table so far."""
    if (folder / "tuning" / "grid.json").exists():
        print("\n".join(["Trials:", *status_lines(snapshot(Grid.load(folder / "tuning")))]))
        best = folder / "tuning.md"
        print("\n" + (best.read_text() if best.exists() else "No best trials yet: some are not finished") + "\n")
        if not (folder / "grid.json").exists():
            return
    grid = Grid.load(folder)
    states = snapshot(grid)
    print("\n".join(status_lines(states)))
    update(grid, states)
    table = folder / f"{stem(grid.settings.table)}.md"
    print("\n" + table.read_text() if table.exists() else "No cell is finished, so there is no table yet")


# --- tuning -----------------------------------------------------------------------------------------------


def tuning_images(grid: Grid):
    """Return the training images that are split for the trials. Raises `UserError` if that cannot be."""
    from cplearn.tables.split import open_training_images  # loads torch

    tuning.trial_grid(grid).check()
    return open_training_images(parse_flags("main_cplearn", grid.cells[0].train))


def show_plan(args: argparse.Namespace, grid: Grid, rest: list[str]) -> None:
    """Time a few steps, and print the plan of the trials, if there are any, and of the cells.

    `rest`: the flags of run_with_submitit.py.
    """
    command = f"torchrun --nproc_per_node={grid.settings.ngpus} main_cplearn.py"
    if args.launcher == "slurm":
        command = f"run_with_submitit.py {shlex.join([*rest, '--ngpus', str(grid.settings.ngpus)])}"
    how = Share(grid.settings.ngpus, args.jobs, args.cells_per_gpu), command, args.price
    if args.tune:
        trials = tuning.trial_grid(grid)
        print(f"Timing a few steps of every method's trial 0 here ({device_name()}) ...")
        first = Grid(grid.folder, grid.settings, trials.cells[: len(trials.methods)])  # the split is not there yet
        timings = tuning.timings(trials, time_lines(args, first))
        print(f"\n{len(trials.cells)} trials, {args.tune} of each of {len(trials.methods)} methods, come first:")
        print_plan(trials, timings, *how)
        print("\nThen the table's cells, with the settings of the best trials (here: as they stand):")
    print(f"Timing a few steps of {len({x.row.key for x in grid.cells})} lines here ({device_name()}) ...")
    print_plan(grid, time_lines(args, grid), *how)


# --- before anything runs ---------------------------------------------------------------------------------


def check_data(args: argparse.Namespace) -> None:
    """Raise `UserError` if the images are not there, or are not those of the paper's column."""
    from cplearn.data import sources  # loads torch

    local_copy = (args.dataset or "").startswith(sources.PREFIX)
    if args.data_path is None and args.dataset != "digits" and not local_copy:
        raise UserError("--data_path is missing: the folder with the images (or --dataset digits)")
    check_unread_path(args)
    if args.data_path is not None and not os.path.isdir(args.data_path):
        raise UserError(f"--data_path {args.data_path} is not a folder: check the path")
    if args.dataset in (None, "folder"):
        train = sources.find_split(Path(args.data_path), "train")
        flat = train.kind == "folder" and train.root == Path(args.data_path)
        if flat or not sources.has_split(args.data_path, "val"):
            raise UserError(
                f"--data_path {args.data_path} needs train/ and val/ (or test/), each with class folders, or lists, tar "
                "or parquet files of both with labels (torchvision's files: --dataset cifar10)"
            )
        of_cifar10 = args.table not in OF_SIZES and args.scale == "paper"
        if of_cifar10 and (classes := len(train.open().classes or [])) != 10:
            raise UserError(
                f"--table {args.table}: {args.data_path} has {classes} classes, CIFAR-10 has 10: name --dataset"
            )
    if args.table in (2, 9) and args.scale == "paper" and args.dataset not in (None, "folder", "cifar10"):
        raise UserError(f"--table {args.table} is of CIFAR-10, not of --dataset {args.dataset}")


def choose_settings(args: argparse.Namespace) -> Settings:
    """Return the grid's settings, with --ngpus chosen if it was not given. Raises `UserError` if GPUs would be shared."""
    most = 8 if args.table in OF_SIZES and args.scale == "paper" else 1
    have = 0 if args.launcher == "slurm" else len(gpus())
    ngpus = args.ngpus or (most if args.launcher == "slurm" else max(1, min(most, have // args.jobs)))
    if have and args.jobs * ngpus > have * args.cells_per_gpu:
        shared = f" (--cells_per_gpu {args.cells_per_gpu})" if args.cells_per_gpu > 1 else ""
        raise UserError(f"--jobs {args.jobs} x --ngpus {ngpus} are more than this machine's {have} GPUs{shared}")
    if args.cells_per_gpu > 1 and not have:
        raise UserError(f"--cells_per_gpu {args.cells_per_gpu}, but there is no GPU here: --jobs cells share the cores")
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(Settings)}
    settings = Settings(**{**given, "ngpus": ngpus})
    if settings.batch % ngpus:
        raise UserError(f"--ngpus {ngpus}: a batch of {settings.batch} cannot be shared evenly: a power of two")
    return settings


def build_grid(args: argparse.Namespace, settings: Settings, best: dict[str, int] | None = None) -> Grid:
    """Return the cells that were asked for, with as many epochs as fit into --minutes_per_cell. Raises `UserError`.

    `best`: the number of the trial by method whose settings they have.
    """
    lines = settings.rows(args.methods, args.out_dims)
    if best:
        lines = [trial_rule.tuned(row, best[row.method]) for row in lines]
    folder = Path(args.output_dir)
    epochs = settings.epochs or timed_epochs(folder, args.minutes_per_cell)
    if args.minutes_per_cell and epochs is None:
        untimed = Grid.build(folder, settings, lines, args.seeds)
        untimed.check()
        print(f"Timing a few steps of every line, for --minutes_per_cell {args.minutes_per_cell:g} ...")
        epochs = epochs_within(settings, time_lines(args, untimed))
    if args.scale == "small" and epochs is None:
        raise UserError("--scale small needs a budget: --minutes_per_cell 10, or --epochs 12")
    grid = Grid.build(folder, dataclasses.replace(settings, epochs=epochs), lines, args.seeds)
    grid.check()
    return grid


def time_lines(args: argparse.Namespace, grid: Grid) -> dict[str, dict]:
    """Time a few steps of every line here; with --launcher slurm one process stands for all."""
    here = Share(grid.settings.ngpus, args.jobs, args.cells_per_gpu) if args.launcher == "local" else Share(1, 1)
    return time_steps(grid, here, args.probe_steps, args.probe_images)


if __name__ == "__main__":
    errors.run_script(main)
