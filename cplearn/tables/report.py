"""The table that `reproduce_table3.py` is about, from the results of its cells: Markdown, CSV and a figure."""

from collections.abc import Callable
from dataclasses import dataclass

from cplearn.errors import WriteError
from cplearn.files import read_json, read_json_lines, write_csv, write_text
from cplearn.tables import paired, tuning
from cplearn.tables.figure import draw
from cplearn.tables.grid import Cell, Grid
from cplearn.tables.measures import MEASURES, in_text, mean_and_spread, read_measures
from cplearn.tables.rows import CHOICES, NAMES, Row, stem, title
from cplearn.tables.status import CellState
from cplearn.text import format_table

NOTE = (
    "Percent; mean ± largest distance from it over n seeds. NMI and AMI: predicted codes against classes; shuffled: "
    "the same codes against shuffled labels, because NMI grows with the number of used codes by itself. linear: last "
    "epoch. RankMe: effective rank of the features. verdict: the monitor's, after the last epoch. chance: NMI does not "
    "exceed the highest of the shuffles; untrained: random initialization, batch norm calibrated."
)


OF_FEATURES = ("linear", "knn")  # measures of an untrained network that are the same whatever the size

# --- numbers ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A line of the table, over its finished seeds."""

    row: Row
    random: bool  # the untrained network
    n: int  # seeds
    verdict: str
    numbers: dict[str, tuple[float, float]]  # mean and spread by measure; what no seed has is left out
    backbone: bool = False  # of the untrained network what has no size; else that of the row's size, with its head

    def mean(self, name: str) -> float | None:
        return self.numbers[name][0] if name in self.numbers else None

    @property
    def paper(self) -> dict[str, float | str]:
        return {} if self.random else self.row.paper


def collect(grid: Grid, states: dict[str, CellState]) -> list[Line]:
    """Return the lines of the complete cells, in the grid's order, then those of the untrained network: its codes by
    size, and its features, which some cell of every seed has."""
    trained: dict[str, tuple[Row, list[dict]]] = {}
    untrained: dict[int, tuple[Row, dict[int, dict]]] = {}  # by size, then by seed
    features: dict[int, dict] = {}  # by seed
    verdicts: dict[str, list[str]] = {}
    for cell in grid.cells:
        if not states[cell.name].complete:
            continue
        trained.setdefault(cell.row.key, (cell.row, []))[1].append(read_measures(cell.results()))
        log = read_json_lines(cell.folder / "log.txt")
        verdicts.setdefault(cell.row.key, []).append(log[-1].get("verdict", "none") if log else "none")
        random = read_measures(cell.results(random=True))
        if random:  # two cells have one where lines were added later: the first counts
            of_codes = {name: value for name, value in random.items() if name not in OF_FEATURES}
            untrained.setdefault(cell.row.out_dim, (cell.row, {}))[1].setdefault(cell.seed, of_codes)
            for name in set(OF_FEATURES) & random.keys():
                features.setdefault(cell.seed, {}).setdefault(name, random[name])
    order = list(dict.fromkeys(cell.row.key for cell in grid.cells))
    lines = [
        Line(row, False, len(seeds), ", ".join(dict.fromkeys(verdicts[row.key])), _over_seeds(seeds))
        for row, seeds in sorted(trained.values(), key=lambda x: order.index(x[0].key))
    ]
    lines += [
        Line(row, True, len(seeds), "", _over_seeds(list(seeds.values())))
        for row, seeds in sorted(untrained.values(), key=lambda x: order.index(x[0].key))
    ]
    if features:
        lines.append(
            Line(grid.cells[0].row, True, len(features), "", _over_seeds(list(features.values())), backbone=True)
        )
    return lines


def _over_seeds(seeds: list[dict]) -> dict[str, tuple[float, float]]:
    values = {name: [s[name] for s in seeds if name in s] for name in MEASURES}
    return {name: mean_and_spread(v) for name, v in values.items() if v}


