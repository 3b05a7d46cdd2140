"""How far a run is: averages kept on the device, the state of an epoch, and a bar or plain lines."""

import sys
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cplearn.distributed import collectives


class Meter:
    """Averages of named scalars over the steps that were taken, kept on the device until they are read."""

    def __init__(self):
        self.totals: dict[str, Tensor] = {}  # over all ranks, until the last reading
        self.recent: dict[str, Tensor] = {}  # of this rank, since then

    def add(self, terms: dict[str, Tensor], skipped: Tensor | None = None) -> None:
        """Add one step's scalars, unless `skipped`, a bool on the device, is true."""
        terms = {"": torch.ones_like(next(iter(terms.values()))), **terms}  # counts the steps
        for name, value in terms.items():
            if skipped is not None:
                value = torch.where(skipped, torch.zeros_like(value), value)
            value = value.double()  # readings at other intervals change no digit that matters
            self.recent[name] = self.recent[name] + value if name in self.recent else value.clone()

    def read(self) -> dict[str, float]:
        """Return averages since the last reading, over all ranks; NaN if every step was skipped."""
        return _averages(self._flush())

    def average(self) -> dict[str, float]:
        """Return averages since the beginning, over all ranks."""
        if self.recent:
            self._flush()
        return _averages(self.totals)

    def _flush(self) -> dict[str, Tensor]:
        names = list(self.recent)
        stacked = collectives.mean_over_ranks(torch.stack([self.recent[n] for n in names]))
        values = dict(zip(names, stacked, strict=True))
        for name, value in values.items():
            self.totals[name] = self.totals[name] + value if name in self.totals else value
        self.recent = {}
        return values

    def state(self) -> dict:
        """Return what a continuation needs. Every rank must call it: `recent` is each rank's own."""
        recent = {name: value.cpu() for name, value in self.recent.items()}
        return {
            "totals": {name: value.cpu() for name, value in self.totals.items()},
            "recent": collectives.gather_objects(recent),
        }

    def load(self, state: dict, device: torch.device) -> None:
        self.totals = {name: value.to(device) for name, value in state["totals"].items()}
        self.recent = {name: value.to(device) for name, value in state["recent"][collectives.rank()].items()}


def _averages(sums: dict[str, Tensor]) -> dict[str, float]:
    return {name: (value / sums[""]).item() for name, value in sums.items() if name}


class Stopwatch:
    """Wall-clock seconds spent in a `with` block, added up."""

    def __init__(self):
        self.seconds = 0.0

    def __enter__(self):
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_):
        self.seconds += time.perf_counter() - self._start


@dataclass
class EpochState:
    """How far the current epoch is, over all its parts if it was interrupted. Saved with the run."""

    meter: Meter = field(default_factory=Meter)
    skipped: int = 0  # steps
    replaced: int = 0  # images
    seconds: float = 0.0
    waiting: Stopwatch = field(default_factory=Stopwatch)  # for data

    def state(self) -> dict:
        """Return what a continuation needs. Every rank must call it."""
        return {
            "meter": self.meter.state(),
            "skipped": self.skipped,
            "replaced": self.replaced,
            "seconds": self.seconds,
            "waiting": self.waiting.seconds,
        }

    def load(self, state: dict, device: torch.device) -> None:
        self.meter.load(state["meter"], device)
        self.skipped, self.replaced, self.seconds = state["skipped"], state["replaced"], state["seconds"]
        self.waiting.seconds = state["waiting"]


class DeferredRead:
    """Numbers of one step, read by the host at the next, so that it never waits for the device it has just fed."""

    def __init__(self):
        self._waiting: tuple[Tensor, torch.cuda.Event | None] | None = None

    def push(self, x: Tensor) -> list[float] | None:
        """Start copying this step's numbers to the host; return those of the step before. Shape: (k,)."""
        before, event = self.flush(), None
        if x.is_cuda:
            x = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._waiting = (x, event)
        return before

    def flush(self) -> list[float] | None:
        """Return what is still under way, if anything."""
        if self._waiting is None:
            return None
        (x, event), self._waiting = self._waiting, None
        if event is not None:
            event.synchronize()
        return x.tolist()


class Progress:
    """A tqdm bar on a terminal; elsewhere (a SLURM log) one plain line every ten seconds. Rank 0 only."""

    SECONDS = 10.0

    def __init__(self, epoch: int, epochs: int, steps: int):
        self.label, self.steps = f"epoch {epoch + 1}/{epochs}", steps
        self.last = time.perf_counter()
        self.bar = None
        if collectives.is_main() and sys.stdout.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=steps, desc=self.label, leave=False, file=sys.stdout, dynamic_ncols=True)

    def show(self, done: int, values: dict[str, float], lr: float, rate: float, wait: float) -> None:
        if not collectives.is_main():
            return
        terms = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        if self.bar is not None:
            self.bar.set_postfix_str(f"{terms}  lr {lr:.2g}  {rate:.0f} img/s  wait {wait:.0%}", refresh=False)
            self.bar.update(done - self.bar.n)
        elif time.perf_counter() - self.last >= self.SECONDS:
            self.last = time.perf_counter()
            print(
                f"{self.label}  step {done}/{self.steps}  {terms}  lr {lr:.2g}  {rate:.0f} img/s  wait {wait:.0%}",
                flush=True,
            )

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
