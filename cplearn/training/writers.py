"""Where else the numbers of an epoch go: TensorBoard, Weights & Biases. Neither package is needed without its flag."""

import argparse
import importlib
import os
import re
import secrets
import sys
from pathlib import Path

from cplearn.distributed import collectives
from cplearn.errors import UserError, exit_status
from cplearn.files import write_text
from cplearn.text import printable

RUN_ID = "wandb_id.txt"  # in the output folder: a continuation goes on in the same run
START, END = 30, 60  # seconds that Weights & Biases may take for its first answer, and to send what is left at the end
MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb.sdk"}


def check_writers(args: argparse.Namespace) -> None:
    """Raise `UserError` if a package that a flag asks for cannot be imported."""
    for package, module in MODULES.items():
        if getattr(args, package):
            try:
                importlib.import_module(module)
            except ImportError as error:
                raise UserError(
                    f"--{package} needs the {package} package ({error}): pip install -U {package}"
                ) from None
    if not re.fullmatch(r"[^/\\#?%:\x00-\x1f]{1,128}", args.wandb_project):
        raise UserError(f"--wandb_project {args.wandb_project!r} must be 1 to 128 characters without / \\ # ? % :")


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
    """A run at Weights & Biases, with its files in OUTPUT_DIR/wandb. What fails is said, and training goes on."""

    def __init__(self, args: argparse.Namespace):
        kept = "did not start: its numbers are kept for `wandb sync`"  # None: as WANDB_MODE or `wandb offline` chose
        self.run = self._attempt(kept, _start, args, None) or self._attempt("is left out", _start, args, "offline")
        if self.run is not None and not self.run.disabled:
            where = os.path.join(args.output_dir, "wandb") if self.run.offline else self.run.url
            print(f"Weights & Biases: run {self.run.id}, {where}", flush=True)

    def write(self, numbers: dict[str, float], epoch: int) -> None:
        if self.run is not None:  # of epochs that are trained again the first numbers stay
            self._attempt("lost an epoch", self.run.log, numbers, step=epoch + 1)

    def close(self, code: int) -> None:
        import wandb

        if self.run is not None:
            self._attempt("could not send everything: `wandb sync` does", self.run.finish, exit_code=code)
        self._attempt("has left a process", wandb.teardown)

    def _attempt(self, failed: str, function, *args, **options):
        try:
            return function(*args, **options)
        except Exception as error:  # whatever it may be
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            print(f"WARNING: Weights & Biases {failed} ({reason})", file=sys.stderr, flush=True)


def _start(args: argparse.Namespace, mode: str | None):
    """Return the run of an output folder: a new one, or the one that an earlier start began."""
    import wandb

    wandb.teardown()  # of an attempt before, whose process would hold on to the run's id
    path, folder = Path(args.output_dir, RUN_ID), os.path.abspath(args.output_dir)
    run_id = path.read_text().strip() if path.exists() else os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
    write_text(path, f"{run_id}\n")
    for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        os.environ.setdefault(name, os.path.join(folder, "wandb", "cache"))
    settings = {"console": "off", "silent": True, "init_timeout": START, "finish_timeout": END}
    stdin = sys.stdin
    try:
        with open(os.devnull) as sys.stdin:  # nobody is asked for an account: the answer might never come
            return wandb.init(
                id=run_id,
                resume="allow",
                project=args.wandb_project,
                name=printable(os.path.basename(folder))[:128],
                dir=args.output_dir,
                config={k: printable(v) if isinstance(v, str) else v for k, v in vars(args).items()},
                allow_val_change=True,  # flags that may differ in a continuation
                mode=mode,
                settings=wandb.Settings(**settings, finish_timeout_raises=True),
            )
    finally:
        sys.stdin = stdin
