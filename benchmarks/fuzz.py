"""What hostile files and wrong flags come to, tried at random (docs/promises.md).

    python benchmarks/fuzz.py [--parts flags files images checkpoints sources] [--flags 1000] [--files 150] [--seed 0]

    flags        each script as its real command, with one to three of its flags set to something that makes no sense:
                 empty, huge, not a number, not UTF-8, paths that are too long or hold something else
    files        a checkpoint, kept features, a class list, a list of images, tar shards, parquet, images: a field
                 replaced by something else, or the bytes damaged; then the command that reads them
    images       files of every odd and damaged kind: read, or refused and replaced, as expected of the kind
    checkpoints  bit flips, cut files, pickles that would run code: loaded as saved, or refused in one line
    sources      images, caches, features and weights that are damaged or changed under their names: fuzz_sources.py

Held: the command works, or ends with a documented exit code and one line that begins with its name, within a minute.
Broke: a traceback, a crash, a hang, another exit code, a file that was there and is changed, code that was run.
Everything is drawn from --seed; commands have limits on their memory. Exits with 1 if anything broke.
"""

import importlib
import os
import random
import resource
import shlex
import shutil
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import harness
import hostile
import stress
from fuzz_sources import fuzz_sources
from PIL import Image

import reproduce_table3
from cplearn import checkpoints, errors
from cplearn.data import datasets
from cplearn.errors import LocalError, UserError
from cplearn.flags import ArgumentParser, nonnegative, positive
from cplearn.host import git_commit
from cplearn.text import format_table, from_printable

SECONDS = 60  # a command that runs longer hangs
MEMORY = 6 * 2**30  # bytes that a command may take beyond what the parent has

RUN = ["--dataset", "digits", "--arch", "resnet8_w8", "--image_size", "16", "--out_dim", "40", "--max_steps", "1",
       "--batch_size_per_gpu", "64", "--num_workers", "0", "--device", "cpu", "--saveckp_freq", "0"]  # fmt: skip
EVALUATION = ["--num_workers", "0", "--device", "cpu"]
HEAVY = ("timm", "torchvision.transforms.v2.functional", "sklearn.datasets", "sklearn.metrics", "sklearn.manifold",
         "sklearn.mixture", "sklearn.linear_model", "matplotlib.pyplot", "cplearn.methods", "submitit")  # fmt: skip
SCRIPTS = ("main_cplearn", "eval_knn", "eval_linear", "eval_cluster", "eval_collapse", "reproduce_table3",
           "run_with_submitit", "extract_features", "visualize_attention", "visualize_codes", "export",
           "plot_runs")  # fmt: skip
# Flags whose hostile values would do just what they say: read this terminal, wait, ask the network's name service, or
# compile for a minute.
LEFT_OUT = {"--help", "--dist_url", "--then", "--local", "--compile"}

NUMBERS = ["", " ", "-1", "0", "-0", "1e309", "nan", "-inf", "1e-320", "1e300", "9" * 40, "4294967296", "0x10", "1_0",
           "1,5", "\u0967\u0968", "1/0", "--1", "2147483648", "18446744073709551616", "0.5", "3", "33"]  # fmt: skip
WORDS = ["None", "true", "a\nb", "\t", "x" * 5000, "\u00e9", "\udcff", "{}", "[1", "*", "@", "%j", "-", "--", "$bad$",
         "timm:resnet50", "resnet8_w999999999", "vit_smal", "\x1b[31m", "=1", "a b", "'", '"', "\\"]  # fmt: skip
PATHS = ["{place}", "{place}/noise", "{place}/empty", "{place}/text", "..", "~", "~no_such_user/x", "{place}/nowhere/x",
         "{place}/" + "d/" * 2000, "{place}/caf\udce9", "{checkpoint}", "{images}"]  # fmt: skip
Result = tuple[str, str, list[str], str]  # part, script, flags, what went wrong or ""


