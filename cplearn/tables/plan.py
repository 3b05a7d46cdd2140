"""What a grid would run and cost (--dry_run), and epochs for --minutes_per_cell, from a few timed steps per line."""

import json
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cplearn.errors import UserError
from cplearn.files import read_json, read_json_lines, read_text, reading, write_text
from cplearn.slurm.checks import parse_flags
from cplearn.tables.child import Children
from cplearn.tables.grid import Cell, Grid, Settings, is_random, not_among, script_of, without_folders
from cplearn.tables.run import Share, device_name, gpus
from cplearn.tables.status import snapshot
from cplearn.text import format_table

COPIES = 3  # of a checkpoint in a cell: the newest, the one before it, and the best

# --- timed steps ------------------------------------------------------------------------------------------


def time_steps(grid: Grid, share: Share, steps: int | None = None, images: int | None = None) -> dict[str, dict]:
    """Return seconds per step of every line, its checkpoint's size and so on, measured by main_cplearn.py itself.

    `images`: per process, instead of the whole batch. Kept in probe.json and taken from there the next time. A line
    that failed has `error`.
    """
    kept_in = grid.folder / "probe.json"
    kept = read_timings(kept_in)
    steps = steps or (60 if gpus() else 10)
    timings: dict[str, dict] = {}
    for row in {cell.row.key: cell.row for cell in grid.cells}.values():
        more = "--epochs 1000 --warmup_epochs 0 --saveckp_minutes 0".split()
        more += ["--batch_size_per_gpu", str(images)] if images else []
        more += ["--epoch_queue_starts", "0"] * (row.method == "swav")  # the queue is part of most epochs
        flags = [*row.flags, *grid.settings.common_flags(), *more]
        flags += not_among(flags, {"--num_workers": share.loader_processes()})
        machine = [device_name(), str(share.processes), *[f"shared by {share.per_gpu}"] * (share.per_gpu > 1)]
        name = shlex.join([*machine, *without_folders(flags), "--max_steps", str(steps)])
        timing = timings[row.key] = kept.get(name) or _time_line(flags, steps, share)
        if "error" not in timing and name not in kept:
            kept[name] = timing
            write_text(kept_in, json.dumps(kept, indent=1) + "\n")
        shown = timing["error"] if "error" in timing else f"{timing['step_seconds']:.3f} s per step"
        print(f"  {row.key}: {shown}", flush=True)
    return timings


def read_timings(path: Path) -> dict[str, dict]:
    """Return the timings that probe.json keeps. Raises `UserError` if it is damaged."""
    try:
        with reading(path, "remove it, to time the steps again"):
            kept = json.loads(read_text(path))
            return {name: {**timing, "step_seconds": float(timing["step_seconds"])} for name, timing in kept.items()}
    except FileNotFoundError:
        return {}


def _time_line(flags: list[str], steps: int, share: Share) -> dict:
    """Train for some steps, beside others on its GPU that train until these are done."""
    env = share.environment(0)
    with tempfile.TemporaryDirectory() as place, _others(flags, share.per_gpu - 1, env):
        folder, printed = Path(place), Path(place, "printed.txt")
        command = [*flags, "--max_steps", str(steps), "--output_dir", place]
        with open(printed, "wb") as out:
            end = Children("main_cplearn", command, processes=share.processes, env=env, out=out).wait()
        if end.code:
            return {"error": end.line}
        log, start = read_json_lines(folder / "log.txt")[-1], read_json(folder / "args.json")
        if log["steps"] < 2:
            return {"error": "too few images, or --probe_steps, for two steps: the first one is not timed"}
        return {
            # The first step includes all that happens once.
            "step_seconds": (log["seconds"] - log["first_step_seconds"]) / (log["steps"] - 1),
            "data_wait": log["data_wait"],
            "images": start["args"]["batch_size_per_gpu"],
            "processes": share.processes,
            "train_images": start["derived"]["train_images"],
            "views": 2 + start["args"]["local_crops_number"],
            "local": (start["args"]["local_image_size"] / start["args"]["image_size"]) ** 2,
            "expected_memory_gb": start["derived"]["expected_memory_gb"],
            "checkpoint_bytes": (folder / "checkpoint.pth").stat().st_size,
            "warnings": [x for x in read_text(printed).splitlines() if x.startswith("WARNING") and "--" in x],
        }


@contextmanager
def _others(flags: list[str], count: int, env: dict[str, str]) -> Iterator[None]:
    """Keep `count` trainings busy beside what is timed inside. One that cannot run leaves the GPU to the others."""
    with tempfile.TemporaryDirectory() as place:
        folders = [Path(place, str(k)) for k in range(count)]
        commands = [[*flags, "--output_dir", str(x)] for x in folders]
        others = [Children("main_cplearn", x, env=env, out=subprocess.DEVNULL) for x in commands]
        try:
            for folder, children in zip(folders, others, strict=True):
                while not (folder / "args.json").exists() and children.poll() is None:  # written before the first step
                    time.sleep(0.2)
            yield
        finally:
            for children in others:
                children.stop(signal.SIGKILL)
                children.wait()


def epochs_within(settings: Settings, timings: dict[str, dict]) -> int:
    """Return the epochs that the slowest line can train in --minutes_per_cell, at least 2. Raises `UserError`."""
    for key, timing in timings.items():
        if "error" in timing:
            raise UserError(f"the timed steps of {key} failed: {timing['error']}")
        if not _steps_per_epoch(settings, timing):
            raise UserError(f"{timing['train_images']} images are fewer than a batch of {settings.batch}: take more")
    seconds = {key: _step_seconds(settings, x) * _steps_per_epoch(settings, x) for key, x in timings.items()}
    slowest = max(seconds, key=seconds.get)
    epochs = max(2, int(60 * settings.minutes_per_cell / max(seconds[slowest], 1e-9)))
    print(f"{epochs} epochs for every cell: {slowest} needs {seconds[slowest]:.0f} s for one")
    return epochs


