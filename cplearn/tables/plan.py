"""What a grid would run and cost (--dry_run), and epochs for --minutes_per_cell, from a few timed steps per line."""

import json
import shlex
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from cplearn.errors import UserError
from cplearn.files import read_json, read_json_lines, write_text
from cplearn.host import end_with_parent
from cplearn.slurm.checks import parse_flags
from cplearn.tables.cells import Cell, Grid, Settings, fits, read_object, without_folders
from cplearn.tables.launch import command_of, device_name, environment, gpus, last_message, loader_flags
from cplearn.tables.status import CellState
from cplearn.text import format_table

COPIES = 3  # of a checkpoint in a cell: the newest, the one before it, and the best

# --- timed steps ------------------------------------------------------------------------------------------


def time_steps(
    grid: Grid, *, processes: int, jobs: int, sharing: int = 1, steps: int | None = None, images: int | None = None
) -> dict[str, dict]:
    """Return seconds per step of every line, its checkpoint's size and so on, measured by main_cplearn.py itself.

    `processes` and `jobs`: how many share this machine; `sharing`: how many a GPU, on which as many train meanwhile.
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
        flags += loader_flags(flags, jobs, processes)
        shared = [f"shared by {sharing}"] * (sharing > 1)
        name = shlex.join([device_name(), str(processes), *shared, *without_folders(flags), "--max_steps", str(steps)])
        timing = timings[row.key] = kept.get(name) or _time_line(flags, steps, processes, jobs, sharing)
        if "error" not in timing and name not in kept:
            kept[name] = timing
            write_text(kept_in, json.dumps(kept, indent=1) + "\n")
        shown = timing["error"] if "error" in timing else f"{timing['step_seconds']:.3f} s per step"
        print(f"  {row.key}: {shown}", flush=True)
    return timings


# What a kept timing must have, and of which type.
MEASURED = {"step_seconds": float, "data_wait": float, "images": int, "processes": int, "train_images": int,
            "views": int, "local": float, "expected_memory_gb": float, "checkpoint_bytes": int}  # fmt: skip


def read_timings(path: Path) -> dict[str, dict]:
    """Return the timings that probe.json keeps. Raises `UserError` if it is damaged or not what was written here."""
    kept = read_object(path)
    for timing in kept.values():
        found = timing if isinstance(timing, dict) else {}
        wrong = [name for name, kind in MEASURED.items() if not fits(found.get(name), kind)]
        if wrong:
            raise UserError(f"{path}: {wrong[0]} is {found.get(wrong[0])!r}: remove the file, to time the steps again")
    return kept


def _time_line(flags: list[str], steps: int, processes: int, jobs: int, sharing: int) -> dict:
    """Train for some steps, beside `sharing` - 1 others that train until these are done."""
    env = environment(0, jobs, processes)
    with tempfile.TemporaryDirectory() as folder, _others(flags, sharing - 1, env):
        command = [*command_of("main_cplearn", processes), *flags, "--max_steps", str(steps), "--output_dir", folder]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
        if done.returncode:
            return {"error": last_message(done.stdout, done.returncode)[1]}
        log = read_json_lines(Path(folder, "log.txt"))[-1]
        start = read_json(Path(folder, "args.json"))
        if log["steps"] < 2:
            return {"error": "too few images, or --probe_steps, for two steps: the first one is not timed"}
        return {
            # The first step includes all that happens once.
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


@contextmanager
def _others(flags: list[str], count: int, env: dict[str, str]) -> Iterator[None]:
    """Keep `count` trainings busy beside what is timed inside. One that cannot run leaves the GPU to the others."""
    with tempfile.TemporaryDirectory() as place, ExitStack() as stack:
        said = [Path(place, f"{k}.txt") for k in range(count)]
        children = []
        for path in said:
            command = [*command_of("main_cplearn", 1), *flags, "--output_dir", str(path.with_suffix(""))]
            out = stack.enter_context(open(path, "wb"))
            child = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env, preexec_fn=end_with_parent)
            children.append(child)
        try:
            for path, child in zip(said, children, strict=True):
                while child.poll() is None and "s per step" not in path.read_text():  # its steps have begun
                    time.sleep(0.2)
            yield
        finally:
            for child in children:
                child.kill()
                child.wait()


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


def print_plan(
    grid: Grid,
    states: dict[str, CellState],
    timings: dict[str, dict],
    *,
    jobs: int,
    sharing: int = 1,
    launcher: str,
    price: float | None,
) -> None:
    """Print what would run, and what it would cost.

    `sharing`: cells that share a GPU; `launcher`: the command before the flags of main_cplearn.py.
    """
    settings = grid.settings
    unit = "CPU" if device_name() == "cpu" else "GPU"
    table, hours, disk, left_out = [], 0.0, 0.0, []
    for cell in grid.cells:
        timing = timings[cell.row.key]
        reason = _left_out(settings, states[cell.name], timing)
        if reason:
            left_out.append(cell.name)
            table.append((cell.name, *[None] * 6, reason))
            continue
        step, waits, memory = _step_seconds(settings, timing), timing["data_wait"], timing["expected_memory_gb"]
        train = cell.stages()[0]
        epochs = parse_flags(train.script, train.flags).epochs
        training = settings.ngpus * epochs * _steps_per_epoch(settings, timing) * step / 3600 / sharing
        evaluating = _evaluation_passes(cell) * timing["train_images"] * _forward_seconds(timing) / 3600 / sharing
        hours, disk = hours + training + evaluating, disk + COPIES * timing["checkpoint_bytes"] / 1e9
        table.append((cell.name, epochs, f"{1000 * step:.0f}", f"{waits:.0%}", f"{training:.1f}", f"{evaluating:.1f}",
                      f"{memory:.1f}", ""))  # fmt: skip
    header = ("cell", "epochs", "ms per step", "of it waiting for images", f"{unit}-h training", f"{unit}-h evaluating",
              "GB a process", "")  # fmt: skip
    print("\n" + format_table(table, header) + "\n")
    _print_commands(grid.cells, launcher)
    days = hours * sharing / settings.ngpus / jobs / 24
    cost = f", {price * hours:,.0f} euros at {price:g} for such an hour" if price else ""
    print(
        f"\n{len(table) - len(left_out)} cells, {_processes(settings.ngpus)} each, a batch of {settings.batch}: "
        f"{hours:,.0f} {unit}-hours, {days:,.1f} days with {jobs} side by side, {disk:,.1f} GB of disk{cost}"
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


def _left_out(settings: Settings, state: CellState, timing: dict) -> str:
    """Return why a cell costs nothing, or cannot be counted; "" if it can."""
    if state.complete:
        return "done"
    if "error" in timing:
        return timing["error"]
    return "" if _steps_per_epoch(settings, timing) else f"fewer images than a batch of {settings.batch}"


def _print_commands(cells: Sequence[Cell], launcher: str) -> None:
    for cell in cells:
        print(f"{launcher} {shlex.join(cell.stages()[0].flags)}")
    print("and for each, as for the first:")
    for stage in cells[0].stages()[1:]:
        print(f"  {stage.script}.py {shlex.join(stage.flags)}")


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
    """Return how often the training images are read: k-NN once, linear once or in every epoch; the rest is small."""
    passes = 0.0
    for stage in cell.stages()[1:]:
        if stage.script == "eval_knn":
            passes += 1
        elif stage.script == "eval_linear":
            flags = parse_flags(stage.script, stage.flags)
            passes += flags.epochs if flags.augment is not False else 1
        elif stage.name == "collapse":
            passes += 0.1
    return passes


def _forward_seconds(timing: dict) -> float:
    """Return seconds of one global view through the backbone, on one device: a third of its share of a step."""
    views = 2 + (timing["views"] - 2) * timing["local"]
    return timing["step_seconds"] / timing["images"] / (3 * views)
