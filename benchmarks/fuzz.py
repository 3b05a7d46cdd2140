"""What wrong input comes to, tried at random: flags with hostile values, and files that lie.

    python benchmarks/fuzz.py [--parts flags files] [--flags 1000] [--files 150] [--seed 0]

    flags   each script as its real command, with one to three of its flags set to something hostile: empty, huge, not
            a number, not UTF-8, shell code, pipes, devices, paths that are too long, ...
    files   a checkpoint, kept features, grid.json, jobs.jsonl, a lock, a recipe, a class list, a log: one of their
            fields replaced by something else, or the bytes by noise; then the command that reads them

Held: the command works, or ends with a documented exit code and one line that begins with its name, within a minute.
Broke: a traceback, a crash, a hang, another exit code, shell code that was run, a file outside its folder that changed.
Everything is drawn from --seed. Commands are forked from this process, which has imported torch but never used it, with
limits on their memory. Exits with 1 if anything broke, and says how to do it again.
"""

import argparse
import contextlib
import copy
import importlib
import json
import multiprocessing
import os
import random
import resource
import shlex
import shutil
import signal
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import main_cplearn
import reproduce_table3
from cplearn import errors
from cplearn.flags import ArgumentParser, nonnegative, positive
from cplearn.host import ROOT, git_commit
from cplearn.text import format_table

FORK = multiprocessing.get_context("fork")
CODES = (0, 2, 3, 4, 5, 6, 7, 75)  # docs/errors.md
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
CODE = ["$(touch {marker})", "`touch {marker}`", "; touch {marker}", "x\ntouch {marker}\n", "' ; touch {marker} ; '",
        "| touch {marker}", "& touch {marker} &", "${IFS}touch", "@{marker}"]  # fmt: skip
PATHS = ["{place}", "{place}/pipe", "{place}/dangling", "{place}/loop", "{place}/noise", "{place}/empty",
         "{place}/text", "/dev/null", "/dev/zero", "/proc/self/mem", "/", "..", "~", "~nobody/x", "{place}/nowhere/x",
         "{place}/" + "d/" * 2000, "{place}/caf\udce9", "{checkpoint}", "{images}"]  # fmt: skip


class Place:
    """A folder with everything that commands may read, made once, and a fresh one for what each writes."""

    def __init__(self, root: Path):
        self.root, self.images = root, root / "images"
        (root / "place").mkdir()
        self.place = root / "place"
        os.mkfifo(self.place / "pipe")
        (self.place / "dangling").symlink_to(self.place / "nothing")
        (self.place / "loop").symlink_to(self.place / "loop")
        (self.place / "noise").write_bytes(random.Random(0).randbytes(5000))
        (self.place / "empty").touch()
        (self.place / "text").write_text("--lr 0.1\n# a recipe\n--nonsense 7\n")
        self.names = {path.name for path in self.place.iterdir()}
        for split in ("train", "val"):
            for k in range(2):
                folder = self.images / split / f"class{k}"
                folder.mkdir(parents=True)
                for i in range(8):
                    Image.fromarray(np.full((16, 16, 3), 40 * k + i, np.uint8)).save(folder / f"{i}.png")
        self.checkpoint, self.vit = root / "run" / "checkpoint.pth", root / "vit" / "checkpoint.pth"
        for path, more in ((self.checkpoint, []), (self.vit, ["--arch", "timm:test_vit"])):
            code, said, _ = self.run("main_cplearn", [*RUN, *more, "--output_dir", str(path.parent)])
            if code:
                raise RuntimeError(f"not even the plain command works: {said}")

    def fresh(self) -> Path:
        """Return where a command may write, and remove what the one before has left there."""
        for path in self.root.glob("out*"):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        return self.root / "out"

    def run(self, script: str, argv: Sequence[str]) -> tuple[int, str, float]:
        """Run a command in a process of its own; return its exit code (-1: it hung), what it said and how long."""
        said = self.root / "said.txt"
        start = time.monotonic()
        child = FORK.Process(target=_child, args=(script, list(argv), str(said), str(self.root / "home")))
        child.start()
        child.join(SECONDS)
        hung = child.is_alive()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # whatever it has left behind, too
        child.join()
        took = time.monotonic() - start
        return -1 if hung else child.exitcode, said.read_bytes().decode("utf-8", "replace"), took


