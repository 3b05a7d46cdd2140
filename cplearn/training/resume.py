"""Saving a run, and resuming it at the exact step and to the same bits."""

import os
import sys
import time
from pathlib import Path

import torch

from cplearn import checkpoints
from cplearn.data.identity import Identity
from cplearn.distributed import collectives
from cplearn.errors import NonFiniteError, UserError
from cplearn.files import read_text, reading
from cplearn.host import git_commit
from cplearn.text import from_printable, printable
from cplearn.training.run import Run

# Flags that may differ between a run and its continuation, because they change nothing but how sums are rounded.
MAY_CHANGE_ON_RESUME = {
    "output_dir", "num_workers", "cache", "cache_dir", "worker_timeout", "saveckp_freq", "saveckp_minutes",
    "print_freq", "max_steps", "max_bad_images", "max_skipped_steps", "knn_freq", "best_by", "on_collapse",
    "resume_force", "tensorboard", "wandb", "wandb_project", "profile", "grad_checkpointing", "compile", "device",
    "dist_url", "dist_timeout", "peer_timeout", "loss_form", "threads",
}  # fmt: skip


def save(run: Run) -> None:
    """Save everything a continuation needs to come to the same bits. Every rank must call it.

    While steps are being skipped nothing is saved, except at the end of the run: the step before them may have broken
    the weights. No state of a random generator is in it: every draw is made from (seed, step, rank) or (seed, epoch,
    sample, view). Raises `WriteError`, and `NonFiniteError` for weights that are not finite.
    """
    if run.bad_steps.in_a_row and run.step < run.last_step:
        if collectives.is_main():
            print(f"Nothing is saved at step {run.step}, which was skipped: checkpoint.pth is of step {run.saved_step}")
        return
    tensors = [*run.method.parameters(), *run.method.buffers()]
    if not torch.stack([t.isfinite().all() for t in tensors]).all():  # asks the device once
        raise NonFiniteError(
            f"weights became infinite or NaN by step {run.step}: not saved, the checkpoint is from before. Try a lower "
            "--lr with --resume_force lr"
        )
    progress = run.epoch.state() | run.monitor.state() | {"in_a_row": run.bad_steps.in_a_row}
    collectives.on_main(_write, run, progress)
    run.saved_at, run.saved_step, run.monitor.improved = time.monotonic(), run.step, False


def _write(run: Run, progress: dict) -> None:
    folder = Path(run.args.output_dir)
    log = folder / "log.txt"
    epoch, rest = divmod(run.step, run.steps_per_epoch)
    state = {
        "args": vars(run.args),
        "identity": run.identity,
        "images": run.content.state(),
        "commit": git_commit(),
        "epoch": epoch,  # whole ones
        "step": run.step,
        "steps_per_epoch": run.steps_per_epoch,
        "model": run.method.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "progress": progress,
        "bad_images": run.bad_images.known,
        "log_bytes": log.stat().st_size if log.exists() else 0,
    }
    run.lock.check()
    others = []
    if run.args.saveckp_freq and rest == 0 and epoch % run.args.saveckp_freq == 0:
        others.append(f"checkpoint{epoch:04}.pth")
    if run.monitor.improved:
        others.append("checkpoint_best.pth")
    checkpoints.save_run(folder, state, others)


def resume(run: Run, defaults: dict) -> None:
    """Go on after the last step in output_dir/checkpoint.pth (or the one before it), if there is one.

    `defaults` are the values of flags that the checkpoint does not know.

    Raises `UserError` if it belongs to a run with other settings, unless --resume_force names each that differs.
    """
    path = collectives.on_main(_choose_checkpoint, Path(run.args.output_dir))
    if path is None:
        collectives.on_main(_identify, run)
        return
    with collectives.raise_on_all_ranks(), reading(path, "use another copy"):  # each rank reads it on its own
        state = checkpoints.load(path)
    changed = collectives.on_main(_compare_images, run, state)
    with collectives.raise_on_all_ranks(), reading(path, "use another copy"):
        differ = _check_settings(run, state, defaults, path, changed)
        checkpoints.load_into(run.method, state["model"], path)
        checkpoints.load_optimizer(run.optimizer, state["optimizer"], path)
        _load_progress(run, state, differ)
    run.bad_images.load(state["bad_images"])
    collectives.on_main(_announce, run, path, differ, state)
    run.resumed = True


