"""Collapse, seen while it happens: code usage and, after an epoch, the probe; the verdict; which epoch was the best.

No labels are used, except with `--knn_freq`. The verdict itself is `verdict.py`.
"""

import math
import time

import torch
from torch import Tensor

from cplearn.data import augmentations
from cplearn.data.pixels import Pixels
from cplearn.distributed import collectives
from cplearn.errors import CollapseError
from cplearn.methods.base import Method
from cplearn.probe import verdict
from cplearn.probe.probe import Probe, ProbeResult
from cplearn.probe.usage import CodeUsage

# Numbers of the probe that are kept from before the first step, to stand beside those of later epochs.
AT_START = tuple(dict.fromkeys((
    verdict.SCORE, f"{verdict.SCORE}_error", *verdict.KEPT, "features_dimensions", "embedding_rank",
    "embedding_dimensions", "score", "features_std", "features_cosine", "embedding_cosine", "agreement",
    "agreement_chance", "codes_used", "codes_perplexity", "within_code", "unique_prototypes", "knn20",
)))  # fmt: skip
BEST = {"score": f"probe_{verdict.SCORE}", "knn": "probe_knn20"}  # what --best_by names, by its name in the log


class Monitor:
    """Code usage and probe of a run, its verdict after each epoch, and which epoch was the best."""

    PATIENCE = 2  # alarms in a row, before --on_collapse stop does

    def __init__(
        self,
        pixels: Pixels,
        views: list[augmentations.View],
        seed: int,
        steps_per_epoch: int,
        knn_freq: int = 0,
        best_by: str = "none",
        precision: str = "fp32",
    ):
        self.usage, self.knn_freq = CodeUsage(), knn_freq
        self.probe = Probe(pixels, views, seed, steps_per_epoch, precision, as_large_as_fits=knn_freq > 0)
        self.alarms = 0  # in a row
        self.last: dict[str, str] = {}  # verdict, and when it was found
        self.start: dict[str, float] = {}  # of `AT_START`
        self.best_by, self.best = best_by, {}  # its epoch, counted from 1, and value
        self.improved = False  # by the last epoch

    def begin(self, method: Method, device: torch.device, batch: int) -> None:
        """Measure the probe before the first step: an untrained network, or the weights of --init_from.

        Every rank must call it.
        """
        probed = self.probe.measure(method, device, batch, untrained=True)
        if probed is not None:
            self.start = collectives.on_main(self._at_start, probed)

    def _at_start(self, probed: ProbeResult) -> dict[str, float]:
        numbers = self._numbers(probed)
        if verdict.SCORE in numbers:
            words = f"{verdict.score_in_words(numbers, {})}; {verdict.numbers_in_words(numbers, {})}"
            words += f"; 20-NN by the labels {numbers['knn20']:.4f}" if "knn20" in numbers else ""
            print(f"Before the first step: {words}", flush=True)
        return {name: numbers[name] for name in AT_START if name in numbers}

    def _numbers(self, probed: ProbeResult) -> dict[str, float]:
        return probed.metrics() | ({"knn20": probed.knn()} if self.knn_freq else {})

    def add(self, usage: Tensor | None, images: int, skipped: Tensor) -> None:
        """Count the mean assignment of a step of so many images over all ranks, if the method has one."""
        if usage is not None:
            self.usage.add(usage, images, skipped)

    def end_epoch(
        self, method: Method, device: torch.device, batch: int, record: dict, *, sound: bool = True, last: bool = False
    ) -> dict:
        """Return numbers and verdict for the log of an epoch that is whole. Every rank must call it.

        In an epoch in which the probe is not measured the last verdict stands, and is shown with its epoch; after the
        `last` one it is measured. The epoch cannot be the best if its weights are not `sound`.
        """
        began, done = time.perf_counter(), record["epoch"] + 1
        usage = self._end_usage(record)
        is_due = self.probe.due(done, last=last) or (self.knn_freq > 0 and done % self.knn_freq == 0)
        probed = self.probe.measure(method, device, batch) if is_due else None
        # By one rank, so that all ranks agree.
        probe, judged = collectives.on_main(self._judge, method, usage, probed, done)
        if judged:
            self.last = judged
            self.alarms = self.alarms + 1 if judged["verdict"] in verdict.ALARMS else 0
        numbers = usage | probe
        if self.last:
            numbers |= {"verdict": self.last["verdict"], "verdict_line": self.last["line"] + self.since(done)}
        if probe:
            numbers |= _named("start_", self.start)
        self._compare(numbers, done, sound=sound)
        if self.best:
            numbers |= {"best_epoch": self.best["epoch"], f"best_{self.best['by']}": self.best["value"]}
        return numbers | {"monitor_seconds": time.perf_counter() - began}

    def since(self, done: int) -> str:
        """Return the epoch of the last verdict in words, "" if it is of this one or there is none."""
        return f" (epoch {self.last['epoch']})" if self.last and self.last["epoch"] != str(done) else ""

    def _end_usage(self, record: dict) -> dict[str, float]:
        """Return the use of codes in an epoch, and begin to count the next; {} without any, or if no step was taken."""
        usage, self.usage = self.usage.average(), CodeUsage()
        entropy = usage.get("usage_entropy", math.nan)
        if not math.isfinite(entropy):
            return {}
        return usage | {"usage_perplexity": math.exp(entropy), "information": entropy - record["train_entropy"]}

    def _judge(self, method: Method, usage: dict, probed: ProbeResult | None, done: int) -> tuple[dict, dict[str, str]]:
        """Return the numbers of the probe, and the verdict as `last` keeps it; {} for none."""
        probe = {} if probed is None else _named("probe_", self._numbers(probed))
        settled = probe if done >= self.probe.first else {}
        judged = verdict.judge(usage | settled | _named("start_", self.start), method.out_dim)
        if judged is None:
            return probe, {}
        return probe, {
            "verdict": judged.name,
            "line": judged.line(method.REMEDIES, method.warnings()),
            "epoch": str(done),
        }

    def _compare(self, numbers: dict, done: int, *, sound: bool) -> None:
        """Note whether an epoch is the best so far."""
        value = numbers.get(BEST.get(self.best_by, ""), math.nan)
        self.improved = sound and done >= self.probe.first and value > self.best.get("value", -math.inf)
        if self.improved:
            self.best = {"by": self.best_by, "epoch": done, "value": value}

    def at_end(self, steps: int) -> dict[str, str]:
        """Return a verdict for the log of a run that ends, after so many steps, before there could be any."""
        if self.last or steps >= self.probe.first * self.probe.steps_per_epoch:
            return {}
        needs = f"{steps} step{'s' * (steps != 1)}; a verdict takes {Probe.SETTLED} and a whole epoch"
        judged = verdict.Verdict(verdict.TOO_SHORT, needs)
        return {"verdict": judged.name, "verdict_line": judged.line({})}

    def check(self, record: dict, saved_step: int) -> None:
        """Raise `CollapseError` after `PATIENCE` alarms in a row."""
        if self.alarms >= self.PATIENCE and record["verdict"] in verdict.ALARMS:
            raise CollapseError(
                f"--on_collapse stop: {record['verdict_line']}. Alarm number {self.alarms} in a row; saved after step "
                f"{saved_step}, --on_collapse warn goes on"
            )

    def state(self) -> dict:
        """Return what a continuation needs, by its names in a checkpoint. Every rank must call it."""
        return {"code_use": self.usage.state(), "alarms": self.alarms, "verdict": self.last, "start": self.start,
                "best": self.best}  # fmt: skip

    def load(self, state: dict, device: torch.device, *, same_steps: bool = True) -> None:
        """Go on from a `state`. `same_steps`: the epoch goes on where it was cut, with the images in the same order."""
        if "code_use" not in state:  # a checkpoint of the first versions
            return
        if same_steps:
            self.usage.load(state["code_use"], device)
        self.alarms, self.last = state["alarms"], state["verdict"]
        self.start, best = state.get("start", {}), state.get("best", {})  # younger still
        is_this_score = self.best_by != "score" or verdict.SCORE in self.start  # versions before had another
        self.best = best if best.get("by") == self.best_by and is_this_score else {}


def _named(prefix: str, numbers: dict) -> dict:
    return {f"{prefix}{name}": value for name, value in numbers.items()}
