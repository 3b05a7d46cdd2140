"""One process at a time: a lock file that names its holder, and is taken over from one that is gone."""

import contextlib
import json
import os
import socket
import threading
import time
from pathlib import Path

from cplearn.errors import UserError
from cplearn.files import read_json, remove_quietly
from cplearn.host import process_start, system_id


class Lock:
    """A file that names the one process that may go on: its host, system, number and start. Entering waits for it.

    On this system the holder is looked for among the processes. One elsewhere (another host, or a container of the same
    name) touches the file every `BEAT` seconds; after `QUIET` seconds without that it is gone.
    """

    BEAT, QUIET = 10.0, 45.0

    def __init__(self, path: Path):
        self.path, pid = path, os.getpid()
        self._own = {"host": socket.gethostname(), "system": system_id(), "pid": pid, "started": process_start(pid)}
        self._stop = threading.Event()

    def __enter__(self) -> "Lock":
        while self.acquire() is not None:
            time.sleep(0.2)
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._beating.join()
        if self.is_held():
            remove_quietly(self.path)

    def is_held(self) -> bool:
        """Return whether the lock is still this process's: one that was frozen may have lost it."""
        return _read(self.path)[0] == self._own

    def acquire(self) -> dict | None:
        """Take the lock and return None, or return the living holder."""
        while True:
            with contextlib.suppress(FileExistsError), open(self.path, "x") as file:
                json.dump(self._own, file)
                break
            holder, touched = _read(self.path)
            lives = _lives(holder)
            if lives is None and touched is not None:
                lives = self._watch(holder, touched)
            if lives:
                return holder
            if lives is False:
                self._remove(holder)
        self._beating = threading.Thread(target=self._beat, daemon=True)
        self._beating.start()
        return None

    def _watch(self, holder: dict, touched: float) -> bool | None:
        """Return whether a holder elsewhere lives; None if the lock has changed hands."""
        print(f"{self.path} is held by {describe(holder)}: watching for {self.QUIET:g} s whether it lives", flush=True)
        end = time.monotonic() + self.QUIET
        while (now := _read(self.path)) == (holder, touched) and time.monotonic() < end:
            time.sleep(min(1.0, self.QUIET / 10))
        return now[1] != touched if now[0] == holder else None

    def _remove(self, dead: dict) -> None:
        """Move a dead holder's lock away; back, if somebody else was faster and it is theirs by now."""
        aside = self.path.with_name(f"{self.path.name}.{self._own['host']}.{self._own['pid']}")
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.path, aside)
            if _read(aside)[0] != dead:
                os.rename(aside, self.path)
            aside.unlink()
            print(f"WARNING: took over {self.path} of a process that is gone: {describe(dead)}", flush=True)

    def _beat(self) -> None:
        while not self._stop.wait(self.BEAT):
            with contextlib.suppress(OSError):  # the folder is away, for a moment or for good: saving will tell
                if self.is_held():
                    os.utime(self.path)


class FolderLock(Lock):
    """`folder`/.lock, for rank 0 of a run. Raises `UserError` on every rank if another process has it."""

    def __init__(self, folder: str | Path, flag: str = "--output_dir"):
        super().__init__(Path(folder) / ".lock")
        self.flag = flag

    def __enter__(self) -> "FolderLock":
        from cplearn.distributed import collectives  # loads torch, which `in_use` does not need

        self.is_main = collectives.is_main()
        collectives.on_main(self._take)
        return self

    def _take(self) -> None:
        if (holder := self.acquire()) is not None:
            folder = self.path.parent
            raise UserError(f"{folder} is in use by {describe(holder)}: stop it, or choose another {self.flag}")

    def __exit__(self, *error) -> None:
        if self.is_main:
            super().__exit__(*error)

    def check(self) -> None:
        """Raise `UserError` if another run took the folder over, as it may from one that was frozen."""
        if not self.is_held():
            raise UserError(f"{self.path} is no longer this run's: another one took {self.path.parent} over")


def in_use(folder: str | Path) -> bool:
    """Return at once whether a living process holds a folder's lock; one elsewhere by its last sign of life."""
    holder, touched = _read(Path(folder) / ".lock")
    lives = _lives(holder)
    return touched is not None and (time.time() - touched < Lock.QUIET if lives is None else lives)


def describe(holder: dict) -> str:
    return f"process {holder.get('pid')} on {holder.get('host', 'an unknown host')}"


def _lives(holder: dict) -> bool | None:
    """Return whether a holder lives; None if that cannot be seen from here."""
    if (holder.get("host"), holder.get("system")) != (socket.gethostname(), system_id()):
        return None
    started = process_start(holder["pid"])
    return started is not None and started == holder.get("started")


def _read(path: Path) -> tuple[dict, float | None]:
    """Return who holds a lock, {} if it is damaged, and when it was touched, None if it is not there."""
    try:
        return read_json(path), path.lstat().st_mtime
    except OSError:
        return {}, None
