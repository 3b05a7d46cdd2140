"""The cells of a grid, its settings, and the folder that keeps both. `reproduce_table3.py` runs them.

Everything about a cell lies in its folder (`cell.py`). grid.json lists settings and cells.
"""

import contextlib
import hashlib
import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

from cplearn.errors import UserError
from cplearn.files import read_json, read_json_lines, read_text, reading, write_text
from cplearn.flags import expand_recipes
from cplearn.host import git_commit
from cplearn.slurm.checks import check_run, parse_flags
from cplearn.tables.rows import OF_SIZES, Row, rows


@dataclass(frozen=True)
class Cell:
    """One pre-training and its evaluations."""

    row: Row
    seed: int
    name: str  # of its folder
    train: list[str]  # flags of main_cplearn.py
    evaluate: dict[str, list[str]]  # flags of eval_NAME.py by name; "random NAME" is of the untrained network
    folder: Path

    def as_json(self) -> dict:
        """Return what grid.json keeps of it."""
        return {name: value for name, value in asdict(self).items() if name != "folder"}

    @classmethod
    def from_json(cls, content: dict, folder: Path) -> "Cell":
        """Return the cell in this folder."""
        kept = {name: content[name] for name in ("seed", "name", "train", "evaluate")}
        return cls(Row(**content["row"]), folder=folder, **kept)

    def write(self, processes: int) -> None:
        """Write cell.json, which says what to do: recipes as they are now, and in how many processes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        content = self.as_json() | {"train": expand_recipes(self.train), "processes": processes}
        write_text(self.folder / "cell.json", json.dumps(content, indent=1) + "\n")

    def results_folder(self, *, random: bool) -> Path:
        """Return where the evaluations of the trained network, or of the untrained one, put their results."""
        return self.folder / ("random_init" if random else "trained")

    def results(self, *, random: bool = False) -> list[dict]:
        """Return the lines of results.jsonl of the trained network, or of the untrained one.

        None but those of the checkpoint that trained.json names (those of earlier versions name none).
        """
        lines = read_json_lines(self.results_folder(random=random) / "results.jsonl")
        weights = read_json(self.folder / "trained.json").get("weights_sha256")
        return [line for line in lines if weights in (None, line.get("weights_sha256"))]

    def missing(self) -> list[str]:
        """Return what is still to be done: "train", and the names of evaluations, in their order."""
        if not (self.folder / "trained.json").exists():
            return ["train", *self.evaluate]
        done = {(random, line.get("script")) for random in (False, True) for line in self.results(random=random)}
        return [name for name in self.evaluate if (is_random(name), script_of(name)) not in done]

    def own_flags(self) -> dict[str, str | int]:
        """Return what makes the cell this one, as flags of main_cplearn.py."""
        return {"method": self.row.method, "out_dim": self.row.out_dim, "seed": self.seed}

    def differs(self) -> str:
        """Return where the checkpoint says something else than this cell, "" if nowhere or if there is none.

        The folder may hold another run: copied there, or trained by hand with other flags.
        """
        trained, own = checkpoint_args(self.folder / "checkpoint.pth"), self.own_flags()
        if epochs := dict(pairwise(self.train)).get("--epochs"):  # the last one's
            own["epochs"] = int(epochs)
        wrong = {name: value for name, value in own.items() if trained.get(name, value) != value}
        return ", ".join(f"--{name} {trained[name]}, not {value}" for name, value in wrong.items())

    def mark_trained(self) -> None:
        """Write trained.json, which names the weights. Whoever saw the training end well calls this."""
        content = {"commit": git_commit()}
        with contextlib.suppress(FileNotFoundError), open(self.folder / "checkpoint.pth", "rb") as file:
            content["weights_sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
        write_text(self.folder / "trained.json", json.dumps(content) + "\n")


def is_random(evaluation: str) -> bool:
    """Return whether an evaluation is of the untrained network."""
    return evaluation.startswith("random ")


def script_of(evaluation: str) -> str:
    """Return the module of an evaluation."""
    return f"eval_{evaluation.rpartition(' ')[2]}"


@dataclass(frozen=True)
class Settings:
    """What all cells of a grid share."""

    table: int | str
    scale: str
    data_path: str | None
    dataset: str | None
    minutes_per_cell: float | None
    train_flags: str
    ngpus: int  # processes per cell
    epochs: int | None  # None: the recipe's
    tune: int | None = None  # trials of each method (cplearn.tables.tuning); None: every method is as it stands
    tune_out_dim: int | None = None
    tune_epochs: int | None = None  # None: as many as the cells

    @property
    def batch(self) -> int:
        """Images per step, over all processes of a cell: the paper's, 512 on ImageNet-100; 64 for the other tables and
        at small scale."""
        return 512 if self.table in OF_SIZES and self.scale == "paper" else 64

    def rows(self, methods: Sequence[str] = (), out_dims: Sequence[int] = ()) -> list[Row]:
        """Return the lines of these methods and sizes (none given: the table's). Raises `UserError` without any."""
        data = self.dataset if self.dataset in ("cifar10", "cifar100", "svhn") else "cifar10"
        return rows(self.table, self.scale, methods, out_dims, data)

    def common_flags(self) -> list[str]:
        """Return the flags of every pre-training."""
        data = {"--data_path": self.data_path, "--dataset": self.dataset}
        given = [x for flag, value in data.items() if value for x in (flag, value)]
        batch = ["--batch_size_per_gpu", str(self.batch // self.ngpus)]
        return ["--saveckp_freq", "0", *batch, *given, *shlex.split(self.train_flags)]

    def cell(self, folder: Path, row: Row, name: str, seed: int, evaluations: Sequence[str]) -> Cell:
        """Return the cell that trains a line with a seed, and is evaluated so."""
        train = [*row.flags, *self.common_flags(), "--seed", str(seed)]
        train += ["--epochs", str(self.epochs)] if self.epochs else []
        flags = self._evaluation_flags()
        evaluate = {x: flags[x.removeprefix("random ")] for x in evaluations}
        return Cell(row, seed, name, train, evaluate, folder / name)

    def _evaluation_flags(self) -> dict[str, list[str]]:
        collapse = "--baseline false"
        if self.scale == "small":
            linear = "--augment false --optimizer adam --epochs 30"
            collapse += " --components 10 100 --mc_samples 2000 --tsne_images 0"
        else:
            # Tables of small networks: the paper's Appendix I. ImageNet-100: DINO's script.
            linear = "" if self.table in OF_SIZES else "--augment false --optimizer adam --epochs 100"
        flags = {"knn": "--nb_knn 20", "linear": linear, "cluster": "--shuffles 20", "collapse": collapse}
        return {name: text.split() for name, text in flags.items()}


@dataclass(frozen=True)
class Grid:
    """Cells of one table with the same settings, in one folder."""

    folder: Path
    settings: Settings
    cells: list[Cell]

    @property
    def methods(self) -> list[str]:
        """Return the methods of the cells, each once."""
        return list(dict.fromkeys(cell.row.method for cell in self.cells))

    @classmethod
    def build(cls, folder: Path, settings: Settings, lines: Sequence[Row], seeds: Sequence[int] = (0,)) -> "Grid":
        """Return the cells of these lines, seed after seed: a grid that is stopped early has every line once before
        any line twice."""
        untrained = _untrained_evaluations(lines)
        evaluations = {row.key: ["knn", "linear", "cluster", "collapse", *untrained.get(row.key, ())] for row in lines}
        pairs = [(row, seed) for seed in seeds for row in lines]
        cells = [settings.cell(folder, row, f"{row.key}_s{seed}", seed, evaluations[row.key]) for row, seed in pairs]
        return cls(folder, settings, cells)

    @classmethod
    def load(cls, folder: Path) -> "Grid":
        """Return the grid that a folder holds. Raises `UserError` if there is none, or if grid.json is damaged."""
        path = folder / "grid.json"
        try:
            with reading(path):
                content = json.loads(read_text(path))
                cells = [Cell.from_json(x, folder / x["name"]) for x in content["cells"]]
                return cls(folder, Settings(**content["settings"]), cells)
        except FileNotFoundError:
            raise UserError(f"{folder} holds no grid: was it started with this --output_dir?") from None

    def kept(self) -> list[Cell]:
        """Return the cells that the folder holds. Raises `UserError` if they have other settings than these."""
        if not (self.folder / "grid.json").exists():
            return []
        before = Grid.load(self.folder)
        theirs, now = asdict(before.settings), asdict(self.settings)
        if theirs["tune"] and now["tune"]:  # more trials are no other setting
            theirs["tune"] = now["tune"]
        self._refuse([f"--{k} {theirs[k]}, now {v}" for k, v in now.items() if theirs[k] != v])
        return before.cells

    def _refuse(self, changed: list[str]) -> None:
        if changed:
            raise UserError(f"{self.folder} holds a grid with {'; '.join(changed[:3])}: choose another --output_dir")

    def save(self) -> "Grid":
        """Add the cells to those that the folder holds, and return them all.

        Raises `UserError` if the folder's cells have other settings, or one that was begun other flags.
        """
        kept = {cell.name: cell for cell in self.kept()}
        begun = [(cell, kept[cell.name]) for cell in self.cells if cell.name in kept and cell.folder.exists()]
        changed = [cell.name for cell, old in begun if without_folders(old.train) != without_folders(cell.train)]
        self._refuse([f"other flags for {name}" for name in changed])
        cells = [*(kept | {cell.name: cell for cell in self.cells}).values()]
        content = {"settings": asdict(self.settings), "commit": git_commit(), "cells": [x.as_json() for x in cells]}
        write_text(self.folder / "grid.json", json.dumps(content, indent=1) + "\n")
        return Grid(self.folder, self.settings, cells)

    def check(self) -> None:
        """Check what main_cplearn.py would refuse, before the first cell runs; its network once for each method.

        Raises `UserError` with the cell's name, also if its flags (a recipe in --train_flags, say) make it another
        cell, or two cells one and the same.
        """
        seen: dict[str, str] = {}
        built = set()
        for cell in self.cells:
            try:
                parsed = parse_flags("main_cplearn", cell.train)
                if cell.row.method not in built:
                    check_run(parsed)
            except UserError as error:
                raise UserError(f"{cell.name}: {error}") from None
            built.add(cell.row.method)
            for name, value in cell.own_flags().items():
                if getattr(parsed, name) != value:
                    raise UserError(f"{cell.name} would train with --{name} {getattr(parsed, name)}, not {value}")
            other = seen.setdefault(repr(sorted(vars(parsed).items())), cell.name)
            if other != cell.name:
                raise UserError(
                    f"{cell.name} and {other} would be the same training: take what sets them apart out of "
                    f"--train_flags '{self.settings.train_flags}'"
                )


def _untrained_evaluations(lines: Sequence[Row]) -> dict[str, list[str]]:
    """Return which evaluations of the untrained network go with which lines, by the lines' keys.

    Its codes once for every size, with CPLearn's head if the table has it; its features once, as backbone and seed are
    the same in every line.
    """
    ours_first = sorted(lines, key=lambda row: row.method != "cplearn")
    of_sizes = {row.out_dim: row.key for row in reversed(ours_first)}  # the first line of each
    features_too = {ours_first[0].key: ["random knn", "random linear", "random cluster"]}
    return {key: ["random cluster"] for key in of_sizes.values()} | features_too


def checkpoint_args(path: Path) -> dict:
    """Return the flags that a run's checkpoint holds, {} if there is none. Its tensors are not read."""
    if not path.is_file():
        return {}
    import torch  # not for --help

    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)["args"]
    except Exception:  # torch raises anything; an evaluation, which reads it whole, says what is wrong
        return {}


def without_folders(flags: list[str]) -> list[str]:
    """Return flags without the recipes' folders: a recipe is the same in another checkout."""
    return [x.rpartition("/")[2] if x.startswith("@") else x for x in flags]


def not_among(flags: Sequence[str], more: dict[str, object]) -> list[str]:
    """Return the flags in `more` that have a value and are not among `flags`."""
    given = {word.split("=")[0] for word in expand_recipes(flags)}
    return [x for flag, value in more.items() if value is not None and flag not in given for x in (flag, str(value))]


def timed_epochs(folder: Path, minutes_per_cell: float | None) -> int | None:
    """Return the epochs that were chosen when this folder's grid began, if it had the same --minutes_per_cell."""
    if not minutes_per_cell or not (folder / "grid.json").exists():
        return None
    settings = Grid.load(folder).settings
    return settings.epochs if settings.minutes_per_cell == minutes_per_cell else None
