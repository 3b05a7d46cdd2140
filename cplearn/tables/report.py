"""The table that `reproduce_table3.py` is about, from the results of its cells: Markdown, CSV and a figure."""

from collections.abc import Callable, Sequence

from cplearn.errors import WriteError
from cplearn.files import read_json, write_csv, write_text
from cplearn.tables import paired, tuning
from cplearn.tables.figure import draw
from cplearn.tables.grid import Grid
from cplearn.tables.measures import MEASURES, in_text, mean_and_spread
from cplearn.tables.rows import CHOICES, NAMES, stem, title
from cplearn.tables.status import State
from cplearn.text import format_table

NOTE = (
    "Percent; mean ± largest distance from it over n seeds. NMI and AMI: predicted codes against classes; shuffled: "
    "the same codes against shuffled labels, because NMI grows with the number of used codes by itself. linear: last "
    "epoch. RankMe: effective rank of the features. verdict: the monitor's, after the last epoch. chance: NMI does not "
    "exceed the highest of the shuffles; untrained: random initialization, batch norm calibrated."
)

OF_FEATURES = ("linear", "knn")  # measures of an untrained network that are the same whatever the size

# What a line may not be above, as it is marked: its measure, and the sentence on the lines that are above.
CAVEATS = {
    "chance": ("nmi", "The NMI is above the highest of the shuffles"),
    "AMI <= untrained": ("ami", "The codes' AMI is above the untrained network's"),
    "linear <= untrained": ("linear", "Linear accuracy is above the untrained network's"),
    "20-NN <= untrained": ("knn", "20-NN accuracy is above the untrained network's"),
}

# --- numbers ----------------------------------------------------------------------------------------------


class Line:
    """A line of the table, over its finished seeds.

    Its kind is "trained", or of the untrained network: "codes" of a size, with the head of the row, or "features".
    """

    def __init__(self, kind: str, seeds: list[State]):
        self.kind, self.row, self.n = kind, seeds[0].cell.row, len(seeds)
        trained = kind == "trained"
        self.paper: dict[str, float | str] = self.row.paper if trained else {}
        self.verdict = ", ".join(dict.fromkeys(x.verdict or "none" for x in seeds)) if trained else ""
        networks = [x.measures if trained else x.untrained for x in seeds]
        own = [name for name in MEASURES if trained or (name in OF_FEATURES) == (kind == "features")]
        values = {name: [x[name] for x in networks if name in x] for name in own}
        # Mean and spread by measure; what no seed has is left out.
        self.numbers = {name: mean_and_spread(x) for name, x in values.items() if x}

    def mean(self, name: str) -> float | None:
        return self.numbers[name][0] if name in self.numbers else None


def collect(states: Sequence[State]) -> tuple[list[Line], list[Line]]:
    """Return the lines of the complete cells, in the grid's order, and those of the untrained network: its codes by
    size, then its features, which some cell of every seed has."""
    order = list(dict.fromkeys(x.cell.row.key for x in states))
    lines: dict[str, dict] = {"trained": {}, "codes": {}, "features": {}}  # by what sets them apart, then by seed
    for state in sorted((x for x in states if x.complete), key=lambda x: order.index(x.cell.row.key)):
        kinds = {"trained": state.cell.row.key}
        if state.untrained:
            kinds["codes"] = state.cell.row.out_dim
        if state.untrained.keys() & OF_FEATURES:
            kinds["features"] = ""
        for kind, key in kinds.items():  # two cells have one where lines were added later: the first counts
            lines[kind].setdefault(key, {}).setdefault(state.cell.seed, state)
    trained, *untrained = ([Line(kind, [*x.values()]) for x in found.values()] for kind, found in lines.items())
    return trained, sum(untrained, [])


def caveats(line: Line, untrained: Sequence[Line]) -> list[str]:
    """Return what a trained line is not above: chance, and the untrained network of its size."""
    levels = {"nmi": line.mean("nmi_shuffled_highest")}
    for x in untrained:
        if x.kind == "features":
            levels |= {name: x.mean(name) for name in OF_FEATURES}
        elif x.row.out_dim == line.row.out_dim:
            levels["ami"] = x.mean("ami")
    pairs = {mark: (line.mean(name), levels.get(name)) for mark, (name, _) in CAVEATS.items()}
    return [mark for mark, pair in pairs.items() if None not in pair and pair[0] <= pair[1]]


# --- the files --------------------------------------------------------------------------------------------


def update(grid: Grid, states: Sequence[State]) -> None:
    """Write the table, if possible: a full disk must not stop the other cells, nor another user's folder --status."""
    try:
        write(grid, states)
    except (OSError, WriteError) as error:
        print(f"WARNING: the table could not be written: {error}")


def write(grid: Grid, states: Sequence[State]) -> None:
    """Write tableN.md, tableN.csv and tableN.png of the complete cells. Does nothing if there are none."""
    settings, path = grid.settings, grid.folder / stem(grid.settings.table)
    trained, untrained = collect(states)
    if not trained:
        return
    small = " at small scale, not the paper's setting" * (settings.scale == "small")
    notes = [
        *other_images([x for x in states if x.complete]),
        setting([x for x in states if x.complete]),
        *[f"Chosen: {CHOICES[settings.table]}"] * (settings.scale == "paper"),
        *[tuning.sentence(grid.folder)] * bool(settings.tune),
        *findings(settings.scale, states, trained, untrained),
    ]
    table = markdown_table(settings.table, trained, untrained)
    parts = [f"# {title(settings.table)}{small}", table, NOTE, "\n".join(f"- {note}" for note in notes)]
    parts += paired.section(settings.table, states)
    write_text(path.with_suffix(".md"), "\n\n".join(parts) + "\n")
    write_csv(path.with_suffix(".csv"), *_as_csv([*trained, *untrained]))
    draw(path.with_suffix(".png"), settings, trained, untrained)


