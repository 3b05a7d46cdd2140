"""Batches that must not end a run: steps that are not finite, and images that cannot be read."""

import json
import math
import sys
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from cplearn.data.images import ImageError, too_many
from cplearn.distributed import collectives
from cplearn.distributed.batch_norm import running_buffers
from cplearn.errors import NonFiniteError, UserError, WriteError
from cplearn.files import write_text
from cplearn.text import printable

# --- steps that are not finite -------------------------------------------------------------------------


class RunningStatistics:
    """Batch norm's running mean and variance, the only state a forward pass writes: a bad batch would spoil it."""

    def __init__(self, module: nn.Module):
        self._buffers = [b for b in running_buffers(module) if b.is_floating_point()]  # counters go on

    @torch.no_grad()
    def keep(self) -> None:
        self._kept = [b.clone() for b in self._buffers]

    @torch.no_grad()
    def restore(self, skipped: Tensor) -> None:
        """Go back to what was kept if `skipped`, a bool on the device, is true."""
        for now, before in zip(self._buffers, self._kept, strict=True):
            now.copy_(torch.where(skipped, before, now))


@torch.no_grad()
def check_gradients(method: nn.Module, loss: Tensor, optimizer, scaler) -> tuple[Tensor, Tensor]:
    """Unscale the gradients. Return whether the step must be skipped, as loss or gradient is not finite on some rank,
    and the norm of each parameter's gradient.

    The scaler looks for infinities in gradients only, so a loss that is not finite, or a norm that overflows, is made
    to show in one of them. Nothing here waits for the device. Shape: loss () summed over ranks -> bool (), float (p,).
    """
    grads = [p.grad for p in method.parameters() if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(grads))
    skipped = ~(norms.sum().isfinite() & loss.isfinite())
    grads[0].masked_fill_(skipped, math.nan)
    scaler.unscale_(optimizer)
    return skipped, norms / scaler.scale(torch.ones_like(norms[0]))


class BadSteps:
    """Counts skipped steps, and ends the run after more than `limit` in a row, with a report of the last."""

    def __init__(self, limit: int, folder: str | Path, names: Sequence[str]):
        self.limit, self.path, self.names = limit, Path(folder) / "bad_step.json", names
        self.in_a_row = 0
        self._seen: deque[tuple] = deque(maxlen=2)  # the host learns one step later which of them was bad

    def remember(self, step: int, samples: Tensor, terms: dict[str, Tensor]) -> None:
        self._seen.append((step, samples, terms))

    def count(self, step: int, skipped: bool, scale: Callable[[], float]) -> None:
        """Count one step. Every rank calls it with the same values; all raise `NonFiniteError` at the same step."""
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        if self.in_a_row <= self.limit:
            return
        samples, terms = next((samples, terms) for s, samples, terms in self._seen if s == step)
        files = [str(self.names[i]) for i in samples]
        terms = {name: float(value) for name, value in terms.items()}
        ranks = collectives.gather_objects({"terms": terms, "files": files})
        wrong = sorted({name for one in ranks for name, x in one["terms"].items() if not math.isfinite(x)})
        if collectives.is_main():
            report = {"step": step, "in_a_row": self.in_a_row, "not_finite": wrong, "loss_scale": scale()}
            for one in ranks:  # JSON has no NaN and no infinity
                one["terms"] = {k: x if math.isfinite(x) else str(x) for k, x in one["terms"].items()}
            try:
                write_text(self.path, json.dumps({**report, "ranks": ranks}, indent=1) + "\n")
            except WriteError as error:
                print(error, file=sys.stderr)
        raise NonFiniteError(
            f"{self.in_a_row} steps in a row were not finite ({', '.join(wrong)}), the last {step}: see {self.path}; "
            "the checkpoint is from before. Try a lower --lr with --resume_force lr, or --precision bf16 for fp16 with "
            "--resume_force precision use_fp16"
        )


# --- images that cannot be read ------------------------------------------------------------------------


class BadImages:
    """Counts images that cannot be read, lists them in bad_images.txt, and ends the run when there are too many.

    A line of the file is the `printable` name, a tab, and the reason.
    """

    def __init__(self, dataset, limit: float, folder: str | Path):
        self.dataset, self.limit, self.path = dataset, limit, Path(folder) / "bad_images.txt"
        self.known: dict[str, str] = {}  # name -> reason, the same on all ranks
        self.unshared: dict[str, str] = {}  # of this rank, which the others do not know of yet

    def note(self, failures: list[tuple[int, str]]) -> int:
        """Remember what could not be read for a batch, (sample, reason) each; return how many."""
        for sample, reason in failures:
            name = str(self.dataset.names[sample])
            if name not in self.known:
                self.unshared[name] = reason
        return len(failures)

    def share(self) -> None:
        """Tell every rank what the others could not read; rank 0 prints and writes it. Every rank must call it."""
        fresh = {name: reason for one in collectives.gather_objects(self.unshared) for name, reason in one.items()}
        fresh = {name: reason for name, reason in sorted(fresh.items()) if name not in self.known}
        self.known.update(fresh)
        self.unshared = {}
        for reason in fresh.values() if collectives.is_main() else ():
            print(f"WARNING: replaced by another image: {reason}", file=sys.stderr, flush=True)
        collectives.on_main(self._write)

    def load(self, known: dict[str, str]) -> None:
        """Go on with those of an earlier run that were not repaired since. Every rank must call it."""
        self.known = collectives.on_main(self._still_unreadable, known)
        if known:
            collectives.on_main(self._write)

    def _still_unreadable(self, known: dict[str, str]) -> dict[str, str]:
        place = {str(name): i for i, name in enumerate(self.dataset.names)} if known else {}
        unreadable = {}
        for name in known.keys() & place.keys():
            try:
                self.dataset[place[name]]
            except ImageError as error:
                unreadable[name] = error.reason
        return dict(sorted(unreadable.items()))

    def _write(self) -> None:
        write_text(self.path, "".join(f"{printable(name)}\t{reason}\n" for name, reason in self.known.items()))

    @property
    def too_many(self) -> bool:
        return len(self.known) > self.limit * len(self.dataset)

    def check(self) -> None:
        """Raise `UserError` on every rank if there are too many."""
        if self.too_many:
            last = next(reversed(self.known.values()))
            said = too_many(len(self.known), len(self.dataset), self.limit, f"repair those in {self.path}")
            raise UserError(f"{said}; the last: {last}")
