"""Which processes of a run are alive: each one beats, a number in the store that a thread beside its work counts up.

A process that works long while the others wait for it in a collective goes on beating. One that is frozen, or whose
machine is gone, does not: it is named long before the time that a collective has to allow for such work.
"""

import atexit
import threading
import time

import torch.distributed as dist

from cplearn import errors
from cplearn.errors import PeerError
from cplearn.host import process_start, system_id

BEAT = 2.0  # seconds; a look at all ranks takes less than a millisecond
GRACE = 30.0  # seconds without a store before a process gives up: its owner may be ending as this one does
DONE = b"done"  # instead of a number: this process has finished its work


class Watch:
    """End this process with a `PeerError` that names another one, when that one does not beat for `minutes`.

    `everyone` is what `launch.check_in` returns; each rank has set str(rank) to some number in the store before.
    Beats are compared by number of looks and not by the clock: a job that is suspended as a whole, and goes on, has
    lost no process.
    """

    def __init__(self, store: dist.Store, rank: int, everyone: list[dict], minutes: float):
        self.store = store.clone()  # where the main thread may hold the other connection
        self.rank, self.everyone, self.minutes = rank, everyone, minutes
        self.names = [f"rank {one['rank']} (process {one['pid']} on {one['host']})" for one in everyone]
        self.pause = min(BEAT, 60 * minutes / 10)
        self.beats = self._look()
        self.over, self.done = threading.Event(), False
        self.threads = [threading.Thread(target=x, daemon=True) for x in (self._beat, self._compare)]
        for thread in self.threads:
            thread.start()
        atexit.register(self.stop)  # a thread that is inside the store when the interpreter ends would abort it

    def stop(self, *, done: bool = False) -> None:
        """Stop watching; if `done`, the others need not hear from this process again."""
        self.done |= done
        self.over.set()
        for thread in self.threads:
            thread.join(timeout=2.0)

    def lost(self) -> str:
        """Return the name of a process that is gone, "" if none is. Takes three beats if there is none.

        Its process on this machine has ended, or it does not beat, or rank 0 does not answer for its store.
        """
        try:
            first = self._look()
            others = [r for r, beat in enumerate(first) if beat != DONE and r != self.rank]
            for _ in range(30):
                for r in others:
                    here = self.everyone[r]["system"] == system_id()
                    if here and process_start(self.everyone[r]["pid"]) != self.everyone[r]["started"]:
                        return self.names[r]
                time.sleep(self.pause / 10)
            last = self._look()
        except RuntimeError:
            return self.names[0]
        return next((self.names[r] for r in others if last[r] == first[r]), "")

    def _look(self) -> list[bytes]:
        return self.store.multi_get([str(r) for r in range(len(self.everyone))])

    def _beat(self) -> None:  # apart from `_compare`: a store whose process is frozen never answers
        count = 0
        try:
            while not self.over.wait(self.pause):
                count += 1
                self.store.set(str(self.rank), str(count))
                self.beats = self._look()
            if self.done:
                self.store.set(str(self.rank), DONE)
        except RuntimeError:  # its process has ended, which gloo's collectives notice by themselves, and NCCL's do not
            if not self.over.wait(GRACE):
                errors.end_at_once(PeerError(f"{self.names[0]} does not answer any more: look for its own message"))

    def _compare(self) -> None:
        before, still = self.beats, [0] * len(self.names)
        while not self.over.wait(self.pause):
            now = self.beats
            still = [n + 1 if a == b != DONE else 0 for n, a, b in zip(still, before, now, strict=True)]
            before = now
            silent = [r for r, n in enumerate(still) if n * self.pause >= 60 * self.minutes]
            if silent:
                # My own beat comes back through the store, too, which is rank 0's.
                name = self.names[0 if self.rank in silent else silent[0]]
                line = f"{name} gives no sign of life for {self.minutes:g} minutes: is it frozen?"
                errors.end_at_once(PeerError(line))
