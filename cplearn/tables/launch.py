"""TODO cplearn.tables.launch."""

import contextlib
import functools
import io
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

import run_with_submitit
from cplearn.errors import Interrupted, UserError
from cplearn.files import remove_quietly, write_text
from cplearn.host import ROOT, end_with_parent
from cplearn.slurm.status import FOLDER, LIVE, job_state, submissions
from cplearn.tables.cells import Cell
from cplearn.text import format_duration

# --- devices ----------------------------------------------------------------------------------------------


@functools.cache
def gpus() -> list[str]:
    """Those that may be used here, by the names that CUDA_VISIBLE_DEVICES gives them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return [x for x in named.split(",") if x] if named else [str(i) for i in range(torch.cuda.device_count())]


@functools.cache
def device_name() -> str:
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"


def command_of(script: str, processes: int) -> list[str]:
    """Without its flags; under torchrun for several processes, and then with no port to agree on."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] * (processes > 1)
    return [sys.executable, *torchrun, str(ROOT / f"{script}.py")]


def environment(slot: int, jobs: int, processes: int) -> dict[str, str]:
    """Each of `jobs` slots has GPUs of its own, or its share of the cores."""
    env = dict(os.environ)
    if gpus():
        env["CUDA_VISIBLE_DEVICES"] = ",".join(gpus()[slot * processes : (slot + 1) * processes])
    else:
        env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // (jobs * processes))))
    return env


def loader_flags(flags: Sequence[str], jobs: int, processes: int) -> list[str]:
    """--num_workers, unless it is given: no loader processes beside CPUs that are all busy."""
    if "--num_workers" in flags:
        return []
    cores = (os.cpu_count() or 1) // (jobs * processes)
    return ["--num_workers", str(min(10, cores) if gpus() else max(0, cores - 1))]


# --- on this machine --------------------------------------------------------------------------------------


def end_of(said: str, code: int) -> tuple[int, str]:
    """Exit code and last word of a script, also from under torchrun, which has a code and last lines of its own."""
    codes = re.findall(r"(?m)^\s*exitcode\s*: (-?\d+)", said)
    words = re.findall(r"(?m)^\w+\.py: (?:error: )?(.+)$", said)
    lines = [x for x in said.splitlines() if x.strip()]
    return (int(codes[-1]) if codes else code), (words or lines or [f"exit code {code}"])[-1]


class Workers:
    """Runs the stages of cells, `jobs` cells side by side, and stops them all when told to."""

    def __init__(self, jobs: int, processes: int):
        self.jobs, self.processes = jobs, processes
        self.stopping = threading.Event()
        self.slots: queue.Queue[int] = queue.Queue()
        for slot in range(jobs):
            self.slots.put(slot)
        self.running: dict[str, subprocess.Popen] = {}
        self.lock = threading.Lock()

    def cell(self, cell: Cell) -> str:
        """Every stage that is not done. Returns "" or what went wrong."""
        slot = self.slots.get()
        try:
            cell.folder.mkdir(parents=True, exist_ok=True)
            remove_quietly(cell.folder / "failed.json")
            for stage, script, flags in cell.stages():
                if cell.done(stage):
                    continue
                code, line = self._stage(cell, stage, script, flags, slot)
                if code == Interrupted.exit_code or self.stopping.is_set():
                    return "stopped"
                if code:
                    what = {"stage": stage, "code": code, "line": line}
                    write_text(cell.folder / "failed.json", json.dumps(what) + "\n")
                    return f"{stage} failed with exit code {code}: {line}"
                if stage == "train":
                    cell.mark_trained()
            return ""
        except (OSError, UserError) as error:  # a full disk
            return str(error)
        finally:
            self.slots.put(slot)

    def _stage(self, cell: Cell, stage: str, script: str, flags: list[str], slot: int) -> tuple[int, str]:
        """Exit code, and the last word."""
        log = cell.folder / f"{stage.replace(' ', '_')}.out"
        command = [*command_of(script, self.processes), *flags, *loader_flags(flags, self.jobs, self.processes)]
        env = environment(slot, self.jobs, self.processes)
        code, line = 0, ""
        for _ in range(30):  # what a killed grid had started may still be saving
            with open(log, "ab") as out, self.lock:
                begin = out.tell()
                if self.stopping.is_set():
                    return Interrupted.exit_code, ""
                child = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env,
                                         start_new_session=True, preexec_fn=end_with_parent)  # fmt: skip
                self.running[cell.name] = child
            code = child.wait()
            with self.lock:
                del self.running[cell.name]
            if code == 0:
                return 0, ""
            with open(log, "rb") as out:
                out.seek(begin)
                code, line = end_of(out.read().decode("utf-8", "replace"), code)
            if code != UserError.exit_code or " is in use by process " not in line:
                break
            time.sleep(2)
        return code, line

    def stop(self) -> None:
        """Once: a second signal would not let training save."""
        with self.lock:
            if self.stopping.is_set():
                return
            self.stopping.set()
            for child in self.running.values():
                with contextlib.suppress(ProcessLookupError):
                    child.terminate()  # training saves before it ends