def caveats(line: Line, untrained: list[Line]) -> list[str]:
    """Return what a trained line is not above: chance, and the untrained network of its size."""

    def not_above(name: str, other: float | None) -> bool:
        return line.mean(name) is not None and other is not None and line.mean(name) <= other

    same_size = [x for x in untrained if x.row.out_dim == line.row.out_dim and not x.backbone][:1]
    with_features = [x for x in untrained if x.backbone]
    return [
        *["chance"] * not_above("nmi", line.mean("nmi_shuffled_highest")),
        *["AMI <= untrained" for x in same_size if not_above("ami", x.mean("ami"))],
        *["linear <= untrained" for x in with_features if not_above("linear", x.mean("linear"))],
        *["20-NN <= untrained" for x in with_features if not_above("knn", x.mean("knn"))],
    ]


# --- the files --------------------------------------------------------------------------------------------


def update(grid: Grid, states: dict[str, CellState]) -> None:
    """Write the table, if possible: a full disk must not stop the other cells, nor another user's folder --status."""
    try:
        write(grid, states)
    except (OSError, WriteError) as error:
        print(f"WARNING: the table could not be written: {error}")


def write(grid: Grid, states: dict[str, CellState]) -> None:
    """Write tableN.md, tableN.csv and tableN.png of the complete cells. Does nothing if there are none."""
    lines = collect(grid, states)
    if not lines:
        return
    trained, untrained = ([x for x in lines if x.random is random] for random in (False, True))
    name = stem(grid.settings.table)
    small = " at small scale, not the paper's setting" * (grid.settings.scale == "small")
    notes = [
        *other_images([cell for cell in grid.cells if states[cell.name].complete]),
        setting([cell for cell in grid.cells if states[cell.name].complete]),
        *[f"Chosen: {CHOICES[grid.settings.table]}"] * (grid.settings.scale == "paper"),
        *[tuning.sentence(grid.folder)] * bool(grid.settings.tune),
        *findings(grid, trained, untrained, missing=sum(not states[cell.name].complete for cell in grid.cells)),
    ]
    table = markdown_table(grid.settings.table, trained, untrained)
    parts = [f"# {title(grid.settings.table)}{small}", table, NOTE, "\n".join(f"- {note}" for note in notes)]
    parts += paired.section(grid, states)
    write_text(grid.folder / f"{name}.md", "\n\n".join(parts) + "\n")
    _write_csv(grid, lines)
    draw(grid.folder / f"{name}.png", grid.settings, trained, untrained)


def markdown_table(table: int | str, trained: list[Line], untrained: list[Line]) -> str:
    """Return the table as text: trained, untrained, random codes of every size, every image a code of its own."""

    def measured(name: str) -> Callable[[Line], str]:
        return lambda x: _mean_spread(x, name)

    columns = [  # heading, and what a line has there
        ("method", _name),
        ("", lambda x: "" if x.backbone else f"c = {x.row.out_dim}" if x.random else x.row.label),
        ("n", lambda x: x.n),
        ("NMI", measured("nmi")),
        ("collapse in the paper", lambda x: x.paper.get("collapse", ""))
        if table == 9
        else ("paper", lambda x: _paper(x, "nmi")),
        ("shuffled", measured("nmi_shuffled")),
        ("AMI", measured("ami")),
        ("linear", measured("linear")),
        ("paper", lambda x: _paper(x, "linear")),
        ("20-NN", measured("knn")),
        ("codes used", measured("used_codes")),
        ("RankMe", measured("features_rank")),
        ("verdict", lambda x: x.verdict),
        ("not above", lambda x: "" if x.random else ", ".join(caveats(x, untrained))),
    ]
    rows = [[value(x) for _, value in columns] for x in [*trained, *untrained]]
    random_codes = {x.row.out_dim: x.mean("nmi_random_codes") for x in [*untrained, *trained] if not x.backbone}
    baselines = [("random codes", f"c = {c}", nmi) for c, nmi in sorted(random_codes.items())]
    baselines.append(("singletons", "", trained[0].mean("nmi_singletons")))
    others = [""] * (len(columns) - 4)  # after the NMI
    rows += [[name, label, "", f"{nmi:.1f}", *others] for name, label, nmi in baselines if nmi is not None]
    return format_table(rows, [heading for heading, _ in columns])


def _name(line: Line) -> str:
    if not line.random:
        return NAMES[line.row.method]
    return "random init" if line.backbone else f"random init, {NAMES[line.row.method]}'s head"


