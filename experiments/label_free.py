"""Which label-free measure follows k-NN? Over many runs, each as its difference to the untrained network.

    python experiments/label_free.py measure output/runs/* output/tuned/* --out output/label_free.jsonl
    python experiments/label_free.py compare output/label_free.jsonl --json output/label_free.json

`measure` takes the folders of runs (with --saveckp_freq, so that there is more than the end) and appends a line for
the untrained network and for every checkpoint: all measures of `label_free_measures.py` on the run's own probe, two
views of up to 2,000 training images, and 20-NN on images that were not trained on (of the run's own --data_path or of
the one given: 4,000 training images vote on 2,000 of the test split, or as --knn_images says; one draw for all runs).
What is in the file is not measured again.

`compare` takes the difference of each measure and of 20-NN to the untrained network of the same run, and prints

    across    rank correlation of the two differences over the ends of runs, with a bootstrap interval (95 %, runs
              drawn with replacement), for the runs of even and of odd number apart: what is chosen on the first half is
              reported on the second
    within    of all pairs of checkpoints of one run (the untrained network is one), how many rank alike
    told      a threshold chosen on the first half, so that the fewest runs are misjudged: how many of the second half
              it sorts rightly into "20-NN above the start by more than noise" and the rest; beside it how many the
              more frequent answer alone would get right
    all       the rank correlation over all runs with its interval, for runs on which nothing was chosen
    rules     of how many runs a rule says "better", and how many of these are. By retrieval and by nearness of an
              image's own view, as many standard errors above the start, of the same images or as if of others. The
              verdict's rule is nearness, other images, 1; before, retrieval, other images, 1
"""

import argparse
import hashlib
import itertools
import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from label_free_measures import label_free
from shared import rank_correlation

import eval_knn
import main_cplearn
from cplearn import checkpoints, errors, random_streams
from cplearn.data import sources
from cplearn.data.pixels import CacheOptions, open_pixels
from cplearn.errors import UserError
from cplearn.files import append_json_line, read_json_lines, write_text
from cplearn.flags import ArgumentParser, positive
from cplearn.host import git_commit
from cplearn.metrics import collapse
from cplearn.probe.monitor import Monitor
from cplearn.text import format_table

# --- measuring --------------------------------------------------------------------------------------------


def lists_for_knn(out: Path, dataset: str, data_path: str, counts: Sequence[int]) -> Path:
    """Return a folder with lists of so many training images and images of the test split, one draw for all runs."""
    key = f"{dataset} {data_path} {counts}"
    folder = out.parent / f"knn_lists_{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if not (folder / "val.txt").exists():
        folder.mkdir(parents=True, exist_ok=True)
        for split, count in zip(("train", "val"), counts, strict=True):
            data = sources.build_dataset("folder", data_path, split, None)
            sample = sources.Sample(data, count, 0)
            images = zip(sample.names, sample.labels, strict=True)
            lines = [f"{Path(data.root, str(name)).resolve()}\t{label}\n" for name, label in images]
            write_text(folder / f"{split}.txt", "".join(lines))
    return folder


def knn(place: Path, lists: Path, checkpoint: Path, *, untrained: bool) -> float:
    """Return the 20-NN top-1 of a checkpoint, or of its untrained network."""
    (place / "results.jsonl").unlink(missing_ok=True)
    eval_knn.main(["--pretrained_weights", str(checkpoint), *["--random_init"] * untrained, "--data_path", str(lists),
                   "--nb_knn", "20", "--num_workers", "0", "--output_dir", str(place)])  # fmt: skip
    return read_json_lines(place / "results.jsonl")[-1]["metrics"]["knn20_top1"]


