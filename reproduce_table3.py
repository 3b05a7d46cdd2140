"""The paper's Table 3 (or 1, 2, 4, 9): every cell trained and evaluated, and the table beside the paper's.

    python reproduce_table3.py --data_path /data/imagenet --output_dir output/table3 --dry_run          # plan and price
    python reproduce_table3.py --data_path /data/imagenet --output_dir output/table3 --launcher slurm --partition gpu
    python reproduce_table3.py --data_path ~/cifar10 --output_dir output/small --scale small --minutes_per_cell 10
    python reproduce_table3.py --output_dir output/table3 --status                                      # how it does

A cell is a pre-training and its evaluations, each by its own script, in output_dir/CELL. The same command again goes
on where a grid was stopped or killed; more --methods, --out_dims or --seeds add cells. The table (table3.md, .csv,
.png) is written after every cell, with --launcher slurm by --status.
"""

import argparse
import os
import shlex
import signal
from collections.abc import Sequence
from pathlib import Path

import run_with_submitit
from cplearn import errors
from cplearn.errors import UserError, WriteError
from cplearn.files import check_output_dir
from cplearn.flags import ArgumentParser, check_finite, expand_paths
from cplearn.tables.cells import Cell, batch_of, build_cells, check_cells, known_epochs, load_grid, save_grid
from cplearn.tables.launch import gpus, run_here, run_on_slurm
from cplearn.tables.plan import epochs_within, plan, probe
from cplearn.tables.report import write
from cplearn.tables.rows import NAMES
from cplearn.tables.status import status_lines


def get_args_parser() -> argparse.ArgumentParser:
    # fmt: off
    p = ArgumentParser(prog="reproduce_table3.py", description=__doc__)
    p.add_argument("--output_dir", required=True, help="A folder a cell, and the table")
    p.add_argument("--status", action="store_true", help="State of every cell, and the table so far; starts nothing")
    p.add_argument("--dry_run", action="store_true", help="Cells, commands, hours, price and disk, by a few timed steps of every line; starts nothing")
    g = p.add_argument_group("grid")
    g.add_argument("--table", type=int, default=3, choices=(1, 2, 3, 4, 9), help="Of the paper")
    g.add_argument("--scale", default="paper", choices=("paper", "small"), help="The paper's setting, or ResNet-10 on images of 32 pixels")
    g.add_argument("--methods", nargs="+", default=[], choices=NAMES, metavar="METHOD", help=f"Of {', '.join(NAMES)} (default: the table's)")
    g.add_argument("--out_dims", nargs="+", type=int, default=[], metavar="C", help="Sizes (default: the table's; small: 16 128 1024 4096 16384)")
    g.add_argument("--seeds", nargs="+", type=int, default=[0])
    g.add_argument("--epochs", type=int, default=None, help="Instead of the recipe's")
    g.add_argument("--minutes_per_cell", type=float, default=None, help="As many epochs for every cell as its slowest can train in this time, by a few timed steps of each (without the evaluations)")
    g.add_argument("--data_path", default=None, help="Images in train/ and val/ (or test/) class folders, or the downloaded data set's folder")
    g.add_argument("--dataset", default=None, help="As in main_cplearn.py (default: folder). Tables 1 and 4: cifar10, cifar100 and svhn name the paper's column")
    g.add_argument("--train_flags", default="", metavar="'FLAGS'", help="More flags of main_cplearn.py for every cell, in quotes")
    g = p.add_argument_group("launch")
    g.add_argument("--launcher", default="local", choices=("local", "slurm"), help="One after another on this machine, or as jobs: then all other flags go to run_with_submitit.py")
    g.add_argument("--jobs", type=int, default=None, help="Cells side by side (default: 1, and 4 with slurm)")
    g.add_argument("--ngpus", type=int, default=None, help="GPUs (without any: processes) a cell, which share its batch: 512 for Table 3, else 64 (default: 8 for Table 3 where there are so many, else 1)")
    g = p.add_argument_group("plan")
    g.add_argument("--price", type=float, default=None, help="Euros for a GPU-hour, for --dry_run")
    g.add_argument("--probe_steps", type=int, default=None, help="Timed steps of every line (default: 60, without a GPU 10)")
    g.add_argument("--probe_images", type=int, default=None, help="Images a process in them, where a whole batch would take too long; the time is scaled up")
    # fmt: on
    return p


