"""Start the stages of cells: one after another on this machine, or as SLURM jobs that wait for one another."""

import contextlib
import functools
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

from cplearn.errors import ExpectedError, Interrupted, UserError
from cplearn.files import read_json, remove_quietly, write_text
from cplearn.flags import expand_recipes
from cplearn.host import ROOT, end_with_parent, usable_cores
from cplearn.slurm.submit import JobRequest, Resources, submit
from cplearn.tables.cells import Cell, Grid, Stage
from cplearn.tables.status import CellState
from cplearn.text import format_duration

# --- devices and commands ---------------------------------------------------------------------------------


@functools.cache
def gpus() -> list[str]:
    """Return the GPUs that may be used here, by the names that CUDA_VISIBLE_DEVICES gives them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return [x for x in named.split(",") if x] if named else [str(i) for i in range(torch.cuda.device_count())]


@functools.cache
def device_name() -> str:
    """Return the first GPU's name, or "cpu"."""
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"


def command_of(script: str, processes: int) -> list[str]:
    """Return the command of a script without its flags; several processes run under torchrun, on a free port."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] * (processes > 1)
    return [sys.executable, *torchrun, str(ROOT / f"{script}.py")]


def environment(slot: int, jobs: int, processes: int) -> dict[str, str]:
    """Return the environment of one of `jobs` slots: its GPUs, and its share of the cores.

    Slots of one process share GPUs where there are more of them than GPUs (--cells_per_gpu), dealt out in turn.
    """
    env = dict(os.environ)
    if gpus():
        first = slot % len(gpus()) if processes == 1 else slot * processes
        env["CUDA_VISIBLE_DEVICES"] = ",".join(gpus()[first : first + processes])
    if not gpus() or jobs > len(gpus()):
        env.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // (jobs * processes))))
    return env


def loader_flags(flags: Sequence[str], jobs: int, processes: int) -> list[str]:
    """Return --num_workers, unless it is given: no loader processes beside CPUs that are all busy."""
    if any(flag.split("=")[0] == "--num_workers" for flag in expand_recipes(flags)):
        return []
    cores = usable_cores() // (jobs * processes)
    return ["--num_workers", str(min(10, cores) if gpus() else max(0, cores - 1))]


def last_message(output: str, code: int) -> tuple[int, str]:
    """Return exit code and last message of a script, also under torchrun, which adds a code and lines of its own."""
    codes = re.findall(r"(?m)^\s*exitcode\s*: (-?\d+)", output)
    messages = re.findall(r"(?m)^\w+\.py: (?:error: )?(.+)$", output)
    lines = [x for x in output.splitlines() if x.strip()]
    return (int(codes[-1]) if codes else code), (messages or lines or [f"exit code {code}"])[-1]


# --- on this machine --------------------------------------------------------------------------------------


class Workers:
    """Run the stages of cells, `jobs` cells side by side, until `stop`."""

    def __init__(self, jobs: int, processes: int):
        self.jobs, self.processes = jobs, processes
        self.stopping = threading.Event()
        self.slots: queue.Queue[int] = queue.Queue()
        for slot in range(jobs):
            self.slots.put(slot)
        self.running: dict[str, subprocess.Popen] = {}
        self.lock = threading.Lock()

    def run_cell(self, cell: Cell, missing: Sequence[str]) -> str:
        """Run the missing stages of a cell. Returns "" or what went wrong."""
        slot = self.slots.get()
        try:
            cell.folder.mkdir(parents=True, exist_ok=True)
            failed_before = read_json(cell.folder / "failed.json").get("times", 0)
            remove_quietly(cell.folder / "failed.json")
            for stage in cell.stages():
                if stage.name not in missing:
                    continue
                code, line = self._run_stage(cell, stage, slot)
                if code == Interrupted.exit_code or self.stopping.is_set():
                    return "stopped"
                if code:
                    times = 1 + (failed_before if isinstance(failed_before, int) else 0)
                    failure = {"stage": stage.name, "code": code, "line": line, "times": times}
                    write_text(cell.folder / "failed.json", json.dumps(failure) + "\n")
                    return f"{stage.name} failed with exit code {code}: {line}"
                if stage.name == "train":
                    cell.mark_trained()
            return ""
        except (OSError, ExpectedError) as error:  # a full disk
            return str(error)
        finally:
            self.slots.put(slot)

    def _run_stage(self, cell: Cell, stage: Stage, slot: int) -> tuple[int, str]:
        """Return exit code and last message."""
        log = cell.folder / f"{stage.name.replace(' ', '_')}.out"
        more = loader_flags(stage.flags, self.jobs, self.processes)
        command = [*command_of(stage.script, self.processes), *stage.flags, *more]
        env = environment(slot, self.jobs, self.processes)
        code, line = 0, ""
        for _ in range(30):  # the processes of a grid that was killed may still be saving
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
                code, line = last_message(out.read().decode("utf-8", "replace"), code)
            if code != UserError.exit_code or " is in use by process " not in line:
                break
            time.sleep(2)
        return code, line

    def stop(self) -> None:
        """Stop all stages, once: a second signal would not let training save."""
        with self.lock:
            if self.stopping.is_set():
                return
            self.stopping.set()
            for child in self.running.values():
                with contextlib.suppress(ProcessLookupError):
                    child.terminate()  # training saves before it ends


@contextlib.contextmanager
def _collect_signals() -> Iterator[list[str]]:
    """Append the names of SIGTERM and SIGINT to a list instead of stopping this process."""
    received: list[str] = []

    def append(number: int, frame) -> None:
        received.append(signal.Signals(number).name)

    before = {number: signal.signal(number, append) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_here(grid: Grid, states: dict[str, CellState], jobs: int, after_each: Callable[[], None]) -> None:
    """Run all cells that are not complete, and print what fails. Raises `Interrupted` on SIGTERM and SIGINT."""
    todo = [cell for cell in grid.cells if not states[cell.name].complete]
    total, done, start = len(grid.cells), len(grid.cells) - len(todo), time.time()
    print(f"{done} of {total} cells are finished; {jobs} at a time", flush=True)
    workers = Workers(jobs, grid.settings.ngpus)
    with _collect_signals() as received, ThreadPoolExecutor(jobs) as pool:
        try:
            futures: dict[Future, Cell] = {
                pool.submit(workers.run_cell, cell, states[cell.name].missing): cell for cell in todo
            }
            waiting = set(futures)
            while waiting:
                ended, waiting = wait(waiting, timeout=1, return_when="FIRST_COMPLETED")
                if received:
                    workers.stop()
                for future in ended:
                    cell, problem = futures[future], future.result()
                    if problem == "stopped":
                        continue
                    done += not problem
                    took = format_duration(time.time() - start)
                    print(f"{cell.name}: {problem or 'done'}  ({done} of {total}, {took})", flush=True)
                    after_each()
        except BaseException:
            workers.stop()  # or the pool would run all remaining cells before it lets go
            raise
    if received:
        raise Interrupted(f"{received[0]}: saved and stopped; the same command goes on")


# --- on SLURM ---------------------------------------------------------------------------------------------


def run_on_slurm(
    grid: Grid, states: dict[str, CellState], jobs: int, resources: Resources, dependency: str | None
) -> None:
    """Submit a job for every stage that has no result and no job.

    Cells form `jobs` chains, so that as many run at a time: each waits for the cell before it, however that ended, and
    the first ones for `dependency`. Raises `UserError` with Slurm's reason; called again, it submits the others.
    """
    todo = [cell for cell in grid.cells if not states[cell.name].complete]
    begun = [live for cell in todo if (live := states[cell.name].live_jobs)]
    begun.sort(key=lambda live: live[0].entry["time"])
    chains = [f"afterany:{live[-1].number}" for live in begun][-jobs:]
    chains += [dependency or ""] * (jobs - len(chains))
    count = k = 0
    for cell in todo:
        live = [job.number for job in states[cell.name].live_jobs]
        after = "" if live else chains[k]
        submitted, last = _submit_cell(cell, states[cell.name], after, resources)
        if live:
            print(f"{cell.name}: jobs {min(live, key=int)} to {max(live, key=int)} are there already")
        if submitted:
            waits = ", after " + after.rpartition(":")[2] if after else ""
            print(f"{cell.name}: jobs {submitted[0]} to {submitted[-1]}{waits}", flush=True)
        if submitted and not live:
            chains[k], k = f"afterany:{last}", (k + 1) % jobs
        count += len(submitted)
    print(f"{count} jobs submitted")


def _submit_cell(cell: Cell, state: CellState, after: str, resources: Resources) -> tuple[list[str], str]:
    """Submit the missing stages of a cell that have no job, one after the other. Returns the new jobs and the last one.

    Evaluations need the training's job to end well.
    """
    live = {job.stage: job.number for job in state.live_jobs}
    submitted, last, trained = [], "", ""
    for stage in cell.stages():
        if stage.name not in state.missing:
            continue
        if stage.name in live:
            last = live[stage.name]
        else:
            needs = [f"afterok:{trained}"] * bool(trained)
            needs += [after] * bool(after) if not last else [f"afterany:{last}"] * (last != trained)
            argv = expand_recipes(stage.flags)  # a job that waits in the queue runs what they say now
            request = JobRequest(stage.script, argv, stage.place, resources, cell.name, ",".join(needs) or None)
            last = submit(request)
            submitted.append(last)
        trained = last if stage.name == "train" else trained
    return submitted, last
