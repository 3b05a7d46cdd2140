"""What a run survives, tried for real: kill -9, damaged images and checkpoints, a full disk; and what saving costs.

    python benchmarks/stress.py [--parts kills images checkpoints disk overhead] [--kills 100] [--seed 0]

    kills        runs of 1, 2 and 3 processes killed at random moments, a third of them while a checkpoint is written,
                 now and then by a signal to stop, or with the newest checkpoint damaged; each goes on until the next
                 kill, and the last must equal the run that nobody disturbed, bit for bit
    images       files of every odd and damaged kind: read, or refused and replaced, as expected of the kind
    checkpoints  bit flips, cut files, foreign pickles: loaded as saved, or refused in one line, nothing executed
    disk         a file system that is too small (tmpfs, as root)
    overhead     seconds to save a ViT-S run, against the default interval

Everything is drawn from --seed. Processes are forked from this one, which has imported torch but never used it, so
that a hundred starts take minutes. Exits with 1 if anything is not as expected.
"""

import argparse
import faulthandler
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections import Counter
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import main_cplearn  # noqa: E402
from cplearn import checkpoints, errors  # noqa: E402
from cplearn.data import datasets  # noqa: E402
from cplearn.errors import LocalError, UserError  # noqa: E402
from cplearn.host import git_commit  # noqa: E402
from cplearn.lock import FolderLock  # noqa: E402
from cplearn.precision import choose_precision  # noqa: E402
from cplearn.text import format_table, from_printable  # noqa: E402
from cplearn.training.resume import save  # noqa: E402
from cplearn.training.stop import StopSignals  # noqa: E402

FORK = multiprocessing.get_context("fork")

# Drop path, batch norm, a prior buffer and an optimizer with state: whatever a continuation could get wrong.
RUN = ["--arch", "timm:test_vit", "--drop_path_rate", "0.3", "--image_size", "32", "--out_dim", "64", "--embed_dim",
       "32", "--epochs", "3", "--warmup_epochs", "1", "--batch_size_per_gpu", "48", "--prior_buffer", "3", 
       "--print_freq", "7", "--saveckp_freq", "1", "--device", "cpu"]  # fmt: skip


# --- running and killing -------------------------------------------------------------------------------


def start(out: Path, world: int, *more: str, place: Path | None = None) -> list:
    """`world` processes of main_cplearn.py on the folder `out`. Their output is appended to said.txt, beside it."""
    place = place or out.parent
    meeting = tempfile.mktemp(dir=place)
    argv = [*RUN, "--output_dir", str(out), "--dist_url", f"file://{meeting}", "--dist_timeout", "0.3", *more]
    processes = [FORK.Process(target=_run, args=(rank, world, argv, str(place / "said.txt"))) for rank in range(world)]
    for process in processes:
        process.start()
    return processes


def _run(rank: int, world: int, argv: list[str], said: str) -> None:
    os.setpgid(0, 0)  # its loader's workers are killed with it
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    faulthandler.register(signal.SIGQUIT, file)  # which the run itself leaves alone
    torch.set_num_threads(1)
    if world > 1:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
    sys.argv = ["main_cplearn.py"]
    errors.run_script(lambda _: main_cplearn.main(argv))
    sys.stdout.flush()


def finish(processes: list, out: Path, seconds: float = 300) -> list[int]:
    """Exit codes; raises if a process hangs, with what `said` has of the run in `out`."""
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
        if process.is_alive():
            os.kill(process.pid, signal.SIGQUIT)  # where it hangs goes to said.txt
            time.sleep(1)
            for other in processes:
                other.kill()
            raise RuntimeError(f"a process hangs: {processes}: {said(out)}")
    return [process.exitcode for process in processes]


def kill_when(processes: list, out: Path, seconds: float, writing: bool) -> bool:
    """kill -9 after some seconds, or then as soon as a checkpoint is being written. False if they ended before."""
    end = time.monotonic() + seconds
    while time.monotonic() < end or (writing and not any(out.glob(".checkpoint*.tmp"))):
        if not all(process.is_alive() for process in processes):
            return False
        time.sleep(0.0005)
    return True


