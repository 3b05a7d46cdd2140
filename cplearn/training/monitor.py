"""Collapse, seen while it happens: code usage from numbers that the loss already has, and after an epoch the probe, a
fixed set of training images.

No labels are used, except with `--knn_freq`. The probe is read in evaluation mode; it changes no weight, no running
statistic and no random number, so a run with and without it comes to the same bits. Numbers and verdict: `collapse.py`.
"""

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cplearn import random_streams
from cplearn.data import augmentations
from cplearn.data.pixels import Pixels
from cplearn.distributed import collectives
from cplearn.distributed.batch_norm import plain_average, statistics_kept
from cplearn.errors import CollapseError, LocalError
from cplearn.evaluation import collapse, label_free
from cplearn.evaluation.knn import leave_one_out_knn
from cplearn.methods.base import Method, forward_by_size
from cplearn.training.progress import Meter


class CodeUsage:
    """Entropy of the mean assignment, and codes in use, over windows of `STEPS` steps of an epoch.

    What is left of an epoch after its last whole window is not looked at, unless the epoch has no whole one.
    """

    STEPS = 20

    def __init__(self) -> None:
        self.meter = Meter()  # over the windows of this epoch
        self.total: Tensor | None = None  # sum of mean assignments in this window, of this rank (c,)
        self.images: Tensor | None = None  # of all ranks, in steps that were taken
        self.steps = self.windows = 0

    @torch.no_grad()
    def add(self, usage: Tensor, images: int, skipped: Tensor) -> None:
        """Count a step of so many images. Nothing here waits for the device. Shape: (c,), bool ()."""
        taken = (~skipped).to(usage.dtype)
        usage = torch.where(skipped, torch.zeros_like(usage), usage)
        self.total = usage.clone() if self.total is None else self.total.add_(usage)
        self.images = taken * images if self.images is None else self.images + taken * images
        self.steps += 1
        if self.steps == self.STEPS:
            self._close()

    def _close(self) -> None:
        total, images = collectives.mean_over_ranks(self.total), self.images
        share = total / total.sum().clamp(min=torch.finfo(total.dtype).tiny)
        # A code counts as used if half an image or more fell to it: none may, where assignments are spread widely.
        terms = {"usage_entropy": torch.special.entr(share).sum(), "codes_used": (share * images >= 0.5).double().sum()}
        self.meter.add(terms, images == 0)
        self.total, self.images, self.steps = None, None, 0
        self.windows += 1

    def read(self) -> dict[str, float]:
        """Return the perplexity over the windows closed since the last reading, {} if none. Every rank must call it."""
        return {"perplexity": math.exp(self.meter.read()["usage_entropy"])} if self.meter.recent else {}

    def average(self) -> dict[str, float]:
        """Return averages over the windows of an epoch that is at its end. Every rank must call it."""
        if not self.windows and self.steps:
            self._close()
        return self.meter.average() if self.windows else {}

    def state(self) -> dict:
        """Return what a continuation needs to come to the same bits. Every rank must call it."""
        mine = {"total": None, "images": None}
        if self.steps:
            mine = {"total": self.total.cpu(), "images": self.images.cpu()}
        return {"meter": self.meter.state(), "steps": self.steps, "windows": self.windows,
                "ranks": collectives.gather_objects(mine)}  # fmt: skip

    def load(self, state: dict, device: torch.device) -> None:
        self.meter.load(state["meter"], device)
        self.steps, self.windows = state["steps"], state["windows"]
        mine = state["ranks"][collectives.rank()]
        if self.steps:
            self.total, self.images = mine["total"].to(device), mine["images"].to(device)


