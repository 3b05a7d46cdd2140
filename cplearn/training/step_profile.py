"""Where the time of a training step goes (--profile): a trace of twenty steps, and the ten largest costs."""

from pathlib import Path

import torch

from cplearn.distributed import collectives
from cplearn.text import format_table

SKIPPED, STEPS = 5, 20  # of the steps of this process: the first ones pay for all that happens once


class StepProfile:
    """Counts steps, profiles `STEPS` of them on rank 0 if wanted, and prints and writes what they cost."""

    def __init__(self, wanted: bool, folder: str, device: torch.device):
        self.path, self.device, self.done = Path(folder) / "profile.json", device, 0
        self.wanted = wanted and collectives.is_main()
        self._profiler = None

    def step(self) -> None:
        """Tell that a step is done."""
        self.done += 1
        if not self.wanted:
            return
        if self.done == SKIPPED:
            kinds = [torch.profiler.ProfilerActivity.CPU]
            kinds += [torch.profiler.ProfilerActivity.CUDA] if self.device.type == "cuda" else []
            self._profiler = torch.profiler.profile(activities=kinds)
            self._profiler.start()
        elif self.done == SKIPPED + STEPS:
            self.close()

    def close(self) -> None:
        """Write and print what was profiled, also of a run that ends before `STEPS` steps."""
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        profiler.export_chrome_trace(str(self.path))
        steps = max(1, self.done - SKIPPED)
        print(f"\n{steps} steps, the ten largest costs (trace: {self.path}, for chrome://tracing or ui.perfetto.dev)\n")
        print(format_table(largest_costs(profiler.key_averages(), steps), ("operation", "ms a step", "share", "calls")))


def largest_costs(averages, steps: int, count: int = 10) -> list[tuple[str, str, str, str]]:
    """Return name, milliseconds and calls a step, and share of all of the operations that take longest themselves."""

    def time(event) -> float:  # microseconds, without what it calls
        return max(event.self_cpu_time_total, getattr(event, "self_device_time_total", 0))

    total = sum(map(time, averages)) or 1.0
    largest = sorted(averages, key=time, reverse=True)[:count]
    return [
        (x.key[:60], f"{time(x) / 1e3 / steps:.2f}", f"{time(x) / total:.1%}", f"{x.count / steps:g}") for x in largest
    ]