def weights_and_log(out: Path) -> tuple[dict, list[dict]]:
    state = checkpoints.load(out / "checkpoint.pth")
    log = [json.loads(line) for line in (out / "log.txt").read_text().splitlines()]
    timed = ("images_per_second", "data_wait", "seconds", "monitor_seconds", "first_step_seconds")
    return state, [{k: v for k, v in record.items() if k not in timed} for record in log]


def same(a, b) -> bool:
    """Equal to the last bit, through containers."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def same_run(a: Path, b: Path) -> bool:
    """Weights, optimizer, counters, log lines and the numbered checkpoints, bit by bit."""
    (one, log_one), (two, log_two) = weights_and_log(a), weights_and_log(b)
    numbered = [sorted(p.name for p in out.glob("checkpoint0*.pth")) for out in (a, b)]
    if numbered[0] != numbered[1]:
        return False
    models = [[checkpoints.load(out / name)["model"] for name in numbered[0]] for out in (a, b)]
    keys = ("step", "epoch", "model", "optimizer", "scaler")
    return log_one == log_two and same(*models) and all(same(one[k], two[k]) for k in keys)


def gone(groups: list[int], seconds: float = 30) -> bool:
    """Whether nothing is left of these process groups: a loader's workers notice in seconds that their rank died."""
    end = time.monotonic() + seconds
    for group in groups:
        while True:
            try:
                os.killpg(group, 0)
            except ProcessLookupError:
                break
            if time.monotonic() > end:
                return False
            time.sleep(0.1)
    return True


def disturb(processes: list, rng: random.Random) -> str:
    """kill -9 of one rank or all, with or without its workers; or a signal to stop, to one rank. Returns which."""
    victims = processes if rng.random() < 0.5 else [rng.choice(processes)]
    if rng.random() < 0.2:
        os.kill(victims[0].pid, rng.choice((signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)))
        return "signal"
    with_workers = rng.random() < 0.5
    for process in victims:
        os.killpg(process.pid, signal.SIGKILL) if with_workers else os.kill(process.pid, signal.SIGKILL)
    return "kill"


