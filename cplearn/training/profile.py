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
            if self.wanted and self.done < SKIPPED:
                print(f"--profile: {self.done} steps are too few, the first {SKIPPED} are not profiled")
            return
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        profiler.export_chrome_trace(str(self.path))
        steps = max(1, self.done - SKIPPED)
        print(f"\n{steps} steps, the ten largest costs (trace: {self.path}, for chrome://tracing or ui.perfetto.dev)\n")
        print(format_table(largest_costs(profiler.key_averages(), steps), ("operation", "ms a step", "share", "calls")))


def device_times(averages) -> dict[str, tuple[float, int]]:
    """Return microseconds and calls of each kernel on a GPU; {} on a CPU. Kernels run one after another."""
    kernels = (x for x in averages if x.device_type != torch.autograd.DeviceType.CPU)
    return {x.key: (x.self_device_time_total, x.count) for x in kernels if not getattr(x, "is_user_annotation", False)}


def largest_costs(averages, steps: int, count: int = 10) -> list[tuple[str, str, str, str]]:
    """Return name, milliseconds and calls a step, and share of all of what takes longest itself.

    That is kernels where there is a GPU, as it is what the step waits for, else operations without those they call.
    """
    times = device_times(averages) or {x.key: (x.self_cpu_time_total, x.count) for x in averages}
    total = sum(time for time, _ in times.values()) or 1.0
    largest = sorted(times.items(), key=lambda x: x[1][0], reverse=True)[:count]
    return [
        (name[:60], f"{time / 1e3 / steps:.2f}", f"{time / total:.1%}", f"{calls / steps:g}")
        for name, (time, calls) in largest
    ]
