"""How often each code was used lately: the prior's memory over steps (--prior_buffer)."""

import torch
from torch import Tensor, nn


class PriorBuffer(nn.Module):
    """Mean code usage of the last `steps` steps, so that the prior sees more images than one batch.

    With m steps kept, p-bar becomes (p-bar of now + sum of the m kept ones) / (m + 1). The kept ones are
    constants. The gradient through p-bar of now is *not* divided by m + 1: each image weighs in the prior as it
    would in a batch m + 1 times as large whose loss is the mean over its images, and the balance with the
    invariance term stays. Saved with the run: the next step depends on it.
    """

    ring: Tensor  # (steps, c) mean assignments over the global views of one step
    pushed: Tensor  # how many steps were ever pushed

    def __init__(self, steps: int, out_dim: int):
        super().__init__()
        self.register_buffer("ring", torch.zeros(steps, out_dim))
        self.register_buffer("pushed", torch.zeros((), dtype=torch.int64))

    def mix(self, log_mean: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Return log p-bar over now and the kept steps, for codes start..stop-1. Shape: (..., b) -> (..., b)."""
        with torch.no_grad():
            count = (self.pushed.clamp(max=len(self.ring)) + 1).to(log_mean.dtype)
            past = self.ring[:, start:stop].sum(0).to(log_mean.dtype).log()
            value = torch.logaddexp(log_mean, past) - count.log()
            weight = (log_mean - value).exp()
        return value + weight * (log_mean - log_mean.detach())

    @torch.no_grad()
    def push(self, usage: Tensor, skipped: Tensor | bool = False) -> None:
        """Keep this step's p-bar and forget the oldest, unless `skipped`. No device synchronization. Shape: (c,)."""
        skipped = torch.as_tensor(skipped, device=self.ring.device)
        place = (self.pushed % len(self.ring))[None]
        kept = torch.where(skipped, self.ring.index_select(0, place), usage[None].to(self.ring.dtype))
        self.ring.index_copy_(0, place, kept)
        self.pushed += ~skipped