def _mean_spread(line: Line, name: str) -> str:
    if name not in line.numbers:
        return ""
    return in_text(*line.numbers[name], line.n, ",.0f" if name == "used_codes" else ",.1f")


def _paper(line: Line, name: str) -> str:
    value = line.paper.get(name, "")
    return f"{value:.1f}" if isinstance(value, float) else value


def _write_csv(grid: Grid, lines: list[Line]) -> None:
    header = ["method", "label", "out_dim", "n", "paper_nmi", "paper_linear", "verdict"]
    header += [column for name in MEASURES for column in (name, f"{name}_spread")]
    rows = []
    for x in lines:
        method = "random init" if x.random else NAMES[x.row.method]
        paper = [x.paper.get(name, "") for name in ("nmi", "linear")]
        numbers = [f"{v:.4f}" if v != "" else "" for name in MEASURES for v in x.numbers.get(name, ("", ""))]
        size = ("features", "") if x.backbone else (x.row.label, x.row.out_dim)
        rows.append([method, *size, x.n, *paper, x.verdict, *numbers])
    write_csv(grid.folder / f"{stem(grid.settings.table)}.csv", header, rows)


def setting(cells: list[Cell]) -> str:
    """Return what these cells were trained on, and with what."""
    values: dict[str, list] = {}
    for cell in cells:
        run, last = read_json(cell.folder / "args.json"), cell.results()[-1]
        if not {"args", "derived"} <= run.keys():
            values.setdefault("without args.json", []).append(cell.name)
            continue
        args, derived = run["args"], run["derived"]
        for name, value in (
            ("network", args["arch"]),
            ("data", args["data_path"] or args["dataset"]),
            ("images", f"{derived['train_images']:,}"),
            ("evaluated on", f"{last['data']} ({last['data_hash']})"),
            ("epochs", args["epochs"]),
            ("batch", derived["effective_batch"]),
            ("seeds", cell.seed),
            ("device", derived["device"]),
            ("commit", derived["commit"]),
        ):
            values.setdefault(name, []).append(str(value))
    return "Setting: " + "; ".join(f"{name} {', '.join(dict.fromkeys(x))}" for name, x in values.items()) + "."


def other_images(cells: list[Cell]) -> list[str]:
    """Return a warning if these cells were not trained and evaluated on the same images; [] if they were."""
    records = [record for cell in cells for record in cell.results()]
    trained = {record["trained_on"] for record in records if record.get("trained_on")}
    evaluated = {(x["script"], x["images_sha256"]) for x in records if x.get("images_sha256")}
    differ = ["trained"] * (len(trained) > 1) + ["evaluated"] * (len(evaluated) > len({name for name, _ in evaluated}))
    how = f"these cells were {' and '.join(differ)} on different images"
    return [f"**Not to be compared: {how}.** Run them again elsewhere."] if differ else []


def findings(grid: Grid, trained: list[Line], untrained: list[Line], *, missing: int) -> list[str]:
    """Return the sentences under the table: how far the numbers go, and which lines show nothing learned."""
    sentences = []
    if missing:
        sentences.append(f"**Not complete: {len(grid.cells) - missing} of {len(grid.cells)} cells.**")
    if min(x.n for x in trained) < 2:
        sentences.append("Some or all lines have one seed: they show no spread, and small differences mean nothing.")
    if grid.settings.scale == "small":
        sentences.append("Data, network and budget differ from the paper's: its values are shown for the trend only.")
    by_line = {x.row.key: caveats(x, untrained) for x in trained}
    for caveat, finding in (
        ("chance", "The NMI is above the highest of the shuffles"),
        ("AMI <= untrained", "The codes' AMI is above the untrained network's"),
        ("linear <= untrained", "Linear accuracy is above the untrained network's"),
        ("20-NN <= untrained", "20-NN accuracy is above the untrained network's"),
    ):
        if caveat == "chance" or untrained:
            lines = [key for key, found in by_line.items() if caveat in found]
            exceptions = f" (not: {', '.join(lines)})" * bool(lines)
            sentences.append(f"{finding} in {len(trained) - len(lines)} of {len(trained)} lines{exceptions}.")
    return sentences
