"""A run: what it is made of and how far it is; what its ranks agree on at each step; its way to disk and back."""

import argparse
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

import checkpoints
import datasets
import distributed
import utils
from augmentations import View
from errors import Interrupted, LocalError, NonFiniteError, UserError
from monitor import Monitor
from progress import Later, Meter
from run_control import BadSteps, FolderLock, StopSignals

# Flags that may differ between a run and its continuation, because they do not change the result.
FREE_ON_RESUME = {
    "output_dir",
    "num_workers",
    "worker_timeout",
    "saveckp_freq",
    "saveckp_minutes",
    "print_freq",
    "max_steps",
    "max_bad_images",
    "max_skipped_steps",
    "knn_freq",
    "on_collapse",
    "resume_force",
    "tensorboard",
    "device",
    "dist_url",
    "dist_timeout",
    "loss_form",
}


@dataclass
class Run:
    """What a run is made of, and how far it is."""

    args: argparse.Namespace
    identity: dict[str, int | str]  # what else must not differ in a continuation
    device: torch.device
    dataset: torch.utils.data.Dataset
    views: list[View]
    loader: torch.utils.data.DataLoader
    method: nn.Module
    model: nn.Module  # the method, in several processes inside DDP
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    last_step: int
    bad_steps: BadSteps
    monitor: Monitor
    lock: FolderLock
    step: int = 0  # finished optimiser steps
    # of the current epoch
    meter: Meter = field(default_factory=Meter)
    outcomes: Later = field(default_factory=Later)  # of the last step, on their way to the host
    skipped: int = 0  # steps
    replaced: int = 0  # images
    seconds: float = 0.0
    waiting: utils.Stopwatch = field(default_factory=utils.Stopwatch)
    # unreadable images: name -> reason; and those that the other ranks do not know of yet
    bad_images: dict[str, str] = field(default_factory=dict)
    news: dict[str, str] = field(default_factory=dict)
    saved_at: float = field(default_factory=time.monotonic)
    saved_step: int = 0


# --- what all ranks agree on at each step -------------------------------------------------------------


def vote(run: Run, loss: Tensor, signals: StopSignals, failures: list[str]) -> Tensor:
    """What all ranks must know of this step, added up: [loss, signals, save due, news of bad images, replaced]. (5,)"""
    replaced = 0
    for sample, reason in datasets.read_failures(failures):
        replaced += 1
        name = str(run.dataset.names[sample])
        if name not in run.bad_images:
            run.news[name] = reason
    minutes = (time.monotonic() - run.saved_at) / 60
    due = distributed.is_main() and 0 < run.args.saveckp_minutes < minutes
    mine = torch.tensor([signals.name is not None, due, bool(run.news), replaced], dtype=torch.float64)
    loss = loss.detach().double()[None]
    return distributed.sum_over_ranks(torch.cat([loss, mine.to(loss.device, non_blocking=True)]))


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
    if run.step < run.last_step and distributed.sum_over_ranks(asked):
        interrupt(run, signals)


def interrupt(run: Run, signals: StopSignals) -> None:
    saved = f"saved after step {run.saved_step} in {run.args.output_dir}" if run.saved_step else "nothing to save yet"
    raise Interrupted(
        f"{signals.name or 'a signal to another process'}: stopped after step {run.step} of {run.last_step}, {saved}; "
        "the same command goes on from there"
    )


# --- images that cannot be read ------------------------------------------------------------------------


def share_bad_images(run: Run) -> None:
    """Every rank learns what the others could not read; rank 0 prints and writes it. Every rank must call it."""
    fresh = {name: reason for news in distributed.gather_objects(run.news) for name, reason in news.items()}
    fresh = {name: reason for name, reason in sorted(fresh.items()) if name not in run.bad_images}
    run.bad_images.update(fresh)
    run.news = {}
    for reason in fresh.values() if distributed.is_main() else ():
        print(f"WARNING: replaced by another image: {reason}", file=sys.stderr, flush=True)
    distributed.on_main(list_bad_images, run)


