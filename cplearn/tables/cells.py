"""The cells of a grid, and the folder that keeps them. `reproduce_table3.py` runs them.

Everything about a cell lies in its folder: the checkpoint and log.txt of its training, trained.json when that is over,
and in trained/ and random_init/ the results of its evaluations. A killed grid continues from what is there.
"""

import argparse
import contextlib
import hashlib
import json
import shlex
import typing
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from cplearn.errors import UserError
from cplearn.files import read_json, read_json_lines, read_text, write_text
from cplearn.host import git_commit
from cplearn.slurm.checks import parse_flags
from cplearn.tables.rows import OF_SIZES, Row, rows


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
        """Return the lines of results.jsonl of the trained network, or of the untrained one.

        None but those of the checkpoint that trained.json names (those of earlier versions name none).
        """
        lines = read_json_lines(self._results_folder(random=random) / "results.jsonl")
        kinds = {"script": str, "weights_sha256": str, "metrics": dict}
        weights = read_json(self.folder / "trained.json").get("weights_sha256")
        return [
            line
            for line in lines
            if all(isinstance(line.get(name), kind) for name, kind in kinds.items())
            and weights in (None, line["weights_sha256"])
        ]

    def _results_folder(self, *, random: bool) -> Path:
        return self.folder / ("random_init" if random else "trained")

    def own_flags(self) -> dict[str, str | int]:
        """Return what makes the cell this one, as flags of main_cplearn.py."""
        return {"method": self.row.method, "out_dim": self.row.out_dim, "seed": self.seed}

    def differs(self) -> str:
        """Return where the checkpoint says something else than this cell, "" if nowhere or if there is none.

        The folder may hold another run: copied there, or trained by hand with other flags.
        """
        said, cell = checkpoint_args(self.folder / "checkpoint.pth"), self.own_flags()
        if "--epochs" in self.train:
            last = max(i for i, flag in enumerate(self.train) if flag == "--epochs")
            cell["epochs"] = int(self.train[last + 1])
        wrong = [
            f"--{name} {said[name]}, not {value}" for name, value in cell.items() if said.get(name, value) != value
        ]
        return ", ".join(wrong)

    def mark_trained(self) -> None:
        """Write trained.json, which names the weights. Whoever saw the training end well calls this."""
        content = {"commit": git_commit()}
        with contextlib.suppress(FileNotFoundError), open(self.folder / "checkpoint.pth", "rb") as file:
            content["weights_sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
        write_text(self.folder / "trained.json", json.dumps(content) + "\n")


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
    tune: int | None  # trials of each method (cplearn.tables.tuning); None: every method is as it stands
    tune_out_dim: int | None
    tune_epochs: int | None  # None: as many as the cells

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
            # Tables of small networks: the paper's Appendix I. ImageNet-100: DINO's script.
            linear = "" if self.table in OF_SIZES else "--augment false --optimizer adam --epochs 100"
        flags = {"knn": "--nb_knn 20", "linear": linear, "cluster": "--shuffles 20", "collapse": collapse}
        return {name: text.split() for name, text in flags.items()}


def paper_batch(table: int | str, scale: str) -> int:
    """Return the paper's batch over all processes: 512 on ImageNet-100, 64 for the other tables and at small scale."""
    return 512 if table in OF_SIZES and scale == "paper" else 64


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
    def build(
        cls,
        folder: Path,
        settings: Settings,
        *,
        methods: Sequence[str] = (),
        out_dims: Sequence[int] = (),
        seeds: Sequence[int] = (0,),
        tuned: Callable[[Row], list[str]] = lambda row: [],
    ) -> "Grid":
        """Return the grid of these methods and sizes (none given: the table's). Raises `UserError` if it is empty.

        `tuned`: flags that are added to a row's.

        Cells come seed after seed, so that a grid that is stopped early has every line once before any line twice.
        """
        data = settings.dataset if settings.dataset in ("cifar10", "cifar100", "svhn") else "cifar10"
        lines = rows(settings.table, settings.scale, methods, out_dims, data)
        lines = [replace(row, flags=[*row.flags, *tuned(row)]) for row in lines]
        untrained = _untrained_stages(lines)
        epochs = ["--epochs", str(settings.epochs)] if settings.epochs else []
        cells = []
        for seed in seeds:
            for row in lines:
                flags = settings.evaluation_flags()
                flags |= {f"random {name}": flags[name] for name in untrained.get(row.key, ())}
                train = [*row.flags, *settings.common_flags(), "--seed", str(seed), *epochs]
                name = f"{row.key}_s{seed}"
                cells.append(Cell(row, seed, name, train, flags, folder / name))
        return cls(folder, settings, cells)

    @classmethod
    def load(cls, folder: Path) -> "Grid":
        """Return the grid that a folder holds. Raises `UserError` if there is none."""
        content = read_object(folder / "grid.json")
        if not content:
            raise UserError(f"{folder} holds no grid: was it started with this --output_dir?")
        return cls(folder, *_read_grid(folder, content))

    def kept(self) -> list[Cell]:
        """Return the cells that the folder holds. Raises `UserError` if they have other settings than these."""
        before, now = read_object(self.folder / "grid.json"), asdict(self.settings)
        if not before:
            return []
        settings, cells = _read_grid(self.folder, before)
        theirs = asdict(settings)
        if settings.tune and self.settings.tune:  # more trials are no other setting
            theirs["tune"] = now["tune"]
        self._refuse([f"--{k} {theirs[k]}, now {v}" for k, v in now.items() if theirs[k] != v])
        return cells

    def _refuse(self, changed: list[str]) -> None:
        if changed:
            raise UserError(f"{self.folder} holds a grid with {'; '.join(changed[:3])}: choose another --output_dir")

    def save(self, forget: Collection[str] = ()) -> "Grid":
        """Add the cells to those that the folder holds, but for the names in `forget`, and return them all.

        Raises `UserError` if the folder's cells have other settings.
        """
        cells = [cell for cell in self.kept() if cell.name not in forget]
        kept = {cell.name: {k: v for k, v in asdict(cell).items() if k != "folder"} for cell in cells}
        changed = []
        for cell in self.cells:
            there = kept.get(cell.name)
            if there and without_folders(there["train"]) != without_folders(cell.train):
                changed.append(f"other flags for {cell.name}")
            kept[cell.name] = {k: v for k, v in asdict(cell).items() if k != "folder"}
        self._refuse(changed)
        content = {"settings": asdict(self.settings), "commit": git_commit(), "cells": list(kept.values())}
        write_text(self.folder / "grid.json", json.dumps(content, indent=1) + "\n")
        return Grid.load(self.folder)

    def check(self) -> None:
        """Let every script check its flags before the first of them runs. Raises `UserError` with the cell's name, also
        if its flags (a recipe in --train_flags, say) make it another cell or two cells one and the same."""
        seen: dict[str, str] = {}
        for cell in self.cells:
            for stage in cell.stages():
                try:
                    parsed = parse_flags(stage.script, stage.flags)
                except UserError as error:
                    raise UserError(f"{cell.name}: {error}") from None
                if stage.name != "train":
                    continue
                for name, value in cell.own_flags().items():
                    if getattr(parsed, name) != value:
                        raise UserError(f"{cell.name} would train with --{name} {getattr(parsed, name)}, not {value}")
                if parsed.method == "gedi_gen" and sees_batch_norm(parsed):
                    raise UserError(
                        f"{cell.name} samples images with its network, and {parsed.arch} has batch norm: give all "
                        "lines one without, by --train_flags '--arch resnet8_w32', or leave gedi_gen out of --methods"
                    )
                flags = repr(sorted((vars(parsed) | {"output_dir": ""}).items()))
                if flags in seen:
                    raise UserError(
                        f"{cell.name} and {seen[flags]} would be the same training: take what sets them apart out of "
                        f"--train_flags '{self.settings.train_flags}'"
                    )
                seen[flags] = cell.name


def _untrained_stages(lines: Sequence[Row]) -> dict[str, list[str]]:
    """Return which evaluations of the untrained network go with which lines, by the lines' keys.

    Its codes once for every size, with CPLearn's head if the table has it; its features once, as backbone and seed are
    the same in every line.
    """
    ours_first = sorted(lines, key=lambda row: row.method != "cplearn")
    found: dict[str, list[str]] = {}
    sizes = set()
    for row in ours_first:
        if row.out_dim not in sizes:
            sizes.add(row.out_dim)
            found[row.key] = ["cluster"]
    found[ours_first[0].key] += ["knn", "linear"]
    return found


def sees_batch_norm(flags: argparse.Namespace) -> bool:
    """Return whether the network of these flags has batch norm; it is built without weights."""
    import torch  # not for --help

    from cplearn.backbones import build_backbone, has_batch_norm

    with torch.device("meta"):
        return has_batch_norm(build_backbone(flags.arch, patch_size=flags.patch_size, image_size=flags.image_size))


def checkpoint_args(path: Path) -> dict:
    """Return the flags that a run's checkpoint holds, {} if there is none. Its tensors are not read."""
    if not path.is_file():
        return {}
    import torch  # not for --help

    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)["args"]
    except Exception:  # torch raises anything; an evaluation, which reads it whole, says what is wrong
        return {}