class Probe:
    """A fixed set of training images in two fixed views, measured every `every` epochs.

    It is as large as memory and `COST` allow, a forward pass being a third of a step's work per image and view. Where
    `LEAST` images would cost more in every epoch, it is measured less often.
    """

    MOST, LEAST, COST, BYTES = 2000, 256, 0.015, 2**28
    SETTLED = 30  # steps before which batch norm's running statistics, and so the probe's numbers, mean little

    def __init__(self, pixels: Pixels, views: list[augmentations.View], seed: int, steps_per_epoch: int):
        self.pixels, self.views, self.seed = pixels, views[: Method.N_GLOBAL], seed
        size = self.views[0].size
        budget = self.COST * 3 * len(pixels) * sum(v.size**2 for v in views) / size**2  # of forward passes per epoch
        room = self.BYTES * collectives.world_size() // (2 * 3 * size**2)
        count = min(self.MOST, len(pixels), room, max(self.LEAST, int(budget / 2)))
        self.every = max(1, math.ceil(2 * count / budget))
        self.first, self.steps_per_epoch = math.ceil(self.SETTLED / steps_per_epoch), steps_per_epoch
        order = random_streams.random_stream(random_streams.FOR_MONITOR, seed).permutation(len(pixels))
        self.samples = sorted(int(i) for i in order[:count])
        self._kept: tuple[list[Tensor], Tensor, Tensor] | None = None

    def due(self, epochs_done: int) -> bool:
        return epochs_done >= self.first and (epochs_done - self.first) % self.every == 0

    def _read(self) -> tuple[list[Tensor], Tensor, Tensor]:
        """Read this rank's images, once: crops, color parameters, labels. Those that cannot be read are left out."""
        mine = self.samples[collectives.rank() :: collectives.world_size()]
        # Of an epoch that no run reaches: these views are not trained on.
        u = augmentations.draw(self.seed, 2**31, mine, len(self.views))
        crops, kept = augmentations.empty_views(self.views, len(mine)), []
        for k, i in enumerate(mine):
            try:
                image = self.pixels[i]
            except LocalError:
                continue
            room = [x[len(kept) : len(kept) + 1] for x in crops]
            augmentations.cut_views([image], u[k : k + 1], self.views, room)
            kept.append(k)
        labels = torch.as_tensor(self.pixels.dataset.labels)[[mine[k] for k in kept]].long()
        return [x[: len(kept)] for x in crops], augmentations.color_params(self.views, u[kept]), labels

    @torch.no_grad()
    def measure(
        self, method: Method, device: torch.device, batch: int, *, untrained: bool = False
    ) -> "ProbeResult | None":
        """Compute features, embeddings and codes of both views, `batch` images at a time. Every rank must call it.

        `untrained`: batch norms that have seen no batch yet are given the probe's statistics while it is measured.
        Returns None if some rank could not read any of its images.
        """
        if self._kept is None:
            self._kept = self._read()
        labels = self._kept[-1]
        counts = collectives.gather_objects(len(labels))
        if not all(counts):
            return None
        training = method.training
        method.eval()
        norms = _norms_without_batch(method) if untrained else []
        with statistics_kept(method) if norms else nullcontext():
            if norms and min(counts) > 1:  # as many batches on each rank, none of one image
                with plain_average(norms):
                    for images in self._images(range(0, min(counts) - 1, batch), min(counts), batch, device):
                        method.embed(method.evaluated(images[0]))
            parts: list[dict[str, Tensor | None]] = []
            for images in self._images(range(0, len(labels), batch), len(labels), batch, device):
                features = forward_by_size(method.evaluated, images)
                with torch.autocast(device.type, enabled=False):
                    embeddings = [method.embed(z) for z in features]
                    codes = [method.assign(h) for h in embeddings]
                    vectors = method.code_vectors(codes[0])
                first, other = (x.float() for x in features)
                parts.append({"features": first, "other_features": other, "embedding": embeddings[0],
                              "other_embedding": embeddings[1], "codes": codes[0], "others": codes[1],
                              "vectors": vectors})  # fmt: skip
        method.train(training)
        mine = {name: None if x is None else torch.cat([part[name] for part in parts]) for name, x in parts[0].items()}
        mine["labels"] = labels.to(device)
        rows = {name: None if x is None else collectives.gather_rows(x).cpu() for name, x in mine.items()}
        prototypes = method.learned_codes() if collectives.is_main() else None
        return ProbeResult(**rows, prototypes=None if prototypes is None else prototypes.cpu())

    def _images(self, starts: range, count: int, batch: int, device: torch.device) -> Iterator[list[Tensor]]:
        crops, params, _ = self._kept
        for start in starts:
            rows = slice(start, min(start + batch, count))
            yield augmentations.color_views([x[rows] for x in crops], params[rows], self.views, device)