def markdown_table(table: int | str, trained: list[Line], untrained: list[Line]) -> str:
    """Return the table as text: trained, untrained, random codes of every size, every image a code of its own."""
    columns = [  # heading, and what a line has there
        ("method", _name),
        ("", _label),
        ("n", lambda x: x.n),
        ("NMI", _measured("nmi")),
        ("collapse in the paper", lambda x: x.paper.get("collapse", ""))
        if table == 9
        else ("paper", lambda x: _paper(x, "nmi")),
        ("shuffled", _measured("nmi_shuffled")),
        ("AMI", _measured("ami")),
        ("linear", _measured("linear")),
        ("paper", lambda x: _paper(x, "linear")),
        ("20-NN", _measured("knn")),
        ("codes used", _measured("used_codes")),
        ("RankMe", _measured("features_rank")),
        ("verdict", lambda x: x.verdict),
        ("not above", lambda x: ", ".join(caveats(x, untrained)) if x.kind == "trained" else ""),
    ]
    rows = [[value(x) for _, value in columns] for x in [*trained, *untrained]]
    random_codes = {x.row.out_dim: x.mean("nmi_random_codes") for x in [*untrained, *trained] if x.kind != "features"}
    baselines = [("random codes", f"c = {c}", nmi) for c, nmi in sorted(random_codes.items())]
    baselines.append(("singletons", "", trained[0].mean("nmi_singletons")))
    others = [""] * (len(columns) - 4)  # after the NMI
    rows += [[name, label, "", f"{nmi:.1f}", *others] for name, label, nmi in baselines if nmi is not None]
    return format_table(rows, [heading for heading, _ in columns])


def _name(line: Line) -> str:
    name = NAMES[line.row.method]
    return {"trained": name, "codes": f"random init, {name}'s head", "features": "random init"}[line.kind]


def _label(line: Line) -> str:
    return {"trained": line.row.label, "codes": f"c = {line.row.out_dim}", "features": ""}[line.kind]


def _measured(name: str) -> Callable[[Line], str]:
    """Return what writes a measure's mean and spread of a line."""
    form = ",.0f" if name == "used_codes" else ",.1f"
    return lambda x: in_text(*x.numbers[name], x.n, form) if name in x.numbers else ""


def _paper(line: Line, name: str) -> str:
    value = line.paper.get(name, "")
    return f"{value:.1f}" if isinstance(value, float) else value


def _as_csv(lines: Sequence[Line]) -> tuple[list[str], list[list]]:
    """Return the header and the rows of the CSV file."""
    header = ["method", "label", "out_dim", "n", "paper_nmi", "paper_linear", "verdict"]
    header += [column for name in MEASURES for column in (name, f"{name}_spread")]
    rows = []
    for x in lines:
        method = NAMES[x.row.method] if x.kind == "trained" else "random init"
        paper = [x.paper.get(name, "") for name in ("nmi", "linear")]
        numbers = [f"{v:.4f}" if v != "" else "" for name in MEASURES for v in x.numbers.get(name, ("", ""))]
        size = ("features", "") if x.kind == "features" else (x.row.label, x.row.out_dim)
        rows.append([method, *size, x.n, *paper, x.verdict, *numbers])
    return header, rows


def setting(states: Sequence[State]) -> str:
    """Return what these cells were trained on, and with what."""
    values: dict[str, list] = {}
    for state in states:
        cell, last, run = state.cell, state.results[-1], read_json(state.cell.folder / "args.json")
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


def other_images(states: Sequence[State]) -> list[str]:
    """Return a warning if these cells were not trained and evaluated on the same images; [] if they were."""
    records = [record for x in states for record in x.cell.results()]
    trained = {record["trained_on"] for record in records if record.get("trained_on")}
    evaluated = {(x["script"], x["images_sha256"]) for x in records if x.get("images_sha256")}
    differ = ["trained"] * (len(trained) > 1) + ["evaluated"] * (len(evaluated) > len({name for name, _ in evaluated}))
    how = f"these cells were {' and '.join(differ)} on different images"
    return [f"**Not to be compared: {how}.** Run them again elsewhere."] if differ else []


def findings(scale: str, states: Sequence[State], trained: list[Line], untrained: list[Line]) -> list[str]:
    """Return the sentences under the table: how far the numbers go, and which lines show nothing learned."""
    sentences = []
    complete = sum(x.complete for x in states)
    if complete < len(states):
        sentences.append(f"**Not complete: {complete} of {len(states)} cells.**")
    if min(x.n for x in trained) < 2:
        sentences.append("Some or all lines have one seed: they show no spread, and small differences mean nothing.")
    if scale == "small":
        sentences.append("Data, network and budget differ from the paper's: its values are shown for the trend only.")
    for mark, (_, finding) in CAVEATS.items():
        if mark == "chance" or untrained:
            lines = [x.row.key for x in trained if mark in caveats(x, untrained)]
            exceptions = f" (not: {', '.join(lines)})" * bool(lines)
            sentences.append(f"{finding} in {len(trained) - len(lines)} of {len(trained)} lines{exceptions}.")
    return sentences
