"""The signals that stop a run after the step in which they come. Exit codes are those of `errors.py`."""

import os
import signal
import threading
import time

from cplearn.errors import Interrupted


class StopSignals:
    """While inside, SIGTERM, SIGHUP (a closed terminal), SIGUSR1, SIGUSR2 and Ctrl-C set `name`, and end nothing.

    Ctrl-C again, more than a second later, ends it at once (torchrun passes a first one on twice).
    """

    SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)

    def __init__(self):
        self.name: str | None = None
        self._ctrl_c: float | None = None  # when the first one came

    def __enter__(self) -> "StopSignals":
        here = threading.current_thread() is threading.main_thread()  # Python lets no other set handlers
        nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        wanted = [s for s in self.SIGNALS if not (nohup and s == signal.SIGHUP)] if here else []
        self._before = {s: signal.signal(s, self._note) for s in wanted}
        return self

    def __exit__(self, kind, *_) -> None:
        for number, handler in self._before.items():  # schedulers signal twice: the way out keeps its exit code
            signal.signal(number, signal.SIG_IGN if kind is Interrupted else handler)

    def _note(self, number: int, frame) -> None:
        if number == signal.SIGINT:
            if self._ctrl_c is not None and time.monotonic() - self._ctrl_c > 1:
                raise KeyboardInterrupt
            self._ctrl_c = self._ctrl_c or time.monotonic()
        if self.name is None:
            self.name = signal.Signals(number).name
            more = " (Ctrl-C again: at once)" if number == signal.SIGINT else ""
            os.write(2, f"{self.name}: stopping after this step{more}\n".encode())  # print is not safe here