def _norms_without_batch(method: Method) -> list[nn.Module]:
    kinds = nn.modules.batchnorm._BatchNorm
    norms = [m for m in method.modules() if isinstance(m, kinds) and m.track_running_stats]
    return [m for m in norms if m.num_batches_tracked == 0]


@dataclass(frozen=True)
class ProbeResult:
    """What measuring the probe found, of all ranks, on the CPU: n images, each in two views."""

    features: Tensor  # (n, f)
    other_features: Tensor
    embedding: Tensor  # (n, d)
    other_embedding: Tensor
    codes: Tensor  # int64 (n,)
    others: Tensor
    vectors: Tensor | None  # of the codes of the first view (n, d)
    labels: Tensor  # int64 (n,), -1 where there are none
    prototypes: Tensor | None = None  # of all codes, where they are learned (c, d)

    def label_free(self) -> dict[str, float]:
        """Return the measures that need no label, of `evaluation/label_free.py`."""
        return label_free.label_free(self.features, self.other_features, self.embedding, self.other_embedding,
                                     self.codes, self.others)  # fmt: skip

    def metrics(self) -> dict:
        """Return the numbers of the verdict; NaN as the cosine, and no more, if an entry is not finite."""
        if not (self.features.isfinite().all() and self.embedding.isfinite().all()):
            return {"images": len(self.features), "features_cosine": math.nan}
        found = collapse.probe_metrics(
            self.features, self.embedding, self.codes, self.vectors, self.other_features, self.others
        )
        return found | collapse.prototype_numbers(self.prototypes)

    def knn(self, k: int = 20, temperature: float = 0.07) -> float:
        """Return the top-1 of the weighted k nearest neighbors of each image among the others."""
        return leave_one_out_knn(self.features, self.labels, k=k, temperature=temperature)


# Numbers of the probe that are kept from before the first step, to stand beside those of later epochs.
AT_START = tuple(dict.fromkeys((
    collapse.SCORE, f"{collapse.SCORE}_error", *collapse.KEPT, "features_dimensions", "embedding_rank",
    "embedding_dimensions", "score", "features_std", "features_cosine", "embedding_cosine", "agreement",
    "agreement_chance", "codes_used", "codes_perplexity", "within_code", "unique_prototypes", "knn20",
)))  # fmt: skip
BEST = {"score": f"probe_{collapse.SCORE}", "knn": "probe_knn20"}  # what --best_by names, by its name in the log


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
        if collapse.SCORE in found:
            words = f"{collapse.score_in_words(found, {})}; {collapse.numbers_in_words(found, {})}"
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
        found, verdict, line = collectives.on_main(self._verdict, method, found, probed, done)
        if verdict:
            self.alarms = self.alarms + 1 if verdict in collapse.ALARMS else 0
            self.last = {"verdict": verdict, "line": line, "epoch": str(done)}
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
        verdict = collapse.verdict(found | settled | start, method.out_dim)
        return found | probe, verdict.name if verdict else "", verdict.line(method.REMEDIES) if verdict else ""

    def at_end(self, steps: int) -> dict[str, str]:
        """Return a verdict for the log of a run that ends, after so many steps, before there could be any."""
        if self.last or steps >= self.probe.first * self.probe.steps_per_epoch:
            return {}
        needs = f"{steps} step{'s' * (steps != 1)}; a verdict takes {Probe.SETTLED} and a whole epoch"
        found = collapse.Verdict(collapse.TOO_SHORT, needs)
        return {"verdict": found.name, "verdict_line": found.line({})}

    def check(self, record: dict, saved_step: int) -> None:
        """Raise `CollapseError` after `PATIENCE` alarms in a row."""
        if self.alarms >= self.PATIENCE and record["verdict"] in collapse.ALARMS:
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
            of_this_score = self.best_by != "score" or collapse.SCORE in self.start  # versions before had another
            self.best = best if best.get("by") == self.best_by and of_this_score else {}
