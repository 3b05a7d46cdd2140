"""The probe: a fixed set of training images in two fixed views, measured in evaluation mode.

It changes no weight, no running statistic and no random number, so a run with and without it comes to the same bits.
"""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cplearn import random_streams
from cplearn.compiling import eagerly
from cplearn.data import augmentations
from cplearn.data.pixels import Pixels
from cplearn.distributed import collectives
from cplearn.distributed.batch_norm import plain_average, statistics_kept
from cplearn.errors import LocalError
from cplearn.methods.base import Method, forward_by_size
from cplearn.metrics import collapse
from cplearn.metrics.knn import leave_one_out_knn
from cplearn.precision import autocast


class Probe:
    """A fixed set of training images in two fixed views, measured every `every` epochs.

    It is as large as memory and `COST` allow, a forward pass being a third of a step's work per image and view; for
    --knn_freq, `as_large_as_fits`. Where it would cost more in every epoch, it is measured less often.
    """

    MOST, LEAST, COST, BYTES = 2000, 256, 0.015, 2**28
    SETTLED = 30  # steps before which batch norm's running statistics, and so the probe's numbers, mean little

    def __init__(
        self,
        pixels: Pixels,
        views: list[augmentations.View],
        seed: int,
        steps_per_epoch: int,
        precision: str = "fp32",
        *,
        as_large_as_fits: bool = False,
    ):
        self.pixels, self.views, self.seed = pixels, views[: Method.N_GLOBAL], seed
        self.precision = precision  # of the backbone
        size = self.views[0].size
        budget = self.COST * 3 * len(pixels) * sum(v.size**2 for v in views) / size**2  # of forward passes per epoch
        fit = self.BYTES * collectives.world_size() // (2 * 3 * size**2)
        affordable = self.MOST if as_large_as_fits else max(self.LEAST, int(budget / 2))
        count = min(self.MOST, len(pixels), fit, affordable)
        self.every = max(1, math.ceil(2 * count / budget))
        self.first, self.steps_per_epoch = math.ceil(self.SETTLED / steps_per_epoch), steps_per_epoch
        order = random_streams.random_stream(random_streams.FOR_MONITOR, seed).permutation(len(pixels))
        self.samples = sorted(int(i) for i in order[:count])
        self._kept: tuple[list[Tensor], Tensor, Tensor] | None = None

    def due(self, epochs_done: int, *, last: bool = False) -> bool:
        return epochs_done >= self.first and (last or (epochs_done - self.first) % self.every == 0)

    def _read(self) -> tuple[list[Tensor], Tensor, Tensor]:
        """Read this rank's images, once: crops, color parameters, labels. Those that cannot be read are left out."""
        samples = self.samples[collectives.rank() :: collectives.world_size()]
        # Of an epoch that no run reaches: these views are not trained on.
        u = augmentations.draw(self.seed, 2**31, samples, len(self.views))
        crops, kept = augmentations.empty_views(self.views, len(samples)), []
        for k, i in enumerate(samples):
            try:
                image = self.pixels[i]
            except LocalError:
                continue
            rows = [x[len(kept) : len(kept) + 1] for x in crops]
            augmentations.cut_views([image], u[k : k + 1], self.views, rows)
            kept.append(k)
        labels = torch.as_tensor(self.pixels.dataset.labels)[[samples[k] for k in kept]].long()
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
        with statistics_kept(method) if norms else nullcontext(), eagerly(method.evaluated):
            if norms and min(counts) > 1:  # as many batches on each rank, none of one image
                with plain_average(norms):
                    for images in self._images(range(0, min(counts) - 1, batch), min(counts), batch, device):
                        with autocast(device, self.precision):
                            features = method.evaluated(images[0])
                        method.embed(features)
            batches = self._images(range(0, len(labels), batch), len(labels), batch, device)
            parts = [_measure_batch(method, images, self.precision) for images in batches]
        method.train(training)
        parts = {name: [part[name] for part in parts] for name in parts[0]} | {"labels": [labels.to(device)]}
        prototypes = method.learned_codes() if collectives.is_main() else None
        rows = {k: None if x[0] is None else collectives.gather_rows(torch.cat(x), device) for k, x in parts.items()}
        return ProbeResult(**rows, prototypes=None if prototypes is None else prototypes.cpu())

    def _images(self, starts: range, count: int, batch: int, device: torch.device) -> Iterator[list[Tensor]]:
        crops, params, _ = self._kept
        for start in starts:
            rows = slice(start, min(start + batch, count))
            yield augmentations.color_views([x[rows] for x in crops], params[rows], self.views, device)


def _measure_batch(method: Method, images: list[Tensor], precision: str) -> dict[str, Tensor | None]:
    with autocast(images[0].device, precision):
        features = forward_by_size(method.evaluated, images)
    with torch.autocast(images[0].device.type, enabled=False):
        embeddings = [method.embed(z) for z in features]
        codes = [method.assign(h) for h in embeddings]
        vectors = method.code_vectors(codes[0])
    return {"features": features[0].float(), "other_features": features[1].float(), "embedding": embeddings[0],
            "other_embedding": embeddings[1], "codes": codes[0], "others": codes[1], "vectors": vectors}  # fmt: skip


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

    def metrics(self) -> dict:
        """Return the numbers of the verdict; NaN as the cosine, and no more, if an entry is not finite."""
        if not (self.features.isfinite().all() and self.embedding.isfinite().all()):
            return {"images": len(self.features), "features_cosine": math.nan}
        numbers = collapse.probe_metrics(
            self.features, self.embedding, self.codes, self.vectors, self.other_features, self.others
        )
        return numbers | collapse.prototype_numbers(self.prototypes)

    def knn(self, k: int = 20, temperature: float = 0.07) -> float:
        """Return the top-1 of the weighted k nearest neighbors of each image among the others."""
        return leave_one_out_knn(self.features, self.labels, k=k, temperature=temperature)
