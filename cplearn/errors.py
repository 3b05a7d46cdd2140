"""What can go wrong, each with an exit code (docs/errors.md), and how a script ends. Standard library only."""

import gc
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from cplearn.text import outlive_output


class ExpectedError(Exception):
    """An error that is no bug: shown as one line, without a traceback, with an exit code of its own."""

    exit_code = 1
    alone = False  # whether one rank meets it alone, which then prints it; otherwise all ranks do, and rank 0 prints


class UserError(ExpectedError, ValueError):
    """Wrong input that the user can fix."""

    exit_code = 2  # what argparse itself uses for a wrong flag


class LocalError(UserError):
    """Wrong input that one rank meets alone, such as an unreadable image."""

    alone = True


class NonFiniteError(ExpectedError):
    """Loss or gradient stayed infinite or NaN."""

    exit_code = 3


class WriteError(ExpectedError):
    """The disk is full or went away; the files that were there are whole."""

    exit_code = 4


class ReadError(ExpectedError):
    """A file cannot be read now, which says nothing about its content: the disk went away, no right, no memory."""

    exit_code = 4


class WorkerError(ExpectedError):
    """A process that reads images died or hangs."""

    exit_code = 5
    alone = True


class PeerError(ExpectedError):
    """Another process of the run ended or hangs, so this one cannot go on."""

    exit_code = 6
    alone = True


class CollapseError(ExpectedError):
    """The run collapsed, with --on_collapse stop. It is saved, as after every epoch."""

    exit_code = 7


class Interrupted(ExpectedError):
    """A signal stopped the run, after saving. EX_TEMPFAIL of sysexits.h: run the same command again."""

    exit_code = 75

    def __init__(self, line: str, signal: str | None = None):
        super().__init__(line)
        self.signal = signal  # its name, where it came to this process


# torch raises a plain RuntimeError when a CPU's memory is used up, so there is nothing but its words to know it by.
NO_MEMORY = "can't allocate memory"

watch = None  # the `cplearn.distributed.alive.Watch` of this process, if there are others in its run


def exit_status(error: BaseException) -> tuple[int, str]:
    """Return the exit code and the line to show. Code 1 is a bug, of which the traceback says more."""
    if isinstance(error, ExpectedError):
        line = str(error).strip().splitlines()[-1]  # a loader's worker puts its traceback before it, and the type
        line = line.removeprefix(f"{type(error).__module__}.{type(error).__qualname__}: ")
        return error.exit_code, "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)  # no terminal's codes
    if isinstance(error, KeyboardInterrupt):
        return 130, "Ctrl-C"
    if isinstance(error, SystemExit):
        return (error.code, "see its log") if isinstance(error.code, int) else (1, str(error.code))
    first = (str(error).strip().splitlines() or [""])[0]
    # OutOfMemoryError is torch's, which is not imported here.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or NO_MEMORY in first:
        remedy = "use a smaller --batch_size_per_gpu; training also has --accum N and --grad_checkpointing"
        return UserError.exit_code, f"out of memory ({first[:120] or type(error).__name__}): {remedy}"
    return 1, f"{type(error).__name__}: {first}"


def leave_group() -> None:
    """Leave the process group, if there is one.

    What is left of DDP in reference cycles must be gone by then: collected after its group it aborts the process.
    """
    global watch
    if watch is not None:
        watch.stop(done=True)
        watch = None
        gc.collect()
        distributed = sys.modules["torch"].distributed  # not imported above: what a launcher needs must load at once
        if distributed.is_initialized():
            distributed.destroy_process_group()


def lost_peer(error: BaseException) -> PeerError | None:
    """Return what to tell instead of a RuntimeError if a process of the run is gone, without which torch raises it."""
    if watch is None or not isinstance(error, RuntimeError) or exit_status(error)[0] != 1:
        return None
    ignore_signals()  # the launcher, too, may have seen it, and stop this process before it has told
    name = watch.lost()
    return PeerError(f"{name} has ended: look for its own message, then run again") if name else None


def ignore_signals() -> None:
    """It is too late to stop what ends anyway."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def _report(error: BaseException | None) -> None:
    """What `run_script` was given."""


def end_at_once(error: ExpectedError) -> None:
    """End the process as `run_script` does, from a thread: the main one hangs in a call that no exception reaches."""
    _report(error)
    sys.stdout.flush()
    print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr, flush=True)
    os._exit(error.exit_code)


def run_script(
    main: Callable[[Sequence[str] | None], object],
    report: Callable[[BaseException | None], None] = lambda error: None,
) -> None:
    """Run an entry point; an `ExpectedError` becomes one line on stderr and its exit code.

    Rank 0 prints what all ranks meet alike. Output that is closed or breaks ends nothing.
    `report` is called with the error, or None, before the process ends.
    """
    global _report
    _report = report
    outlive_output()
    try:
        main(None)
        ignore_signals()
        leave_group()  # not after an error: the other ranks may be inside a collective
    except BaseException as raised:
        error = lost_peer(raised) or raised
        code, line = exit_status(error)
        report(error)
        if code == 1 or isinstance(error, SystemExit):
            raise
        alone = getattr(error, "alone", True)
        if code != 130 and (alone or os.environ.get("RANK", "0") == "0"):
            label = "" if isinstance(error, Interrupted) else "error: "
            print(f"{Path(sys.argv[0]).name}: {label}{line}", file=sys.stderr)
        if isinstance(error, Interrupted):  # all ranks come here together
            leave_group()
        sys.exit(code)
    report(None)
