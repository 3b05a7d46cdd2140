"""The paper's Table 3 (or 1, 2, 4, 9): every cell trained and evaluated, and the table beside the paper's.

    python reproduce_table3.py --data_path /data/imagenet --output_dir output/table3 --dry_run          # plan and price
    python reproduce_table3.py --data_path /data/imagenet --output_dir output/table3 --launcher slurm --partition gpu
    python reproduce_table3.py --data_path ~/cifar10 --output_dir output/small --scale small --minutes_per_cell 10
    python reproduce_table3.py --output_dir output/table3 --status                                      # how it does

A cell is a pre-training and its evaluations, each by its own script, in output_dir/CELL. The same command again goes
on where a grid was stopped or killed; more --methods, --out_dims or --seeds add cells. The table is written after
every cell: table3.md, .csv, .png.
"""

import argparse
import contextlib
import ctypes
import functools
import importlib
import io
import json
import os
import queue
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path

import errors
import run_with_submitit
import slurm_jobs
import utils
from errors import Interrupted, UserError
from table_rows import NAMES, Row, rows

ROOT = Path(__file__).resolve().parent
# --- the grid ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    row: Row
    seed: int
    name: str  # of its folder
    train: list[str]  # flags of main_cplearn.py
    evaluate: dict[str, list[str]]  # flags of eval_*.py, by stage; "random ..." is the network untrained
    folder: Path = field(compare=False)

    def stages(self) -> list[tuple[str, str, list[str]]]:
        """Name, script, flags; in the order in which they run."""
        weights = ["--pretrained_weights", str(self.folder / "checkpoint.pth")]
        found = [("train", "main_cplearn", [*self.train, "--output_dir", str(self.folder)])]
        for stage, flags in self.evaluate.items():
            random = ["--random_init", "--output_dir", str(self.folder / "random_init")] * stage.startswith("random")
            found.append((stage, f"eval_{stage.split()[-1]}", [*weights, *random, *flags]))
        return found

    def done(self, stage: str) -> bool:
        if stage == "train":
            return (self.folder / "trained.json").exists() or self._slurm_says_trained()
        random = stage.startswith("random")
        return any(r["script"] == f"eval_{stage.split()[-1]}" for r in self.results(random))

    def results(self, random: bool = False) -> list[dict]:
        lines = utils.read_json_lines(self.folder / ("random_init" * random) / "results.jsonl")
        return [x for x in lines if x["random_init"] == random]  # eval_collapse.py writes of both

    def finished(self) -> bool:
        return all(self.done(stage) for stage, _, _ in self.stages())

    def _slurm_says_trained(self) -> bool:
        folder = self.folder / slurm_jobs.FOLDER
        jobs = [x for x in slurm_jobs.submissions(folder) if x["script"] == "main_cplearn"]
        return bool(jobs) and slurm_jobs.job_state(folder, jobs[-1])["JobState"] == "COMPLETED"


def build_cells(args, epochs: int | None) -> list[Cell]:
    """The grid, seed after seed, so that what is stopped early has every line once before any line twice."""
    out = Path(args.output_dir)
    data = args.dataset if args.dataset in ("cifar10", "cifar100", "svhn") else "cifar10"
    lines = rows(args.table, args.scale, args.methods, args.out_dims, data)
    common = common_flags(args) + (["--epochs", str(epochs)] if epochs else [])
    cells = []
    for seed in args.seeds:
        seen: set[int] = set()
        # The untrained network stands for a size; its backbone is the same whatever the size and the method.
        first = sorted(lines, key=lambda r: r.method != "cplearn")
        baseline = {r.key for r in first if not (r.out_dim in seen or seen.add(r.out_dim))}
        for row in lines:
            flags = evaluation_flags(args)
            random = ("cluster",) * (row.key in baseline)
            random += ("knn", "linear") * (row.key == first[0].key)
            flags |= {f"random {name}": flags[name] for name in random}
            flags = {stage: [*more, "--seed", str(seed)] for stage, more in flags.items()}
            name = f"{row.key}_s{seed}"
            cells.append(Cell(row, seed, name, [*row.flags, "--seed", str(seed), *common], flags, out / name))
    return cells


