"""The cells of a grid, and the folder that keeps them. `reproduce_table3.py` runs them.

Everything about a cell lies in its folder: the checkpoint and log.txt of its training, trained.json when that is over,
and in trained/ and random_init/ the results of its evaluations. A killed grid continues from what is there.
"""

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from cplearn.errors import UserError
from cplearn.files import read_json, read_json_lines, write_text
from cplearn.host import git_commit
from cplearn.slurm.checks import parse_flags
from cplearn.tables.rows import Row, rows


@dataclass(frozen=True)
class Stage:
    """One script of a cell: its training, or an evaluation."""

    name: str  # train; knn, linear, cluster or collapse; "random ..." is of the untrained network
    script: str  # module name
    flags: list[str]
    place: Path  # folder of its results


@dataclass(frozen=True)
class Cell:
    """One pre-training and its evaluations."""

    row: Row
    seed: int
    name: str  # of its folder
    train: list[str]  # flags of main_cplearn.py
    evaluate: dict[str, list[str]]  # flags of eval_*.py, by the stage's name
    folder: Path

    def stages(self) -> list[Stage]:
        """Return the stages in the order in which they run."""
        train = Stage("train", "main_cplearn", [*self.train, "--output_dir", str(self.folder)], self.folder)
        weights = ["--pretrained_weights", str(self.folder / "checkpoint.pth")]
        stages = [train]
        for name, flags in self.evaluate.items():
            random, place = name.startswith("random"), self._results_folder(random=name.startswith("random"))
            where = ["--output_dir", str(place), "--seed", str(self.seed)]
            argv = [*weights, *["--random_init"] * random, *where, *flags]
            stages.append(Stage(name, f"eval_{name.split()[-1]}", argv, place))
        return stages

    def results(self, *, random: bool = False) -> list[dict]:
        """Return the lines of results.jsonl of the trained network, or of the untrained one."""
        return read_json_lines(self._results_folder(random=random) / "results.jsonl")

    def _results_folder(self, *, random: bool) -> Path:
        return self.folder / ("random_init" if random else "trained")

    def mark_trained(self) -> None:
        """Write trained.json. Whoever saw the training end well calls this."""
        write_text(self.folder / "trained.json", json.dumps({"commit": git_commit()}) + "\n")


