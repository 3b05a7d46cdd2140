"""The table that `reproduce_table3.py` is about, from the results of its cells: Markdown, CSV, picture, and a paragraph
of what it shows, made from the numbers."""

import csv
import io
import json
import statistics
from pathlib import Path

import numpy as np

from cplearn.files import read_json_lines, write_text
from cplearn.tables.figure import _draw
from cplearn.tables.rows import CHOICES, NAMES
from cplearn.text import format_table

# Percent, but for COUNTS. name: (results of which script, where in its metrics)
MEASURES = {
    "nmi": ("eval_cluster", ("codes", "nmi")),
    "linear": ("eval_linear", ("linear_last_top1",)),
    "ami": ("eval_cluster", ("codes", "ami")),
    "knn": ("eval_knn", ("knn20_top1",)),
    "nmi_shuffled": ("eval_cluster", ("codes_shuffled", "nmi")),
    "nmi_shuffled_highest": ("eval_cluster", ("codes_shuffled", "nmi_highest")),
    "nmi_random_codes": ("eval_cluster", ("random_codes", "nmi")),
    "nmi_singletons": ("eval_cluster", ("singletons", "nmi")),
    "kmeans_ami": ("eval_cluster", ("kmeans", "ami")),
    "used_codes": ("eval_cluster", ("codes", "used_codes")),
    "features_rank": ("eval_collapse", ("features_rank",)),
}


TITLES = {"linear": "linear", "knn": "20-NN", "ami": "AMI", "nmi": "NMI"}


COUNTS = ("used_codes", "features_rank")


# --- numbers ----------------------------------------------------------------------------------------------


def measure(results: list[dict]) -> dict[str, float]:
    """Of one network. Only results of its newest weights count. Shape: lines of results.jsonl."""
    newest = results[-1]["weights_sha256"] if results else None
    found: dict[str, float] = {}
    for line in results:
        if line["weights_sha256"] != newest:
            continue
        for name, (script, path) in MEASURES.items():
            if line["script"] == script:
                value = line["metrics"]
                for key in path:
                    value = (value or {}).get(key)
                if value is not None:
                    found[name] = value if name in COUNTS else 100 * value
    return found


def summary(values: list[float]) -> tuple[float, float]:
    """Mean, and the largest distance from it."""
    mean = statistics.mean(values)
    return mean, max(abs(v - mean) for v in values)


def collect(cells) -> list[dict]:
    """A dict a line of the table: row, n, and (mean, spread) of every measure over the finished seeds; with the
    untrained networks, label "random init", at the end."""
    lines, seen, verdicts = {}, set(), {}
    for cell in cells:
        if cell.finished():
            lines.setdefault(("", cell.row.key), (cell.row, []))[1].append(measure(cell.results()))
            log = read_json_lines(cell.folder / "log.txt")
            verdicts.setdefault(cell.row.key, []).append(log[-1].get("verdict", "none") if log else "none")
            random = measure(cell.results(random=True))
            if random and (cell.row.out_dim, cell.seed) not in seen:  # two, where lines were added later
                seen.add((cell.row.out_dim, cell.seed))
                lines.setdefault(("random", cell.row.out_dim), (cell.row, []))[1].append(random)
    found = []
    order = list(dict.fromkeys(cell.row.key for cell in cells))
    for (kind, _), (row, seeds) in sorted(lines.items(), key=lambda x: (x[0][0], order.index(x[1][0].key))):
        names = [name for name in MEASURES if any(name in s for s in seeds)]
        numbers = {name: summary([s[name] for s in seeds if name in s]) for name in names}
        said = "" if kind == "random" else ", ".join(dict.fromkeys(verdicts[row.key]))
        found.append({"row": row, "random": kind == "random", "n": len(seeds), "verdict": said, **numbers})
    return found


def marks(line: dict, untrained: list[dict]) -> str:
    """What a reader must know of a trained line: chance, and the untrained network of its size."""
    found = []
    if line["nmi"][0] <= line["nmi_shuffled_highest"][0]:
        found.append("chance")
    same = next((x for x in untrained if x["row"].out_dim == line["row"].out_dim), None)
    if same and line["ami"][0] <= same["ami"][0]:
        found.append("AMI <= untrained")
    first = next((x for x in untrained if "linear" in x), None)
    for name in ("linear", "knn"):
        if first and line[name][0] <= first[name][0]:
            found.append(f"{TITLES[name]} <= untrained")
    return ", ".join(found)