def common_flags(args) -> list[str]:
    """Of every pre-training."""
    data = {"--data_path": args.data_path, "--dataset": args.dataset}
    given = [x for flag, value in data.items() if value for x in (flag, value)]
    return ["--saveckp_freq", "0", *given, *shlex.split(args.train_flags)]


def evaluation_flags(args) -> dict[str, list[str]]:
    if args.scale == "small":
        linear = ["--augment", "false", "--optimizer", "adam", "--epochs", "30"]
        collapse = ["--baseline", "false", "--components", "10", "100", "--mc_samples", "2000", "--tsne_images", "0"]
    else:
        # Tables of small networks: the paper's Appendix I. Table 3: DINO's script.
        linear = [] if args.table == 3 else ["--augment", "false", "--optimizer", "adam", "--epochs", "100"]
        collapse = []
    return {"knn": ["--nb_knn", "20"], "linear": linear, "cluster": ["--shuffles", "20"], "collapse": collapse}


# --- flags ------------------------------------------------------------------------------------------------


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
    g.add_argument("--minutes_per_cell", type=float, default=None, help="As many epochs for every cell as its slowest can train in this time (not counting the evaluations)")
    g.add_argument("--data_path", default=None, help="Images in train/ and val/ (or test/) class folders, or the downloaded data set's folder")
    g.add_argument("--dataset", default=None, help="As in main_cplearn.py (default: folder). Tables 1 and 4: cifar10, cifar100 and svhn name the paper's column")
    g.add_argument("--train_flags", default="", metavar="'FLAGS'", help="More flags of main_cplearn.py for every cell, in quotes")
    g = p.add_argument_group("launch")
    g.add_argument("--launcher", default="local", choices=("local", "slurm"), help="One after another on this machine, or as jobs: then all other flags go to run_with_submitit.py")
    g.add_argument("--jobs", type=int, default=None, help="Cells side by side (default: 1, and 4 with slurm)")
    g.add_argument("--ngpus", type=int, default=None, help="GPUs a cell (default: 8 with slurm, else all of this machine over --jobs)")
    g = p.add_argument_group("plan")
    g.add_argument("--price", type=float, default=None, help="Euros for a GPU-hour, for --dry_run")
    g.add_argument("--probe_steps", type=int, default=10, help="Timed steps of every line")
    g.add_argument("--probe_images", type=int, default=None, help="Images a process in them (default: the batch; fewer where a CPU stands in: time is scaled up)")
    # fmt: on
    return p