def _step_seconds(settings: Settings, timing: dict) -> float:
    """Return the seconds of a step with the cell's whole share of the batch."""
    return timing["step_seconds"] * settings.batch / settings.ngpus / timing["images"]


def _steps_per_epoch(settings: Settings, timing: dict) -> int:
    return timing["train_images"] // settings.batch


# --- the plan ---------------------------------------------------------------------------------------------


def print_plan(grid: Grid, timings: dict[str, dict], share: Share, launcher: str, price: float | None) -> None:
    """Print what would run, and what it would cost. `launcher`: the command before the flags of main_cplearn.py."""
    settings, sharing = grid.settings, share.per_gpu
    unit = "CPU" if device_name() == "cpu" else "GPU"
    table, hours, disk, left_out = [], 0.0, 0.0, []
    for state in snapshot(grid):
        cell, timing = state.cell, timings[state.cell.row.key]
        if reason := "done" if state.complete else _not_counted(settings, timing):
            left_out.append(cell.name)
            table.append((cell.name, *[None] * 6, reason))
            continue
        step, waits, memory = _step_seconds(settings, timing), timing["data_wait"], timing["expected_memory_gb"]
        epochs = parse_flags("main_cplearn", cell.train).epochs
        training = settings.ngpus * epochs * _steps_per_epoch(settings, timing) * step / 3600 / sharing
        evaluating = _evaluation_passes(cell) * timing["train_images"] * _forward_seconds(timing) / 3600 / sharing
        hours, disk = hours + training + evaluating, disk + COPIES * timing["checkpoint_bytes"] / 1e9
        table.append((cell.name, epochs, f"{1000 * step:.0f}", f"{waits:.0%}", f"{training:.1f}", f"{evaluating:.1f}",
                      f"{memory:.1f}", ""))  # fmt: skip
    header = ("cell", "epochs", "ms per step", "of it waiting for images", f"{unit}-h training", f"{unit}-h evaluating",
              "GB a process", "")  # fmt: skip
    print("\n" + format_table(table, header) + "\n")
    _print_commands(grid.cells, launcher)
    days = hours * sharing / settings.ngpus / share.jobs / 24
    cost = f", {price * hours:,.0f} euros at {price:g} for such an hour" if price else ""
    print(
        f"\n{len(table) - len(left_out)} cells, {_processes(settings.ngpus)} each, a batch of {settings.batch}: "
        f"{hours:,.0f} {unit}-hours, {days:,.1f} days with {share.jobs} side by side, {disk:,.1f} GB of disk{cost}"
    )
    if left_out:
        print(f"Not counted: {', '.join(left_out)}")
    _print_how_timed(settings, timings.values())
    if sharing > 1:
        need = sharing * max((x.get("expected_memory_gb", 0.0) for x in timings.values()), default=0.0)
        print(f"{sharing} cells share a GPU, in these times too; together they take up to about {need:.1f} GB of it")
    for key, timing in timings.items():
        for warning in timing.get("warnings", []):
            print(f"{key}: {warning}")
    if unit == "CPU" and settings.scale == "paper":
        print("WARNING: no GPU here, so these are hours of this CPU: type it where a GPU is")


def _not_counted(settings: Settings, timing: dict) -> str:
    """Return why a line's cost is not known, "" if it is."""
    few = f"fewer images than a batch of {settings.batch}"
    return timing.get("error") or ("" if _steps_per_epoch(settings, timing) else few)


def _print_commands(cells: Sequence[Cell], launcher: str) -> None:
    for cell in cells:
        print(f"{launcher} {shlex.join([*cell.train, '--output_dir', str(cell.folder)])}")
    print("and for each, as for the first:")
    for name, flags in cells[0].evaluate.items():
        random = ["--random_init"] * is_random(name)
        weights = ["--pretrained_weights", str(cells[0].folder / "checkpoint.pth"), *random]
        print(f"  {script_of(name)}.py {shlex.join([*weights, *flags])}")


def _print_how_timed(settings: Settings, timings: Sequence[dict]) -> None:
    timing = next((x for x in timings if "images" in x), {"images": 0, "processes": 0})
    scaled = 0 < timing["images"] * settings.ngpus < settings.batch
    too_much = ", scaled up, which is too much where a part of a step does not grow with the batch" * scaled
    print(
        f"Steps were timed here: {device_name()}, {_processes(timing['processes'])}, {timing['images']} images each"
        f"{too_much}; evaluations are estimated from the passes over the images that they make."
    )


def _processes(n: int) -> str:
    return f"{n} process{'es' * (n > 1)}"


def _evaluation_passes(cell: Cell) -> float:
    """Return how often the training images are read: once for each network, and in every epoch of a linear probe that
    augments them; the rest is small."""
    passes = len({is_random(name) for name in cell.evaluate if script_of(name) == "eval_knn"})
    linear = [parse_flags("eval_linear", x) for name, x in cell.evaluate.items() if script_of(name) == "eval_linear"]
    return passes + sum(flags.epochs for flags in linear if flags.augment is not False)


def _forward_seconds(timing: dict) -> float:
    """Return seconds of one global view through the backbone, on one device: a third of its share of a step."""
    views = 2 + (timing["views"] - 2) * timing["local"]
    return timing["step_seconds"] / timing["images"] / (3 * views)
