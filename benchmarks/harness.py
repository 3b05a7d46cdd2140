"""Commands in processes of their own, for what kills or misleads them: forked, so that a thousand starts take minutes.

The parent has imported torch but never used it: threads do not survive a fork.
"""

import faulthandler
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cplearn import errors
from cplearn.host import ROOT

FORK = multiprocessing.get_context("fork")
HUNG = 1000  # in place of an exit code
CODES = (0, 2, 3, 4, 5, 6, 7, 75)  # docs/errors.md


def start(
    script: str,
    main: Callable[[Sequence[str]], object],
    argv: Sequence[str],
    output: Path,
    prepare: Callable[[], None] = lambda: None,
    **environment: str,
) -> BaseProcess:
    """Start `script.py argv`, whose entry is `main`, as a group of its own; what it prints is appended to `output`."""
    process = FORK.Process(target=_run, args=(script, main, list(argv), output, prepare, environment))
    process.start()
    return process


def _run(script: str, main: Callable, argv: list[str], output: Path, prepare: Callable, environment: dict) -> None:
    os.setsid()  # what it starts is killed with it
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number, opened in ((0, os.open(os.devnull, os.O_RDONLY)), (1, file), (2, file)):
        os.dup2(opened, number)
    faulthandler.register(signal.SIGQUIT, file)  # which the scripts leave alone
    torch.set_num_threads(1)
    os.environ.update(environment)
    prepare()
    sys.argv = [f"{ROOT}/{script}.py", *argv]
    errors.run_script(lambda _: main(argv))
    sys.stdout.flush()


def finish(processes: list[BaseProcess], seconds: float) -> list[int]:
    """Wait for the end of all; return their exit codes. What hangs prints where, is killed, and counts as `HUNG`."""
    end, codes = time.monotonic() + seconds, []
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
        codes.append(HUNG if process.is_alive() else process.exitcode)
        if codes[-1] == HUNG:
            os.kill(process.pid, signal.SIGQUIT)
            time.sleep(1)
            kill(process)
            process.join()
    return codes


def kill(process: BaseProcess) -> None:
    """Kill a process with everything that it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def gone(processes: list[BaseProcess], seconds: float = 30) -> bool:
    """Return whether nothing is left of these groups: a loader's workers notice in seconds that their rank died."""
    end = time.monotonic() + seconds
    for process in processes:
        while True:
            try:
                os.killpg(process.pid, 0)
            except ProcessLookupError:
                break
            if time.monotonic() > end:
                return False
            time.sleep(0.1)
    return True


def same(a, b) -> bool:
    """Return whether two containers of tensors are equal to the last bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b