# --- table ------------------------------------------------------------------------------------------------


def write(out: Path, table: int, scale: str, cells) -> None:
    """tableN.md, tableN.csv and tableN.png of the finished cells. Nothing if there are none."""
    lines = collect(cells)
    if not lines:
        return
    trained = [x for x in lines if not x["random"]]
    untrained = [x for x in lines if x["random"]]
    rows = []
    for x in lines:
        name = f"random init, {NAMES[x['row'].method]}'s head" if x["random"] else NAMES[x["row"].method]
        paper = {} if x["random"] else x["row"].paper
        rows.append([name, f"c = {x['row'].out_dim}" if x["random"] else x["row"].label, x["n"],
                     _pm(x, "nmi"), _paper(paper, "nmi"), _pm(x, "nmi_shuffled"), _pm(x, "ami"), _pm(x, "linear"),
                     _paper(paper, "linear"), _pm(x, "knn"), _pm(x, "used_codes"),
                     _pm(x, "features_rank"), x["verdict"], "" if x["random"] else marks(x, untrained)])  # fmt: skip
    for c in sorted({x["row"].out_dim for x in lines}):
        x = next(x for x in lines if x["row"].out_dim == c and "nmi_random_codes" in x)
        rows.append(["random codes", f"c = {c}", "", f"{x['nmi_random_codes'][0]:.1f}", *[""] * 10])
    rows.append(["singletons", "", "", f"{lines[0]['nmi_singletons'][0]:.1f}", *[""] * 10])
    if table == 9:
        for row, x in zip(rows, lines, strict=False):
            row[4] = x["row"].paper.get("collapse", "") if not x["random"] else ""
    header = ("method", "", "n", "NMI", "collapse in the paper" if table == 9 else "paper", "shuffled", "AMI", "linear",
              "paper", "20-NN", "codes used", "RankMe", "verdict", "not above")  # fmt: skip
    title = f"# Table {table}" + " at small scale, not the paper's setting" * (scale == "small")
    said = [
        setting(cells),
        f"Chosen: {CHOICES[table]}" * (scale == "paper"),
        *paragraph(table, scale, trained, untrained, cells),
    ]
    text = [
        title,
        "",
        format_table(rows, header),
        "",
        NOTE,
        "",
        *(f"- {sentence}" for sentence in said if sentence),
    ]
    write_text(out / f"table{table}.md", "\n".join(text) + "\n")
    _write_csv(out / f"table{table}.csv", lines, NAMES)
    _draw(out / f"table{table}.png", table, scale, trained, untrained, NAMES)


NOTE = (
    "Percent; mean ± largest distance from it over n seeds. NMI and AMI: predicted codes against classes; shuffled: "
    "the same codes against shuffled labels. linear: last epoch. RankMe: effective rank of the features. verdict: the "
    "monitor's, after the last epoch. chance: NMI does not exceed the highest of the shuffles; untrained: random "
    "initialisation, batch norm calibrated."
)


def _pm(line: dict, name: str) -> str:
    if name not in line:
        return ""
    mean, spread = line[name]
    digits = 0 if name == "used_codes" else 1
    return f"{mean:,.{digits}f}" + (f" ± {spread:,.{digits}f}" if line["n"] > 1 else "")


def _paper(paper: dict, name: str) -> str:
    value = paper.get(name, "")
    return f"{value:.1f}" if isinstance(value, float) else value or ""


def _write_csv(path: Path, lines: list[dict], names: dict[str, str]) -> None:
    header = ["method", "label", "out_dim", "n", "paper_nmi", "paper_linear", "verdict"]
    for name in MEASURES:
        header += [name, f"{name}_spread"]
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(header)
    for x in lines:
        row, paper = x["row"], {} if x["random"] else x["row"].paper
        numbers = [v for name in MEASURES for v in (map("{:.4f}".format, x[name]) if name in x else ("", ""))]
        method = "random init" if x["random"] else names[row.method]
        writer.writerow(
            [
                method,
                row.label,
                row.out_dim,
                x["n"],
                paper.get("nmi", ""),
                paper.get("linear", ""),
                x["verdict"],
                *numbers,
            ]
        )
    write_text(path, text.getvalue())