class Place:
    """A folder with everything that commands may read, made once, and a fresh one for what each writes."""

    def __init__(self, root: Path):
        self.root, self.images, self.place, self.home = root, root / "images", root / "place", root / "home"
        self.place.mkdir()
        (self.place / "noise").write_bytes(random.Random(0).randbytes(5000))
        (self.place / "empty").touch()
        (self.place / "text").write_text("--lr 0.1\n# a recipe\n--nonsense 7\n")
        for split in ("train", "val"):
            for k in range(2):
                folder = self.images / split / f"class{k}"
                folder.mkdir(parents=True)
                for i in range(8):
                    Image.new("RGB", (16, 16), (40 * k + i,) * 3).save(folder / f"{i}.png")
        self.run, self.vit, self.features = root / "run", root / "vit", root / "features"
        self.must_work("main_cplearn", [*RUN, "--output_dir", str(self.run)])
        self.must_work("main_cplearn", [*RUN, "--arch", "timm:test_vit", "--output_dir", str(self.vit)])
        weights = ["--pretrained_weights", str(self.run / "checkpoint.pth"), *EVALUATION]
        self.must_work("eval_knn", [*weights, "--dump_features", str(self.features), "--output_dir", str(self.run)])
        self.inputs = [x for folder in (self.place, self.images, self.run, self.vit) for x in folder.rglob("*")]

    def fresh(self) -> Path:
        """Return where a command may write, and remove what the one before has left there."""
        for path in self.root.glob("out*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return self.root / "out"

    def command(self, script: str, argv: Sequence[str]) -> tuple[int, str]:
        """Run a command in a process of its own; return its exit code and what it printed."""
        output = self.root / "output.txt"
        output.unlink(missing_ok=True)
        main = _plan if script == "reproduce_table3" else importlib.import_module(script).main
        process = harness.start(script, main, argv, output, self._limit, HOME=str(self.home), OMP_NUM_THREADS="1")
        (code,) = harness.finish([process], SECONDS)
        harness.kill(process)  # whatever it has left behind
        return code, output.read_bytes().decode("utf-8", "replace")

    def _limit(self) -> None:
        shutil.rmtree(self.home, ignore_errors=True)
        self.home.mkdir()
        os.chdir(self.home)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def must_work(self, script: str, argv: Sequence[str]) -> None:
        code, printed = self.command(script, argv)
        if code:
            raise RuntimeError(f"not even the plain command of {script}.py works: {printed}")

    def attempt(self, part: str, script: str, argv: list[str]) -> Result:
        """Run a command and judge how it ended."""
        before = self.fingerprint()
        wrong = problem(script, *self.command(script, argv))
        if not wrong and self.fingerprint() != before:
            wrong = "changed a file that was there"
        return part, script, argv, wrong

    def fingerprint(self) -> list[tuple]:
        """Return size and time of every file that was there from the start; evaluations append to results.jsonl."""
        files = [x for x in self.inputs if x.name != "results.jsonl" and not x.is_dir()]
        return [(str(x), x.lstat().st_size, x.lstat().st_mtime_ns) if x.exists() else (str(x),) for x in files]


def _plan(argv: Sequence[str]) -> None:
    """Do what reproduce_table3.py does before it starts anything."""
    args, rest = reproduce_table3.parse_args(argv)
    if args.launcher == "slurm":
        reproduce_table3.parse_launcher_flags(rest)
    reproduce_table3.check_data(args)
    settings = reproduce_table3.choose_settings(args)
    if not args.minutes_per_cell:
        reproduce_table3.build_grid(args, settings)


def problem(script: str, code: int, printed: str) -> str:
    """Return what is wrong with how a command ended; "" if it held."""
    lines = printed.strip().splitlines() or [""]
    if code == harness.HUNG:
        return f"hung for {SECONDS} s"
    if "Traceback (most recent call last)" in printed:
        return f"traceback: {lines[-1][:150]}"
    if code not in harness.CODES:
        return f"exit code {code}: {lines[-1][:150]}"
    messages = [line for line in lines if line.startswith(f"{script}.py: ")]
    if code and len(messages) != 1:
        return f"{len(messages)} messages instead of one: {printed.strip()[-150:]!r}"
    return ""


# --- flags ------------------------------------------------------------------------------------------------


def base_flags(script: str, place: Place, out: Path) -> list[str]:
    """Return the flags of a command that works."""
    weights = ["--pretrained_weights", str((place.vit if "attention" in script else place.run) / "checkpoint.pth")]
    images = ["--images", str(place.images)]
    evaluation = [*weights, "--output_dir", str(out), *EVALUATION]
    return {
        "main_cplearn": [*RUN, "--output_dir", str(out)],
        "reproduce_table3": ["--output_dir", str(out), "--scale", "small", "--dataset", "digits", "--epochs", "2"],
        "run_with_submitit": ["--dry_run", "--cpu", "--nodes", "1", "--ngpus", "1", "--output_dir", str(out), *RUN],
        "plot_runs": [str(place.run), "--out", str(out)],
        "export": [*weights, "--to", "safetensors", "--out", f"{out}.safetensors"],
        "extract_features": [*weights, *images, "--out", f"{out}.npz", *EVALUATION],
        "visualize_attention": [*weights, *images, "--output_dir", str(out), "--device", "cpu"],
        "visualize_codes": [*evaluation, *images],
        "eval_linear": [*evaluation, "--epochs", "1", "--augment", "false"],
        "eval_collapse": [*evaluation, "--tsne_images", "0"],
    }.get(script, evaluation)


def hostile_flags(rng: random.Random, script: str, place: Place) -> list[str]:
    """Draw one to three flags of a script with values that make no sense."""
    known = {"{place}": place.place, "{checkpoint}": place.run / "checkpoint.pth", "{images}": place.images}

    def draw() -> str:
        text = rng.choice(rng.choice((NUMBERS, NUMBERS, WORDS, PATHS)))
        for name, path in known.items():
            text = text.replace(name, str(path))
        return text

    actions = [x for x in importlib.import_module(script).get_args_parser()._actions if x.option_strings]
    argv = []
    for action in rng.sample([x for x in actions if not LEFT_OUT & set(x.option_strings)], rng.choice((1, 1, 1, 2, 3))):
        count = 0 if action.nargs == 0 and rng.random() < 0.7 else rng.choice((1, 1, 1, 1, 2, 0))
        argv += [rng.choice(action.option_strings), *(draw() for _ in range(count))]
    if rng.random() < 0.1:
        argv.insert(rng.randrange(len(argv) + 1), draw())
    return argv


def fuzz_flags(place: Place, count: int, rng: random.Random) -> list[Result]:
    for script in SCRIPTS:
        place.must_work(script, base_flags(script, place, place.fresh()))
    results = []
    for _ in range(count):
        script = rng.choice(("main_cplearn", "main_cplearn", "run_with_submitit", *SCRIPTS))
        argv = [*base_flags(script, place, place.fresh()), *hostile_flags(rng, script, place)]
        results.append(place.attempt("flags", script, argv))
    return results


# --- files that lie -----------------------------------------------------------------------------------------


def write_file(kind: str, place: Place, out: Path) -> Path:
    """Make a whole file of a kind in the folder `out`; return its path."""
    pictures = sorted((place.images / "train").rglob("*.png"))
    if kind in ("run", "features", "images"):
        shutil.copytree(getattr(place, kind), out)
        name = {"run": "checkpoint.pth", "features": "features_val_last1.pth", "images": "train/class0/3.png"}[kind]
        return out / name
    out.mkdir()
    path = out / kind
    if kind == "train-0.tar":
        with tarfile.open(path, "w") as file:
            file.add(place.images / "train", ".")
    elif kind == "train-0.parquet":
        import pyarrow
        from pyarrow import parquet

        rows = [{"bytes": x.read_bytes(), "path": x.name} for x in pictures]
        parquet.write_table(pyarrow.table({"image": rows, "label": [int("class1" in str(x)) for x in pictures]}), path)
    else:
        path.write_text("class0\nclass1\n" if kind == "classes.txt" else "".join(f"{x}\tant\n" for x in pictures))
    return path


def readers(place: Place) -> list[tuple[str, str, Callable[[Path], list[str]]]]:
    """Return script, kind of file, and the flags that read a file of that kind in a folder."""
    small = [*RUN, "--dataset", "folder", "--batch_size_per_gpu", "4"]

    def weights(out: Path, *more: str) -> list[str]:
        return ["--pretrained_weights", str(out / "checkpoint.pth"), *EVALUATION, *more]

    def train(out: Path) -> list[str]:
        return [*small, "--data_path", str(out), "--output_dir", str(out / "run")]

    def load(out: Path) -> list[str]:
        return ["--load_features", str(out), "--output_dir", str(out)]

    images = ["--images", str(place.images)]
    return [
        ("main_cplearn", "run", lambda out: [*RUN, "--max_steps", "2", "--output_dir", str(out)]),
        ("eval_knn", "run", lambda out: weights(out, "--output_dir", str(out))),
        ("eval_cluster", "run", lambda out: weights(out, "--output_dir", str(out))),
        ("export", "run", lambda out: [str(out / "checkpoint.pth"), "--to", "head"]),
        ("extract_features", "run", lambda out: weights(out, *images, "--out", str(out / "f.npz"))),
        ("visualize_codes", "run", lambda out: weights(out, *images)),
        ("eval_knn", "features", load),
        ("eval_cluster", "features", load),
        ("main_cplearn", "classes.txt", lambda out: [
            *train(out), "--data_path", str(place.images), "--class_list", str(out / "classes.txt")]),
        ("main_cplearn", "train.txt", lambda out: [*train(out), "--data_path", str(out / "train.txt")]),
        ("main_cplearn", "train-0.tar", train),
        ("main_cplearn", "train-0.parquet", train),
        ("main_cplearn", "images", train),
    ]  # fmt: skip


def fuzz_files(place: Place, count: int, rng: random.Random) -> list[Result]:
    """Try files that lie; those that broke something are kept."""
    shutil.copy(place.features / "features_val_last1.pth", place.features / "features_train_last1.pth")
    results, kinds = [], readers(place)
    for k in range(count):
        script, kind, flags = kinds[k % len(kinds)]
        out = place.fresh()
        path = write_file(kind, place, out)
        if path.suffix == ".pth" and rng.random() < 0.75:
            torch.save(hostile.lie(rng, torch.load(path, weights_only=True)), path)
        else:
            hostile.damage(path, rng)
        kept = place.root / f"lie{k}{path.suffix}"
        shutil.copy(path, kept)
        *command, wrong = place.attempt("files", script, flags(out))
        results.append((*command, f"{wrong} ({kept})" if wrong else ""))
        if not wrong:
            kept.unlink()
    return results


def fuzz_checkpoints(place: Place, count: int, rng: random.Random) -> list[Result]:
    """Read damaged checkpoints, and pickles that would run code."""
    torch.manual_seed(rng.randrange(2**31))
    state = {"step": 7, "args": {"lr": 0.1, "name": "x"}, "model": {f"w{i}": torch.randn(40, 30) for i in range(8)}}
    good, path, witness = place.root / "good.pth", place.root / "hostile.pth", place.root / "executed"
    checkpoints.save(good, state)
    results = []
    for k in range(count):
        shutil.copy(good, path)
        attack, wrong = k % 10 >= 7, ""
        hostile.write_attack(path, rng, witness) if attack else hostile.damage(path, rng)
        try:
            if not harness.same(checkpoints.load(path), {"format": checkpoints.FORMAT, **state}):
                wrong = "loaded as something else"
        except UserError as error:
            wrong = "refused in several lines" if "\n" in str(error) else ""
        if witness.exists():
            wrong = "ran code"
        results.append(("checkpoints", "pickles that run code" if attack else "damaged", [], wrong))
    return results


def fuzz_images(place: Place, count: int, rng: random.Random) -> list[Result]:
    """Read images of every kind, and train on all of them with and without workers."""
    data = place.root / "data" / "train"
    data.mkdir(parents=True)
    kinds = hostile.write_images(data, -(-count // 27), rng)
    dataset, results, unreadable = datasets.Folder(data), [], set()
    for i, name in enumerate(map(str, dataset.names)):
        kind = name.rpartition("-")[0]
        try:
            image, _ = dataset[i]
            right = kinds[kind] and image.mode == "RGB" and min(image.size) > 0
        except LocalError as error:
            unreadable.add(name)
            right = not kinds[kind] and "\n" not in str(error)
        sort = "can be read" if kinds[kind] else "damaged"
        results.append(("images", sort, [], "" if right else f"{name}: not as expected"))
    outs = [place.root / f"workers{workers}" for workers in (0, 2)]
    for out in outs:
        flags = ["--data_path", str(data.parent), "--num_workers", out.name[-1], "--max_bad_images", "1", "--epochs",
                 "2", "--batch_size_per_gpu", "16"]  # fmt: skip
        codes = stress.finish(stress.start(out, 1, *flags), out)
        listed = {from_printable(x.split("\t")[0]) for x in (out / "bad_images.txt").read_text().splitlines()}
        wrong = "" if codes == [0] and listed <= unreadable else f"exit code {codes}, {len(listed)} images listed"
        results.append(("images", "a training on all", flags, wrong))
    results.append(("images", "the same with workers", [], "" if stress.same_run(*outs) else "other weights"))
    return results


PARTS = {"flags": fuzz_flags, "files": fuzz_files, "images": fuzz_images, "checkpoints": fuzz_checkpoints,
         "sources": fuzz_sources}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Try everything and print what held."""
    parser = ArgumentParser(prog="benchmarks/fuzz.py", description=__doc__)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--flags", type=positive(int), default=1000, help="Commands with hostile flags")
    parser.add_argument("--files", type=positive(int), default=150, help="Files that lie")
    parser.add_argument("--images", type=positive(int), default=270, help="Images of odd and damaged kinds")
    parser.add_argument("--checkpoints", type=positive(int), default=1500, help="Damaged and hostile checkpoints")
    parser.add_argument("--sources", type=positive(int), default=800, help="Images, caches, features and weights")
    parser.add_argument("--seed", type=nonnegative(int), default=0)
    args = parser.parse_args(argv)
    for name in (*SCRIPTS, *HEAVY):  # once, and not in each of a thousand processes
        importlib.import_module(name)
    torch.set_num_threads(1)
    folder, start = tempfile.mkdtemp(prefix="fuzz"), time.time()
    place, results = Place(Path(folder)), []
    for part in args.parts:
        results += PARTS[part](place, getattr(args, part), random.Random(f"{part} {args.seed}"))
    groups = {key: [x for x in results if x[:2] == key] for key in sorted({x[:2] for x in results})}
    rows = []
    for key, group in (groups | {("all", ""): results}).items():
        broke = sum(bool(x[3]) for x in group)
        rows.append((*key, str(len(group)), str(len(group) - broke), str(broke)))
    print(f"seed {args.seed}, commit {git_commit()}, {time.time() - start:.0f} s\n")
    print(format_table(rows, ("part", "script or kind", "tried", "held", "broke")))
    broken = [x for x in results if x[3]]
    for _, script, flags, wrong in broken:
        print(f"\n{wrong}\n  {script} {shlex.join(flags)}".encode("utf-8", "backslashreplace").decode())
    if broken:
        print(f"\nkept: {folder}")
        sys.exit(1)
    shutil.rmtree(folder)


if __name__ == "__main__":
    errors.run_script(main)