def parse_args(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Flags, and those of run_with_submitit.py. Raises `UserError`."""
    parser = get_args_parser()
    args, rest = parser.parse_known_args(argv)
    utils.check_finite(args)
    utils.expand_paths(args, "output_dir", "data_path")
    args.output_dir = os.path.abspath(args.output_dir)
    if args.jobs is None:
        args.jobs = 4 if args.launcher == "slurm" else 1
    if rest and args.launcher != "slurm":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    for name in ("epochs", "minutes_per_cell", "jobs", "probe_steps", "probe_images", "price"):
        if (getattr(args, name) or 1) <= 0 or getattr(args, name) == 0:
            raise UserError(f"--{name} {getattr(args, name):g} must be positive")
    if args.epochs and args.minutes_per_cell:
        raise UserError("--epochs and --minutes_per_cell both say how long to train: leave one out")
    for name in ("methods", "out_dims", "seeds"):
        given = getattr(args, name)
        if len(set(given)) < len(given):
            raise UserError(f"--{name} {' '.join(map(str, given))} names one twice")
    if args.table == 9 and len(args.out_dims) > 1:
        raise UserError(f"--table 9 has one size: --out_dims {args.out_dims[0]}")
    if any(x in args.train_flags for x in ("--output_dir", "--seed", "--out_dim", "--method ")):
        raise UserError(f"--train_flags '{args.train_flags}': folder, seed, method and size are the grid's")
    return args, rest


def main(argv: Sequence[str] | None = None) -> None:
    args, rest = parse_args(argv)
    if args.status:
        cells = load_grid(args)
        print("\n".join(status_lines(cells)))
        write_report(args, cells)
        return
    check_data(args)
    utils.check_output_dir(args.output_dir)
    epochs = known_epochs(args)
    if args.minutes_per_cell and epochs is None:
        print(f"Timing {args.probe_steps} steps of every line, for --minutes_per_cell {args.minutes_per_cell:g} ...")
        epochs = epochs_within(args, probe(args, build_cells(args, 1)))
    if args.scale == "small" and epochs is None:
        raise UserError("--scale small needs a budget: --minutes_per_cell 10, or --epochs 12")
    cells = build_cells(args, epochs)
    settings = check_cells(args, cells)
    if args.dry_run:
        plan(args, cells, rest)
        return
    save_grid(args, cells, settings, epochs)
    if args.launcher == "slurm":
        run_on_slurm(args, cells, rest)
    else:
        run_here(args, cells)


def check_data(args) -> None:
    if args.data_path is None:
        if args.dataset == "digits":
            return
        raise UserError("--data_path is missing: the folder with the images (or --dataset digits)")
    if not os.path.isdir(args.data_path) and args.launcher == "local":
        raise UserError(f"--data_path {args.data_path} is not a folder: check the path")
    args.data_path = os.path.abspath(args.data_path)
    folder = args.dataset in (None, "folder")
    if folder and os.path.isdir(args.data_path) and not any(
        os.path.isdir(os.path.join(args.data_path, split)) for split in ("val", "test")
    ):  # fmt: skip
        raise UserError(f"--data_path {args.data_path} has no val or test folder: the evaluations need one")


def check_cells(args, cells: list[Cell]) -> dict[str, dict]:
    """Every script's own check of its flags, before the first of them runs. Returns what each cell trains with."""
    settings = {}
    for cell in cells:
        said = io.StringIO()  # of argparse, which prints its usage
        try:
            with contextlib.redirect_stderr(said):
                settings[cell.name] = vars(main_cplearn().parse_args([*cell.train, "--output_dir", str(cell.folder)]))
                for _, script, flags in cell.stages()[1:]:
                    importlib.import_module(script).get_args_parser().parse_args(flags)
        except UserError as error:
            raise UserError(f"{cell.name}: {error}") from None
        except SystemExit:
            raise UserError(f"{cell.name}: {said.getvalue().strip().splitlines()[-1]}") from None
        del settings[cell.name]["output_dir"]
    return settings


def main_cplearn():
    """Loads torch, for which --help and --status need not wait."""
    return importlib.import_module("main_cplearn")


# --- what a folder's grid is ------------------------------------------------------------------------------


def _grid_file(args) -> Path:
    return Path(args.output_dir, "grid.json")


def _read_grid(args) -> dict:
    try:
        return json.loads(_grid_file(args).read_text())
    except (OSError, ValueError):
        return {}


def known_epochs(args) -> int | None:
    """What was given, or what was timed when this grid began."""
    before = _read_grid(args)
    if before and not args.epochs and args.minutes_per_cell in (None, before["minutes_per_cell"]):
        return before["epochs"]
    return args.epochs


def save_grid(args, cells: list[Cell], settings: dict[str, dict], epochs: int | None) -> None:
    """Write down the cells; those of before stay. Raises `UserError` if one of them has other settings now."""
    kept = {x["name"]: x for x in _read_grid(args).get("cells", [])}
    for cell in cells:
        now = json.loads(json.dumps(settings[cell.name]))
        before = kept.get(cell.name, {}).get("settings", now)
        changed = [
            f"--{k} {before.get(k)}, now {now.get(k)}" for k in sorted(before | now) if before.get(k) != now.get(k)
        ]
        if changed:
            raise UserError(
                f"{args.output_dir} holds {cell.name} with {'; '.join(changed[:3])}: choose another --output_dir"
            )
        kept[cell.name] = {k: v for k, v in asdict(cell).items() if k != "folder"} | {"settings": now}
    content = {
        "table": args.table,
        "scale": args.scale,
        "epochs": epochs,
        "minutes_per_cell": args.minutes_per_cell or _read_grid(args).get("minutes_per_cell"),
        "commit": utils.git_commit(),
        "cells": list(kept.values()),
    }
    utils.write_text(_grid_file(args), json.dumps(content, indent=1) + "\n")


def load_grid(args) -> list[Cell]:
    """All cells of a folder. Raises `UserError` if there are none."""
    grid = _read_grid(args)
    if not grid:
        raise UserError(f"{args.output_dir} holds no grid: was it started with this --output_dir?")
    args.table, args.scale = grid["table"], grid["scale"]
    return [
        Cell(Row(**x["row"]), x["seed"], x["name"], x["train"], x["evaluate"], Path(args.output_dir, x["name"]))
        for x in grid["cells"]
    ]  # fmt: skip


def write_report(args, cells: list[Cell]) -> None:
    import table_report

    table_report.write(Path(args.output_dir), args.table, args.scale, cells)


# --- plan -------------------------------------------------------------------------------------------------


def probe(args, cells: list[Cell]) -> dict[str, dict]:
    """Seconds a step of every line, its checkpoint's size and so on, measured here by main_cplearn.py itself.

    Kept in output_dir/probe.json, by line and device, and taken from there the next time. `error` where it failed.
    """
    kept_in = Path(args.output_dir, "probe.json")
    kept = json.loads(kept_in.read_text()) if kept_in.exists() else {}
    found = {}
    for cell in {c.row.key: c for c in reversed(cells)}.values():
        more = f"--max_steps {args.probe_steps} --epochs 1000 --warmup_epochs 0 --saveckp_minutes 0".split()
        more += ["--batch_size_per_gpu", str(args.probe_images)] if args.probe_images else []
        more += ["--epoch_queue_starts", "0"] * (cell.row.method == "swav")  # its share of most epochs
        flags = [*cell.row.flags, *common_flags(args), *more]
        key = shlex.join([_device(), *flags])
        if key not in kept:
            with tempfile.TemporaryDirectory() as folder:
                kept[key] = _probe_one(args, [*flags, "--output_dir", folder], Path(folder))
            utils.write_text(kept_in, json.dumps(kept, indent=1) + "\n")
        found[cell.row.key] = kept[key]
        x = kept[key]
        print(f"  {cell.row.key}: " + (x["error"] if "error" in x else f"{x['step_seconds']:.3f} s a step"), flush=True)
    return dict(reversed(found.items()))


def _probe_one(args, flags: list[str], folder: Path) -> dict:
    command = [*_launch(args), str(ROOT / "main_cplearn.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=_environment(args, 0))
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
    log = utils.read_json_lines(folder / "log.txt")[-1]
    start = json.loads((folder / "args.json").read_text())
    steps = log["steps"] - 1  # the first one includes all that happens once
    if steps < 1:
        return {"error": "--probe_steps 1 is too few, or the data set has fewer images than a batch"}
    return {
        "step_seconds": (log["seconds"] - log["first_step_seconds"]) / steps,
        "images": start["args"]["batch_size_per_gpu"],
        "processes": start["derived"]["processes"],
        "train_images": start["derived"]["train_images"],
        "views": 2 + start["args"]["local_crops_number"],
        "local": (start["args"]["local_image_size"] / start["args"]["image_size"]) ** 2,
        "expected_memory_gb": start["derived"]["expected_memory_gb"],
        "checkpoint_bytes": (folder / "checkpoint.pth").stat().st_size,
        "device": start["derived"]["device"],
    }


@functools.cache
def _device() -> str:
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"


@functools.cache
def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _batch(cell: Cell) -> tuple[int, int]:
    theirs = main_cplearn().parse_args([*cell.train, "--output_dir", str(cell.folder)])
    return theirs.batch_size_per_gpu, theirs.epochs


def epochs_within(args, times: dict[str, dict]) -> int:
    """The same number for all: what the slowest line can do in --minutes_per_cell, at least 2."""
    failed = {key: x["error"] for key, x in times.items() if "error" in x}
    if failed:
        key, error = next(iter(failed.items()))
        raise UserError(f"the timed steps of {key} failed: {error}")
    cells = {c.row.key: c for c in build_cells(args, 1)}

    def an_epoch(key: str) -> float:
        x, batch = times[key], _batch(cells[key])[0]
        return x["step_seconds"] * batch / x["images"] * (x["train_images"] // (batch * x["processes"]))

    slowest = max(times, key=an_epoch)
    epochs = max(2, int(60 * args.minutes_per_cell / an_epoch(slowest)))
    print(f"{epochs} epochs for every cell: {slowest} needs {an_epoch(slowest):.0f} s for one")
    return epochs


def plan(args, cells: list[Cell], launcher_flags: list[str]) -> None:
    """Print what would run, and what it would cost."""
    print(f"Timing {args.probe_steps} steps of {len({c.row.key for c in cells})} lines here ({_device()}) ...")
    times = probe(args, cells)
    gpus = processes_of(args)
    table, total, disk = [], 0.0, 0.0
    for cell in cells:
        x = times[cell.row.key]
        if "error" in x:
            table.append((cell.name, None, None, None, None, None, x["error"]))
            continue
        batch, epochs = _batch(cell)
        step = x["step_seconds"] * batch / x["images"]
        steps = epochs * (x["train_images"] // (batch * gpus))
        training = gpus * steps * step / 3600
        evaluating = _evaluation_passes(cell) * x["train_images"] * _forward_seconds(x) / 3600
        size = 2 * x["checkpoint_bytes"] / 1e9
        total, disk = total + training + evaluating, disk + size
        table.append((cell.name, epochs, f"{1000 * step:.0f}", f"{training:.1f}", f"{evaluating:.1f}",
                      f"{x['expected_memory_gb']:.1f}", "done" * cell.finished()))  # fmt: skip
    unit = "GPU" if _device() != "cpu" else "CPU"
    header = (
        "cell",
        "epochs",
        "ms a step",
        f"{unit}-h training",
        f"{unit}-h evaluating",
        f"GB a process, batch {args.probe_images or 'as trained'}",
        "",
    )
    print("\n" + utils.format_table(table, header) + "\n")
    for cell in cells[:1] + cells[-1:] * (len(cells) > 1):
        print(f"{cell.name}:")
        for _, script, flags in cell.stages():
            print(f"  {script}.py {shlex.join(flags)}")
    if args.launcher == "slurm":
        print(
            f"\neach by run_with_submitit.py --ngpus {gpus} {shlex.join(launcher_flags)}, at most {args.jobs} cells at a time"
        )
    print(f"\n{len(cells)} cells on {gpus} process{'es' * (gpus > 1)} each: {total:,.0f} {unit}-hours, {total / gpus / args.jobs / 24:,.1f} "
          f"days with {args.jobs} side by side, {disk:,.1f} GB of disk"
          + (f", {args.price * total:,.0f} euros at {args.price:g} an hour" if args.price else ""))  # fmt: skip
    print(
        f"Steps were timed on this machine ({_device()}, batch {next((x['images'] for x in times.values() if 'images' in x), 0)} a process"
        f", {_gpus() and processes_of(args) or 1} process); hours are for such a device, without the exchange between "
        "more processes. The evaluations' are an estimate from the passes over the data that they make."
    )
    if unit == "CPU" and args.scale == "paper":
        print(
            "WARNING: no GPU here, so these are hours of this CPU: run --dry_run where a GPU is, with the same --output_dir"
        )


def _evaluation_passes(cell: Cell) -> float:
    """Times that the training images are read: k-NN once, linear once or in every epoch; the rest is small."""
    import eval_linear

    passes = 0.0
    for stage, script, flags in cell.stages()[1:]:
        if script == "eval_knn":
            passes += 1
        elif script == "eval_linear":
            theirs = eval_linear.get_args_parser().parse_args(flags)
            passes += theirs.epochs if theirs.augment is not False else 1
        elif stage == "collapse":
            passes += 0.1
    return passes


def _forward_seconds(x: dict) -> float:
    """Of one global view through the backbone: a third of its share of a training step."""
    views = 2 + (x["views"] - 2) * x["local"]
    return x["step_seconds"] / x["images"] / (3 * views)


# --- on this machine --------------------------------------------------------------------------------------


def processes_of(args) -> int:
    """Processes a cell, one a GPU."""
    if args.ngpus:
        return args.ngpus
    return 8 if args.launcher == "slurm" else max(1, _gpus() // args.jobs)


def _launch(args) -> list[str]:
    n = processes_of(args) if args.launcher == "local" else max(1, min(1, _gpus()))
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"] if n > 1 else []
    return [sys.executable, *torchrun]


def _environment(args, slot: int) -> dict[str, str]:
    """Each slot has its own GPUs, or its share of the cores."""
    env = dict(os.environ)
    jobs = args.jobs if args.launcher == "local" else 1
    if _gpus():
        if args.launcher == "local" and "CUDA_VISIBLE_DEVICES" not in env:
            n = processes_of(args)
            env["CUDA_VISIBLE_DEVICES"] = ",".join(str((slot * n + i) % _gpus()) for i in range(n))
    else:
        env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // (jobs * processes_of(args)))))
    return env


def _with_parent() -> Callable[[], None] | None:
    """For a child: be told to save and stop when this process dies, even by kill -9. Linux only."""
    try:
        prctl = ctypes.CDLL(None).prctl
    except (OSError, AttributeError):
        return None
    return lambda: prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


class Workers:
    """Runs the stages of cells, and stops them all when told to."""

    def __init__(self, args):
        self.args = args
        self.stopping = threading.Event()
        self.slots: queue.Queue[int] = queue.Queue()
        for slot in range(args.jobs):
            self.slots.put(slot)
        self.running: dict[str, subprocess.Popen] = {}
        self.lock = threading.Lock()

    def cell(self, cell: Cell) -> str:
        """Every stage that is not done. Returns "" or what went wrong."""
        slot = self.slots.get()
        try:
            for stage, script, flags in cell.stages():
                if self.stopping.is_set():
                    return "stopped"
                if cell.done(stage):
                    continue
                cell.folder.mkdir(parents=True, exist_ok=True)
                code, line = self._stage(cell, stage, script, flags, slot)
                if code == Interrupted.exit_code or self.stopping.is_set():
                    return "stopped"
                if code:
                    what = {"stage": stage, "code": code, "line": line}
                    utils.write_text(cell.folder / "failed.json", json.dumps(what) + "\n")
                    return f"{stage} failed with exit code {code}: {line}"
                if stage == "train":
                    utils.write_text(cell.folder / "trained.json", json.dumps({"commit": utils.git_commit()}) + "\n")
            utils.remove_quietly(cell.folder / "failed.json")
            return ""
        finally:
            self.slots.put(slot)

    def _stage(self, cell: Cell, stage: str, script: str, flags: list[str], slot: int) -> tuple[int, str]:
        log = cell.folder / f"{stage.replace(' ', '_')}.out"
        command = [*_launch(self.args), str(ROOT / f"{script}.py"), *self._workers(flags)]
        for _ in range(30):  # what a killed grid had started may still be saving
            with open(log, "ab") as out, self.lock:
                if self.stopping.is_set():
                    return Interrupted.exit_code, ""
                child = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
                                         env=_environment(self.args, slot), preexec_fn=_with_parent())  # fmt: skip
                self.running[cell.name] = child
            code = child.wait()
            with self.lock:
                del self.running[cell.name]
            line = ([x for x in slurm_jobs.tail(log).splitlines() if x.strip()] or [""])[-1]
            if code != UserError.exit_code or " is in use by process " not in line:
                return code, line
            time.sleep(2)
        return code, line

    def _workers(self, flags: list[str]) -> list[str]:
        """On CPUs that are all busy, no loader processes beside."""
        if _gpus() or "--num_workers" in flags:
            return flags
        return [*flags, "--num_workers", str(max(0, (os.cpu_count() or 1) // self.args.jobs - 1))]

    def stop(self) -> None:
        """Once: a second signal would not let training save."""
        with self.lock:
            if self.stopping.is_set():
                return
            self.stopping.set()
            for child in self.running.values():
                with contextlib.suppress(ProcessLookupError):
                    child.terminate()  # training saves before it ends


def run_here(args, cells: list[Cell]) -> None:
    """All cells that are not finished. Raises `UserError` at the end if some failed."""
    from run_control import FolderLock

    todo = [cell for cell in cells if not cell.finished()]
    print(f"{len(cells) - len(todo)} of {len(cells)} cells are finished; {args.jobs} at a time, in {args.output_dir}")
    workers, asked = Workers(args), []

    def stop(number: int, frame) -> None:
        asked.append(signal.Signals(number).name)

    before = {s: signal.signal(s, stop) for s in (signal.SIGTERM, signal.SIGINT)}
    problems: dict[str, str] = {}
    try:
        with FolderLock(args.output_dir), ThreadPoolExecutor(args.jobs) as pool:
            futures: dict[Future, Cell] = {pool.submit(workers.cell, cell): cell for cell in todo}
            waiting, start = set(futures), time.time()
            while waiting:
                ended, waiting = wait(waiting, timeout=1, return_when="FIRST_COMPLETED")
                if asked:
                    workers.stop()
                for future in ended:
                    cell, problem = futures[future], future.result()
                    if problem:
                        problems[cell.name] = problem
                    if problem != "stopped":
                        done = sum(c.finished() for c in cells)
                        took = utils.format_duration(time.time() - start)
                        print(f"{cell.name}: {problem or 'done'}  ({done} of {len(cells)}, {took})", flush=True)
                        write_report(args, load_grid(args))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked:
        raise Interrupted(f"{asked[0]}: saved and stopped; the same command goes on")
    write_report(args, load_grid(args))
    if problems:
        raise UserError(
            f"{len(problems)} of {len(cells)} cells failed: see --status; the same command tries them again"
        )
    print(f"Done: {args.output_dir}/table{args.table}.md, .csv, .png")


# --- on SLURM ---------------------------------------------------------------------------------------------


def run_on_slurm(args, cells: list[Cell], rest: list[str]) -> None:
    """A job for every stage. Cells stand in --jobs lines, each waiting for the one before, however that ended."""
    launcher = [*rest, *([] if "--ngpus" in rest else ["--ngpus", str(processes_of(args))])]
    lines: list[str] = [""] * args.jobs  # the last job of each
    count = 0
    for i, cell in enumerate(c for c in cells if not c.finished()):
        line = i % args.jobs
        jobs = live_jobs(cell)
        if jobs:
            print(f"{cell.name}: jobs {jobs[0]} to {jobs[-1]} are there already")
            lines[line] = jobs[-1]
            continue
        before, trained = lines[line], ""
        for stage, script, flags in cell.stages():
            if cell.done(stage):
                continue
            needs = [f"afterok:{trained}"] * bool(trained) + [f"afterany:{before}"] * (before != trained)
            command = ["--script", script, *launcher, "--name", cell.name]
            command += ["--dependency", ",".join(needs)] if needs else []
            with contextlib.redirect_stdout(io.StringIO()):
                (before,) = run_with_submitit.main([*command, *flags])
            trained = before if stage == "train" else trained
            jobs.append(before)
        print(f"{cell.name}: jobs {jobs[0]} to {jobs[-1]}" + f", after {lines[line]}" * bool(lines[line]), flush=True)
        lines[line] = before
        count += len(jobs)
    print(
        f"{count} jobs submitted. State: {Path(sys.argv[0]).name} --output_dir {shlex.quote(args.output_dir)} --status"
    )


def _job_folders(cell: Cell) -> list[Path]:
    return [cell.folder / slurm_jobs.FOLDER, cell.folder / "random_init" / slurm_jobs.FOLDER]


def live_jobs(cell: Cell) -> list[str]:
    """Jobs of a cell that wait or run, in the order of their submission."""
    found = [(folder, x) for folder in _job_folders(cell) for x in slurm_jobs.submissions(folder)]
    found.sort(key=lambda pair: pair[1]["time"])
    return [x["job"] for folder, x in found if slurm_jobs.job_state(folder, x)["JobState"] in slurm_jobs.LIVE]


# --- status -----------------------------------------------------------------------------------------------


def status_lines(cells: list[Cell]) -> list[str]:
    """A line a cell: state, progress, error; and how many there are of each."""
    table, counts = [], {}
    for cell in cells:
        state, more = state_of(cell)
        counts[state] = counts.get(state, 0) + 1
        table.append((cell.name, state, more))
    return [
        utils.format_table(table, ("cell", "state", "")),
        f"{len(cells)} cells: " + ", ".join(f"{n} {state}" for state, n in counts.items()),
    ]


def state_of(cell: Cell) -> tuple[str, str]:
    """done, failed, queued, training, evaluating, stopped (goes on with the same command) or waiting."""
    left = [stage for stage, _, _ in cell.stages() if not cell.done(stage)]
    if not left:
        return "done", ""
    for folder in _job_folders(cell):
        for x in {x["script"]: x for x in slurm_jobs.submissions(folder)}.values():
            now = slurm_jobs.job_state(folder, x)
            if now["JobState"] in slurm_jobs.AT_WORK:
                if x["script"] == "main_cplearn":
                    return "training", slurm_jobs.progress(folder, x["job"], running=True)
                return "evaluating", x["script"]
            if now["JobState"] not in (*slurm_jobs.LIVE, "COMPLETED"):
                return "failed", f"{x['script']}: {slurm_jobs.last_error(folder, x, now)}"
    jobs = live_jobs(cell)
    if jobs:
        return "queued", f"job {jobs[0]}"
    failed = _json_or_empty(cell.folder / "failed.json")
    if in_use(cell.folder):
        return "training", slurm_jobs.progress(cell.folder / slurm_jobs.FOLDER, "", running=True)
    if failed:
        return "failed", f"{failed['stage']}, exit code {failed['code']}: {failed['line']}"
    if left[0] != "train":
        return "evaluating", f"{left[0]} is next"
    if (cell.folder / "log.txt").exists():
        return "stopped", slurm_jobs.progress(cell.folder / slurm_jobs.FOLDER, "", running=False)
    return "waiting", ""


def in_use(folder: Path) -> bool:
    """Whether the lock of a run (`run_control.FolderLock`) is a living one's: seen here, or by its beat elsewhere."""
    lock = _json_or_empty(folder / ".lock")
    if not lock:
        return False
    if lock.get("host") == os.uname().nodename:
        return lock.get("started") == utils.process_start(lock.get("pid", 0))
    with contextlib.suppress(OSError):
        return time.time() - (folder / ".lock").stat().st_mtime < 60
    return False


def _json_or_empty(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # | head
    errors.run_script(main)