def _load_progress(run: Run, state: dict, differ: dict) -> None:
    """Set how far the run is."""
    if "precision" not in differ:
        run.scaler.load_state_dict(state["scaler"])
    run.step = run.saved_step = int(state["step"])
    if not 0 <= run.step or not 0 <= state["epoch"]:
        raise ValueError(f"step {run.step} of epoch {state['epoch']}")
    progress = state["progress"]
    same_steps = state["steps_per_epoch"] == run.steps_per_epoch
    if same_steps and not {"processes", "batch_size_per_gpu", "data", "seed"} & differ.keys():
        run.epoch.load(progress, run.device)
        run.monitor.load(progress, run.device)
        run.bad_steps.in_a_row = progress["in_a_row"]
    else:  # another batch: steps cannot be matched inside an epoch
        run.step = state["epoch"] * run.steps_per_epoch
        if not {"data", "seed"} & differ.keys():  # the probe is the same
            run.monitor.load(progress, run.device, same_steps=False)


def _choose_checkpoint(folder: Path) -> str | None:
    """Clear up after a killed run, and return the newest checkpoint that can be read. None if there is none."""
    checkpoints.finish_writing(folder)
    newest = checkpoints.load_run(folder)
    log = folder / "log.txt"
    if newest is None:
        if log.exists():  # of a run that was killed before its first checkpoint
            os.replace(log, log.with_name("log_old.txt"))
        return None
    _, path, problem = newest
    if problem:
        latest = folder / checkpoints.LATEST
        if latest.exists():  # out of the way of the good one, which is the next to be called previous
            os.replace(latest, latest.with_name("checkpoint_damaged.pth"))
        print(f"WARNING: {problem}. Resuming the one before it, {path}", file=sys.stderr, flush=True)
    return str(path)


def _identify(run: Run) -> None:
    run.content.read_sample(run.images.dataset)


def _compare_images(run: Run, state: dict) -> str:
    """Return how the images differ from those that the run began with, "" if they do not."""
    if "images" not in state:  # an older checkpoint
        _identify(run)
        return ""
    bad = Path(run.args.output_dir, "bad_images.txt")  # has those that were met after the checkpoint, too
    lines = read_text(bad).splitlines() if bad.exists() else []
    repaired = {from_printable(line.partition("\t")[0]) for line in lines} | state["bad_images"].keys()
    before = Identity(**state["images"])
    changes = run.content.changes(before, run.images.dataset, repaired)
    if changes.copied:
        print(f"The images seem to be a copy: other times, but the same content in all {changes.copied:,} compared")
    if run.content.files.equal(before.files):
        run.content = before
    _identify(run)
    return changes.text


def _check_settings(run: Run, state: dict, defaults: dict, path: str, changed: str) -> dict[str, object]:
    """Return the settings that differ, with the checkpoint's values; `changed` says how the images do.

    Raises `UserError` for those not forced.
    """
    now, then = vars(run.args) | run.identity, defaults | state["args"] | state["identity"]
    names = (now.keys() | then.keys()) - MAY_CHANGE_ON_RESUME
    differ = {k: then.get(k) for k in sorted(names) if now.get(k) != then.get(k) or (k == "data" and changed)}
    words = {k: f"{k} {then.get(k)} there, {now.get(k)} here" for k in differ} | {"data": f"data: {changed}"}
    refused = [k for k in differ if k not in run.args.resume_force]
    if refused:
        raise UserError(
            f"{path} belongs to another run: "
            + ", ".join(words[k] for k in refused)
            + f"; use another --output_dir, the same settings, or --resume_force {' '.join(refused)}"
        )
    return differ


def _announce(run: Run, path: str, differ: dict[str, object], state: dict) -> None:
    """Say where the run goes on, and cut off log lines that are going to be written again."""
    log_bytes, threads = state["log_bytes"], state["identity"].get("threads")
    epoch, rest = divmod(run.step, run.steps_per_epoch)
    print(f"Resuming {path} after epoch {epoch}" + f" and {rest} of {run.steps_per_epoch} steps" * (rest > 0))
    if run.device.type == "cpu" and threads not in (None, torch.get_num_threads()):
        print(
            f"WARNING: saved with {threads} threads per process, now there are {torch.get_num_threads()}: on a CPU "
            f"sums round differently, so this ends with other bits than an undisturbed run (OMP_NUM_THREADS={threads})"
        )
    form = getattr(run.args, "loss_form", None)  # CPLearn's
    if (before := state["args"].get("loss_form", form)) != form:
        print(
            f"WARNING: saved with --loss_form {before}, now it is {form}: sums may round differently, so this can "
            "end with other bits than an undisturbed run"
        )
    if differ:
        print(f"WARNING: forced although different: {', '.join(f'{k} was {printable(v)}' for k, v in differ.items())}")
    log = Path(run.args.output_dir, "log.txt")
    size = log.stat().st_size if log.exists() else 0
    if size > log_bytes and run.step < run.last_step:
        os.truncate(log, log_bytes)
    elif size < log_bytes:
        print(f"WARNING: {log} has lost lines: {size} bytes instead of {log_bytes}")
