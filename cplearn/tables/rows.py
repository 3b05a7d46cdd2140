"""Lines of the paper's Tables 1, 2, 3, 4 and 9, and of its earlier version's grid of sizes ("falcon"): what is trained
for each, and what the paper has there.

Values are the paper's own, in paper_tables/; where it does not name a setting, CHOICES says whose is taken.
"""

import contextlib
import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cplearn.errors import UserError
from cplearn.host import ROOT

# The methods of cplearn.methods.METHODS (not imported, so that --help needs no torch) by the paper's names.
NAMES = {
    "barlow_twins": "Barlow",
    "swav": "SwAV",
    "dino": "DINO",
    "gedi": "GEDI no gen",
    "cplearn": "CPLearn",
    "gedi_gen": "GEDI",
    "self_classifier": "Self-Classifier",
}

TABLES = (1, 2, 3, 4, 9, "falcon")
OF_SIZES = (3, "falcon")  # methods x sizes, on ImageNet-100

# Methods of the tables of sizes, by the names that the paper has there.
METHODS = {
    3: {method: NAMES[method] for method in ("barlow_twins", "swav", "dino", "gedi", "cplearn")},
    "falcon": {"dino": "DINO", "cplearn": "FALCON"},
}
OUT_DIMS = {"paper": (128, 1024, 2048, 32768, 65536, 131072), "small": (16, 128, 1024, 4096, 16384)}

# Sizes that the paper does not name: those of the published ResNet-18 code.
UNNAMED = {"barlow_twins": 2048, "swav": 3000}

# The flags of a method at --scale small (what was tried is in results/methods.md).
SMALL_FLAGS: dict[str, Callable[[int], str]] = {
    "cplearn": lambda c: "--beta 0.5" if c <= 128 else "--beta 0.25",  # the direction of the paper's Table 7
    # Below the trap of the forward prior; the rate of the paper's Table 6, or it ends below the untrained network.
    "gedi": lambda c: f"--beta {0.9 / math.log(c):.2f} --lr 0.0004",
    "gedi_gen": lambda c: f"--beta {0.9 / math.log(c):.2f} --lr 0.0004",
    "dino": lambda c: "--momentum_teacher 0.99",  # a dozen epochs are too few for 0.996
    "swav": lambda c: "--epoch_queue_starts 1 --queue_length 960",  # 15 batches; for runs of a few epochs
    "barlow_twins": lambda c: "--lr 0.001",  # at the common rate it does not learn
}

# Where the paper is silent, or is not followed: printed under every table.
CHOICES = {
    1: "sizes of Barlow Twins and SwAV are the published ResNet-18 code's; GEDI's is the number of classes, with the "
    "beta of CPLearn's Table 7. The head is the equations' (--n_ref 1, embed_dim = f), tanh.",
    2: "head, size of Barlow Twins and SwAV, and GEDI's prior (sum, beta 0.1) are the published code's. One optimizer "
    "for all, as the paper's text has it; the code trains the others with LARS. Self-Classifier has CPLearn's frozen "
    "head, as the sizes in the paper's Table 8 say. The paper's NMI of SwAV is not of its prototypes.",
    3: "crops, width, activation and logit scale are not in the paper: DINO's crops for all, this project's head. GEDI "
    "has CPLearn's beta (0.25): from c = 786 on (every size but 128) all images partly on one code then have a lower "
    "loss than uniform assignments (docs/losses.md).",
    "falcon": "of the earlier version only the numbers are known here: all but the 100 epochs is as for Table 3.",
    4: "the head is the equations' (--n_ref 1, embed_dim = f).",
    9: "c = 512: the paper names no size, and its value at beta = 1 is Table 2's for c = f. The head is the published "
    "code's.",
}


@dataclass(frozen=True)
class Row:
    """A line of a table, for all seeds."""

    key: str
    method: str
    out_dim: int
    label: str  # what sets it apart from other lines of its method
    x: float  # its place in the figure
    flags: list[str]  # of main_cplearn.py
    paper: dict[str, float | str]  # nmi and linear top-1, in percent, or the word that the paper has there


def rows(table: int | str, scale: str, methods: Sequence[str], out_dims: Sequence[int], data: str) -> list[Row]:
    """Return the lines of a table with the given methods and sizes (none given: the table's own).

    `data`: cifar10, cifar100 or svhn, for the paper's column. Raises `UserError` if no line is left.
    """
    if table in OF_SIZES:
        lines = _by_size(table, scale, methods, out_dims)
    elif table == 9 and (set(methods) - {"cplearn"} or len(out_dims) > 1):
        raise UserError("--table 9 is of CPLearn at one size: leave out --methods, and name one --out_dims")
    elif table == 2 and data != "cifar10":
        raise UserError(f"--table 2 is of CIFAR-10, not --dataset {data}")
    else:
        lines = _of_resnets(table, scale, data, out_dims)
        lines = [r for r in lines if (not methods or r.method in methods) and (not out_dims or r.out_dim in out_dims)]
    if not lines:
        given = " and ".join(f"{x}" for x in (list(methods), list(out_dims)) if x)
        raise UserError(f"--table {table} has no line of {given}: leave out --methods and --out_dims to see all")
    return lines


def title(table: int | str) -> str:
    """Return what a table is called."""
    return f"Table {table}" if isinstance(table, int) else "ImageNet-100 by size, as in the paper's earlier version"