def parse_args(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Flags, and those of run_with_submitit.py. Raises `UserError`."""
    parser = get_args_parser()
    args, rest = parser.parse_known_args(argv)
    check_finite(args)
    expand_paths(args, "output_dir", "data_path")
    args.output_dir = os.path.abspath(args.output_dir)
    if rest and args.launcher != "slurm":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    for name in ("epochs", "minutes_per_cell", "jobs", "ngpus", "probe_steps", "probe_images", "price"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise UserError(f"--{name} {value:g} must be positive")
    if args.epochs and args.minutes_per_cell:
        raise UserError("--epochs and --minutes_per_cell both say how long to train: leave one out")
    for name in ("methods", "out_dims", "seeds"):
        given = getattr(args, name)
        if len(set(given)) < len(given):
            raise UserError(f"--{name} {' '.join(map(str, given))} names one twice")
    try:
        words = {x.split("=")[0] for x in shlex.split(args.train_flags)}
    except ValueError as error:
        raise UserError(f"--train_flags {args.train_flags}: {error}") from None
    taken = words & {
        "--output_dir",
        "--seed",
        "--out_dim",
        "--method",
        "--epochs",
        "--batch_size_per_gpu",
        "--data_path",
    }
    if taken or "--help" in words:
        raise UserError(
            f"--train_flags '{args.train_flags}': {', '.join(taken or words)} is not for the cells: leave it out"
        )
    if args.launcher == "slurm":
        launcher, unknown = run_with_submitit.get_args_parser().parse_known_args(rest)
        if unknown or launcher.nodes > 1 or launcher.then:
            wrong = " ".join(unknown) or ("--then" if launcher.then else f"--nodes {launcher.nodes}")
            raise UserError(f"{wrong} is no flag of the grid or of a job here (a cell has one node): leave it out")
    args.jobs = args.jobs or (4 if args.launcher == "slurm" else 1)
    return args, rest


def main(argv: Sequence[str] | None = None) -> None:
    args, rest = parse_args(argv)
    if args.status:
        cells = load_grid(args)
        print("\n".join(status_lines(cells)))
        report(args, cells)
        table = Path(args.output_dir, f"table{args.table}.md")
        print("\n" + table.read_text() if table.exists() else "No cell is finished, so there is no table yet")
        return
    check_data(args)
    check_output_dir(args.output_dir)
    share_devices(args)
    epochs = known_epochs(args)
    if args.minutes_per_cell and epochs is None:
        print(f"Timing a few steps of every line, for --minutes_per_cell {args.minutes_per_cell:g} ...")
        epochs = epochs_within(args, probe(args, build_cells(args, None)))
    if args.scale == "small" and epochs is None:
        raise UserError("--scale small needs a budget: --minutes_per_cell 10, or --epochs 12")
    cells = build_cells(args, epochs)
    check_cells(cells)
    if args.dry_run:
        plan(args, cells, rest)
        return
    from cplearn.training.folder_lock import FolderLock

    with FolderLock(args.output_dir):
        save_grid(args, cells, epochs)
        if args.launcher == "slurm":
            run_on_slurm(cells, args.jobs, [*rest, "--ngpus", str(args.ngpus)])
            print(f"State: reproduce_table3.py --output_dir {shlex.quote(args.output_dir)} --status")
            return
        run_here(cells, args.jobs, args.ngpus, lambda: report(args, load_grid(args)))
    report(args, load_grid(args))
    left = [cell.name for cell in cells if not cell.finished()]
    if left:
        raise UserError(
            f"{len(left)} of {len(cells)} cells are not finished ({', '.join(left[:3])}): see --status; "
            "the same command tries them again"
        )
    print(f"Done: {args.output_dir}/table{args.table}.md, .csv, .png")


# --- before anything runs ---------------------------------------------------------------------------------


def check_data(args) -> None:
    """Raises `UserError` if the images are not there, or not those that the paper's column is of."""
    if args.data_path is None and args.dataset != "digits":
        raise UserError("--data_path is missing: the folder with the images (or --dataset digits)")
    if args.data_path is not None:
        args.data_path = os.path.abspath(args.data_path)
        if not os.path.isdir(args.data_path):
            raise UserError(f"--data_path {args.data_path} is not a folder: check the path")
    if args.dataset in (None, "folder"):
        train = os.path.join(args.data_path, "train")
        if not os.path.isdir(train) or not any(
            os.path.isdir(os.path.join(args.data_path, split)) for split in ("val", "test")
        ):
            raise UserError(
                f"--data_path {args.data_path} needs train/ and val/ (or test/), each with class folders "
                "(torchvision's files: --dataset cifar10)"
            )
        classes = len([x for x in os.scandir(train) if x.is_dir()])
        if args.table != 3 and args.scale == "paper" and classes != 10:
            raise UserError(
                f"--table {args.table}: {args.data_path} has {classes} classes, CIFAR-10 has 10: name --dataset"
            )
    if args.table in (2, 9) and args.scale == "paper" and args.dataset not in (None, "folder", "cifar10"):
        raise UserError(f"--table {args.table} is of CIFAR-10, not of --dataset {args.dataset}")


def share_devices(args) -> None:
    """--ngpus, if it was not given; and that nothing has to be shared. Raises `UserError`."""
    most = 8 if args.table == 3 and args.scale == "paper" else 1
    if args.launcher == "slurm":
        args.ngpus = args.ngpus or most
    else:
        have = len(gpus())
        args.ngpus = args.ngpus or max(1, min(most, have // args.jobs))
        if have and args.jobs * args.ngpus > have:
            raise UserError(f"--jobs {args.jobs} x --ngpus {args.ngpus} are more than this machine's {have} GPUs")
    if batch_of(args) % args.ngpus:
        raise UserError(f"--ngpus {args.ngpus}: a batch of {batch_of(args)} cannot be shared evenly: a power of two")


def report(args, cells: list[Cell]) -> None:
    """Write the table. A disk that is full must not stop what runs."""
    try:
        write(Path(args.output_dir), args.table, args.scale, cells)
    except (OSError, WriteError) as error:
        print(f"WARNING: the table could not be written: {error}")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # | head
    errors.run_script(main)
