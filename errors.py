"""What can go wrong, with an exit code each (README, "When things go wrong"), and how a script ends."""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch


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


def run_script(main: Callable[[Sequence[str] | None], object]) -> None:
    """Run an entry point; a `UserError` becomes one line on stderr and its exit code.

    What all ranks meet alike is printed by rank 0 only.
    """
    try:
        main(None)
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):  # too late to stop what is done
            signal.signal(number, signal.SIG_IGN)
        if torch.distributed.is_initialized():  # not after an error: the other ranks may be inside a collective
            torch.distributed.destroy_process_group()
    except UserError as error:
        if isinstance(error, LocalError) or int(os.environ.get("RANK", "0")) == 0:
            line = str(error).strip().splitlines()[-1]  # a loader's worker puts its traceback before it
            label = "" if isinstance(error, Interrupted) else "error: "
            print(f"{Path(sys.argv[0]).name}: {label}{line}", file=sys.stderr)
        if isinstance(error, Interrupted) and torch.distributed.is_initialized():  # all ranks come here together
            torch.distributed.destroy_process_group()
        sys.exit(error.exit_code)
    except RuntimeError as error:
        if not torch.distributed.is_initialized() or not any(sign in str(error) for sign in PEER_GONE):
            raise
        reason = next(sign for sign in PEER_GONE if sign in str(error))
        line = f"another process of the run ended or hangs ({reason}): look for its own message, then run again"
        print(f"{Path(sys.argv[0]).name}: error: {line}", file=sys.stderr)
        sys.exit(PeerError.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
