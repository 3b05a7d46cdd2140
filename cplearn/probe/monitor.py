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
    ):
        self.usage, self.probe, self.knn_freq = CodeUsage(), Probe(pixels, views, seed, steps_per_epoch), knn_freq
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
        found = probed.metrics() | ({"knn20": probed.knn()} if self.knn_freq else {})
        if verdict.SCORE in found:
            words = f"{verdict.score_in_words(found, {})}; {verdict.numbers_in_words(found, {})}"
            words += f"; 20-NN by the labels {found['knn20']:.4f}" if "knn20" in found else ""
            print(f"Before the first step: {words}", flush=True)
        return {name: found[name] for name in AT_START if name in found}

    def add(self, usage: Tensor | None, images: int, skipped: Tensor) -> None:
        """Count the mean assignment of a step of so many images over all ranks, if the method has one."""
        if usage is not None:
            self.usage.add(usage, images, skipped)

    def end_epoch(self, method: Method, device: torch.device, batch: int, record: dict, *, sound: bool = True) -> dict:
        """Return numbers and verdict for the log of an epoch that is whole. Every rank must call it.

        In an epoch in which the probe is not measured the last verdict stands, and is shown with its epoch. The epoch
        cannot be the best if its weights are not `sound`.
        """
        start = time.perf_counter()
        found, done = self.usage.average(), record["epoch"] + 1
        self.usage = CodeUsage()
        if not math.isfinite(found.get("usage_entropy", math.nan)):  # none, or every step was skipped
            found = {}
        else:
            found["usage_perplexity"] = math.exp(found["usage_entropy"])
            found["information"] = found["usage_entropy"] - record["train_entropy"]
        knn = self.knn_freq > 0 and done % self.knn_freq == 0
        probed = self.probe.measure(method, device, batch) if self.probe.due(done) or knn else None
        # By one rank, so that all ranks agree.
        found, name, line = collectives.on_main(self._verdict, method, found, probed, done)
        if name:
            self.alarms = self.alarms + 1 if name in verdict.ALARMS else 0
            self.last = {"verdict": name, "line": line, "epoch": str(done)}
        if self.last:
            since = "" if self.last["epoch"] == str(done) else f" (epoch {self.last['epoch']})"
            found |= {"verdict": self.last["verdict"], "verdict_line": self.last["line"] + since}
        found |= self._compare(found, done, sound)
        return found | {"monitor_seconds": time.perf_counter() - start}

    def _compare(self, found: dict, done: int, sound: bool) -> dict:
        """Return the numbers at the start beside those found, and which epoch is the best so far."""
        probed = "probe_images" in found
        start = {f"start_{name}": value for name, value in self.start.items()} if probed else {}
        value = found.get(BEST.get(self.best_by, ""), math.nan)
        settled = sound and done >= self.probe.first
        self.improved = settled and value > self.best.get("value", -math.inf)
        if self.improved:
            self.best = {"by": self.best_by, "epoch": done, "value": value}
        if self.best:
            start |= {"best_epoch": self.best["epoch"], f"best_{self.best['by']}": self.best["value"]}
        return start

    def _verdict(self, method: Method, found: dict, probed: ProbeResult | None, done: int) -> tuple[dict, str, str]:
        """Return numbers, verdict and its line; "" and "" for none."""
        probe = {} if probed is None else probed.metrics() | ({"knn20": probed.knn()} if self.knn_freq else {})
        probe = {f"probe_{name}": value for name, value in probe.items()}
        start = {f"start_{name}": value for name, value in self.start.items()}
        settled = probe if done >= self.probe.first else {}
        judged = verdict.judge(found | settled | start, method.out_dim)
        return found | probe, judged.name if judged else "", judged.line(method.REMEDIES) if judged else ""

    def at_end(self, steps: int) -> dict[str, str]:
        """Return a verdict for the log of a run that ends, after so many steps, before there could be any."""
        if self.last or steps >= self.probe.first * self.probe.steps_per_epoch:
            return {}
        needs = f"{steps} step{'s' * (steps != 1)}; a verdict takes {Probe.SETTLED} and a whole epoch"
        found = verdict.Verdict(verdict.TOO_SHORT, needs)
        return {"verdict": found.name, "verdict_line": found.line({})}

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
        if "code_use" in state:  # not in checkpoints of the first versions
            if same_steps:
                self.usage.load(state["code_use"], device)
            self.alarms, self.last = state["alarms"], state["verdict"]
            self.start, best = state.get("start", {}), state.get("best", {})  # younger still
            of_this_score = self.best_by != "score" or verdict.SCORE in self.start  # versions before had another
            self.best = best if best.get("by") == self.best_by and of_this_score else {}
