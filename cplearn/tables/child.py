"""Scripts as child processes. How they end is read from a file that each process leaves, never from what it prints."""

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
from typing import BinaryIO, NamedTuple

from cplearn import errors
from cplearn.errors import ExpectedError, Interrupted, PeerError
from cplearn.files import read_json, write_text
from cplearn.host import end_with_parent

GRACE = 30.0  # seconds for the other processes of a script when one has failed
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")  # variables of a process group


class End(NamedTuple):
    """How a script ended."""

    code: int
    line: str  # its last message, "" after code 0


class Children:
    """A script in one or several processes of this machine, which end with this one.

    Several form a process group, as under torchrun, which however hides exit codes and dies of Slurm's signals. When
    one of them fails, the others are stopped.
    """

    def __init__(
        self,
        script: str,
        flags: Sequence[str],
        *,
        processes: int = 1,
        env: dict[str, str] | None = None,
        out: BinaryIO | int | None = None,
    ):
        self._place = tempfile.TemporaryDirectory()
        self._failed_at: float | None = None
        env = {name: value for name, value in (env or os.environ).items() if name not in LAUNCHERS}
        start = str(Path(__file__).with_name("__main__.py"))
        command = [sys.executable, start, str(os.getpid()), self._place.name, script, *flags]
        if processes > 1:
            command += ["--dist_url", f"file://{self._place.name}/meeting"]
            env.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does
        self._processes = []
        for rank in range(processes):
            numbers = dict(zip(LAUNCHERS, map(str, (rank, processes, rank, processes)), strict=True))
            self._processes.append(
                subprocess.Popen(
                    command,
                    env=env | (numbers if processes > 1 else {}),
                    stdout=out,
                    stderr=subprocess.STDOUT if out is not None else None,
                    start_new_session=True,  # Ctrl-C comes through `stop`, once
                )
            )

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
        end = read_json(Path(self._place.name, f"{rank}.json"))
        self._place.cleanup()
        if codes[rank] < 0:
            return End(PeerError.exit_code, f"killed by {signal.Signals(-codes[rank]).name}")
        return End(codes[rank], str(end.get("line", "see its log")) if codes[rank] else "")

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


def run(parent: int, ends: str, script: str, flags: list[str]) -> None:
    """Run the script in this process, a child of `parent`, and leave how it ended in the folder `ends`."""
    end_with_parent()
    if os.getppid() != parent:  # gone before that
        sys.exit(Interrupted.exit_code)

    def report(code: int, line: str) -> None:
        try:
            write_text(Path(ends, f"{os.environ.get('RANK', '0')}.json"), json.dumps({"line": line}))
        except ExpectedError as error:  # a full disk, which may be why the script ended
            print(error, file=sys.stderr)

    sys.argv = [f"{script.rpartition('.')[2]}.py", *flags]
    errors.run_script(lambda _: importlib.import_module(script).main(flags), report)
