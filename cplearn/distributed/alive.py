"""Which processes of a run are alive: each counts up a number in the store, from a thread beside its work.

A process that works long while the others wait for it in a collective goes on counting. One that is frozen, or whose
machine is gone, does not: it is found, and named, long before the time that a collective has to allow for such work.
"""

import atexit
import threading

import torch.distributed as dist

from cplearn import errors
from cplearn.errors import PeerError

ENDED = -(10**12)  # added to the count of a process that has done its work


class Watch:
    """End this process with a `PeerError` that names another one, when that one's count stands still for `minutes`.

    `names` say who the ranks are, in their order. The counts are compared by number of looks and not by the clock: a
    job that is suspended as a whole, and goes on, has lost no process.
    """

    def __init__(self, store: dist.Store, rank: int, names: list[str], minutes: float):
        self.store = getattr(store, "clone", lambda: store)()  # where the main thread may hold the other connection
        self.rank, self.names, self.minutes = rank, names, minutes
        self.keys, self.counts = [f"alive{r}" for r in range(len(names))], [0] * len(names)
        self.pause = min(10.0, 60 * minutes / 10)  # in seconds; a look takes less than a millisecond
        self.over, self.done = threading.Event(), False
        self.threads = [threading.Thread(target=x, daemon=True) for x in (self._count, self._compare)]
        for thread in self.threads:
            thread.start()

    def stop(self, *, done: bool) -> None:
        """Stop watching; if `done`, the others need not hear from this process again."""
        self.done = done
        self.over.set()
        for thread in self.threads:
            thread.join(timeout=2.0)

    def _count(self) -> None:  # apart from `_compare`: a store whose process is frozen never answers
        try:
            while not self.over.wait(self.pause):
                self.store.add(self.keys[self.rank], 1)
                self.counts = [self.store.add(key, 0) for key in self.keys]
            if self.done:
                self.store.add(self.keys[self.rank], ENDED)
        except (dist.DistError, RuntimeError):  # its process has ended, which collectives notice by themselves
            self.over.set()

    def _compare(self) -> None:
        seen, still = self.counts, [0] * len(self.names)
        while not self.over.wait(self.pause):
            still = [n + 1 if a == b >= 0 else 0 for n, a, b in zip(still, seen, self.counts, strict=True)]
            seen = self.counts
            silent = [r for r, n in enumerate(still) if n * self.pause >= 60 * self.minutes]
            if silent:
                # My own count comes back through the store, too, which is rank 0's.
                who = self.names[0 if self.rank in silent else silent[0]]
                errors.end_at_once(
                    PeerError(f"{who} gives no sign of life for {self.minutes:g} minutes: is it frozen?")
                )


_watch: Watch | None = None


def start(store: dist.Store, rank: int, names: list[str], minutes: float) -> None:
    """Let a `Watch` begin, in place of the one before it."""
    global _watch
    stop()
    _watch = Watch(store, rank, names, minutes)


def stop(*, done: bool = False) -> None:
    """Stop the `Watch`, if there is one."""
    global _watch
    if _watch is not None:
        _watch.stop(done=done)
    _watch = None


atexit.register(stop)  # a thread that is inside the store when the interpreter ends would abort it
