"""What a run shows while it trains: averages kept on the device, and a bar or plain lines."""

import sys
import time

import torch
from torch import Tensor

import distributed


class Meter:
    """Averages of named scalars, kept on the device until they are read."""

    def __init__(self):
        self.totals: dict[str, Tensor] = {}
        self.recent: dict[str, Tensor] = {}
        self.steps = self.recent_steps = 0

    def add(self, terms: dict[str, Tensor]) -> None:
        for name, value in terms.items():
            self.recent[name] = self.recent[name] + value if name in self.recent else value.clone()
        self.recent_steps += 1

    def read(self) -> dict[str, float]:
        """Averages since the last reading, over all ranks."""
        values = self._flush()
        return {name: (value / self._last_steps).item() for name, value in values.items()}

    def average(self) -> dict[str, float]:
        """Averages since the beginning, over all ranks."""
        if self.recent_steps:
            self._flush()
        return {name: (value / self.steps).item() for name, value in self.totals.items()}

    def _flush(self) -> dict[str, Tensor]:
        names = list(self.recent)
        stacked = distributed.mean_over_ranks(torch.stack([self.recent[n].double() for n in names]))
        values = dict(zip(names, stacked, strict=True))
        for name, value in values.items():
            self.totals[name] = self.totals[name] + value if name in self.totals else value
        self.steps += self.recent_steps
        self._last_steps = self.recent_steps
        self.recent, self.recent_steps = {}, 0
        return values


class Progress:
    """A tqdm bar on a terminal; elsewhere (a SLURM log) one plain line every ten seconds. Rank 0 only."""

    SECONDS = 10.0

    def __init__(self, epoch: int, epochs: int, steps: int):
        self.label, self.steps = f"epoch {epoch + 1}/{epochs}", steps
        self.last = time.perf_counter()
        self.bar = None
        if distributed.is_main() and sys.stdout.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=steps, desc=self.label, leave=False, file=sys.stdout, dynamic_ncols=True)

    def show(self, done: int, values: dict[str, float], lr: float, rate: float, wait: float) -> None:
        if not distributed.is_main():
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
