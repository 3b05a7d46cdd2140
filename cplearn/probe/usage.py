"""How evenly the codes are used, from numbers that the loss already has."""

import math

import torch
from torch import Tensor

from cplearn.distributed import collectives
from cplearn.training.meters import Meter


class CodeUsage:
    """Entropy of the mean assignment, and codes in use, over windows of `STEPS` steps of an epoch.

    Trailing steps are ignored, unless the epoch has no whole window.
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
        # A code counts as used from a total probability of 0.5: none may, where assignments are spread widely.
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
        parts = {"total": self.total, "images": self.images}
        own = {name: None if x is None else x.cpu() for name, x in parts.items()}
        return {"meter": self.meter.state(), "steps": self.steps, "windows": self.windows,
                "ranks": collectives.gather_objects(own)}  # fmt: skip

    def load(self, state: dict, device: torch.device) -> None:
        self.meter.load(state["meter"], device)
        self.steps, self.windows = state["steps"], state["windows"]
        own = state["ranks"][collectives.rank()]
        if self.steps:
            self.total, self.images = own["total"].to(device), own["images"].to(device)
