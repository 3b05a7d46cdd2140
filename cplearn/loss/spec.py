"""What all forms of the streamed loss share: which loss it is, the prior's population, and sums over blocks.

Letters as in `streamed.py`.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from cplearn.distributed import collectives
from cplearn.loss.prior_buffer import PriorBuffer


@dataclass(frozen=True)
class LossSpec:
    """Which loss: beta * invariance + prior, over the first `n_global` of the views.

    `prior` is reverse, KL(p-bar || uniform), or forward, CE(uniform, p-bar). Its mean p-bar runs over the images of all
    ranks (`prior_group` global) or of this one (local), and over the steps that `buffer` keeps.

    Raises ValueError for other values.
    """

    beta: float
    prior: str = "reverse"
    prior_group: str = "global"
    n_global: int = 2
    buffer: PriorBuffer | None = None

    def __post_init__(self):
        if self.prior not in ("reverse", "forward") or self.prior_group not in ("global", "local"):
            raise ValueError(f"prior {self.prior!r} / prior_group {self.prior_group!r} is unknown")
        if not self.beta >= 0:
            raise ValueError(f"beta {self.beta:g} must not be negative: 0.25 is the paper's value for ImageNet-100")

    def check_views(self, views: int) -> None:
        """Raise ValueError unless there are two or more views, and as many global ones."""
        if views < 2 or not 1 <= self.n_global <= views:
            raise ValueError(f"the loss needs two or more views, got {views} with {self.n_global} global")


def population(spec: LossSpec, log_mean: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Return log p-bar over all ranks, and with the kept steps, from this rank's, for codes start..stop-1.

    Shape: (b, G) -> two of (b, G).
    """
    if spec.prior_group == "global" and collectives.world_size() > 1:
        if spec.prior == "forward":
            log_mean = collectives.log_mean_over_ranks(log_mean)
        else:  # one all-reduce instead of two; p log p-bar is 0 where p-bar underflows
            mean = collectives.mean_over_ranks(log_mean.exp())
            log_mean = mean.clamp_min_(torch.finfo(mean.dtype).tiny).log_()
    return log_mean, log_mean if spec.buffer is None else spec.buffer.mix(log_mean.T, start, stop).T


def join(tops: Tensor, totals: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest value, and the log of the sum of exponentials relative to it, from those of the parts.

    Shape: (parts, rows) -> two of (rows,).
    """
    top = tops.amax(0)
    return top, (totals * (tops - top).exp()).sum(0).log()


def largest_probability(blocks: Iterable[Tensor]) -> Tensor:
    """Return the largest entry of each row's softmax, from its logits a block of codes at a time.

    Shape: (n, b) each, one at least -> (n,).
    """
    top = total = None
    for logits in blocks:
        best = logits.amax(1) if top is None else torch.maximum(top, logits.amax(1))
        mass = (logits - best[:, None]).exp_().sum(1)
        total = mass if top is None else total * (top - best).exp() + mass
        top = best
    return 1 / total


def summarize(spec: LossSpec, t: Tensor, entropy: Tensor, views: int, log_mean: Tensor, usage: Tensor) -> tuple:
    """Return loss, invariance, prior, entropy, usage. Shape: t and entropy (G, n), log_mean (c, G), usage (c,)."""
    n_global, n = t.shape
    invariance = -t.sum() / (n_global * (views - 1) * n)
    if spec.prior == "reverse":
        parts = log_mean.split(2**16)  # a million codes in one piece would cost more memory than all else
        prior = sum((x.exp() * (x + math.log(len(usage)))).sum(0) for x in parts).mean()
    else:
        prior = -log_mean.mean()
    return spec.beta * invariance + prior, invariance, prior, entropy.mean(), usage