def measure_run(run: Path, settings: argparse.Namespace, done: set[tuple[str, int]]) -> None:
    """Append the lines of one run that are not there yet."""
    last = checkpoints.load(run / "checkpoint.pth")
    args = argparse.Namespace(**last["args"])
    epochs = {int(path.stem.removeprefix("checkpoint")): path for path in run.glob("checkpoint0*.pth")}
    epochs[last["epoch"]] = run / "checkpoint.pth"
    todo = [epoch for epoch in (0, *sorted(epochs)) if (str(run), epoch) not in done]
    if not todo:
        return
    lists = lists_for_knn(settings.out, args.dataset, settings.data_path or args.data_path, settings.knn_images)
    dataset, views = main_cplearn.find_images(args)
    pixels = open_pixels(dataset, views, CacheOptions("none", args.cache_dir, 0))
    random_streams.seed_everything(random_streams.FOR_WEIGHTS, args.seed)
    method = main_cplearn.build_method_for(args, views)
    method.begin()
    probe = Monitor(pixels, views, args.seed, len(dataset) // last["args"]["batch_size_per_gpu"]).probe
    for epoch in todo:
        checkpoint = epochs.get(epoch, run / "checkpoint.pth")
        if epoch:
            checkpoints.load_into(method, checkpoints.load(checkpoint)["model"], str(checkpoint))
        x = probe.measure(method, torch.device("cpu"), 250, untrained=epoch == 0)
        top1 = knn(settings.out.parent / f"knn_{settings.out.stem}", lists, checkpoint, untrained=epoch == 0)
        line = {"run": str(run), "epoch": epoch, "method": args.method, "commit": git_commit()}
        line |= label_free(x.features, x.other_features, x.embedding, x.other_embedding, x.codes, x.others)
        line |= {"knn": top1, "probe_images": len(x.features)}
        line["places"] = collapse.view_places(x.features, x.other_features).tolist()
        append_json_line(settings.out, line)


def measure(args: argparse.Namespace) -> None:
    """Measure every run that has ended."""
    torch.set_num_threads(args.threads)
    done = {(x["run"], x["epoch"]) for x in read_json_lines(args.out)} if args.out.exists() else set()
    for run in args.paths:
        if (run / "checkpoint.pth").exists():
            measure_run(run.absolute(), args, done)


# --- comparing --------------------------------------------------------------------------------------------


def by_run(lines: list[dict]) -> dict[str, list[dict]]:
    """Return the lines of each run in the order of epochs, of those that have the untrained network and more."""
    runs: dict[str, list[dict]] = {}
    for line in sorted(lines, key=lambda x: (x["run"], x["epoch"])):
        runs.setdefault(line["run"], []).append(line)
    return {name: epochs for name, epochs in runs.items() if epochs[0]["epoch"] == 0 and len(epochs) > 1}


def differences(lines: list[dict]) -> dict[str, list[dict]]:
    """Return, by run, the lines of its epochs with every number as its difference to the untrained network."""
    kept = ("epoch", "probe_images")
    numbers = dict.fromkeys(k for x in lines for k, v in x.items() if isinstance(v, int | float) and k not in kept)

    def minus(a: float | None, b: float | None) -> float:
        return math.nan if a is None or b is None else a - b

    return {
        name: [{k: x[k] for k in ("epoch", "method")} | {k: minus(x.get(k), epochs[0].get(k)) for k in numbers}
               for x in epochs]
        for name, epochs in by_run(lines).items()
    }  # fmt: skip


def measures(runs: dict[str, list[dict]]) -> list[str]:
    """Return the names of the measures."""
    return [k for k in next(iter(runs.values()))[-1] if k not in ("epoch", "method", "knn", "retrieval_chance")]


def correlation(ends: list[dict], name: str) -> float:
    """Return the rank correlation of a measure's difference with 20-NN's; NaN where it does not vary."""
    return rank_correlation([(x[name], x["knn"]) for x in ends if math.isfinite(x[name])])


def interval(ends: list[dict], name: str, rng: np.random.Generator, draws: int) -> tuple[float, float]:
    """Return the bootstrap interval (95 %) of `correlation` over runs."""
    values = [correlation([ends[i] for i in rng.integers(0, len(ends), len(ends))], name) for _ in range(draws)]
    low, high = np.nanpercentile(values, [2.5, 97.5]) if np.isfinite(values).any() else (math.nan, math.nan)
    return float(low), float(high)


def within(runs: dict[str, list[dict]], name: str, noise: float) -> tuple[float, int]:
    """Return the share of pairs of one run's checkpoints that a measure and 20-NN rank alike, and how many there are.

    Pairs whose 20-NN differ by less than `noise` do not count.
    """
    alike = total = 0
    for epochs in runs.values():
        for i, a in enumerate(epochs):
            for b in epochs[i + 1 :]:
                knn, value = b["knn"] - a["knn"], b[name] - a[name]
                if abs(knn) >= noise and math.isfinite(value):
                    total += 1
                    alike += knn * value > 0
    return (alike / total if total else math.nan), total


def best_threshold(ends: list[dict], name: str, sign: float, noise: float) -> float:
    """Return the threshold of sign * difference above which a run counts as better, with the fewest mistakes."""
    values = sorted({sign * x[name] for x in ends if math.isfinite(x[name])})
    between = [-math.inf, *((a + b) / 2 for a, b in zip(values, values[1:], strict=False)), math.inf]
    return min(between, key=lambda t: sum((sign * x[name] > t) != (x["knn"] > noise) for x in ends))


def risen(start: np.ndarray, end: np.ndarray, *, same: bool) -> float:
    """Return by how many standard errors a mean over images has risen; 0 where nothing varies.

    The error is that of the differences of the same images, or, as if they had been others, of two means.
    """
    parts = [end - start] if same else [start, end]
    rise, error = end.mean() - start.mean(), math.sqrt(sum(part.var(ddof=1) / len(part) for part in parts))
    return float(rise / error) if error > 0 else 0.0


def rules(lines: list[dict], noise: float) -> list[tuple]:
    """Return rows: a rule, of how many runs it says "better", how many of those are, lose; how many it misses."""
    pairs = [(x[0], x[-1]) for x in by_run([x for x in lines if "places" in x]).values()]
    gains = [end["knn"] - start["knn"] for start, end in pairs]
    rows = []
    of_image = {"retrieval": lambda place: 1.0 * (place == 1), "nearness": lambda place: -np.log(place)}
    for (name, value), same, errors_above in itertools.product(of_image.items(), (False, True), (1, 2)):
        values = [[value(np.array(x["places"])) for x in pair] for pair in pairs]
        better = [risen(*pair, same=same) > errors_above for pair in values]
        called, rest = ([gain for gain, x in zip(gains, better, strict=True) if x == sort] for sort in (True, False))
        rows.append((name, "same" if same else "other", errors_above, len(called), sum(x > noise for x in called),
                     sum(x < 0 for x in called), sum(x > noise for x in rest)))  # fmt: skip
    return rows


def compare_all(runs: dict[str, list[dict]], lines: list[dict], args: argparse.Namespace) -> None:
    """Print the correlations over all runs, and what rules say of them."""
    rng, ends = np.random.default_rng(0), [epochs[-1] for epochs in runs.values()]
    rows = []
    for name in measures(runs):
        value, (low, high) = correlation(ends, name), interval(ends, name, rng, args.draws)
        rows.append((name, f"{value:.2f}", f"{low:.2f} to {high:.2f}"))
    rows.sort(key=lambda row: -abs(float(row[1])) if row[1] != "nan" else 1)
    print("\n" + format_table(rows, ("measure", f"all {len(ends)} runs", "95 %")))
    header = ("rule", "images", "errors", "called better", "better", "below the start", "better and missed")
    print("\n" + format_table(rules(lines, args.noise), header))


def of_halves(name: str, runs: dict[str, list[dict]], halves: list[list[dict]], low: float, high: float, noise: float
              ) -> dict:  # fmt: skip
    """Return what one measure tells: chosen on the first half of the runs, reported on the second."""
    first, second = (correlation(half, name) for half in halves)
    sign = -1.0 if first < 0 else 1.0
    alike, _ = within(runs, name, noise)
    threshold = best_threshold(halves[0], name, sign, noise)
    calls = [(sign * x[name] > threshold, x["knn"] > noise) for x in halves[1]]
    return {"first": first, "second": second, "low": low, "high": high, "within": alike if sign > 0 else 1 - alike,
            "sign": sign, "threshold": sign * threshold, "right": sum(a == b for a, b in calls),
            "false": sum(a and not b for a, b in calls)}  # fmt: skip


def compare(args: argparse.Namespace) -> None:
    """Print the table."""
    lines = read_json_lines(args.paths[0])
    runs = differences(lines)
    if len(runs) < 10:
        raise UserError(f"{args.paths[0]} has {len(runs)} runs: at least 10 are needed")
    rng, noise, names = np.random.default_rng(0), args.noise, measures(runs)
    order = rng.permutation(sorted(runs))
    halves = [[runs[name][-1] for name in order[k::2]] for k in (0, 1)]
    intervals = {name: interval(halves[1], name, rng, args.draws) for name in names}
    results = {name: of_halves(name, runs, halves, *intervals[name], noise) for name in names}
    ends = halves[0] + halves[1]
    methods = ", ".join(f"{sum(x['method'] == m for x in ends)} {m}" for m in sorted({x["method"] for x in ends}))
    better, gains = [sum(x["knn"] > noise for x in half) for half in halves], [x["knn"] for x in ends]
    print(f"{len(runs)} runs ({methods}); {sum(better)} of them end with a 20-NN above the start's by {noise:g}, "
          f"difference {min(gains):.3f} to {max(gains):.3f}, median {statistics.median(gains):.3f}; "
          f"commit {', '.join(sorted({x['commit'] for x in lines}))}")  # fmt: skip
    count = len(halves[1])
    print(f"Always the more frequent answer: {max(better[1], count - better[1])} of {count} right in the second half\n")
    pairs = within(runs, names[-1], noise)[1]
    rows = [(name, "+" if x["sign"] > 0 else "-", f"{x['first']:.2f}", f"{x['second']:.2f}",
             f"{x['low']:.2f} to {x['high']:.2f}", f"{x['within']:.0%}", f"{x['threshold']:.3g}",
             f"{x['right']} of {count}", x["false"]) for name, x in results.items()]  # fmt: skip
    rows.sort(key=lambda row: -abs(results[row[0]]["first"]) if math.isfinite(results[row[0]]["first"]) else 1)
    header = ("measure", "sign", "first half", "second half", "95 %", f"within ({pairs} pairs)", "threshold",
              "told, second half", "of them called better and not")  # fmt: skip
    print(format_table(rows, header))
    compare_all(runs, lines, args)
    if args.json:
        write_text(args.json, json.dumps({"runs": len(runs), "measures": results}, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure runs, or compare what was measured."""
    parser = ArgumentParser(prog="experiments/label_free.py", description=__doc__)
    parser.add_argument("what", choices=("measure", "compare"))
    parser.add_argument("paths", nargs="+", type=Path, help="Folders of runs; for compare, the file that measure wrote")
    parser.add_argument("--out", type=Path, default=Path("output/label_free.jsonl"))
    parser.add_argument("--data_path", default=None, help="Images for 20-NN (default: those of each run)")
    parser.add_argument("--knn_images", type=positive(int), nargs=2, default=[4000, 2000], metavar=("VOTE", "TEST"))
    noise = "Of 20-NN in one direction (default: 0.02, twice the standard error of 2,000 images at 0.3)"
    parser.add_argument("--noise", type=positive(float), default=0.02, help=noise)
    parser.add_argument("--threads", type=positive(int), default=1)
    parser.add_argument("--draws", type=positive(int), default=1000, help="Bootstrap samples")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args(argv)
    {"measure": measure, "compare": compare}[args.what](args)


if __name__ == "__main__":
    errors.run_script(main)
