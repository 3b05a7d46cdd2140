"""Run the cells of a grid: side by side on this machine, or as SLURM jobs, one for each cell."""

import functools
import os
import signal
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from cplearn.errors import Interrupted
from cplearn.host import usable_cores
from cplearn.slurm.submit import JobRequest, Resources, submit
from cplearn.tables.child import Children
from cplearn.tables.grid import Cell
from cplearn.tables.status import State
from cplearn.text import format_duration
from cplearn.training.stop import StopSignals

CELL = "cplearn.tables.cell"  # what a job or a process of a cell runs

# --- devices ----------------------------------------------------------------------------------------------


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


class Share(NamedTuple):
    """How cells share this machine."""

    processes: int  # of every cell
    jobs: int  # cells side by side
    per_gpu: int = 1  # cells that share a GPU, on which as many train meanwhile

    def environment(self, slot: int) -> dict[str, str]:
        """Return the environment of one of `jobs` slots: its GPUs, and its share of the cores.

        Slots of one process share GPUs where there are more of them than GPUs (--cells_per_gpu), dealt out in turn.
        """
        env = dict(os.environ)
        if gpus():
            first = slot % len(gpus()) if self.processes == 1 else slot * self.processes
            env["CUDA_VISIBLE_DEVICES"] = ",".join(gpus()[first : first + self.processes])
        if not gpus() or self.jobs > len(gpus()):
            env.setdefault("OMP_NUM_THREADS", str(max(1, self._cores())))
        return env

    def loader_processes(self) -> int:
        """Return --num_workers of each process: none beside CPUs that are all busy."""
        return min(10, self._cores()) if gpus() else max(0, self._cores() - 1)

    def _cores(self) -> int:
        return usable_cores() // (self.jobs * self.processes)


# --- on this machine --------------------------------------------------------------------------------------


def run_here(states: Sequence[State], share: Share, after_each: Callable[[], None] = lambda: None) -> None:
    """Run all cells that are not complete, and print what fails. Raises `Interrupted` after a signal."""
    todo = [state.cell for state in states if not state.complete]
    total, done, start = len(states), len(states) - len(todo), time.time()
    print(f"{done} of {total} cells are finished; {share.jobs} at a time", flush=True)
    running: dict[int, tuple[Cell, Children]] = {}  # by slot
    with StopSignals() as signals:
        told = False
        try:
            while running or (todo and not signals.name):
                for slot in range(share.jobs):
                    if todo and slot not in running and not signals.name:
                        cell = todo.pop(0)
                        running[slot] = cell, _start(cell, share, slot)
                if signals.name and not told:
                    _stop(running)
                    told = True
                for slot, (cell, children) in list(running.items()):
                    if (end := children.poll()) is None:
                        continue
                    del running[slot]
                    done += end.code == 0
                    if end.code == 0 or not (signals.name or end.code == Interrupted.exit_code):
                        took = format_duration(time.time() - start)
                        print(f"{cell.name}: {end.line or 'done'}  ({done} of {total}, {took})", flush=True)
                        after_each()
                time.sleep(0.1)
        finally:  # after an error nothing is left running
            _stop(running)
            for _, children in running.values():
                children.wait()
    if signals.name:
        raise Interrupted(f"{signals.name}: saved and stopped; the same command goes on", signals.name)


def _start(cell: Cell, share: Share, slot: int) -> Children:
    """Start the command of a cell, with the devices of its slot; it prints into cell.out. Raises `WriteError`."""
    cell.write(share.processes)
    flags = [str(cell.folder), "--num_workers", str(share.loader_processes())]
    with open(cell.folder / "cell.out", "ab") as out:
        return Children(CELL, flags, env=share.environment(slot), out=out)


def _stop(running: dict[int, tuple[Cell, Children]]) -> None:
    for _, children in running.values():
        children.stop(signal.SIGTERM)  # training saves before it ends


# --- on SLURM ---------------------------------------------------------------------------------------------


def run_on_slurm(states: Sequence[State], jobs: int, resources: Resources, dependency: str | None) -> None:
    """Submit a job for every cell that is not complete and has none.

    Each waits for the end of the one `jobs` before it, so that as many run at a time, and the first for `dependency`.
    Raises `UserError` with Slurm's reason; called again, it submits the others.
    """
    todo = [state for state in states if not state.complete]
    live = sorted((state for state in todo if state.live_job), key=lambda state: state.job.entry["time"])
    numbers = [state.live_job for state in live]
    for state in todo:
        cell = state.cell
        if state.live_job:
            print(f"{cell.name}: job {state.live_job} is there already")
            continue
        after = f"afterany:{numbers[-jobs]}" if len(numbers) >= jobs else dependency
        cell.write(resources.ngpus)
        numbers.append(submit(JobRequest(CELL, [str(cell.folder)], cell.folder, resources, cell.name, after, tasks=1)))
        print(f"{cell.name}: job {numbers[-1]}" + (f", after {after.rpartition(':')[2]}" if after else ""), flush=True)
    print(f"{len(numbers) - len(live)} jobs submitted")
