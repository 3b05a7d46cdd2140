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


def vote(run: Run, loss: Tensor, failures: list[tuple[int, str]]) -> Votes:
    """Ask all ranks about the step that is being made. Shape: loss (); failures to read an image of the batch."""
    replaced = run.bad_images.note(failures)
    minutes = (time.monotonic() - run.saved_at) / 60
    due = collectives.is_main() and 0 < run.args.saveckp_minutes < minutes
    asked = run.signals.name is not None
    mine = torch.tensor([asked, due, bool(run.bad_images.unshared), replaced], dtype=torch.float64)
    loss = loss.detach().double()[None]
    votes = collectives.sum_over_ranks(torch.cat([loss, mine.to(loss.device, non_blocking=True)]))
    return Votes(*votes.unbind())


def act_on_votes(run: Run, skipped: Tensor, votes: Votes) -> None:
    """Act on what all ranks agreed on one step ago: count, share, save, stop. The same on every rank.

    `skipped` (a bool on the device) and `votes` are of the step just done.
    """
    outcome = torch.stack([skipped.double(), votes.signals, votes.due, votes.unshared, votes.replaced])
    stop, due = count(run, run.outcomes.push(outcome))
    if run.between_epochs or run.step == run.last_step:
        return  # the end of an epoch, and of the run, saves anyway
    if stop or due or run.bad_images.too_many:
        count(run, run.outcomes.flush())  # of the step just done: a checkpoint has to know
        save(run)
    run.bad_images.check()
    if stop:
        interrupt(run)


def count(run: Run, outcome: list[float] | None) -> tuple[bool, bool]:
    """Add up one step's outcome (of `act_on_votes`), if there is one. Return whether to stop, and to save."""
    if outcome is None:
        return False, False
    skipped, stop, due, unshared, replaced = outcome
    run.epoch.skipped += int(skipped)
    run.epoch.replaced += int(replaced)
    if unshared or skipped:  # both may write
        collectives.on_main(run.lock.check)
    if unshared:
        run.bad_images.share()
    counted = run.step - 1 if run.outcomes.waiting else run.step
    run.bad_steps.count(counted - 1, bool(skipped), run.scaler.get_scale)
    return bool(stop), bool(due)


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