def _child(script: str, argv: list[str], said: str, home: str) -> None:
    os.setsid()
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(file, 1)
    os.dup2(file, 2)
    shutil.rmtree(home, ignore_errors=True)
    os.makedirs(home)
    os.chdir(home)
    os.environ.update(HOME=home, OMP_NUM_THREADS="1")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.argv = [f"{ROOT}/{script}.py", *argv]
    main = importlib.import_module(script).main
    errors.run_script((lambda _: _plan(argv)) if script == "reproduce_table3" else main)
    sys.stdout.flush()
    os._exit(0)


def _plan(argv: list[str]) -> None:
    """Do what reproduce_table3.py does before it starts anything; with --status, all of it."""
    args, rest = reproduce_table3.parse_args(argv)
    if args.status:
        reproduce_table3.main(argv)
        return
    if args.launcher == "slurm":
        reproduce_table3.parse_launcher_flags(rest)
    reproduce_table3.check_data(args)
    settings = reproduce_table3.choose_settings(args)
    if not args.minutes_per_cell:
        reproduce_table3.build_grid(args, settings)


def problem(script: str, code: int, said: str) -> str:
    """Return what is wrong with how a command ended; "" if it held."""
    if code == -1:
        return f"hung for {SECONDS} s"
    if "Traceback (most recent call last)" in said:
        return f"traceback: {said.strip().splitlines()[-1][:150]}"
    if code not in CODES:
        return f"exit code {code}: {(said.strip().splitlines() or [''])[-1][:150]}"
    messages = [line for line in said.splitlines() if line.startswith(f"{script}.py: ")]
    if code and len(messages) != 1:
        return f"{len(messages)} messages instead of one: {said.strip()[-150:]!r}"
    return ""


# --- flags ------------------------------------------------------------------------------------------------


def flags_of(script: str) -> list[argparse.Action]:
    """Return the flags of a script."""
    if script == "main_cplearn":
        parser = main_cplearn.get_args_parser()
    else:
        parser = importlib.import_module(script).get_args_parser()
    return [x for x in parser._actions if x.option_strings and not LEFT_OUT & set(x.option_strings)]


def base_flags(script: str, place: Place, out: Path) -> list[str]:
    """Return the flags of a command that works."""
    if script == "main_cplearn":
        return [*RUN, "--output_dir", str(out)]
    if script == "reproduce_table3":
        return ["--output_dir", str(out), "--scale", "small", "--dataset", "digits", "--epochs", "2"]
    if script == "run_with_submitit":
        return ["--dry_run", "--cpu", "--nodes", "1", "--ngpus", "1", "--output_dir", str(out), *RUN]
    if script == "plot_runs":
        return [str(place.checkpoint.parent), "--out", str(out)]
    weights = ["--pretrained_weights", str(place.vit if script == "visualize_attention" else place.checkpoint)]
    images = ["--images", str(place.images)]
    if script == "export":
        return [*weights, "--to", "safetensors", "--out", str(out.with_suffix(".safetensors"))]
    if script == "extract_features":
        return [*weights, *images, "--out", str(out.with_suffix(".npz")), *EVALUATION]
    if script == "visualize_attention":
        return [*weights, *images, "--output_dir", str(out), "--device", "cpu"]
    if script == "visualize_codes":
        return [*weights, *images, "--output_dir", str(out), *EVALUATION]
    more = {"eval_linear": ["--epochs", "1", "--augment", "false"], "eval_collapse": ["--tsne_images", "0"]}
    return [*weights, "--output_dir", str(out), *EVALUATION, *more.get(script, [])]


def hostile_flags(rng: random.Random, script: str, place: Place, marker: Path) -> list[str]:
    """Draw one to three flags of a script with hostile values."""
    known = {"place": place.place, "checkpoint": place.checkpoint, "images": place.images, "marker": marker}

    def fill(text: str) -> str:
        for key, path in known.items():
            text = text.replace(f"{{{key}}}", str(path))
        return text

    argv = []
    for action in rng.sample(flags_of(script), rng.choice((1, 1, 1, 2, 3))):
        name = rng.choice(action.option_strings)
        values = rng.choice((NUMBERS, NUMBERS, WORDS, CODE, PATHS))
        count = 0 if action.nargs == 0 and rng.random() < 0.7 else rng.choice((1, 1, 1, 1, 2, 0))
        argv += [name, *(fill(rng.choice(values)) for _ in range(count))]
    if rng.random() < 0.1:
        argv.insert(rng.randrange(len(argv) + 1), fill(rng.choice((*WORDS, *CODE, *PATHS))))
    return argv


