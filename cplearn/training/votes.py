"""What all ranks agree on at each step: skipped steps, signals, saving, unreadable images."""

import time
from typing import NamedTuple

import torch
from torch import Tensor

from cplearn.distributed import collectives
from cplearn.errors import Interrupted
from cplearn.training.resume import save
from cplearn.training.run import Run


class Votes(NamedTuple):
    """What all ranks must know of a step, summed over them. Each is a number on the device, which nobody waits for."""

    loss: Tensor
    signals: Tensor  # ranks that were told to stop
    due: Tensor  # 1 if it is time to save
    unshared: Tensor  # ranks with bad images that the others do not know
    replaced: Tensor  # images of this batch


class Outcome(NamedTuple):
    """What the host learns of a step while the next one runs: `Votes`, but for the loss, and whether it was skipped."""

    skipped: float = 0
    signals: float = 0
    due: float = 0
    unshared: float = 0
    replaced: float = 0


def vote(run: Run, loss: Tensor, failures: list[tuple[int, str]]) -> Votes:
    """Ask all ranks about the step that is being made. Shape: loss (); failures to read an image of the batch."""
    replaced = run.bad_images.note(failures)
    minutes = (time.monotonic() - run.saved_at) / 60
    due = collectives.is_main() and 0 < run.args.saveckp_minutes < minutes
    asked = run.signals.name is not None
    local = torch.tensor([asked, due, bool(run.bad_images.unshared), replaced], dtype=torch.float64)
    loss = loss.detach().double()[None]
    votes = collectives.sum_over_ranks(torch.cat([loss, local.to(loss.device, non_blocking=True)]))
    return Votes(*votes.unbind())


def act_on_votes(run: Run, skipped: Tensor, votes: Votes) -> None:
    """Count, share, save or stop, the same on every rank, by the outcome of the step before: it has arrived by now.

    `skipped` (a bool on the device) and `votes` are of the step just done.
    """
    arrived = run.outcomes.push(torch.stack([skipped.double(), *votes[1:]]))
    outcome = _count(run, run.step - 2, arrived)
    if run.between_epochs or run.step == run.last_step:
        return  # the end of an epoch, and of the run, saves anyway
    if outcome.signals or outcome.due or run.bad_images.too_many:
        count_last(run)  # a checkpoint has to know
        save(run)
    run.bad_images.check()
    if outcome.signals:
        interrupt(run)


def count_last(run: Run) -> None:
    """Wait for the outcome of the step just done, and count it."""
    _count(run, run.step - 1, run.outcomes.flush())


def _count(run: Run, step: int, numbers: list[float] | None) -> Outcome:
    """Count the outcome of a step, if there is one; return it."""
    if numbers is None:
        return Outcome()
    outcome = Outcome(*numbers)
    run.epoch.skipped += int(outcome.skipped)
    run.epoch.replaced += int(outcome.replaced)
    if outcome.unshared or outcome.skipped:  # both may write
        collectives.on_main(run.lock.check)
    if outcome.unshared:
        run.bad_images.share()
    run.bad_steps.count(step, bool(outcome.skipped), run.scaler.get_scale)
    return outcome


def stop_if_asked(run: Run) -> None:
    """Stop all ranks between two steps if any of them got a signal, unless the run is at its end."""
    asked = torch.tensor(float(run.signals.name is not None), device=run.device)
    if run.step < run.last_step and collectives.sum_over_ranks(asked):
        interrupt(run)


def interrupt(run: Run) -> None:
    """Raise `Interrupted`."""
    saved = f"saved after step {run.saved_step} in {run.args.output_dir}" if run.saved_step else "nothing to save yet"
    raise Interrupted(
        f"{run.signals.name or 'a signal to another process'}: stopped after step {run.step} of {run.last_step}, "
        f"{saved}; the same command goes on from there",
        signal=run.signals.name,
    )