@dataclass(frozen=True)
class Settings:
    """What all cells of a grid share."""

    table: int
    scale: str
    data_path: str | None
    dataset: str | None
    minutes_per_cell: float | None
    train_flags: str
    ngpus: int  # processes per cell
    epochs: int | None  # None: the recipe's

    @property
    def batch(self) -> int:
        """Images per step, over all processes of a cell."""
        return paper_batch(self.table, self.scale)

    def common_flags(self) -> list[str]:
        """Return the flags of every pre-training."""
        data = {"--data_path": self.data_path, "--dataset": self.dataset}
        given = [x for flag, value in data.items() if value for x in (flag, value)]
        batch = ["--batch_size_per_gpu", str(self.batch // self.ngpus)]
        return ["--saveckp_freq", "0", *batch, *given, *shlex.split(self.train_flags)]

    def evaluation_flags(self) -> dict[str, list[str]]:
        """Return the flags of every evaluation, by the stage's name."""
        collapse = "--baseline false"
        if self.scale == "small":
            linear = "--augment false --optimizer adam --epochs 30"
            collapse += " --components 10 100 --mc_samples 2000 --tsne_images 0"
        else:
            # Tables of small networks: the paper's Appendix I. Table 3: DINO's script.
            linear = "" if self.table == 3 else "--augment false --optimizer adam --epochs 100"
        flags = {"knn": "--nb_knn 20", "linear": linear, "cluster": "--shuffles 20", "collapse": collapse}
        return {name: text.split() for name, text in flags.items()}


def paper_batch(table: int, scale: str) -> int:
    """Return the paper's batch over all processes: 512 for Table 3, 64 for the other tables and at small scale."""
    return 512 if table == 3 and scale == "paper" else 64


@dataclass(frozen=True)
class Grid:
    """Cells of one table with the same settings, in one folder."""

    folder: Path
    settings: Settings
    cells: list[Cell]

    @classmethod
    def build(
        cls,
        folder: Path,
        settings: Settings,
        *,
        methods: Sequence[str] = (),
        out_dims: Sequence[int] = (),
        seeds: Sequence[int] = (0,),
    ) -> "Grid":
        """Return the grid of these methods and sizes (none given: the table's). Raises `UserError` if it is empty.

        Cells come seed after seed, so that a grid that is stopped early has every line once before any line twice.
        """
        data = settings.dataset if settings.dataset in ("cifar10", "cifar100", "svhn") else "cifar10"
        lines = rows(settings.table, settings.scale, methods, out_dims, data)
        # One untrained network per size; its backbone is the same whatever the size and the method.
        by_method = sorted(lines, key=lambda r: r.method != "cplearn")
        of_size = {row.out_dim: row.key for row in reversed(by_method)}.values()
        epochs = ["--epochs", str(settings.epochs)] if settings.epochs else []
        cells = []
        for seed in seeds:
            for row in lines:
                flags = settings.evaluation_flags()
                random = ("cluster",) * (row.key in of_size) + ("knn", "linear") * (row.key == by_method[0].key)
                flags |= {f"random {name}": flags[name] for name in random}
                train = [*row.flags, *settings.common_flags(), "--seed", str(seed), *epochs]
                name = f"{row.key}_s{seed}"
                cells.append(Cell(row, seed, name, train, flags, folder / name))
        return cls(folder, settings, cells)

    @classmethod
    def load(cls, folder: Path) -> "Grid":
        """Return the grid that a folder holds. Raises `UserError` if there is none."""
        content = read_json(folder / "grid.json")
        if not content:
            raise UserError(f"{folder} holds no grid: was it started with this --output_dir?")
        settings = Settings(**{field.name: content["settings"].get(field.name) for field in fields(Settings)})
        cells = [
            Cell(Row(**x["row"]), x["seed"], x["name"], x["train"], x["evaluate"], folder / x["name"])
            for x in content["cells"]
        ]
        return cls(folder, settings, cells)

    def save(self) -> "Grid":
        """Add the cells to those that the folder holds, and return them all.

        Raises `UserError` if the folder's cells have other settings.
        """
        path = self.folder / "grid.json"
        before, now = read_json(path), asdict(self.settings)
        theirs = before.get("settings", now)
        changed = [f"--{k} {theirs[k]}, now {v}" for k, v in now.items() if theirs[k] != v]
        kept = {x["name"]: x for x in before.get("cells", [])}
        for cell in self.cells:
            there = kept.get(cell.name)
            if there and without_folders(there["train"]) != without_folders(cell.train):
                changed.append(f"other flags for {cell.name}")
            kept[cell.name] = {k: v for k, v in asdict(cell).items() if k != "folder"}
        if changed:
            raise UserError(f"{self.folder} holds a grid with {'; '.join(changed[:3])}: choose another --output_dir")
        content = {"settings": now, "commit": git_commit(), "cells": list(kept.values())}
        write_text(path, json.dumps(content, indent=1) + "\n")
        return Grid.load(self.folder)

    def check(self) -> None:
        """Let every script check its flags before the first of them runs. Raises `UserError` with the cell's name."""
        for cell in self.cells:
            for stage in cell.stages():
                try:
                    parse_flags(stage.script, stage.flags)
                except UserError as error:
                    raise UserError(f"{cell.name}: {error}") from None


def without_folders(flags: list[str]) -> list[str]:
    """Return flags without the recipes' folders: a recipe is the same in another checkout."""
    return [x.rpartition("/")[2] if x.startswith("@") else x for x in flags]


def timed_epochs(folder: Path, minutes_per_cell: float | None) -> int | None:
    """Return the epochs that were chosen when this folder's grid began, if it had the same --minutes_per_cell."""
    settings = read_json(folder / "grid.json").get("settings", {})
    return settings["epochs"] if minutes_per_cell and settings.get("minutes_per_cell") == minutes_per_cell else None
