"""Does this GPU compute what it should, and how fast? The first 15 minutes on a new machine, a verdict for each part.

    python benchmarks/gpu.py [--json output/gpu.json] [--minutes 15] [--parts loss step ...]
    python benchmarks/gpu.py --device cpu --tiny        # the same code on a CPU: shows that it runs, not how fast

Right:  kernels (their tests, at full size), loss (every form and dictionary against float64), colors, step (gradients
        by precision), overflow (fp16), resume, real (JPEG files, no wait for the device, memory), ranks (all GPUs:
        stopped and resumed, compiled), methods (all seven train and evaluate), processes (two GPUs: gradients; one
        killed, one frozen)
Fast:   ceilings (copy, products), costs (where the time goes), steps (whole ones, against DINO's), forms (of the loss)

Each part is a process of its own: one that crashes or hangs is a verdict too. After every part the JSON file, and a
Markdown file beside it, are written; the same command goes on from there. Exit code 0: all as expected; 1: something is
not; 2: no GPU; 3: no time was left to check whether all is right.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gpu_fast
import gpu_right
import torch
from measure import run_cell

from cplearn import errors
from cplearn.errors import UserError
from cplearn.files import read_json, write_text
from cplearn.flags import ArgumentParser, positive
from cplearn.host import git_commit
from cplearn.text import format_table

PARTS = (*gpu_right.PARTS, *gpu_fast.PARTS)
# Minutes of each part at most; the measurements leave out what does not fit.
MINUTES = {"kernels": 1.5, "loss": 1.5, "colors": 0.5, "step": 1, "overflow": 0.7, "resume": 0.7, "real": 1.5,
           "ranks": 3, "methods": 1.5, "processes": 4, "ceilings": 0.5, "costs": 0.7, "steps": 3,
           "forms": 2}  # fmt: skip
GRACE = 150.0  # seconds after its end before a part counts as hung: compiling cannot be cut short


def get_args_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(prog="benchmarks/gpu.py", description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="Small enough for a CPU; times are not judged")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--json", default="output/gpu.json", help="Results; the same as Markdown beside it")
    parser.add_argument("--minutes", type=positive(float), default=15, help="In all")
    parser.add_argument("--again", action="store_true", help="Also repeat the parts that went well before")
    parser.add_argument("--part", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, default=0.0, help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the parts, or one of them for the process that runs them all."""
    args = get_args_parser().parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("torch sees no GPU here: nothing to measure (--device cpu --tiny tries the code out)")
    if args.device == "cpu" and not args.tiny:
        raise UserError("--device cpu would take hours: add --tiny")
    if args.part:
        print(json.dumps(run_part(args)._asdict()))
        return
    report = {"hardware": hardware(args.device), "tiny": args.tiny, "parts": {}}
    print("\n".join(f"{name}: {value}" for name, value in report["hardware"].items()) + "\n", flush=True)
    before = {} if args.again else parts_before(report, Path(args.json))
    end = time.time() + 60 * args.minutes
    for name in args.parts:
        began = time.time()
        part = before.get(name) or start_part(args, name, min(began + 60 * MINUTES[name], end))
        report["parts"][name] = part | ({} if name in before else {"seconds": time.time() - began, "tiny": args.tiny})
        write(report, Path(args.json))
        print("\n".join(part_lines(name, report["parts"][name])) + "\n", flush=True)
    parts = report["parts"].items()
    print("\n".join(verdict(name, part) for name, part in parts))
    print(f"\nWritten: {args.json}, {Path(args.json).with_suffix('.md')}")
    if any(part["misses"] for _, part in parts):
        sys.exit(1)
    if any(name in gpu_right.PARTS and not part["cells"] for name, part in parts):
        sys.exit(3)


def parts_before(report: dict, path: Path) -> dict[str, dict]:
    """Return the parts that went well when this machine and this commit were measured before."""
    kept = read_json(path)
    same = ("device", "torch", "commit")
    if (
        any(kept.get("hardware", {}).get(key) != report["hardware"][key] for key in same)
        or kept["tiny"] != report["tiny"]
    ):
        return {}
    return {name: part for name, part in kept["parts"].items() if part["cells"] and not part["misses"]}


def hardware(device: str) -> dict[str, str]:
    """Return what the numbers are of: names, driver, clocks as they are now."""
    facts = {"commit": git_commit(), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    if device == "cpu":
        return facts | {"device": f"cpu, {torch.get_num_threads()} threads"}
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    facts |= {"device": f"{len(names)} x {names[0]}", "CUDA": str(torch.version.cuda)}
    peers = sum(torch.cuda.can_device_access_peer(i, k) for i in range(len(names)) for k in range(i))
    facts["pairs that reach each other's memory"] = f"{peers} of {len(names) * (len(names) - 1) // 2}"
    wanted = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu,mig.mode.current"
    try:
        command = ["nvidia-smi", "-i", "0", f"--query-gpu={wanted}", "--format=csv,noheader"]
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
        facts |= dict(zip(wanted.split(","), (x.strip() for x in answer.split(",")), strict=True))
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        facts["nvidia-smi"] = f"did not answer ({type(error).__name__})"
    return facts


def run_part(args: argparse.Namespace) -> gpu_fast.Outcome:
    """Run one part in this process."""
    device = torch.device(args.device)
    if args.part in gpu_right.PARTS:
        return gpu_right.outcome(gpu_right.PARTS[args.part](device, args.tiny))
    before = {name: part["cells"] for name, part in read_json(Path(args.json)).get("parts", {}).items()}
    return gpu_fast.PARTS[args.part](device, args.tiny, before, args.until)


def start_part(args: argparse.Namespace, name: str, until: float) -> dict:
    """Run a part in a process of its own. Crashing, hanging and running out of time are outcomes."""
    empty = {"columns": [], "rows": [], "cells": [], "says": "", "misses": []}
    if time.time() > until:
        return empty | {"says": "left out: no time left"}
    flags = ("--device", args.device, "--json", args.json, "--until", until, *["--tiny"] * args.tiny)
    limit = until - time.time() + (600 if args.tiny else GRACE)
    part, error = run_cell(__file__, "--part", name, *flags, limit=limit)
    return part or empty | {"misses": [error]}


def verdict(name: str, part: dict) -> str:
    """Return a part's line: as expected, or not, with numbers."""
    if part.get("tiny") and name in gpu_fast.PARTS and part["cells"]:
        return f"{name}: ran (times of --tiny are not judged): {part['says']}"
    if not part["misses"]:
        return f"{name}: as expected: {part['says']}" if part["cells"] else f"{name}: {part['says']}"
    shown = "; ".join(part["misses"][:3]) + f"; and {len(part['misses']) - 3} more" * (len(part["misses"]) > 3)
    return f"{name}: NOT as expected: {shown}"


def part_lines(name: str, part: dict) -> list[str]:
    """Return a part as Markdown: its table and its verdict."""
    table = [format_table(part["rows"], part["columns"]), ""] if part["rows"] else []
    return [f"## {name}", "", *table, f"{verdict(name, part)} ({part['seconds']:.0f} s)"]


def write(report: dict, path: Path) -> None:
    """Write the report as JSON and as Markdown."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(report, indent=1) + "\n")
    lines = ["# One GPU, checked and timed", "", *(f"- {name}: {value}" for name, value in report["hardware"].items())]
    lines += ["", *(verdict(name, part) + "  " for name, part in report["parts"].items())]
    for name, part in report["parts"].items():
        lines += ["", *part_lines(name, part)]
    write_text(path.with_suffix(".md"), "\n".join(lines) + "\n")


if __name__ == "__main__":
    errors.run_script(main)
