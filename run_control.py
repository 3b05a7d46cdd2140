"""What can stop a run from outside or inside: signals, a second process on the same folder, steps that are not finite.

Exit codes are those of `errors.py`; README lists them.
"""

import json
import math
import os
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import distributed
from errors import Interrupted, NonFiniteError, UserError, WriteError
from utils import process_start, remove_quietly

# --- signals -------------------------------------------------------------------------------------------


class StopSignals:
    """While inside, SIGTERM, SIGUSR1, SIGUSR2 and Ctrl-C do not end the process but set `name`.

    Ctrl-C again, more than a second later, ends it at once (torchrun passes a first one on twice).
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)

    def __init__(self):
        self.name: str | None = None
        self._ctrl_c: float | None = None  # when the first one came

    def __enter__(self) -> "StopSignals":
        here = threading.current_thread() is threading.main_thread()  # Python lets no other set handlers
        self._before = {s: signal.signal(s, self._note) for s in self.SIGNALS} if here else {}
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


# --- one run, one folder -------------------------------------------------------------------------------


class FolderLock:
    """`folder`/.lock holds host, pid and start time of the one process group that may write there.

    Raises `UserError` on every rank if another run has it. A lock whose process is gone is taken over: on the same
    host by looking for the process, from another one by watching for `QUIET` seconds whether its heartbeat moves.
    """

    BEAT, QUIET = 10.0, 45.0  # seconds

    def __init__(self, folder: str | Path):
        self.path = Path(folder) / ".lock"
        self._stop = threading.Event()

    def __enter__(self) -> "FolderLock":
        distributed.on_main(self._acquire)
        return self

    def __exit__(self, *_) -> None:
        if not distributed.is_main():
            return
        self._stop.set()
        self._thread.join()
        if _read_lock(self.path) == self._mine:
            remove_quietly(self.path)

    def check(self) -> None:
        """Raises `UserError` if another run took the folder over, as it may from one that was stopped for long."""
        if _read_lock(self.path) != self._mine:
            raise UserError(f"{self.path} is no longer this run's: another one took {self.path.parent} over")

    def _acquire(self) -> None:
        pid = os.getpid()
        self._mine = {"host": socket.gethostname(), "system": system_id(), "pid": pid, "started": process_start(pid)}
        while not self._create():
            other = _read_lock(self.path)
            if other is not None:
                self._refuse_if_alive(other)
                print(f"WARNING: taking over {self.path} of a run that is gone: {_describe(other)}")
                self._remove(other)
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def _create(self) -> bool:
        """Complete or not at all: a link fails if the lock is there, and its content was written before."""
        temporary = self.path.with_name(f".lock.{self._mine['host']}.{self._mine['pid']}")
        try:
            temporary.write_text(json.dumps(self._mine))
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
                f"{self.path.parent} is in use by {_describe(other)}: stop it, or choose another --output_dir"
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


def system_id() -> str:
    """This boot of this machine, and the name space of its process numbers: containers may share a host's name."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _read_lock(path: Path) -> dict | None:
    """None if there is no lock (any more). A damaged one belongs to nobody."""
    try:
        content = json.loads(path.read_text())
        return content if isinstance(content, dict) and isinstance(content.get("pid"), int) else {"pid": 0}
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {"pid": 0}


def _mtime(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _describe(lock: dict) -> str:
    return f"process {lock.get('pid')} on {lock.get('host', 'an unknown host')}"


# --- steps that are not finite -------------------------------------------------------------------------


class RunningStatistics:
    """Batch norm's running mean and variance, the only state a forward pass writes: a bad batch would spoil it."""

    def __init__(self, module: nn.Module):
        self._buffers = [
            b
            for m in module.modules()
            if isinstance(m, nn.modules.batchnorm._NormBase)
            for b in (m.running_mean, m.running_var)
            if b is not None
        ]

    @torch.no_grad()
    def keep(self) -> None:
        self._kept = [b.clone() for b in self._buffers]

    @torch.no_grad()
    def restore(self, skipped: Tensor) -> None:
        """Back to what was kept if `skipped`, a bool on the device, is true."""
        for now, before in zip(self._buffers, self._kept, strict=True):
            now.copy_(torch.where(skipped, before, now))


class BadSteps:
    """Counts skipped steps, and ends the run after more than `limit` in a row with a report of the last."""

    def __init__(self, limit: int, folder: str | Path, names: Sequence[str]):
        self.limit, self.path, self.names = limit, Path(folder) / "bad_step.json", names
        self.in_a_row = 0
        self._seen: deque[tuple] = deque(maxlen=2)  # the host learns one step later which of them was bad

    def remember(self, step: int, samples: Tensor, terms: dict[str, Tensor]) -> None:
        self._seen.append((step, samples, terms))

    def count(self, step: int, skipped: bool, scale: Callable[[], float]) -> None:
        """Every rank calls it with the same values. Raises `NonFiniteError` on all of them together."""
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        if self.in_a_row <= self.limit:
            return
        samples, terms = next((samples, terms) for s, samples, terms in self._seen if s == step)
        files = [str(self.names[i]) for i in samples]
        terms = {name: float(value) for name, value in terms.items()}
        ranks = distributed.gather_objects({"terms": terms, "files": files})
        wrong = sorted({name for one in ranks for name, x in one["terms"].items() if not math.isfinite(x)})
        if distributed.is_main():
            report = {"step": step, "in_a_row": self.in_a_row, "not_finite": wrong, "loss_scale": scale()}
            for one in ranks:  # JSON has no NaN and no infinity
                one["terms"] = {k: x if math.isfinite(x) else str(x) for k, x in one["terms"].items()}
            try:
                self.path.write_text(json.dumps({**report, "ranks": ranks}, indent=1) + "\n")
            except OSError as error:
                print(f"{self.path} could not be written: {error.strerror}", file=sys.stderr)
        raise NonFiniteError(
            f"{self.in_a_row} steps in a row were not finite ({', '.join(wrong)}), the last {step}: see {self.path}; "
            "the checkpoint is from before. Try a lower --lr with --resume_force lr, or --precision bf16 for fp16 with "
            "--resume_force precision use_fp16"
        )