def list_bad_images(run: Run) -> None:
    lines = "".join(f"{name}\t{reason}\n" for name, reason in run.bad_images.items())
    utils.write_text(Path(run.args.output_dir, "bad_images.txt"), lines)


def still_unreadable(run: Run, known: dict[str, str]) -> dict[str, str]:
    """Of the images that could not be read before, those that were not repaired since."""
    place = {str(name): i for i, name in enumerate(run.dataset.names)} if known else {}
    found = {}
    for name in known.keys() & place.keys():
        try:
            run.dataset[place[name]]
        except LocalError as error:
            found[name] = str(error).partition("; repair it")[0]
    return dict(sorted(found.items()))


def too_many_bad_images(run: Run) -> bool:
    return len(run.bad_images) > run.args.max_bad_images * len(run.dataset)


def check_bad_images(run: Run) -> None:
    """Raises `UserError` on every rank if there are too many."""
    if too_many_bad_images(run):
        last = next(reversed(run.bad_images.values()))
        raise UserError(
            f"{len(run.bad_images)} of {len(run.dataset)} images cannot be read, more than --max_bad_images "
            f"{run.args.max_bad_images:g} allows ({int(run.args.max_bad_images * len(run.dataset))}): repair those in "
            f"{run.args.output_dir}/bad_images.txt, or allow more; the last: {last}"
        )


# --- to disk and back ----------------------------------------------------------------------------------


def save(run: Run) -> None:
    """Everything a continuation needs to come to the same bits. Every rank must call it.

    While steps are being skipped nothing is saved, except at the end of the run: the step before them may have broken
    the weights. No state of a random generator is in it: every draw is made from (seed, step, rank) or (seed, epoch,
    sample, view). Raises `WriteError`, and `NonFiniteError` for weights that are not finite.
    """
    if run.bad_steps.in_a_row and run.step < run.last_step:
        return
    if not all(t.isfinite().all() for t in [*run.method.parameters(), *run.method.buffers()]):
        raise NonFiniteError(
            f"weights became infinite or NaN by step {run.step}: not saved, the checkpoint is from before. Try a lower "
            "--lr with --resume_force lr"
        )
    meter, code_use = run.meter.state(), run.monitor.use.state()
    epoch, rest = divmod(run.step, len(run.loader))

    def write() -> None:
        folder = Path(run.args.output_dir)
        log = folder / "log.txt"
        state = {
            "args": vars(run.args),
            "identity": run.identity,
            "commit": utils.git_commit(),
            "epoch": epoch,  # whole ones
            "step": run.step,
            "steps_per_epoch": len(run.loader),
            "model": run.method.state_dict(),
            "optimizer": run.optimizer.state_dict(),
            "scaler": run.scaler.state_dict(),
            "progress": {
                "meter": meter,
                "code_use": code_use,
                "alarms": run.monitor.alarms,
                "verdict": run.monitor.last,
                "skipped": run.skipped,
                "replaced": run.replaced,
                "in_a_row": run.bad_steps.in_a_row,
                "seconds": run.seconds,
                "waiting": run.waiting.seconds,
            },
            "bad_images": run.bad_images,
            "log_bytes": log.stat().st_size if log.exists() else 0,
        }
        run.lock.check()
        if run.args.saveckp_freq and rest == 0 and epoch % run.args.saveckp_freq == 0:  # first: a kill may come between
            checkpoints.save(folder / f"checkpoint{epoch:04}.pth", state)
        checkpoints.save_run(folder, state)

    distributed.on_main(write)
    run.saved_at, run.saved_step = time.monotonic(), run.step


STATE_KEYS = {"format", "args", "identity", "commit", "epoch", "step", "steps_per_epoch", "model", "optimizer",
              "scaler", "progress", "bad_images", "log_bytes"}  # fmt: skip


