"""TODO cplearn.training.resume."""

import os
import sys
import time
from pathlib import Path

from cplearn import checkpoints
from cplearn.distributed import collectives
from cplearn.errors import NonFiniteError, UserError
from cplearn.host import git_commit
from cplearn.training.bad_batches import list_bad_images, still_unreadable
from cplearn.training.run import Run

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
            "commit": git_commit(),
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

    collectives.on_main(write)
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

    path = collectives.on_main(choose)
    if path is None:
        return False
    with collectives.raise_on_all_ranks():  # each rank reads the file on its own
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
    run.bad_images = collectives.on_main(still_unreadable, run, state["bad_images"])
    if state["bad_images"]:
        collectives.on_main(list_bad_images, run)
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
    if collectives.is_main():
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
