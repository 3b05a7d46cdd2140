"""TODO cplearn.tables.plan."""

import importlib
import json
import shlex
import subprocess
import tempfile
from pathlib import Path

from cplearn.errors import UserError
from cplearn.files import read_json_lines, write_text
from cplearn.tables.cells import Cell, _without_folders, batch_of, common_flags
from cplearn.tables.launch import command_of, device_name, end_of, environment, gpus, loader_flags
from cplearn.text import format_table

# --- plan -------------------------------------------------------------------------------------------------


def probe(args, cells: list[Cell]) -> dict[str, dict]:
    """Seconds a step of every line, its checkpoint's size and so on, measured here by main_cplearn.py itself.

    Kept in output_dir/probe.json and taken from there the next time. `error` where it failed. With --launcher slurm one
    process stands for all.
    """
    kept_in = Path(args.output_dir, "probe.json")
    kept = json.loads(kept_in.read_text()) if kept_in.exists() else {}
    processes = args.ngpus if args.launcher == "local" else 1
    steps = args.probe_steps or (60 if gpus() else 10)
    found = {}
    for cell in cells:
        key = cell.row.key
        if key in found:
            continue
        more = f"--max_steps {steps} --epochs 1000 --warmup_epochs 0 --saveckp_minutes 0".split()
        more += ["--batch_size_per_gpu", str(args.probe_images)] if args.probe_images else []
        more += ["--epoch_queue_starts", "0"] * (cell.row.method == "swav")  # its share of most epochs
        flags = [*cell.row.flags, *common_flags(args), *more]
        flags += loader_flags(flags, args.jobs if args.launcher == "local" else 1, processes)
        name = shlex.join([device_name(), str(processes), *_without_folders(flags)])
        if name not in kept:
            found[key] = _probe_one(args, flags, processes)
            if "error" not in found[key]:
                kept[name] = found[key]
                write_text(kept_in, json.dumps(kept, indent=1) + "\n")
        x = found[key] = kept.get(name) or found[key]
        print(f"  {key}: " + (x["error"] if "error" in x else f"{x['step_seconds']:.3f} s a step"), flush=True)
    return found


def _probe_one(args, flags: list[str], processes: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        command = [*command_of("main_cplearn", processes), *flags, "--output_dir", folder]
        env = environment(0, args.jobs if args.launcher == "local" else 1, processes)
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
        if done.returncode:
            return {"error": end_of(done.stdout, done.returncode)[1]}
        log = read_json_lines(Path(folder, "log.txt"))[-1]
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
    device = device_name()
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
    print("\n" + format_table(table, header) + "\n")
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