def read_object(path: Path) -> dict:
    """Return the JSON object in a file that this project wrote, {} if there is no such file.

    Raises `UserError` for a damaged file: taken for none, what it keeps would be overwritten.
    """
    try:
        content = json.loads(read_text(path))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): restore a copy, or move it away to begin anew") from None
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path} is damaged (no JSON object): restore a copy, or move it away to begin anew")
    return content


def _read_grid(folder: Path, content: dict) -> tuple[Settings, list[Cell]]:
    """Return settings and cells of grid.json. Raises `UserError` for fields that are not those of `Grid.save`."""
    try:
        settings = _fill(Settings, {field.name: None for field in fields(Settings)} | content["settings"])
        cells = [
            _fill(Cell, x | {"row": _fill(Row, x["row"]), "folder": folder / str(x["name"])}) for x in content["cells"]
        ]
    except KeyError as error:
        raise UserError(f"{folder}/grid.json has no field {error}: restore a copy, or move it away") from None
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder}/grid.json is not what a grid writes ({error}): restore a copy") from None
    return settings, cells


def _fill(kind: type, content: dict):
    """Return the dataclass with these fields. Raises `TypeError` or `ValueError` that names what does not fit it."""
    wrong = [x.name for x in fields(kind) if not fits(content.get(x.name), x.type)]
    if wrong:
        raise ValueError(f"{wrong[0]} is {content.get(wrong[0])!r}")
    return kind(**content)


def fits(value: object, kind: type) -> bool:
    """Return whether a value out of a JSON file is of a type like `int`, `str | None` or `dict[str, list[str]]`."""
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if origin is list:
        return isinstance(value, list) and all(fits(x, inside[0]) for x in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(k, inside[0]) and fits(x, inside[1]) for k, x in value.items())
    if inside:
        return any(fits(value, x) for x in inside)
    return isinstance(value, (kind, int) if kind is float else kind)


def without_folders(flags: list[str]) -> list[str]:
    """Return flags without the recipes' folders: a recipe is the same in another checkout."""
    return [x.rpartition("/")[2] if x.startswith("@") else x for x in flags]


def timed_epochs(folder: Path, minutes_per_cell: float | None) -> int | None:
    """Return the epochs that were chosen when this folder's grid began, if it had the same --minutes_per_cell."""
    content = read_object(folder / "grid.json")
    settings = asdict(_read_grid(folder, content)[0]) if content else {}
    return settings["epochs"] if minutes_per_cell and settings.get("minutes_per_cell") == minutes_per_cell else None
