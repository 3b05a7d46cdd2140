"""What can go wrong, with an exit code each (README, "When things go wrong"), and how a script ends."""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path


class UserError(ValueError):
    """Wrong input that the user can mend: shown as one line, without a traceback."""

    exit_code = 2  # what argparse itself uses for a wrong flag


class LocalError(UserError):
    """A `UserError` that one rank meets alone (an unreadable image): printed by that rank, whichever it is."""


class NonFiniteError(UserError):
    """Loss or gradient stayed infinite or NaN."""

    exit_code = 3


class WriteError(UserError):
    """The disk is full, or went away: what was there already is whole."""

    exit_code = 4


class WorkerError(LocalError):
    """A process that reads images died or hangs."""

    exit_code = 5


class PeerError(LocalError):
    """Another process of the run ended or hangs, so this one cannot go on."""

    exit_code = 6


class CollapseError(UserError):
    """--on_collapse stop: the run collapsed. Saved, as after every epoch."""

    exit_code = 7


class Interrupted(UserError):
    """Told to stop by a signal, after saving. EX_TEMPFAIL of sysexits.h: run the same command again."""

    exit_code = 75


# How torch words it when the other end of a collective is gone.
PEER_GONE = (
    "Connection closed by peer",
    "Connection reset",
    "Broken pipe",
    "Timed out waiting",
    "NCCL",
    "ProcessGroup",
)


def judge(error: BaseException) -> tuple[int, str]:
    """Exit code and the line to show. Code 1 is a bug, of which the traceback tells more."""
    if isinstance(error, UserError):
        return error.exit_code, str(error).strip().splitlines()[-1]  # a loader's worker puts its traceback before it
    if isinstance(error, KeyboardInterrupt):
        return 130, "Ctrl-C"
    if isinstance(error, SystemExit):
        return (error.code, "see its log") if isinstance(error.code, int) else (1, str(error.code))
    sign = next((sign for sign in PEER_GONE if sign in str(error)), None)
    if isinstance(error, RuntimeError) and sign and in_group():
        line = f"another process of the run ended or hangs ({sign}): look for its own message, then run again"
        return PeerError.exit_code, line
    return 1, f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def in_group() -> bool:
    torch = sys.modules.get("torch")  # not imported here: what a launcher needs should load at once
    return torch is not None and torch.distributed.is_initialized()


def leave_group() -> None:
    if in_group():
        sys.modules["torch"].distributed.destroy_process_group()


def run_script(
    main: Callable[[Sequence[str] | None], object], report: Callable[[int, str], None] = lambda code, line: None
) -> None:
    """Run an entry point; a `UserError` becomes one line on stderr and its exit code.

    What all ranks meet alike is printed by rank 0 only. `report` hears code and line before the process ends.
    """
    try:
        main(None)
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):  # too late to stop what is done
            signal.signal(number, signal.SIG_IGN)
        leave_group()  # not after an error: the other ranks may be inside a collective
    except BaseException as error:
        code, line = judge(error)
        report(code, line)
        if code == 1 or isinstance(error, SystemExit):
            raise
        alone = isinstance(error, LocalError) or not isinstance(error, UserError)
        if code != 130 and (alone or int(os.environ.get("RANK", "0")) == 0):
            label = "" if isinstance(error, Interrupted) else "error: "
            print(f"{Path(sys.argv[0]).name}: {label}{line}", file=sys.stderr)
        if isinstance(error, Interrupted):  # all ranks come here together
            leave_group()
        sys.exit(code)
    report(0, "")
