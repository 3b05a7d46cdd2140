"""One run per folder: a lock that names its holder, and can be taken over from one that is gone."""

import json
import os
import socket
import threading
import time
from pathlib import Path

from cplearn.distributed import collectives
from cplearn.errors import UserError, WriteError
from cplearn.files import create, read_text, remove_quietly
from cplearn.host import process_start, system_id


class FolderLock:
    """`folder`/.lock holds host, pid and start time of the one process group that may write there.

    Raises `UserError` on every rank if another run has it. A lock whose process is gone is taken over: on the same
    host by looking for the process, from another one by watching for `QUIET` seconds whether its heartbeat moves.
    """

    BEAT, QUIET = 10.0, 45.0  # seconds

    def __init__(self, folder: str | Path, flag: str = "--output_dir"):
        self.path, self.flag = Path(folder) / ".lock", flag
        self._stop = threading.Event()

    def __enter__(self) -> "FolderLock":
        collectives.on_main(self._acquire)
        return self

    def __exit__(self, *_) -> None:
        if not collectives.is_main():
            return
        self._stop.set()
        self._thread.join()
        if _read_lock(self.path) == self._mine:
            remove_quietly(self.path)

    def check(self) -> None:
        """Raise `UserError` if another run took the folder over, as it may from one that was stopped for long."""
        if _read_lock(self.path) != self._mine:
            raise UserError(f"{self.path} is no longer this run's: another one took {self.path.parent} over")

    def _acquire(self) -> None:
        pid = os.getpid()
        self._mine = {"host": socket.gethostname(), "system": system_id(), "pid": pid, "started": process_start(pid)}
        while not self._create():
            if self.path.is_symlink() or (self.path.exists() and not self.path.is_file()):
                raise UserError(f"{self.path} is a link or no file, so it is no run's lock: remove it")
            other = _read_lock(self.path)
            if other is not None:
                self._refuse_if_alive(other)
                print(f"WARNING: taking over {self.path} of a run that is gone: {_describe(other)}")
                self._remove(other)
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def _create(self) -> bool:
        """Create the lock complete or not at all: a link fails if the lock is there; its content was written before."""
        temporary = self.path.with_name(f".lock.{self._mine['host']}.{self._mine['pid']}")
        try:
            with create(temporary) as f:
                f.write(json.dumps(self._mine).encode())
            try:
                os.link(temporary, self.path)
            except FileExistsError:
                return False
            except OSError:  # a file system without links
                try:
                    with open(self.path, "x") as f:
                        f.write(json.dumps(self._mine))
                except FileExistsError:
                    return False
            return True
        except OSError as error:
            raise WriteError(f"{self.path} cannot be written: {error.strerror}") from None
        finally:
            remove_quietly(temporary)

    def _refuse_if_alive(self, other: dict) -> None:
        if all(other.get(k) == self._mine[k] for k in ("host", "system")):
            started = process_start(other["pid"])
            alive = started is not None and started == other.get("started")
        else:
            print(
                f"{self.path} is held by {_describe(other)}: watching for {self.QUIET:g} s whether it lives", flush=True
            )
            first, end = _mtime(self.path), time.monotonic() + self.QUIET
            while _mtime(self.path) == first and time.monotonic() < end:
                time.sleep(min(1.0, self.QUIET / 10))
            alive = _mtime(self.path) not in (first, None)  # None: it was given back meanwhile
        if alive:
            raise UserError(
                f"{self.path.parent} is in use by {_describe(other)}: stop it, or choose another {self.flag}"
            )

    def _remove(self, other: dict) -> None:
        """Move the dead lock away, and back if somebody else was faster and it is not the dead one any more."""
        aside = self.path.with_name(f".lock.dead.{self._mine['host']}.{self._mine['pid']}")
        try:
            os.rename(self.path, aside)
        except FileNotFoundError:
            return
        if _read_lock(aside) != other:
            os.rename(aside, self.path)
        remove_quietly(aside)

    def _beat(self) -> None:
        while not self._stop.wait(self.BEAT):
            try:
                if _read_lock(self.path) == self._mine:
                    os.utime(self.path)
            except OSError:  # the folder is away for a moment, or for good: saving will tell
                pass


def _read_lock(path: Path) -> dict | None:
    """Return the lock's content; None if there is no lock (any more). A damaged one belongs to nobody."""
    try:
        content = json.loads(read_text(path, limit=2**16))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        return {"pid": 0}
    return content if isinstance(content, dict) and type(content.get("pid")) is int else {"pid": 0}


def _mtime(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _describe(lock: dict) -> str:
    return f"process {lock.get('pid')} on {lock.get('host', 'an unknown host')}"