def stem(table: int | str) -> str:
    """Return what the files of a table are called, without their suffixes."""
    return f"table{table}" if isinstance(table, int) else table


def paper_lines(table: int | str) -> list[dict[str, str]]:
    """Return the lines of paper_tables/tableN.csv (or falcon_imagenet100.csv)."""
    name = "falcon_imagenet100" if table == "falcon" else f"table{table}"
    with open(ROOT / "paper_tables" / f"{name}.csv", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def beta_of(out_dim: int) -> str:
    """Return beta of the paper's Table 7 (equal on its three data sets) for the largest listed c up to `out_dim`."""
    line = paper_lines(7)[0]
    sizes = [int(name[1:]) for name in line if name.startswith("c")]
    return line[f"c{max([c for c in sizes if c <= out_dim], default=min(sizes))}"]


def _flags(scale: str, recipe: str, method: str, out_dim: int, more: str = "") -> list[str]:
    name = "small_comparison" if scale == "small" else recipe
    own = SMALL_FLAGS[method](out_dim) if scale == "small" and method in SMALL_FLAGS else ""
    last = f"{more} {own}" if method.startswith("gedi") else f"{own} {more}"  # GEDI's beta is not the table's there
    return [f"@{ROOT}/recipes/{name}.txt", *f"--method {method} --out_dim {out_dim} {last}".split()]


def _known(line: dict[str, str], **columns: str) -> dict[str, float | str]:
    """Return the paper's values that a line has, in percent; of a word the word."""
    known: dict[str, float | str] = {name: line[column] for name, column in columns.items() if column in line}
    for name, value in known.items():
        with contextlib.suppress(ValueError):
            known[name] = round((1 if columns[name].endswith("_percent") else 100) * float(value), 3)
    return known


def _by_size(table: int | str, scale: str, methods: Sequence[str], out_dims: Sequence[int]) -> list[Row]:
    names, falcon = METHODS[table], table == "falcon"
    paper = {(x["method"], int(x["c" if falcon else "out_dim"])): x for x in paper_lines(table)}
    sizes = out_dims or (sorted({c for _, c in paper}) if falcon else OUT_DIMS[scale])
    more = ["--epochs", "100"] if falcon and scale == "paper" else []
    lines = []
    for method in methods or names:
        if method not in names and (falcon or scale == "paper"):
            raise UserError(f"--methods {method} is not in --table {table}: {', '.join(names)}")
        for c in sizes:
            there = paper.get((names.get(method), c), {})
            known = _known(there, nmi="nmi_percent", linear="linear_top1_percent")
            flags = [*_flags(scale, f"imagenet100_{method}", method, c), *more]
            lines.append(Row(f"{method}_c{c}", method, c, f"c = {c}", c, flags, known))
    return lines


def _of_resnets(table: int, scale: str, data: str, out_dims: Sequence[int]) -> list[Row]:
    """Return the lines of the tables of small networks: ResNet-8 in Tables 1 and 4, ResNet-18 in 2 and 9."""
    large = table in (2, 9)
    classes, width = (100, 256) if data == "cifar100" else (10, 512 if large else 128)
    sizes = UNNAMED | {"gedi": classes, "gedi_gen": classes, "c=k": classes, "c=f": width, "f": width}
    methods = {name: method for method, name in NAMES.items()}
    lines = []
    for line in paper_lines(table):
        method = methods[line.get("method", NAMES["cplearn"])]
        if table == 9:
            c = out_dims[0] if out_dims else 512  # its beta = 1 has Table 2's value of c = f = 512
        else:
            c = sizes.get(line["c"] or method) or int(line["c"])
        key, label, x, more = f"{method}_c{c}", f"c = {c}", len(lines), ""
        paper = _known(line, nmi="nmi_percent", linear="linear_acc_percent")
        if table == 2:
            gedi = "--gedi_prior_reduction sum --beta 0.1"
            more = {"cplearn": "--beta 1", "gedi": gedi, "self_classifier": "--head cplearn"}.get(method, "")
        elif table == 9:
            key, label, x = f"beta{line['beta']}_c{c}", f"beta = {line['beta']}", float(line["beta"])
            more = f"--beta {line['beta']}"
            paper["collapse"] = "yes" if line["cluster_collapse"] == "1" else "no"
        else:
            paper = _known(line, nmi=f"{data}_nmi", linear=f"{data}_acc")
            if method in ("cplearn", "gedi", "gedi_gen"):
                more = f"--beta {beta_of(c)}"
            if method == "cplearn":
                activation = {"L2-Norm": "l2", "Tanh": "tanh"}[line.get("activation", "Tanh")]
                more += f" --activation {activation}"
            if table == 4:
                key, label = f"{activation}_c{c}", f"c = {c}, {activation}"
            if scale == "paper":  # Table 6, and the width f
                more += {"svhn": " --epochs 20 --augmentation svhn", "cifar100": " --arch resnet8_w256"}.get(data, "")
        flags = _flags(scale, "cifar10_resnet18" if large else "cifar10_resnet8", method, c, more)
        if large and method == "cplearn" and scale == "paper":
            flags.append(f"@{ROOT}/recipes/published_head.txt")
        lines.append(Row(key, method, c, label, x, flags, paper))
    return lines