def fuzz_flags(place: Place, count: int, seed: int) -> list[tuple[str, str, list[str], str]]:
    """Try hostile flags. Returns (part, script, flags, problem or "") of each."""
    rng, found = random.Random(seed), []
    for script in SCRIPTS:
        code, said, _ = place.run(script, base_flags(script, place, place.fresh()))
        if code:
            raise RuntimeError(f"not even the plain command of {script}.py works: {said}")
    for k in range(count):
        script = rng.choice(("main_cplearn", "main_cplearn", "run_with_submitit", *SCRIPTS))
        out, marker = place.fresh(), place.root / "home" / "marker"
        argv = [*base_flags(script, place, out), *hostile_flags(rng, script, place, marker)]
        found.append(try_one(place, "flags", script, argv, marker))
        show(k, count)
    return found


def try_one(place: Place, part: str, script: str, argv: list[str], marker: Path) -> tuple[str, str, list[str], str]:
    before = fingerprint(place, argv)
    code, said, _ = place.run(script, argv)
    wrong = problem(script, code, said)
    if marker.exists():
        wrong = "ran shell code"
    elif fingerprint(place, argv) != before:
        wrong = wrong or "changed a file outside its folder"
    return part, script, argv, wrong


# Flags that name where a command writes; below their values anything may change that is not there before.
WRITES = ("--output_dir", "--dump_features", "--out_csv", "--cache_dir", "--output", "--out", "--csv")


def fingerprint(place: Place, argv: list[str]) -> list[tuple]:
    """Return names, sizes and times of what this command may not change."""
    told = [os.path.normpath(argv[k + 1]) for k, flag in enumerate(argv[:-1]) if flag in WRITES]
    folders = (place.place, place.images, place.checkpoint.parent)
    paths = [path for folder in folders for path in folder.rglob("*") if path.name != "results.jsonl"]
    paths = [
        x
        for x in paths
        if not x.is_dir() and not any(str(x).startswith((f"{y}/", f"{y}.")) and y != str(place.place) for y in told)
    ]
    if str(place.place) in told:  # told to write beside what is there
        paths = [x for x in paths if x.parent != place.place or x.name in place.names]
    return sorted((str(x), x.lstat().st_size, x.lstat().st_mtime_ns) for x in paths)


