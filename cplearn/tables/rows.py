"""Lines of the paper's Tables 1, 2, 3, 4 and 9, and of its earlier version's grid of sizes ("falcon"): what is trained
for each, and what the paper has there.

Values are the paper's own, in paper_tables/; where it does not name a setting, CHOICES says whose is taken.
"""

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
    elif table == 9:
        if set(methods) - {"cplearn"} or len(out_dims) > 1:
            raise UserError("--table 9 is of CPLearn at one size: leave out --methods, and name one --out_dims")
        lines = _table9(scale, out_dims[0] if out_dims else 512)  # its beta = 1 has Table 2's value of c = f = 512
    else:
        lines = {1: _table1, 2: _table2, 4: _table4}[table](scale, data)
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


def _percent(value: str, unit: float = 1.0) -> float | str:
    try:
        return round(unit * float(value), 3)
    except ValueError:
        return value


def _method_of(name: str) -> str:
    return next(method for method, theirs in NAMES.items() if theirs == name)


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
            columns = {"nmi": "nmi_percent", "linear": "linear_top1_percent"}
            known = {name: _percent(there[column]) for name, column in columns.items() if column in there}
            flags = [*_flags(scale, f"imagenet100_{method}", method, c), *more]
            lines.append(Row(f"{method}_c{c}", method, c, f"c = {c}", c, flags, known))
    return lines


def _table1(scale: str, data: str) -> list[Row]:
    classes, width = _classes_and_width(data)
    sizes = UNNAMED | {"gedi": classes, "gedi_gen": classes, "c=k": classes, "c=f": width}
    lines = []
    for line in paper_lines(1):
        method = _method_of(line["method"])
        c = sizes.get(line["c"] or method) or int(line["c"])
        more = f"--beta {beta_of(c)}" if method in ("cplearn", "gedi", "gedi_gen") else ""
        more += " --activation tanh" * (method == "cplearn")
        lines.append(_resnet8(f"{method}_c{c}", method, c, f"c = {c}", more, line, scale, data, len(lines)))
    return lines


def _table4(scale: str, data: str) -> list[Row]:
    lines = []
    for line in paper_lines(4):
        c = _classes_and_width(data)[1] if line["c"] == "f" else int(line["c"])
        activation = {"L2-Norm": "l2", "Tanh": "tanh"}[line["activation"]]
        more, label = f"--beta {beta_of(c)} --activation {activation}", f"c = {c}, {activation}"
        lines.append(_resnet8(f"{activation}_c{c}", "cplearn", c, label, more, line, scale, data, len(lines)))
    return lines


def _classes_and_width(data: str) -> tuple[int, int]:
    return (100, 256) if data == "cifar100" else (10, 128)


def _resnet8(key: str, method: str, c: int, label: str, more: str, line, scale: str, data: str, x: float) -> Row:
    if scale == "paper":  # Table 6, and the width f
        more += {"svhn": " --epochs 20 --augmentation svhn", "cifar100": " --arch resnet8_w256"}.get(data, "")
    paper = {"nmi": _percent(line[f"{data}_nmi"], 100), "linear": _percent(line[f"{data}_acc"], 100)}
    return Row(key, method, c, label, x, _flags(scale, "cifar10_resnet8", method, c, more), paper)


def _table2(scale: str, data: str) -> list[Row]:
    if data != "cifar10":
        raise UserError(f"--table 2 is of CIFAR-10, not --dataset {data}")
    lines = []
    for line in paper_lines(2):
        method = _method_of(line["method"])
        sizes = UNNAMED | {"gedi": 10, "c=f": 512}
        c = sizes.get(line["c"] or method) or int(line["c"])
        more = {
            "cplearn": "--beta 1",
            "gedi": "--gedi_prior_reduction sum --beta 0.1",
            "self_classifier": "--head cplearn",
        }.get(method, "")
        flags = _flags(scale, "cifar10_resnet18", method, c, more)
        flags += [f"@{ROOT}/recipes/published_head.txt"] * (method == "cplearn" and scale == "paper")
        paper = {"nmi": _percent(line["nmi_percent"]), "linear": _percent(line["linear_acc_percent"])}
        lines.append(Row(f"{method}_c{c}", method, c, f"c = {c}", len(lines), flags, paper))
    return lines


def _table9(scale: str, c: int) -> list[Row]:
    lines = []
    for line in paper_lines(9):
        beta = line["beta"]
        flags = _flags(scale, "cifar10_resnet18", "cplearn", c, f"--beta {beta}")
        flags += [f"@{ROOT}/recipes/published_head.txt"] * (scale == "paper")
        paper = {"linear": _percent(line["linear_acc_percent"])}
        paper |= {"collapse": "yes" if line["cluster_collapse"] == "1" else "no"}
        lines.append(Row(f"beta{beta}_c{c}", "cplearn", c, f"beta = {beta}", float(beta), flags, paper))
    return lines
