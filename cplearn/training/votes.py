"""TODO cplearn.training.votes."""

import time

import torch
from torch import Tensor

from cplearn.data import loaders
from cplearn.distributed import collectives
from cplearn.errors import Interrupted
from cplearn.training.bad_batches import check_bad_images, share_bad_images, too_many_bad_images
from cplearn.training.resume import save
from cplearn.training.run import Run
from cplearn.training.run_control import StopSignals

# --- what all ranks agree on at each step -------------------------------------------------------------


def vote(run: Run, loss: Tensor, signals: StopSignals, failures: list[str]) -> Tensor:
    """What all ranks must know of this step, added up: [loss, signals, save due, news of bad images, replaced]. (5,)"""
    replaced = 0
    for sample, reason in loaders.read_failures(failures):
        replaced += 1
        name = str(run.dataset.names[sample])
        if name not in run.bad_images:
            run.news[name] = reason
    minutes = (time.monotonic() - run.saved_at) / 60
    due = collectives.is_main() and 0 < run.args.saveckp_minutes < minutes
    mine = torch.tensor([signals.name is not None, due, bool(run.news), replaced], dtype=torch.float64)
    loss = loss.detach().double()[None]
    return collectives.sum_over_ranks(torch.cat([loss, mine.to(loss.device, non_blocking=True)]))


def settle(run: Run, outcome: list[float] | None, signals: StopSignals) -> None:
    """Act on what all ranks agreed on one step ago: count, share, save, stop. The same on every rank."""
    stop, due = count(run, outcome)
    if run.step % len(run.loader) == 0 or run.step == run.last_step:
        return  # the end of an epoch, and of the run, saves anyway
    if stop or due or too_many_bad_images(run):
        count(run, run.outcomes.flush())  # of the step just done: a checkpoint has to know
        save(run)
    check_bad_images(run)
    if stop:
        interrupt(run, signals)


def count(run: Run, outcome: list[float] | None) -> tuple[bool, bool]:
    """Add up one step's outcome, if there is one. Returns whether to stop, and to save."""
    if outcome is None:
        return False, False
    skipped, stop, due, news, replaced = outcome
    run.skipped += int(skipped)
    run.replaced += int(replaced)
    if news:
        share_bad_images(run)
    counted = run.step - 1 if run.outcomes.waiting else run.step
    run.bad_steps.count(counted - 1, bool(skipped), run.scaler.get_scale)
    return bool(stop), bool(due)


def stop_if_asked(run: Run, signals: StopSignals) -> None:
    """Between two steps: if any rank got a signal, and the run is not at its end, all of them stop."""
    asked = torch.tensor(float(signals.name is not None), device=run.device)
    if run.step < run.last_step and collectives.sum_over_ranks(asked):
        interrupt(run, signals)


def interrupt(run: Run, signals: StopSignals) -> None:
    saved = f"saved after step {run.saved_step} in {run.args.output_dir}" if run.saved_step else "nothing to save yet"
    raise Interrupted(
        f"{signals.name or 'a signal to another process'}: stopped after step {run.step} of {run.last_step}, {saved}; "
        "the same command goes on from there"
    )