def show(k: int, count: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{k + 1} of {count}", end="\n" if k + 1 == count else "", file=sys.stderr, flush=True)


# --- files that lie -----------------------------------------------------------------------------------------

JUNK = [None, True, -1, 0, 3.7, 1e308, float("nan"), 10**30, "", "x", "x" * 2000, "../..", [], {}, [1, 2], {"a": 1},
        [[[[[[]]]]]], "\ud800"]  # fmt: skip


def lie(rng: random.Random, content):
    """Return a copy with one value somewhere inside replaced, removed or added."""
    content = copy.copy(content)
    if isinstance(content, dict) and content:
        key = rng.choice(list(content))
        if rng.random() < 0.7 and isinstance(content[key], (dict, list)):
            content[key] = lie(rng, content[key])
        elif rng.random() < 0.2:
            del content[key]
        elif rng.random() < 0.1:
            content[rng.choice(("more", 7, None))] = rng.choice(JUNK)
        else:
            content[key] = rng.choice(JUNK)
        return content
    if isinstance(content, list) and content and rng.random() < 0.8:
        k = rng.randrange(len(content))
        content[k] = lie(rng, content[k])
        return content
    return rng.choice(JUNK)


def noise(rng: random.Random, content: bytes) -> bytes:
    """Return bytes with a part of them lost, doubled or replaced."""
    a, b = sorted((rng.randrange(len(content) + 1), rng.randrange(len(content) + 1)))
    return (
        content[:a] + rng.choice((b"", rng.randbytes(rng.randrange(200)), content[a:b] * 2, b"\0" * 50)) + content[b:]
    )


def write_lie(rng: random.Random, path: Path) -> None:
    """Let a file lie: JSON, lines of JSON, a checkpoint, or text."""
    if rng.random() < 0.25:
        path.write_bytes(noise(rng, path.read_bytes()))
    elif path.suffix == ".pth":
        content = lie(rng, torch.load(path, weights_only=True))
        torch.save(content, path)
    elif path.suffix in (".json", ".lock") or path.name == ".lock":
        path.write_text(json.dumps(lie(rng, json.loads(path.read_text()))))
    elif path.suffix == ".jsonl" or path.name == "log.txt":
        lines = path.read_text().splitlines()
        k = rng.randrange(len(lines))
        lines[k] = json.dumps(lie(rng, json.loads(lines[k])))
        path.write_text("\n".join(lines) + "\n")
    else:
        path.write_bytes(noise(rng, path.read_bytes()))


def file_commands(place: Place) -> list[tuple[str, Callable[[Path], Path], Callable[[Path], list[str]]]]:
    """Return script, what makes a whole file in a fresh folder and returns its path, and the flags that read it."""

    def copy_of(name: str):
        def make(out: Path) -> Path:
            shutil.copytree(place.checkpoint.parent, out)
            return out / name

        return make

    def kept(out: Path) -> Path:
        shutil.copytree(place.root / "kept", out)
        return out / "features_val_last1.pth"

    def grid(name: str):
        def make(out: Path) -> Path:
            shutil.copytree(place.root / "grid", out)
            return out / name

        return make

    def written(name: str, text: str):
        def make(out: Path) -> Path:
            out.mkdir()
            (out / name).write_text(text)
            return out / name

        return make

    def shard(out: Path) -> Path:
        out.mkdir()
        with tarfile.open(out / "0.tar", "w") as file:
            file.add(place.images / "train", ".")
        return out / "0.tar"

    small = [*RUN, "--dataset", "folder", "--batch_size_per_gpu", "4"]
    paths = "".join(f"{path}\tant\n" for path in sorted((place.images / "train").rglob("*.png")))
    longer = [*RUN, "--max_steps", "2"]
    lock = json.dumps({"host": "elsewhere", "system": "x", "pid": 7, "started": "1"})
    listing = "class0\nclass1\n"
    jobs = json.dumps({"job": "7", "script": "main_cplearn", "name": "x", "time": 1.0, "commit": "c"}) + "\n"

    def resume(out: Path) -> list[str]:
        return [*longer, "--output_dir", str(out)]

    def evaluate(out: Path) -> list[str]:
        return ["--pretrained_weights", str(out / "checkpoint.pth"), "--output_dir", str(out), *EVALUATION]

    def load(out: Path) -> list[str]:
        return ["--load_features", str(out), "--output_dir", str(out)]

    return [
        ("main_cplearn", copy_of("checkpoint.pth"), resume),
        ("main_cplearn", copy_of("args.json"), resume),
        ("main_cplearn", written(".lock", lock), resume),
        ("eval_knn", copy_of("checkpoint.pth"), evaluate),
        ("eval_cluster", copy_of("checkpoint.pth"), evaluate),
        ("eval_knn", kept, load),
        ("eval_cluster", kept, load),
        ("reproduce_table3", grid("grid.json"), lambda out: ["--output_dir", str(out), "--status"]),
        ("reproduce_table3", grid("cplearn_c16_s0/log.txt"), lambda out: ["--output_dir", str(out), "--status"]),
        ("reproduce_table3", grid("cplearn_c16_s0/trained/results.jsonl"),
         lambda out: ["--output_dir", str(out), "--status"]),
        ("run_with_submitit", written("jobs.jsonl", jobs), lambda out: ["--status", str(out)]),
        ("main_cplearn", written("list.txt", listing), lambda out: [
            *small, "--data_path", str(place.images), "--class_list", str(out / "list.txt"), "--output_dir",
            str(out / "run")]),
        ("main_cplearn", written("train.txt", paths), lambda out: [
            *small, "--data_path", str(out / "train.txt"), "--output_dir", str(out / "run")]),
        ("main_cplearn", shard, lambda out: [*small, "--data_path", str(out), "--output_dir", str(out / "run")]),
        ("plot_runs", copy_of("log.txt"), lambda out: [str(out)]),
        ("export", copy_of("checkpoint.pth"), lambda out: [str(out / "checkpoint.pth"), "--to", "head"]),
        ("extract_features", copy_of("checkpoint.pth"), lambda out: [
            "--pretrained_weights", str(out / "checkpoint.pth"), "--images", str(place.images), "--out",
            str(out / "f.npz"), *EVALUATION]),
        ("visualize_codes", copy_of("checkpoint.pth"), lambda out: [
            "--pretrained_weights", str(out / "checkpoint.pth"), "--images", str(place.images), *EVALUATION]),
        ("main_cplearn", written("recipe.txt", "--lr 0.001\n--beta 0.25 # a comment\n"),
         lambda out: [*RUN, f"@{out / 'recipe.txt'}", "--output_dir", str(out / "run")]),
    ]  # fmt: skip


def make_whole_files(place: Place) -> None:
    """Make kept features and a grid with one trained cell, by the real commands."""
    kept = ["--pretrained_weights", str(place.checkpoint), "--dump_features", str(place.root / "kept"), *EVALUATION,
            "--output_dir", str(place.root / "kept")]  # fmt: skip
    code, said, _ = place.run("eval_knn", kept)
    if code:
        raise RuntimeError(said)
    shutil.copy(place.root / "kept" / "features_val_last1.pth", place.root / "kept" / "features_train_last1.pth")
    flags = ["--output_dir", str(place.root / "grid"), "--scale", "small", "--dataset", "digits", "--epochs", "1",
             "--methods", "cplearn", "--out_dims", "16",
             "--train_flags", "--arch resnet8_w8 --max_steps 2"]  # fmt: skip
    args, _ = reproduce_table3.parse_args(flags)
    (place.root / "grid").mkdir()
    (cell,) = reproduce_table3.build_grid(args, reproduce_table3.choose_settings(args)).save().cells
    knn = ["--pretrained_weights", str(cell.folder / "checkpoint.pth"), *cell.evaluate["knn"]]
    stages = {"main_cplearn": (cell.train, cell.folder), "eval_knn": (knn, cell.results_folder(random=False))}
    for script, (flags, out) in stages.items():
        code, said, _ = place.run(script, [*flags, "--output_dir", str(out), *EVALUATION])
        if code:
            raise RuntimeError(said)
    cell.mark_trained()


def fuzz_files(place: Place, count: int, seed: int) -> list[tuple[str, str, list[str], str]]:
    """Try files that lie. Returns (part, script, flags, problem or "") of each."""
    make_whole_files(place)
    rng, found, commands = random.Random(seed), [], file_commands(place)
    from cplearn.lock import FolderLock

    FolderLock.QUIET = 0.2  # how long a foreign lock is watched
    for k in range(count):
        script, make, flags = commands[k % len(commands)]
        out = place.root / "out"
        shutil.rmtree(out, ignore_errors=True)
        path = make(out)
        write_lie(rng, path)
        kept = place.root / f"lie{k}" / path.name
        kept.parent.mkdir()
        shutil.copy(path, kept)
        one = try_one(place, "files", script, flags(out), place.root / "home" / "marker")
        found.append((*one[:3], f"{one[3]} ({kept})" if one[3] else ""))
        if not one[3]:
            shutil.rmtree(kept.parent)
        show(k, count)
    return found


# --- all ----------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    """Try everything and say what held."""
    parser = ArgumentParser(prog="benchmarks/fuzz.py", description=__doc__)
    parser.add_argument("--parts", nargs="+", default=["flags", "files"], choices=("flags", "files"))
    parser.add_argument("--flags", type=positive(int), default=1000, help="Commands with hostile flags")
    parser.add_argument("--files", type=positive(int), default=150, help="Files that lie")
    parser.add_argument("--seed", type=nonnegative(int), default=0)
    args = parser.parse_args(argv)
    for name in (*SCRIPTS, *HEAVY):  # once, and not in each of a thousand processes
        importlib.import_module(name)
    folder, start = tempfile.mkdtemp(prefix="fuzz"), time.time()
    place, found = Place(Path(folder)), []
    if "flags" in args.parts:
        found += fuzz_flags(place, args.flags, args.seed)
    if "files" in args.parts:
        found += fuzz_files(place, args.files, args.seed)
    rows = []
    for key in sorted({(part, script) for part, script, _, _ in found}):
        wrong = [x[3] for x in found if x[:2] == key]
        broke = sum(map(bool, wrong))
        rows.append((*key, str(len(wrong)), str(len(wrong) - broke), str(broke)))
    broke = [x for x in found if x[3]]
    rows.append(("all", "", str(len(found)), str(len(found) - len(broke)), str(len(broke))))
    print(f"seed {args.seed}, commit {git_commit()}, {time.time() - start:.0f} s\n")
    print(format_table(rows, ("part", "script", "tried", "held", "broke")))
    for _, script, flags, wrong in broke:
        print(f"\n{wrong}\n  {script}.py {shlex.join(flags)}".encode("utf-8", "backslashreplace").decode())
    if broke:
        print(f"\nkept: {folder}")
        sys.exit(1)
    shutil.rmtree(folder)


if __name__ == "__main__":
    errors.run_script(main)
