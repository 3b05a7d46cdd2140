"""What a run survives, tried for real: kill -9, signals, lost ranks, damaged checkpoints, a full disk.

    python benchmarks/stress.py [--parts kills disk] [--kills 100] [--seed 0]

    kills   runs of 1, 2 and 3 processes killed at random moments, a third of them while a checkpoint is written, now
            and then by a signal to stop, or with the newest checkpoint damaged; each goes on until the next kill, and
            the last must equal the run that nobody disturbed, bit for bit
    disk    a file system that is too small (tmpfs, as root)

Everything is drawn from --seed. Exits with 1 if anything is not as expected. Hostile files and flags: `fuzz.py`.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import harness
from hostile import damage

import main_cplearn
from cplearn import checkpoints
from cplearn.host import git_commit
from cplearn.text import format_table

# Drop path, batch norm, a prior buffer and an optimizer with state: whatever a continuation could get wrong.
RUN = ["--arch", "timm:test_vit", "--drop_path_rate", "0.3", "--image_size", "32", "--out_dim", "64", "--embed_dim",
       "32", "--epochs", "3", "--warmup_epochs", "1", "--batch_size_per_gpu", "48", "--prior_buffer", "3",
       "--print_freq", "7", "--saveckp_freq", "1", "--device", "cpu"]  # fmt: skip
SETTINGS = ((1, 0, "adamw"), (1, 2, "sgd"), (2, 0, "adamw"), (2, 1, "lars"), (3, 0, "adamw"))  # ranks, workers


# --- runs ----------------------------------------------------------------------------------------------


def start(out: Path, world: int, *more: str, output: Path | None = None) -> list[BaseProcess]:
    """Start `world` processes of main_cplearn.py on the folder `out`; they print to output.txt beside it."""
    output = output or out.parent / "output.txt"
    meeting = tempfile.mktemp(dir=output.parent)
    argv = [*RUN, "--output_dir", str(out), "--dist_url", f"file://{meeting}", "--dist_timeout", "0.3", *more]
    ranks = [{"RANK": str(k), "WORLD_SIZE": str(world), "LOCAL_RANK": str(k), "LOCAL_WORLD_SIZE": str(world)}
             for k in range(world)] if world > 1 else [{}]  # fmt: skip
    return [harness.start("main_cplearn", main_cplearn.main, argv, output, **rank) for rank in ranks]


def finish(processes: list[BaseProcess], out: Path, seconds: float = 300) -> list[int]:
    """Return exit codes; raise if a process hangs, with the end of what the run in `out` printed."""
    codes = harness.finish(processes, seconds)
    if harness.HUNG in codes:
        raise RuntimeError(f"a process hangs, {codes}: {printed(out)}")
    return codes


def printed(out: Path) -> str:
    return (out.parent / "output.txt").read_text()[-1500:]


def state_and_log(out: Path) -> tuple[dict, list[dict]]:
    state = checkpoints.load(out / "checkpoint.pth")
    log = [json.loads(line) for line in (out / "log.txt").read_text().splitlines()]
    timed = ("images_per_second", "data_wait", "seconds", "monitor_seconds", "first_step_seconds")
    return state, [{k: v for k, v in record.items() if k not in timed} for record in log]


def same_run(a: Path, b: Path) -> bool:
    """Compare weights, optimizer, counters, log lines and the numbered checkpoints, bit by bit."""
    (state_a, log_a), (state_b, log_b) = state_and_log(a), state_and_log(b)
    numbered = [{p.name: checkpoints.load(p)["model"] for p in out.glob("checkpoint0*.pth")} for out in (a, b)]
    keys = ("step", "epoch", "model", "optimizer", "scaler")
    return log_a == log_b and harness.same(*numbered) and all(harness.same(state_a[k], state_b[k]) for k in keys)


# --- kills ---------------------------------------------------------------------------------------------


def wait_for_moment(processes: list[BaseProcess], out: Path, seconds: float, writing: bool) -> bool:
    """Wait some seconds, or then until a checkpoint is being written. Return False if a process ended before."""
    end = time.monotonic() + seconds
    while time.monotonic() < end or (writing and not any(out.glob(".checkpoint*.tmp"))):
        if not all(process.is_alive() for process in processes):
            return False
        time.sleep(0.0005)
    return True


def disturb(processes: list[BaseProcess], rng: random.Random) -> str:
    """kill -9 of one rank or all, with or without its workers; or a signal to stop, to one rank. Return which."""
    victims = processes if rng.random() < 0.5 else [rng.choice(processes)]
    if rng.random() < 0.2:
        os.kill(victims[0].pid, rng.choice((signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)))
        return "signal"
    with_workers = rng.random() < 0.5
    for process in victims:
        harness.kill(process) if with_workers else os.kill(process.pid, signal.SIGKILL)
    return "kill"


def as_expected(how: str, codes: list[int]) -> bool:
    """Return whether ranks may end with these codes after being disturbed so."""
    if how == "kill":
        return all(code in (0, -9, 6) for code in codes)
    # All saved, or finished; or the signal came while they were starting.
    return set(codes) in ({75}, {0}) or all(code in (-15, -10, -12, 130, 6) for code in codes)


class Victim:
    """A run that is disturbed and started again until it has had enough."""

    def __init__(self, out: Path, world: int, more: list[str], rng: random.Random, counts: Counter, where: Counter):
        self.out, self.world, self.more, self.rng, self.counts, self.where = out, world, more, rng, counts, where
        self.chances, self.reached, self.started = rng.randrange(3, 9), 0, []

    def go_on(self, kills: int) -> bool:
        """Start the run, and disturb it unless it had enough. Return whether it has come to its end."""
        processes = start(self.out, self.world, *self.more)
        self.started += processes
        quietly = self.chances == 0 or self.counts["kill"] >= kills
        seconds, writing = self.rng.uniform(0.2, 3.0), self.rng.random() < 1 / 3
        if quietly or not wait_for_moment(processes, self.out, seconds, writing):
            codes = finish(processes, self.out)
            if any(codes):
                raise RuntimeError(f"ended on its own with {codes}: {printed(self.out)}")
            return True
        how = disturb(processes, self.rng)
        codes = finish(processes, self.out)
        if not as_expected(how, codes):
            raise RuntimeError(f"exit codes {codes} after a {how}: {printed(self.out)}")
        if any(codes):
            self.look(how)
        return not any(codes)

    def look(self, how: str) -> None:
        """Count what the disturbance met and what is left; damage the newest checkpoint now and then."""
        half = any(self.out.glob(".checkpoint*.tmp")) or (self.out / "checkpoint.pth.new").exists()
        saved = checkpoints.load_run(self.out) if self.out.exists() else None
        step = saved[0]["step"] if saved else 0
        self.chances -= 1
        self.counts[how] += 1
        if how == "kill":
            self.where["checkpoint" if half else "start" if step == self.reached else "step"] += 1
        self.counts["lost"] += step < self.reached
        self.reached = step
        if saved and self.rng.random() < 0.1 and (self.out / "checkpoint_previous.pth").exists():
            damage(self.out / "checkpoint.pth", self.rng)
            self.counts["damaged"] += 1
            self.reached = checkpoints.load(self.out / "checkpoint_previous.pth")["step"]


def stress_kills(folder: Path, kills: int, rng: random.Random) -> tuple[tuple, list[tuple], bool]:
    """Return columns, a row for each setting, and whether all is as expected."""
    rows = []
    for world, workers, optimizer in SETTINGS:
        name = f"{world} process{'es' * (world > 1)}, {workers} workers each, {optimizer}"
        more = ["--num_workers", str(workers), "--optimizer", optimizer]
        quiet = folder / f"quiet{world}{workers}" / "run"
        quiet.parent.mkdir(parents=True)
        codes = finish(start(quiet, world, *more, "--saveckp_minutes", "0"), quiet)
        if any(codes):
            raise RuntimeError(f"{name}: the undisturbed run ended with {codes}: {printed(quiet)}")
        more += ["--saveckp_minutes", "0.002"]
        counts, where, equal = Counter(), Counter(), []
        while counts["kill"] < -(-kills // len(SETTINGS)):  # the last is left alone when there were enough
            out = folder / f"killed{world}{workers}_{len(equal)}" / "run"
            out.parent.mkdir(parents=True)
            victim = Victim(out, world, more, rng, counts, where)
            while not victim.go_on(-(-kills // len(SETTINGS))):
                pass
            if not harness.gone(victim.started):
                raise RuntimeError(f"{name}: processes are left behind")
            equal.append(same_run(quiet, out))
        hits = ", ".join(f"{n} {place}" for place, n in sorted(where.items()))
        rows.append((name, counts["kill"], hits, counts["signal"], counts["damaged"], counts["lost"],
                     f"{sum(equal)} of {len(equal)}", all(equal) and not counts["lost"]))  # fmt: skip
        print(f"{name}: {counts['kill']} kills, {sum(equal)} of {len(equal)} runs equal", flush=True)
    columns = ("setting", "kill -9", "hit", "signals", "newest damaged", "lost", "equal to the undisturbed")
    return columns, [row[:-1] for row in rows], all(row[-1] for row in rows)


# --- a full disk ---------------------------------------------------------------------------------------


def stress_disk(folder: Path, kills: int, rng: random.Random) -> tuple[tuple, list[tuple], bool]:
    """Run on a small tmpfs beside a file that leaves too little space, and again when it is gone."""
    small, columns = folder / "small", ("full disk", "result", "checkpoints")
    small.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400m", "tmpfs", small]).returncode:
        return columns, [("tmpfs", "not tried: needs root and mount", "")], True
    try:
        quiet, out, codes, right = folder / "quiet", small / "run", [], True
        more = ("--num_workers", "0", "--saveckp_minutes", "0")
        finish(start(quiet, 1, *more), quiet)
        size = (quiet / "checkpoint.pth").stat().st_size
        for free in (0, 0.5, 1.5, 2.5):  # checkpoints; a run holds three: new, latest, and the one before
            shutil.rmtree(out, ignore_errors=True)
            (small / "ballast").write_bytes(bytes(int(shutil.disk_usage(small).free - free * size)))
            codes += finish(start(out, 1, *more, output=folder / "output.txt"), folder / "run")
            saved = checkpoints.load_run(out) if out.exists() else None
            print(f"room for {free} checkpoints: exit code {codes[-1]}, step {saved[0]['step'] if saved else 0} kept")
            right &= codes[-1] == 4 and (saved is None or saved[2] is None)
            (small / "ballast").unlink()
            right &= finish(start(out, 1, *more), out) == [0] and same_run(quiet, out)
        return columns, [("tmpfs", f"exit codes {codes}", "kept, then equal" if right else "DAMAGED")], right
    finally:
        subprocess.run(["umount", small])


PARTS = {"kills": stress_kills, "disk": stress_disk}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(f"torch {torch.__version__}, seed {args.seed}, commit {git_commit()}\n")
    torch.set_num_threads(1)
    right = []
    with tempfile.TemporaryDirectory() as temporary:
        for part in args.parts:
            folder, rng, begin = Path(temporary, part), random.Random(f"{part} {args.seed}"), time.perf_counter()
            folder.mkdir()
            columns, rows, as_it_should = PARTS[part](folder, args.kills, rng)
            print(f"\n{format_table(rows, columns)}\n\n({time.perf_counter() - begin:.0f} s)\n", flush=True)
            right.append(as_it_should)
    sys.exit(0 if all(right) else 1)


if __name__ == "__main__":
    main()