def resume(run: Run, defaults: dict) -> bool:
    """Go on after the last step in output_dir/checkpoint.pth (or the one before it). False if there is none.

    `defaults` are the values of flags that the checkpoint does not know.

    Raises `UserError` if it belongs to a run with other settings, unless --resume_force names each that differs.
    """
    args, log = run.args, Path(run.args.output_dir, "log.txt")

    def choose() -> str | None:
        checkpoints.finish_writing(args.output_dir)
        found = checkpoints.load_run(args.output_dir)
        if found is None:
            if log.exists():  # of a run that was killed before its first checkpoint
                os.replace(log, log.with_name("log_old.txt"))
            return None
        _, path, problem = found
        if problem:
            latest = Path(args.output_dir, checkpoints.LATEST)
            if latest.exists():  # out of the way of the good one, which is the next to be called previous
                os.replace(latest, latest.with_name("checkpoint_damaged.pth"))
            print(f"WARNING: {problem}. Resuming the one before it, {path}", file=sys.stderr, flush=True)
        return str(path)

    path = distributed.on_main(choose)
    if path is None:
        return False
    with distributed.together():  # each rank reads the file on its own
        state = checkpoints.load(path)
        if state.keys() != STATE_KEYS:
            names = ", ".join(sorted(map(str, state.keys() ^ STATE_KEYS)))
            raise UserError(f"{path} was written by another version (keys {names}): use another --output_dir")
        mine, theirs = vars(args) | run.identity, defaults | state["args"] | state["identity"]
        differ = {k for k in mine.keys() | theirs.keys() if k not in FREE_ON_RESUME and mine.get(k) != theirs.get(k)}
        refused = sorted(differ - set(args.resume_force))
        if refused:
            raise UserError(
                f"{path} belongs to another run: "
                + ", ".join(f"{k} {theirs.get(k)} there, {mine.get(k)} here" for k in refused)
                + f"; use another --output_dir, the same settings, or --resume_force {' '.join(refused)}"
            )
        checkpoints.load_into(run.method, state["model"], path)
        checkpoints.load_optimizer(run.optimizer, state["optimizer"], path)
        if "precision" not in differ:
            run.scaler.load_state_dict(state["scaler"])
    run.bad_images = distributed.on_main(still_unreadable, run, state["bad_images"])
    if state["bad_images"]:
        distributed.on_main(list_bad_images, run)
    run.step = run.saved_step = state["step"]
    if state["steps_per_epoch"] == len(run.loader) and not {"processes", "batch_size_per_gpu", "data", "seed"} & differ:
        progress = state["progress"]
        run.meter.load(progress["meter"], run.device)
        if "code_use" in progress:  # not in checkpoints of earlier versions
            run.monitor.use.load(progress["code_use"], run.device)
            run.monitor.alarms, run.monitor.last = progress["alarms"], progress["verdict"]
        run.skipped, run.replaced, run.seconds = progress["skipped"], progress["replaced"], progress["seconds"]
        run.waiting.seconds, run.bad_steps.in_a_row = progress["waiting"], progress["in_a_row"]
    else:  # another batch: steps cannot be matched inside an epoch
        run.step = state["epoch"] * len(run.loader)
    if distributed.is_main():
        epoch, rest = divmod(run.step, len(run.loader))
        print(f"Resuming {path} after epoch {epoch}" + f" and {rest} of {len(run.loader)} steps" * (rest > 0))
        if differ:
            print(
                f"WARNING: forced although different: {', '.join(f'{k} was {theirs.get(k)}' for k in sorted(differ))}"
            )
        size = log.stat().st_size if log.exists() else 0
        if size > state["log_bytes"] and run.step < run.last_step:  # lines that are going to be written again
            os.truncate(log, state["log_bytes"])
        elif size < state["log_bytes"]:
            print(f"WARNING: {log} has lost lines: {size} bytes instead of {state['log_bytes']}")
    return True
