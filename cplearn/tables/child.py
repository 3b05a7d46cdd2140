"""Scripts as child processes. How they end is read from a file that each process leaves, never from what it prints."""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cplearn import errors
from cplearn.errors import ExpectedError, Interrupted, PeerError
from cplearn.files import read_json, write_text
from cplearn.host import ROOT, end_with_parent

GRACE = 30.0  # seconds for the other processes of a script when one has failed
GROUP = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")  # variables of a process group


class End(NamedTuple):
    """How a script ended."""

    code: int
    line: str  # its last message, "" after code 0


class Children:
    """A script in one or several processes of this machine, which end with this one.

    Several form a process group, as under torchrun, which however hides exit codes and dies of Slurm's signals. When
    one of them fails, the others are stopped.
    """

    def __init__(self, script: str, flags: Sequence[str], *, processes: int = 1, env: dict | None = None, out=None):
        """Start them. `out`: where they print, if not here."""
        self._place = tempfile.TemporaryDirectory()
        self._failed_at: float | None = None
        # -m would import a cplearn of the working folder.
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        env = (env or dict(os.environ)) | {"PYTHONSAFEPATH": "1", "PYTHONPATH": path}
        env = {name: value for name, value in env.items() if name not in GROUP}
        command = [sys.executable, "-m", "cplearn.tables.child", str(os.getpid()), self._place.name, script, *flags]
        numbers = [{}]
        if processes > 1:
            command += ["--dist_url", f"file://{self._place.name}/meeting"]
            env.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does
            numbers = [dict(zip(GROUP, map(str, (r, processes, r, processes)), strict=True)) for r in range(processes)]
        self._processes = [
            subprocess.Popen(command, env=env | own, stdout=out, stderr=None if out is None else subprocess.STDOUT,
                             start_new_session=True)  # Ctrl-C comes through `stop`, once
            for own in numbers
        ]  # fmt: skip

    def poll(self) -> End | None:
        """Return how the script ended, None while a process of it runs."""
        codes = [process.poll() for process in self._processes]
        if None in codes:
            if self._failed_at is None and any(code not in (None, 0, Interrupted.exit_code) for code in codes):
                self._failed_at = time.monotonic()
                self.stop(signal.SIGTERM)
            elif self._failed_at is not None and time.monotonic() > self._failed_at + GRACE:
                self.stop(signal.SIGKILL)
            return None
        rank = min(range(len(codes)), key=lambda rank: _explains(codes[rank]))
        line = read_json(Path(self._place.name, f"{rank}.json")).get("line", "see its log")
        self._place.cleanup()
        if codes[rank] < 0:
            return End(PeerError.exit_code, f"killed by {signal.Signals(-codes[rank]).name}")
        return End(codes[rank], line if codes[rank] else "")

    def wait(self) -> End:
        """Wait for the end."""
        while (end := self.poll()) is None:
            time.sleep(0.05)
        return end

    def stop(self, number: int) -> None:
        """Send a signal to all processes that run."""
        for process in self._processes:
            process.send_signal(number)


def _explains(code: int) -> int:
    """Order exit codes by what they explain: a failure first, then kills, what follows from these, and stops."""
    if code < 0:
        return 3 if code == -signal.SIGTERM else 1
    return {PeerError.exit_code: 2, Interrupted.exit_code: 4, 0: 5}.get(code, 0)


def run(parent: str, ends: str, script: str, *flags: str) -> None:
    """Run the script in this process, a child of `parent`, and leave how it ended in the folder `ends`."""
    end_with_parent()
    if os.getppid() != int(parent):  # gone before that
        sys.exit(Interrupted.exit_code)

    def report(error: BaseException | None) -> None:
        if error:
            content = json.dumps({"line": errors.exit_status(error)[1]})
            with contextlib.suppress(ExpectedError):  # a full disk, which may be why the script ended
                write_text(Path(ends, f"{os.environ.get('RANK', '0')}.json"), content)

    sys.argv = [f"{script.rpartition('.')[2]}.py", *flags]
    errors.run_script(lambda _: importlib.import_module(script).main(flags), report)


if __name__ == "__main__":
    run(*sys.argv[1:])
