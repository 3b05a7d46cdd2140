"""Where else the numbers of an epoch go: TensorBoard, Weights & Biases. Neither package is needed without its flag."""

import argparse
import importlib.metadata
import importlib.util
import os
import re
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cplearn.distributed import collectives
from cplearn.errors import UserError, exit_status
from cplearn.files import read_text, write_text
from cplearn.text import printable

# As in pyproject.toml. Older ones fail with NumPy 2; leave a process behind, or wait without end for a server.
OLDEST = {"tensorboard": "2.18", "wandb": "0.29"}
RUN_ID = "wandb_id.txt"  # in the output folder: a continuation goes on in the same run
START, END = 30, 60  # seconds that Weights & Biases may take for its first answer, and to send what is left at the end


def check_writers(args: argparse.Namespace) -> None:
    """Raise `UserError` if a package that a flag asks for is not there, or too old, or for a name that a project cannot
    have."""
    for package, oldest in OLDEST.items():
        if not getattr(args, package):
            continue
        found = importlib.util.find_spec(package)
        if found is None or found.origin is None:  # a folder of that name, such as wandb's own, is no package
            raise UserError(f"--{package} needs the {package} package: pip install {package}")
        with suppress(importlib.metadata.PackageNotFoundError):  # installed under another name, such as tb-nightly
            if _numbers(installed := importlib.metadata.version(package)) < _numbers(oldest):
                raise UserError(
                    f"--{package} needs {package} {oldest} or newer, not {installed}: pip install -U {package}"
                )
    if not re.fullmatch(r"[^/\\#?%:\x00-\x1f]{1,128}", args.wandb_project):
        raise UserError(f"--wandb_project {args.wandb_project!r} must be 1 to 128 characters without / \\ # ? % :")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


class Writers:
    """What --tensorboard and --wandb ask for, on rank 0; nothing elsewhere. Closed at the end of a `with` block."""

    def __init__(self, args: argparse.Namespace, epoch: int):
        self._writers: list[TensorBoard | WeightsAndBiases] = []
        if collectives.is_main():
            if args.tensorboard:
                self._writers.append(TensorBoard(args.output_dir, epoch))
            if args.wandb:
                self._writers.append(WeightsAndBiases(args))

    def write(self, record: dict) -> None:
        """Write the numbers of a log record."""
        numbers = {k: v for k, v in record.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        for writer in self._writers:
            writer.write(numbers, record["epoch"])

    def __enter__(self) -> "Writers":
        return self

    def __exit__(self, kind, error: BaseException | None, trace) -> None:
        for writer in self._writers:
            writer.close(exit_status(error)[0] if error else 0)


class TensorBoard:
    """Events in OUTPUT_DIR/tensorboard; those of epochs that are trained again are replaced."""

    def __init__(self, output_dir: str, epoch: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(os.path.join(output_dir, "tensorboard"), purge_step=epoch)

    def write(self, numbers: dict[str, float], epoch: int) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, epoch)
        self._writer.flush()

    def close(self, code: int) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run at Weights & Biases, with its files in OUTPUT_DIR/wandb. It must never stop or delay the training.

    Without network or account it keeps the numbers in that folder, to be sent later; whatever else fails is said once.
    """

    def __init__(self, args: argparse.Namespace):
        self.run, self.folder = None, os.path.join(args.output_dir, "wandb")
        for mode in (None, "offline"):  # None: what the user has chosen, with WANDB_MODE or `wandb offline`
            try:
                with self._kept_inside():
                    self.run = _start(args, mode)
                break
            except Exception as error:  # whatever it may be
                _end_process()  # it would hold on to the run's id
                self._warn("did not start", error, "left out" if mode else "its numbers are kept for `wandb sync`")
        if self.run is not None and not self.run.disabled:
            where = self.folder if self.run.offline else self.run.url
            print(f"Weights & Biases: run {self.run.id}, {where}", flush=True)

    def write(self, numbers: dict[str, float], epoch: int) -> None:
        try:
            if self.run is not None:  # of epochs that are trained again the first numbers stay
                self.run.log(numbers, step=epoch + 1)
        except Exception as error:
            self.run = None
            self._warn("failed", error, "left out from here on")

    def close(self, code: int) -> None:
        try:
            with self._kept_inside():
                if self.run is not None:
                    self.run.finish(exit_code=code)
        except Exception as error:
            self._warn("could not send everything", error, f"`wandb sync {self.folder}/run-*` sends it")
        _end_process()

    def _warn(self, what: str, error: Exception, then: str) -> None:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        print(f"WARNING: Weights & Biases {what} ({reason}): {then}", file=sys.stderr, flush=True)

    @contextmanager
    def _kept_inside(self) -> Iterator[None]:
        """Let its process write inside the folder only, and ask nobody: the answer might never come."""
        stdin, missing = sys.stdin, [name for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR") if name not in os.environ]
        os.environ.update({name: os.path.join(os.path.abspath(self.folder), "cache") for name in missing})
        try:
            with open(os.devnull) as sys.stdin:
                yield
        finally:
            sys.stdin = stdin
            for name in missing:
                os.environ.pop(name, None)


def _end_process() -> None:
    """End the process that Weights & Biases has beside this one, whatever state it is in."""
    if "wandb" in sys.modules:
        with suppress(Exception):
            sys.modules["wandb"].teardown()


def _start(args: argparse.Namespace, mode: str | None):
    """Return the run of an output folder: a new one, or the one that an earlier start began."""
    import wandb

    settings = {"console": "off", "silent": True, "init_timeout": START, "finish_timeout": END}
    return wandb.init(
        id=_run_id(Path(args.output_dir, RUN_ID)),
        resume="allow",
        project=args.wandb_project,
        name=printable(Path(args.output_dir).absolute().name)[:128],
        dir=args.output_dir,
        config={k: printable(v) if isinstance(v, str) else v for k, v in vars(args).items()},
        allow_val_change=True,  # flags that may differ in a continuation
        mode=mode,
        settings=wandb.Settings(**settings, finish_timeout_raises=True),
    )


def _run_id(path: Path) -> str:
    """Return the id in a file, which is written first if it holds none."""
    found = read_text(path, 1000).strip() if path.exists() else os.environ.get("WANDB_RUN_ID", "")
    if not re.fullmatch(r"[\w-]{1,64}", found, re.ASCII):
        found = secrets.token_hex(4)
    write_text(path, f"{found}\n")
    return found