def run_here(cells: list[Cell], jobs: int, processes: int, after_each: Callable[[], None]) -> None:
    """All cells that are not finished; what fails is printed. Raises `Interrupted` on SIGTERM and SIGINT."""
    todo = [cell for cell in cells if not cell.finished()]
    print(f"{len(cells) - len(todo)} of {len(cells)} cells are finished; {jobs} at a time", flush=True)
    workers, asked = Workers(jobs, processes), []
    before = {
        number: signal.signal(number, lambda number, frame: asked.append(signal.Signals(number).name))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    start = time.time()
    try:
        with ThreadPoolExecutor(jobs) as pool:
            try:
                futures: dict[Future, Cell] = {pool.submit(workers.cell, cell): cell for cell in todo}
                waiting = set(futures)
                while waiting:
                    ended, waiting = wait(waiting, timeout=1, return_when="FIRST_COMPLETED")
                    if asked:
                        workers.stop()
                    for future in ended:
                        cell, problem = futures[future], future.result()
                        if problem == "stopped":
                            continue
                        done = sum(c.finished() for c in cells)
                        took = format_duration(time.time() - start)
                        print(f"{cell.name}: {problem or 'done'}  ({done} of {len(cells)}, {took})", flush=True)
                        after_each()
            except BaseException:
                workers.stop()  # or the pool would run what is left before it lets go
                raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked:
        raise Interrupted(f"{asked[0]}: saved and stopped; the same command goes on")


# --- on SLURM ---------------------------------------------------------------------------------------------


def run_on_slurm(cells: list[Cell], jobs: int, launcher: list[str]) -> None:
    """A job for every stage that is neither done nor submitted. Cells stand in `jobs` lines, each waiting for the one
    before it, however that ended: so many run at a time. Raises `UserError` with Slurm's reason; again goes on."""
    todo = [cell for cell in cells if not cell.finished()]
    there = sorted((x for cell in todo for x in live_jobs(cell)), key=lambda x: x["time"])
    tails = [last["job"] for last in {x["cell"]: x for x in there}.values()][-jobs:]  # of lines that were begun
    lines = (tails + [""] * jobs)[:jobs]
    count = line = 0
    for cell in todo:
        live = {(x["script"], x["place"]): x["job"] for x in live_jobs(cell)}
        begin = before = "" if live else lines[line]
        new, trained = [], ""
        for stage, script, flags in cell.stages():
            if cell.done(stage):
                continue
            job = live.get((script, cell.place(stage)))
            if job is None:
                needs = [f"afterok:{trained}"] * bool(trained) + [f"afterany:{before}"] * (before not in ("", trained))
                command = ["--script", script, *launcher, "--name", cell.name]
                command += ["--dependency", ",".join(needs)] if needs else []
                with contextlib.redirect_stdout(io.StringIO()):
                    (job,) = run_with_submitit.main([*command, *flags])
                new.append(job)
            before = job
            trained = job if stage == "train" else trained
        if live:
            print(f"{cell.name}: jobs {min(live.values(), key=int)} to {max(live.values(), key=int)} are there already")
        if new:
            print(f"{cell.name}: jobs {new[0]} to {new[-1]}" + f", after {begin}" * bool(begin), flush=True)
            count += len(new)
        if new and not live:
            lines[line], line = before, (line + 1) % jobs
    print(f"{count} jobs submitted")


def live_jobs(cell: Cell) -> list[dict]:
    """Jobs of a cell that wait or run, in the order of their submission: job, script, place, cell, time."""
    found = []
    for place in dict.fromkeys(cell.place(stage) for stage, _, _ in cell.stages()):
        folder = place / FOLDER
        for x in submissions(folder):
            if job_state(folder, x)["JobState"] in LIVE:
                found.append(
                    {"job": x["job"], "script": x["script"], "place": place, "cell": cell.name, "time": x["time"]}
                )
    return sorted(found, key=lambda x: x["time"])
