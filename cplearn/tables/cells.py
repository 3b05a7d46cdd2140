"""Cells of a grid, and how they are run: on this machine, or as jobs. `reproduce_table3.py` says what the cells are.

Everything about a cell lies in its folder: the checkpoint and log.txt of its training, and in trained/ and
random_init/ the results of its evaluations. What is done is read from there, so a killed grid goes on where it was.
"""

import contextlib
import importlib
import io
import json
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path

from cplearn.errors import UserError
from cplearn.files import read_json_lines, write_text
from cplearn.host import git_commit
from cplearn.slurm.status import FOLDER, job_state, submissions
from cplearn.tables.rows import Row, rows


@dataclass(frozen=True)
class Cell:
    """One pre-training and its evaluations."""

    row: Row
    seed: int
    name: str  # of its folder
    train: list[str]  # flags of main_cplearn.py
    evaluate: dict[str, list[str]]  # flags of eval_*.py, by stage; "random ..." is the untrained network
    folder: Path

    def stages(self) -> list[tuple[str, str, list[str]]]:
        """Name, script, flags; in the order in which they run."""
        found = [("train", "main_cplearn", [*self.train, "--output_dir", str(self.folder)])]
        for stage, flags in self.evaluate.items():
            more = ["--random_init"] * stage.startswith("random")
            weights = ["--pretrained_weights", str(self.folder / "checkpoint.pth")]
            where = ["--output_dir", str(self.place(stage)), "--seed", str(self.seed)]
            found.append((stage, f"eval_{stage.split()[-1]}", [*weights, *more, *where, *flags]))
        return found

    def place(self, stage: str) -> Path:
        """Folder of a stage's results."""
        return self.folder if stage == "train" else self.folder / ("random_init" if "random" in stage else "trained")

    def results(self, random: bool = False) -> list[dict]:
        return read_json_lines(self.place("random" if random else "trained") / "results.jsonl")

    def done(self, stage: str) -> bool:
        if stage != "train":
            return any(r["script"] == f"eval_{stage.split()[-1]}" for r in self.results("random" in stage))
        if (self.folder / "trained.json").exists():
            return True
        jobs = [x for x in submissions(self.folder / FOLDER) if x["script"] == "main_cplearn"]
        if jobs and job_state(self.folder / FOLDER, jobs[-1])["JobState"] == "COMPLETED":
            self.mark_trained()
            return True
        return False

    def mark_trained(self) -> None:
        write_text(self.folder / "trained.json", json.dumps({"commit": git_commit()}) + "\n")

    def finished(self) -> bool:
        return all(self.done(stage) for stage, _, _ in self.stages())


BATCH = {3: 512}  # over all processes; 64 for the other tables and at small scale


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
    content = {"settings": now, "commit": git_commit(), "cells": list(kept.values())}
    write_text(Path(args.output_dir, "grid.json"), json.dumps(content, indent=1) + "\n")


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
