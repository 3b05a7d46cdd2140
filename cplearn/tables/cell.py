"""A cell of a grid is one command, which trains, extracts features once, and runs all evaluations on them:

    python -m cplearn.tables.cell output/table3/cplearn_c128_s0

The same command again goes on where it was stopped or killed. The cell's folder has

    cell.json             what to do: flags of main_cplearn.py and of every evaluation, and in how many processes
    the files of a run    main_cplearn.py's: checkpoint.pth, log.txt, args.json
    trained.json          once training has ended well: the weights by their hash
    trained/results.jsonl, random_init/results.jsonl        a line per evaluation, of the trained and untrained network
    failed.json           what failed the last time, with its exit code and last message, and how often it did
"""

import argparse
import json
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from cplearn import errors
from cplearn.errors import ExpectedError, Interrupted, UserError
from cplearn.files import read_json, read_text, reading, remove_quietly, write_text
from cplearn.flags import ArgumentParser, nonnegative
from cplearn.lock import in_use
from cplearn.tables.child import Children
from cplearn.tables.grid import Cell, not_among
from cplearn.training.stop import StopSignals

SAVING = 60.0  # seconds to wait for the processes of a cell that was killed, which may still be saving


class PartError(ExpectedError):
    """Training or an evaluation failed; the exit code is its own."""

    def __init__(self, part: str, code: int, line: str):
        super().__init__(f"{part} failed with exit code {code}: {line}")
        self.part, self.exit_code, self.line = part, code, line


def get_args_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(prog="cplearn.tables.cell", description=__doc__)
    parser.add_argument("folder", help="Folder of the cell, as reproduce_table3.py has begun it")
    parser.add_argument("--num_workers", type=nonnegative(int), default=None, help="Loader processes per process")
    parser.add_argument("--device", default=None, help="auto, cpu or cuda")
    parser.add_argument("--dist_url", default="env://", help="Rendezvous of the processes; a job sets it")
    return parser


def read_cell(folder: str | Path) -> tuple[Cell, int]:
    """Return the cell that cell.json describes, and its number of processes. Raises `UserError`."""
    path = Path(os.path.abspath(os.path.expanduser(folder)), "cell.json")
    try:
        with reading(path):
            content = json.loads(read_text(path))
            return Cell.from_json(content, path.parent), int(content["processes"])
    except FileNotFoundError:
        raise UserError(f"{path} is not there: reproduce_table3.py begins a cell") from None


def machine_flags(args: argparse.Namespace, flags: Sequence[str] = ()) -> list[str]:
    """Return --num_workers and --device as given to the cell, for a script whose own flags do not have them."""
    return not_among(flags, {"--num_workers": args.num_workers, "--device": args.device})


def main(argv: Sequence[str] | None = None) -> None:
    """Do what is missing of a cell. Raises `PartError`, and `Interrupted` after a signal."""
    args = get_args_parser().parse_args(argv)
    cell, processes = read_cell(args.folder)
    failed = cell.folder / "failed.json"
    times = read_json(failed).get("times", 0)
    remove_quietly(failed)
    try:
        with StopSignals() as signals:
            if "train" in cell.missing():
                flags = [*cell.train, "--output_dir", str(cell.folder), *machine_flags(args, cell.train)]
                _run(cell, "main_cplearn", flags, cell.folder, processes, signals)
                cell.mark_trained()
            elif differs := cell.differs():
                raise UserError(f"{cell.name}: its checkpoint has {differs}: move {cell.folder} away")
            if cell.missing():
                flags, place = [str(cell.folder), *machine_flags(args)], cell.results_folder(random=False)
                _run(cell, "cplearn.tables.evaluate", flags, place, processes, signals)
    except PartError as error:
        failure = {"stage": error.part, "code": error.exit_code, "line": error.line, "times": times + 1}
        write_text(failed, json.dumps(failure) + "\n")
        raise


def _run(cell: Cell, script: str, flags: list[str], place: Path, processes: int, signals: StopSignals) -> None:
    """Run a script that locks the folder `place` to its end. A signal is handed on once, so that training can save."""
    end_of_wait = time.monotonic() + SAVING
    while in_use(place) and not signals.name:
        if time.monotonic() > end_of_wait:
            raise UserError(f"{place} is in use by another process: stop it, or wait for its end")
        time.sleep(0.5)
    children, told = Children(script, flags, processes=processes), False
    while (end := children.poll()) is None:
        if signals.name and not told:
            children.stop(getattr(signal, signals.name))
            told = True
        time.sleep(0.05)
    if end.code == Interrupted.exit_code:
        raise Interrupted(end.line, signals.name)
    if end.code and signals.name:
        raise Interrupted(f"{signals.name}: stopped; the same command goes on", signals.name)
    if end.code:
        raise PartError(cell.missing()[0], end.code, end.line)


if __name__ == "__main__":
    errors.run_script(main)