def setting(cells) -> str:
    """What was trained on what, of the finished cells."""
    done = [cell for cell in cells if cell.finished()]
    found: dict[str, list] = {}
    for cell in done:
        run = json.loads((cell.folder / "args.json").read_text())
        args, derived, last = run["args"], run["derived"], cell.results()[-1]
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
            found.setdefault(name, []).append(str(value))
    return "Setting: " + "; ".join(f"{name} {', '.join(dict.fromkeys(values))}" for name, values in found.items()) + "."


# --- what it shows ----------------------------------------------------------------------------------------


def paragraph(table: int, scale: str, trained: list[dict], untrained: list[dict], cells) -> list[str]:
    """Sentences, each true of these numbers."""
    said = []
    done = sum(c.finished() for c in cells)
    if done < len(cells):
        said.append(f"**Not complete: {done} of {len(cells)} cells.**")
    seeds = max(x["n"] for x in trained)
    if min(x["n"] for x in trained) < 2:
        said.append("Some or all lines have one seed: they show no spread, and small differences mean nothing.")
    spread = {m: max((x[m][1] for x in trained if x["n"] > 1), default=None) for m in ("linear", "knn", "ami")}
    if seeds > 1:
        said.append(
            f"The largest distance of a seed from its line's mean is {spread['linear']:.1f} points in linear, "
            f"{spread['knn']:.1f} in 20-NN and {spread['ami']:.1f} in AMI."
        )
    if scale == "small":
        said.append("Data, network and budget differ from the paper's: its values stand beside for their direction.")
    low, high = (f(x["nmi_shuffled"][0] for x in trained) for f in (min, max))
    said.append(
        f"NMI grows with the number of used codes by itself: shuffled labels reach {low:.1f} to {high:.1f} here."
    )
    said += _best(trained)
    said += _against_paper(trained) if scale == "paper" else []
    flagged = {x["row"].key: marks(x, untrained) for x in trained}
    for mark, what in (
        ("chance", "The NMI is above the highest of the shuffles"),
        ("AMI <=", "The codes' AMI is above the untrained network's"),
        ("linear <=", "Linear accuracy is above the untrained network's"),
        ("20-NN <=", "20-NN accuracy is above the untrained network's"),
    ):
        if mark != "chance" and not untrained:
            continue
        names = [key for key, text in flagged.items() if mark in text]
        said.append(
            f"{what} in {len(trained) - len(names)} of {len(trained)} lines"
            + f" (not: {', '.join(names)})" * bool(names)
            + "."
        )
    return said


def _best(trained: list[dict]) -> list[str]:
    """Who is first at each size that two methods share, and whether by more than the seeds differ."""
    said = []
    by_size: dict[int, list[dict]] = {}
    for x in trained:
        by_size.setdefault(x["row"].out_dim, []).append(x)
    for measure_name, title in (("linear", "linear accuracy"), ("ami", "AMI of the codes")):
        first = []
        for c, lines in sorted(by_size.items()):
            if len({x["row"].method for x in lines}) < 2:
                continue
            best, second = sorted(lines, key=lambda x: -x[measure_name][0])[:2]
            gap = best[measure_name][0] - second[measure_name][0]
            clear = min(best["n"], second["n"]) > 2 and gap > best[measure_name][1] + second[measure_name][1]
            doubt = "" if clear else f", not clear of {second['row'].method}"
            first.append(f"{best['row'].method} at {c} (by {gap:.1f}{doubt})")
        if first:
            said.append(f"Highest {title}: {'; '.join(first)}.")
    return said


def _against_paper(trained: list[dict]) -> list[str]:
    """Rank correlation with the paper's values over the lines that have one, beside that of what knows nothing."""
    from scipy.stats import spearmanr

    said = []
    for name, title in (("nmi", "NMI"), ("linear", "linear accuracy")):
        lines = [x for x in trained if isinstance(x["row"].paper.get(name), float)]
        theirs = [x["row"].paper[name] for x in lines]
        ours = [x[name][0] for x in lines]
        if len(set(ours)) < 3 or len(set(theirs)) < 3:
            continue
        distance = np.abs(np.subtract(ours, theirs)).mean()
        chance = [x["nmi_random_codes"][0] for x in lines]
        beside = f" (random codes of the same sizes: {spearmanr(chance, theirs)[0]:.2f})" if name == "nmi" else ""
        said.append(
            f"{title} beside the paper's, {len(lines)} lines: rank correlation "
            f"{spearmanr(ours, theirs)[0]:.2f}{beside}, mean distance {distance:.1f} points."
        )
    return said