def stress_kills(folder: Path, kills: int, rng: random.Random) -> list[tuple]:
    """One row per setting: kills, where they hit, lost checkpoints, whether the end is the same."""
    rows = []
    settings = ((1, 0, "adamw"), (1, 2, "sgd"), (2, 0, "adamw"), (2, 1, "lars"), (3, 0, "adamw"))
    for world, workers, optimizer in settings:
        name = f"{world} process{'es' * (world > 1)}, {workers} workers each, {optimizer}"
        more = ["--num_workers", str(workers), "--optimizer", optimizer]
        quiet = folder / f"quiet{world}{workers}" / "run"
        quiet.parent.mkdir(parents=True)
        codes = finish(start(quiet, world, *more, "--saveckp_minutes", "0"), quiet)
        if any(codes):
            raise RuntimeError(f"{name}: the undisturbed run ended with {codes}: {said(quiet)}")
        more += ["--saveckp_minutes", "0.002"]
        done, signals, lost, damaged, equal, finished = 0, 0, 0, 0, 0, 0
        where: Counter = Counter()
        target = -(-kills // len(settings))
        while done < target:  # a run that was killed often enough comes to its end; then the next one begins
            out = folder / f"killed{world}{workers}_{finished}" / "run"
            out.parent.mkdir(parents=True)
            reached, chances, groups = 0, rng.randrange(3, 9), []
            while True:
                processes = start(out, world, *more)
                groups += [process.pid for process in processes]
                quietly = chances == 0 or done >= target
                if quietly or not kill_when(processes, out, rng.uniform(0.2, 3.0), rng.random() < 1 / 3):
                    codes = finish(processes, out)
                    if any(codes):
                        raise RuntimeError(f"{name}: ended on its own with {codes}: {said(out)}")
                    break
                how = disturb(processes, rng)
                codes = finish(processes, out)
                if how == "kill":
                    fine = all(code in (0, -9, 6) for code in codes)
                else:  # all saved, or finished; or the signal came while they were starting
                    fine = set(codes) in ({75}, {0}) or all(code in (-15, -10, -12, 130, 6) for code in codes)
                if not fine:
                    raise RuntimeError(f"{name}: exit codes {codes} after a {how}: {said(out)}")
                if all(code == 0 for code in codes):
                    break
                half = any(out.glob(".checkpoint*.tmp")) or (out / "checkpoint.pth.new").exists()
                found = checkpoints.load_run(out) if out.exists() else None
                step = found[0]["step"] if found else 0
                done, signals, chances = done + (how == "kill"), signals + (how == "signal"), chances - 1
                if how == "kill":
                    where["checkpoint" if half else "start" if step == reached else "step"] += 1
                lost += step < reached
                reached = step
                if found and rng.random() < 0.1 and (out / "checkpoint_previous.pth").exists():
                    damage(out / "checkpoint.pth", rng)
                    damaged += 1
                    reached = checkpoints.load(out / "checkpoint_previous.pth")["step"]
            if not gone(groups):
                raise RuntimeError(f"{name}: processes are left behind")
            finished += 1
            equal += same_run(quiet, out)
        hits = ", ".join(f"{n} {place}" for place, n in sorted(where.items()))
        rows.append((name, done, hits, signals, damaged, lost, f"{equal} of {finished}"))
        print(f"{name}: {done} kills, {equal} of {finished} runs equal", flush=True)
    return rows


def said(out: Path) -> str:
    return (out.parent / "said.txt").read_text()[-1500:]


# --- checkpoints ---------------------------------------------------------------------------------------


def damage(path: Path, rng: random.Random) -> None:
    """Flip a few bits, cut, or overwrite a piece."""
    content = bytearray(path.read_bytes())
    kind = rng.randrange(4)
    if kind == 0:
        for _ in range(rng.choice((1, 1, 2, 8))):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del content[rng.randrange(len(content)) :]
    elif kind == 2:
        at = rng.randrange(len(content))
        content[at : at + rng.randrange(1, 4096)] = rng.randbytes(rng.randrange(0, 4096))
    else:  # the directory and the pickle are small: aim at them
        at = rng.choice(
            (rng.randrange(min(2000, len(content))), len(content) - 1 - rng.randrange(min(2000, len(content))))
        )
        content[at] = rng.randrange(256)
    path.write_bytes(bytes(content))


class _Attack:
    def __init__(self, witness: str):
        self.witness = witness

    def __reduce__(self):
        return os.system, (f"touch {self.witness}",)


def foreign(path: Path, rng: random.Random, witness: str) -> None:
    """A file that would run code if unpickled, in one of several wrappings."""
    content = {"format": checkpoints.FORMAT, "model": {"w": torch.zeros(3)}, "args": _Attack(witness)}
    kind = rng.randrange(4)
    if kind == 0:
        torch.save(content, path)
    elif kind == 1:
        torch.save(content, path, _use_new_zipfile_serialization=False)
    elif kind == 2:
        path.write_bytes(pickle.dumps(content, protocol=rng.choice((0, 2, 4))))
    else:  # a checkpoint whose pickle is replaced, checksums and all
        plain = BytesIO()
        torch.save({**content, "args": {}}, plain)
        with zipfile.ZipFile(plain) as source, zipfile.ZipFile(path, "w") as target:
            for item in source.namelist():
                evil = item.endswith("data.pkl")
                target.writestr(item, pickle.dumps(_Attack(witness), protocol=2) if evil else source.read(item))


def stress_checkpoints(folder: Path, files: int, rng: random.Random) -> list[tuple]:
    """One row per kind: how many were loaded as saved, refused, loaded as something else, or executed."""
    torch.manual_seed(rng.randrange(2**31))
    state = {"step": 7, "args": {"lr": 0.1, "name": "x"}, "model": {f"w{i}": torch.randn(40, 30) for i in range(8)}}
    good, path, witness = folder / "good.pth", folder / "fuzzed.pth", folder / "executed"
    checkpoints.save(good, state)
    rows = []
    for kind, share in (("damaged", 0.7), ("foreign pickles", 0.3)):
        counts: Counter = Counter()
        for _ in range(round(files * share)):
            shutil.copy(good, path)
            damage(path, rng) if kind == "damaged" else foreign(path, rng, str(witness))
            try:
                loaded = checkpoints.load(path)
                counts["as saved" if same(loaded, {"format": checkpoints.FORMAT, **state}) else "WRONG"] += 1
            except UserError as error:
                counts["refused" if "\n" not in str(error) else "WRONG"] += 1
        rows.append(
            (kind, sum(counts.values()), counts["as saved"], counts["refused"], counts["WRONG"], int(witness.exists()))
        )
    return rows


# --- images --------------------------------------------------------------------------------------------


def odd_images(folder: Path, each: int, rng: random.Random) -> dict[str, bool]:
    """Write `each` files of every kind; returns kind -> whether such files can be read."""

    def picture(mode="RGB", size=(48, 40)):
        coarse = Image.fromarray(
            np.random.default_rng(rng.randrange(2**31)).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        )
        return coarse.resize(size, Image.Resampling.BICUBIC).convert(mode)

    def encoded(kind="JPEG", image=None, **options):
        file = BytesIO()
        (image or picture()).save(file, kind, **options)
        return file.getvalue()

    def cut(content):
        return content[: rng.randrange(1, int(len(content) * 0.95))]

    def png_header(width, height):
        def chunk(name, data):
            return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

        rows = zlib.compress(b"\0" * 10000)  # far too few: only the header counts
        head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")

    def frames():
        return encoded("GIF", picture("P"), save_all=True, append_images=[picture("P"), picture("P")])

    def turned():
        exif = Image.Exif()
        exif[0x0112] = 6
        return encoded(exif=exif)

    def transparent():
        image = picture("P")
        image.info["transparency"] = 3
        return encoded("PNG", image, transparency=3)

    deep = lambda: Image.fromarray(np.arange(48 * 40, dtype=np.uint16).reshape(40, 48) * 30)  # noqa: E731
    kinds = {
        "JPEG": (".jpg", True, encoded),
        "progressive JPEG": (".jpg", True, lambda: encoded(progressive=True)),
        "CMYK JPEG": (".jpg", True, lambda: encoded(image=picture("CMYK"))),
        "gray JPEG": (".jpeg", True, lambda: encoded(image=picture("L"))),
        "JPEG with EXIF rotation": (".JPG", True, turned),
        "16-bit PNG": (".png", True, lambda: encoded("PNG", deep())),
        "palette PNG with transparency": (".png", True, transparent),
        "gray and alpha PNG": (".png", True, lambda: encoded("PNG", picture("LA"))),
        "1-bit PNG": (".png", True, lambda: encoded("PNG", picture("1"))),
        "animated GIF": (".gif", True, frames),
        "PNG called .jpg": (".jpg", True, lambda: encoded("PNG")),
        "WebP": (".webp", True, lambda: encoded("WEBP")),
        "16-bit TIFF": (".tif", True, lambda: encoded("TIFF", deep())),
        "1 x 1 pixel": (".png", True, lambda: encoded("PNG", picture(size=(1, 1)))),
        "20000 x 20 pixels": (".png", True, lambda: encoded("PNG", picture(size=(20000, 20)))),
        "20 x 20000 pixels": (".jpg", True, lambda: encoded(image=picture(size=(20, 20000)))),
        "cut JPEG": (".jpg", False, lambda: cut(encoded())),
        "cut PNG": (".png", False, lambda: cut(encoded("PNG"))),
        "cut GIF": (".gif", False, lambda: cut(encoded("GIF"))[:200]),
        "empty file": (".jpg", False, lambda: b""),
        "text": (".jpg", False, lambda: b"<html>404 not found</html>"),
        "random bytes": (".png", False, lambda: rng.randbytes(3000)),
        "JPEG head, then zeros": (".jpg", False, lambda: encoded()[:300] + bytes(3000)),
        "PostScript called .jpg": (".jpg", False, lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
        "float TIFF": (".tiff", False, lambda: encoded("TIFF", picture("F"))),
        "decompression bomb": (".png", False, lambda: png_header(60000, 60000)),
        "large bomb": (".png", False, lambda: png_header(10000, 10000)),
    }  # fmt: skip
    for kind, (suffix, _, make) in kinds.items():
        for i in range(each):
            (folder / f"{kind.replace(' ', '_')}-{i}{suffix}").write_bytes(make())
    return {kind.replace(" ", "_"): readable for kind, (_, readable, _) in kinds.items()}


def stress_images(folder: Path, images: int, rng: random.Random) -> list[tuple]:
    """One row per kind, then one for a training run over all of them with and without workers."""
    data = folder / "data" / "train"
    data.mkdir(parents=True)
    expected = odd_images(data, -(-images // 27), rng)
    dataset = datasets.Folder(data)
    outcome: dict[str, Counter] = {kind: Counter() for kind in expected}
    unreadable = 0
    for i in range(len(dataset)):
        kind = str(dataset.names[i]).rpartition("-")[0]
        try:
            image, _ = dataset[i]
            outcome[kind]["read" if image.mode == "RGB" and min(image.size) > 0 else "WRONG"] += 1
        except LocalError as error:
            outcome[kind]["refused" if "\n" not in str(error) else "WRONG"] += 1
            unreadable += 1
    rows = []
    for kind, readable in expected.items():
        found = outcome[kind]
        wrong = found["WRONG"] + found["refused" if readable else "read"]
        rows.append((kind.replace("_", " "), sum(found.values()), found["read"], found["refused"], wrong))
    outs = []
    for workers in (0, 2):
        out = folder / f"workers{workers}"
        more = ("--data_path", str(data.parent), "--num_workers", str(workers), "--max_bad_images", "1",
                "--epochs", "2", "--batch_size_per_gpu", "16")  # fmt: skip
        if any(finish(start(out, 1, *more), out)):
            raise RuntimeError(f"training on damaged images ended; see {folder}/said.txt")
        outs.append(out)
        listed = {from_printable(line.split("\t")[0]) for line in (out / "bad_images.txt").read_text().splitlines()}
        if not listed <= {str(n) for n in dataset.names} or len(listed) > unreadable:
            raise RuntimeError(f"{out}/bad_images.txt lists {len(listed)} files, {unreadable} are unreadable")
    replaced = sum(record["replaced_images"] for record in weights_and_log(outs[0])[1])
    rows.append((f"trained on all: {replaced} replaced", len(dataset), "", "", int(not same_run(*outs))))
    return rows


# --- disk and time -------------------------------------------------------------------------------------


def stress_disk(folder: Path, rng: random.Random) -> list[tuple]:
    """A run on a small tmpfs beside a file that leaves too little room, which then goes away."""
    place = folder / "small"
    place.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400m", "tmpfs", place]).returncode:
        return [("tmpfs", "not tried: needs root and mount", "", "")]
    try:
        quiet = folder / "quiet"
        more = ("--num_workers", "0", "--saveckp_minutes", "0")
        finish(start(quiet, 1, *more), quiet)
        size = (quiet / "checkpoint.pth").stat().st_size
        out = place / "run"
        codes, as_expected = [], True
        for room in (
            0,
            0.5,
            1.5,
            2.5,
            3.5,
        ):  # in checkpoints; the run writes two kinds, and keeps one before the latest
            shutil.rmtree(out, ignore_errors=True)
            ballast = place / "ballast"
            with open(ballast, "wb") as f:
                f.write(bytes(int(shutil.disk_usage(place).free - room * size)))
            codes += finish(start(out, 1, *more, place=folder), folder / "run")
            found = checkpoints.load_run(out) if out.exists() else None
            print(
                f"room for {room} checkpoints: exit code {codes[-1]}, step {found[0]['step'] if found else 0} is kept"
            )
            as_expected &= codes[-1] == 4 and (found is None or found[2] is None)
            ballast.unlink()
            as_expected &= finish(start(out, 1, *more), out) == [0] and same_run(quiet, out)
        return [("tmpfs", f"exit codes {codes}", "kept, then equal" if as_expected else "DAMAGED", "")]
    finally:
        subprocess.run(["umount", place])


def overhead(folder: Path) -> list[tuple]:
    """Seconds to save ViT-S with AdamW's state, against 15 minutes."""
    args = main_cplearn.parse_args(["--arch", "vit_small", "--out_dim", "131072", "--device", "cpu", "--output_dir",
                                    str(folder / "vit"), "--num_workers", "0", "--use_fp16", "false"])  # fmt: skip
    device = torch.device("cpu")
    choose_precision(args, device)
    Path(args.output_dir).mkdir(parents=True)
    stdout, sys.stdout = sys.stdout, open(os.devnull, "w")
    try:
        lock = FolderLock(args.output_dir).__enter__()
        run = main_cplearn.build(args, device, lock, StopSignals())
    finally:
        sys.stdout = stdout
    for p in run.method.parameters():
        if p.requires_grad:
            p.grad = torch.zeros_like(p)
    run.optimizer.step()
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        save(run)
        seconds.append(time.perf_counter() - begin)
    lock.__exit__(None)
    size = Path(args.output_dir, "checkpoint.pth").stat().st_size / 2**20
    median = sorted(seconds)[2]
    return [("vit_small, AdamW", f"{size:.0f} MiB", f"{median:.2f} s", f"{median / (60 * args.saveckp_minutes):.3%}")]


# --- all of it -----------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("kills", "images", "checkpoints", "disk", "overhead")
    parser.add_argument("--parts", nargs="+", default=parts, choices=parts)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--images", type=int, default=270)
    parser.add_argument("--files", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # threads do not survive a fork
    print(f"torch {torch.__version__}, seed {args.seed}, commit {git_commit()}\n")
    wrong = False
    with tempfile.TemporaryDirectory() as temporary:
        for part in args.parts:
            folder, rng, begin = Path(temporary, part), random.Random(f"{part} {args.seed}"), time.perf_counter()
            folder.mkdir()
            if part == "kills":
                rows = stress_kills(folder, args.kills, rng)
                header = ("setting", "kill -9", "hit", "signals", "newest damaged", "lost", "equal to the undisturbed")
                wrong |= any(row[5] or row[6].split(" of ")[0] != row[6].split(" of ")[1] for row in rows)
            elif part == "images":
                rows = stress_images(folder, args.images, rng)
                header = ("kind", "files", "read", "refused", "not as expected")
                wrong |= any(row[4] for row in rows)
            elif part == "checkpoints":
                rows = stress_checkpoints(folder, args.files, rng)
                header = ("kind", "files", "loaded as saved", "refused", "loaded as something else", "executed")
                wrong |= any(row[4] or row[5] for row in rows)
            elif part == "disk":
                rows, header = stress_disk(folder, rng), ("full disk", "result", "checkpoints", "")
                wrong |= rows[0][2] == "DAMAGED"
            else:
                rows, header = overhead(folder), ("saving", "size", "median of 5", "of 15 minutes")
            print(f"\n{format_table(rows, header)}\n\n({time.perf_counter() - begin:.0f} s)\n", flush=True)
    sys.exit(int(wrong))


if __name__ == "__main__":
    main()
