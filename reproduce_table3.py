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
import contextlib
import importlib
import io
import json
import os
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import errors
import grid
import run_with_submitit
import utils
from errors import UserError, WriteError
from grid import Cell
from table_rows import NAMES, Row, rows

ROOT = Path(__file__).resolve().parent
BATCH = {3: 512}  # over all processes; 64 for the other tables and at small scale


def get_args_parser() -> argparse.ArgumentParser:
    # fmt: off
    p = utils.ArgumentParser(prog="reproduce_table3.py", description=__doc__)
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
    utils.check_finite(args)
    utils.expand_paths(args, "output_dir", "data_path")
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
        print("\n".join(grid.status_lines(cells)))
        report(args, cells)
        table = Path(args.output_dir, f"table{args.table}.md")
        print("\n" + table.read_text() if table.exists() else "No cell is finished, so there is no table yet")
        return
    check_data(args)
    utils.check_output_dir(args.output_dir)
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
    from run_control import FolderLock

    with FolderLock(args.output_dir):
        save_grid(args, cells, epochs)
        if args.launcher == "slurm":
            grid.run_on_slurm(cells, args.jobs, [*rest, "--ngpus", str(args.ngpus)])
            print(f"State: reproduce_table3.py --output_dir {shlex.quote(args.output_dir)} --status")
            return
        grid.run_here(cells, args.jobs, args.ngpus, lambda: report(args, load_grid(args)))
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
        have = len(grid.gpus())
        args.ngpus = args.ngpus or max(1, min(most, have // args.jobs))
        if have and args.jobs * args.ngpus > have:
            raise UserError(f"--jobs {args.jobs} x --ngpus {args.ngpus} are more than this machine's {have} GPUs")
    if batch_of(args) % args.ngpus:
        raise UserError(f"--ngpus {args.ngpus}: a batch of {batch_of(args)} cannot be shared evenly: a power of two")


def batch_of(args) -> int:
    """Over all processes of a cell."""
    return BATCH.get(args.table, 64) if args.scale == "paper" else 64


def build_cells(args, epochs: int | None) -> list[Cell]:
    """The grid, seed after seed, so that what is stopped early has every line once before any line twice."""
    data = args.dataset if args.dataset in ("cifar10", "cifar100", "svhn") else "cifar10"
    lines = rows(args.table, args.scale, args.methods, args.out_dims, data)
    # The untrained network stands for a size; its backbone is the same whatever the size and the method.
    by_method = sorted(lines, key=lambda r: r.method != "cplearn")
    of_size = {row.out_dim: row.key for row in reversed(by_method)}.values()
    cells = []
    for seed in args.seeds:
        for row in lines:
            flags = evaluation_flags(args)
            random = ("cluster",) * (row.key in of_size) + ("knn", "linear") * (row.key == by_method[0].key)
            flags |= {f"random {name}": flags[name] for name in random}
            train = [*row.flags, *common_flags(args), "--seed", str(seed)]
            train += ["--epochs", str(epochs)] if epochs else []
            name = f"{row.key}_s{seed}"
            cells.append(Cell(row, seed, name, train, flags, Path(args.output_dir, name)))
    return cells


def common_flags(args) -> list[str]:
    """Of every pre-training."""
    data = {"--data_path": args.data_path, "--dataset": args.dataset}
    given = [x for flag, value in data.items() if value for x in (flag, value)]
    batch = ["--batch_size_per_gpu", str(batch_of(args) // args.ngpus)]
    return ["--saveckp_freq", "0", *batch, *given, *shlex.split(args.train_flags)]


def evaluation_flags(args) -> dict[str, list[str]]:
    collapse = "--baseline false"
    if args.scale == "small":
        linear = "--augment false --optimizer adam --epochs 30"
        collapse += " --components 10 100 --mc_samples 2000 --tsne_images 0"
    else:
        # Tables of small networks: the paper's Appendix I. Table 3: DINO's script.
        linear = "" if args.table == 3 else "--augment false --optimizer adam --epochs 100"
    flags = {"knn": "--nb_knn 20", "linear": linear, "cluster": "--shuffles 20", "collapse": collapse}
    return {name: text.split() for name, text in flags.items()}


def check_cells(cells: list[Cell]) -> None:
    """Every script's own check of its flags, before the first of them runs. Raises `UserError` with the cell's name."""
    for cell in cells:
        said = io.StringIO()  # of argparse, which prints its usage
        try:
            with contextlib.redirect_stderr(said):
                for stage, script, flags in cell.stages():
                    module = importlib.import_module(script)
                    (module if stage == "train" else module.get_args_parser()).parse_args(flags)
        except UserError as error:
            raise UserError(f"{cell.name}: {error}") from None
        except SystemExit:
            raise UserError(f"{cell.name}: {said.getvalue().strip().splitlines()[-1]}") from None


# --- what a folder's grid is ------------------------------------------------------------------------------


def settings_of(args, epochs: int | None) -> dict:
    """What all cells of a folder share."""
    names = ("table", "scale", "data_path", "dataset", "minutes_per_cell", "train_flags", "ngpus")
    return {name: getattr(args, name) for name in names} | {"epochs": epochs}


def read_grid(args) -> dict:
    try:
        return json.loads(Path(args.output_dir, "grid.json").read_text())
    except (OSError, ValueError):
        return {}


def known_epochs(args) -> int | None:
    """What was given, or what was timed when this grid began."""
    before = read_grid(args).get("settings", {})
    if args.minutes_per_cell and before.get("minutes_per_cell") == args.minutes_per_cell:
        return before["epochs"]
    return args.epochs


def save_grid(args, cells: list[Cell], epochs: int | None) -> None:
    """Write down the cells; those of before stay. Raises `UserError` if they were of another setting."""
    before, now = read_grid(args), settings_of(args, epochs)
    changed = [
        f"--{k} {before['settings'][k]}, now {v}" for k, v in now.items() if before and before["settings"][k] != v
    ]
    kept = {x["name"]: x for x in before.get("cells", [])}
    for cell in cells:
        there = kept.get(cell.name)
        if there and _without_folders(there["train"]) != _without_folders(cell.train):
            changed.append(f"other flags for {cell.name}")
        kept[cell.name] = {k: v for k, v in asdict(cell).items() if k != "folder"}
    if changed:
        raise UserError(f"{args.output_dir} holds a grid with {'; '.join(changed[:3])}: choose another --output_dir")
    content = {"settings": now, "commit": utils.git_commit(), "cells": list(kept.values())}
    utils.write_text(Path(args.output_dir, "grid.json"), json.dumps(content, indent=1) + "\n")


def _without_folders(flags: list[str]) -> list[str]:
    """A recipe is the same in another checkout."""
    return [x.rpartition("/")[2] if x.startswith("@") else x for x in flags]


def load_grid(args) -> list[Cell]:
    """All cells of a folder. Raises `UserError` if there are none."""
    content = read_grid(args)
    if not content:
        raise UserError(f"{args.output_dir} holds no grid: was it started with this --output_dir?")
    args.table, args.scale = content["settings"]["table"], content["settings"]["scale"]
    return [
        Cell(Row(**x["row"]), x["seed"], x["name"], x["train"], x["evaluate"], Path(args.output_dir, x["name"]))
        for x in content["cells"]
    ]


def report(args, cells: list[Cell]) -> None:
    """Write the table. A disk that is full must not stop what runs."""
    import table_report

    try:
        table_report.write(Path(args.output_dir), args.table, args.scale, cells)
    except (OSError, WriteError) as error:
        print(f"WARNING: the table could not be written: {error}")


# --- plan -------------------------------------------------------------------------------------------------


def probe(args, cells: list[Cell]) -> dict[str, dict]:
    """Seconds a step of every line, its checkpoint's size and so on, measured here by main_cplearn.py itself.

    Kept in output_dir/probe.json and taken from there the next time. `error` where it failed. With --launcher slurm one
    process stands for all.
    """
    kept_in = Path(args.output_dir, "probe.json")
    kept = json.loads(kept_in.read_text()) if kept_in.exists() else {}
    processes = args.ngpus if args.launcher == "local" else 1
    steps = args.probe_steps or (60 if grid.gpus() else 10)
    found = {}
    for cell in cells:
        key = cell.row.key
        if key in found:
            continue
        more = f"--max_steps {steps} --epochs 1000 --warmup_epochs 0 --saveckp_minutes 0".split()
        more += ["--batch_size_per_gpu", str(args.probe_images)] if args.probe_images else []
        more += ["--epoch_queue_starts", "0"] * (cell.row.method == "swav")  # its share of most epochs
        flags = [*cell.row.flags, *common_flags(args), *more]
        flags += grid.loader_flags(flags, args.jobs if args.launcher == "local" else 1, processes)
        name = shlex.join([grid.device_name(), str(processes), *_without_folders(flags)])
        if name not in kept:
            found[key] = _probe_one(args, flags, processes)
            if "error" not in found[key]:
                kept[name] = found[key]
                utils.write_text(kept_in, json.dumps(kept, indent=1) + "\n")
        x = found[key] = kept.get(name) or found[key]
        print(f"  {key}: " + (x["error"] if "error" in x else f"{x['step_seconds']:.3f} s a step"), flush=True)
    return found


def _probe_one(args, flags: list[str], processes: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        command = [*grid.command_of("main_cplearn", processes), *flags, "--output_dir", folder]
        env = grid.environment(0, args.jobs if args.launcher == "local" else 1, processes)
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
        if done.returncode:
            return {"error": grid.end_of(done.stdout, done.returncode)[1]}
        log = utils.read_json_lines(Path(folder, "log.txt"))[-1]
        start = json.loads(Path(folder, "args.json").read_text())
        if log["steps"] < 2:
            return {"error": "too few images, or --probe_steps, for two steps: the first one is not timed"}
        return {
            # The first one includes all that happens once.
            "step_seconds": (log["seconds"] - log["first_step_seconds"]) / (log["steps"] - 1),
            "data_wait": log["data_wait"],
            "images": start["args"]["batch_size_per_gpu"],
            "processes": processes,
            "train_images": start["derived"]["train_images"],
            "views": 2 + start["args"]["local_crops_number"],
            "local": (start["args"]["local_image_size"] / start["args"]["image_size"]) ** 2,
            "expected_memory_gb": start["derived"]["expected_memory_gb"],
            "checkpoint_bytes": Path(folder, "checkpoint.pth").stat().st_size,
            "warnings": [x for x in done.stdout.splitlines() if x.startswith("WARNING") and "--" in x],
        }


def epochs_within(args, times: dict[str, dict]) -> int:
    """The same number for all: what the slowest line can do in --minutes_per_cell, at least 2."""
    for key, x in times.items():
        if "error" in x:
            raise UserError(f"the timed steps of {key} failed: {x['error']}")
    seconds = {key: _step_seconds(args, x) * _steps_per_epoch(args, x) for key, x in times.items()}
    slowest = max(seconds, key=seconds.get)
    epochs = max(2, int(60 * args.minutes_per_cell / max(seconds[slowest], 1e-9)))
    print(f"{epochs} epochs for every cell: {slowest} needs {seconds[slowest]:.0f} s for one")
    return epochs


def _step_seconds(args, x: dict) -> float:
    return x["step_seconds"] * batch_of(args) / args.ngpus / x["images"]


def _steps_per_epoch(args, x: dict) -> int:
    return x["train_images"] // batch_of(args)


def plan(args, cells: list[Cell], launcher_flags: list[str]) -> None:
    """Print what would run, and what it would cost."""
    device = grid.device_name()
    unit = "CPU" if device == "cpu" else "GPU"
    print(f"Timing a few steps of {len({c.row.key for c in cells})} lines here ({device}) ...")
    times = probe(args, cells)
    table, hours, disk, left_out = [], 0.0, 0.0, []
    for cell in cells:
        x = times[cell.row.key]
        if cell.finished() or "error" in x or not _steps_per_epoch(args, x):
            left_out.append(cell.name)
            why = "done" if cell.finished() else x.get("error", f"fewer images than a batch of {batch_of(args)}")
            table.append((cell.name, *[None] * 6, why))
            continue
        epochs = importlib.import_module("main_cplearn").parse_args(cell.stages()[0][2]).epochs
        training = args.ngpus * epochs * _steps_per_epoch(args, x) * _step_seconds(args, x) / 3600
        evaluating = _evaluation_passes(cell) * x["train_images"] * _forward_seconds(x) / 3600
        hours, disk = hours + training + evaluating, disk + 2 * x["checkpoint_bytes"] / 1e9
        table.append((cell.name, epochs, f"{1000 * _step_seconds(args, x):.0f}", f"{x['data_wait']:.0%}", f"{training:.1f}",
                      f"{evaluating:.1f}", f"{x['expected_memory_gb']:.1f}", ""))  # fmt: skip
    header = ("cell", "epochs", "ms a step", "of it waiting for images", f"{unit}-h training", f"{unit}-h evaluating",
              "GB without activations", "")  # fmt: skip
    print("\n" + utils.format_table(table, header) + "\n")
    print_commands(args, cells, launcher_flags)
    days = hours / args.ngpus / args.jobs / 24
    price = f", {args.price * hours:,.0f} euros at {args.price:g} for such an hour" if args.price else ""
    print(f"\n{len(cells) - len(left_out)} cells, {args.ngpus} process{'es' * (args.ngpus > 1)} each, a batch of {batch_of(args)}: "
          f"{hours:,.0f} {unit}-hours, {days:,.1f} days with {args.jobs} side by side, {disk:,.1f} GB of disk{price}")  # fmt: skip
    if left_out:
        print(f"Not counted: {', '.join(left_out)}")
    x = next((x for x in times.values() if "images" in x), {"images": 0, "processes": 0})
    print(f"Steps were timed here: {device}, {x['processes']} process{'es' * (x['processes'] > 1)}, {x['images']} images each"
          + (", scaled up, which is too much where a part of a step does not grow with the batch" if args.probe_images else "")
          + "; evaluations are estimated from the passes over the images that they make.")  # fmt: skip
    for key, x in times.items():
        for warning in x.get("warnings", []):
            print(f"{key}: {warning}")
    if unit == "CPU" and args.scale == "paper":
        print("WARNING: no GPU here, so these are hours of this CPU: type it where a GPU is")


def print_commands(args, cells: list[Cell], launcher_flags: list[str]) -> None:
    if args.launcher == "slurm":
        how = f"run_with_submitit.py {shlex.join([*launcher_flags, '--ngpus', str(args.ngpus)])} --script main_cplearn"
    else:
        how = f"torchrun --nproc_per_node={args.ngpus} main_cplearn.py"
    for cell in cells:
        print(f"{how} {shlex.join(cell.stages()[0][2])}")
    print("and for each, as for the first:")
    for _, script, flags in cells[0].stages()[1:]:
        print(f"  {script}.py {shlex.join(flags)}")


def _evaluation_passes(cell: Cell) -> float:
    """Times that the training images are read: k-NN once, linear once or in every epoch; the rest is small."""
    passes = 0.0
    for stage, script, flags in cell.stages()[1:]:
        if script == "eval_knn":
            passes += 1
        elif script == "eval_linear":
            theirs = importlib.import_module(script).get_args_parser().parse_args(flags)
            passes += theirs.epochs if theirs.augment is not False else 1
        elif stage == "collapse":
            passes += 0.1
    return passes


def _forward_seconds(x: dict) -> float:
    """Of one global view through the backbone, on one device: a third of its share of a training step."""
    views = 2 + (x["views"] - 2) * x["local"]
    return x["step_seconds"] / x["images"] / (3 * views)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # | head
    errors.run_script(main)
