"""What can be known of submitted jobs, from Slurm and from the files that they write into output_dir/slurm/:

jobs.jsonl            one line per submission: job number, time, entry point, flags, size, commit
JOB_submission.sh     the batch script
JOB_RANK_log.out      what each process printed, over all requeues
JOB_RANK_end.json     how each process ended the last time: exit code, message, host
JOB_end.json          what the batch script decided: done, failed, requeued
"""

import contextlib
import json
import re
import subprocess
import sys
from pathlib import Path

from cplearn.errors import Interrupted, PeerError, UserError
from cplearn.files import read_json, read_json_lines
from cplearn.host import process_start
from cplearn.text import format_duration

FOLDER = "slurm"  # in output_dir

# Slurm's words for a job that runs (SIGNALING: at the moment in which a signal is sent), waits, or is not over yet.
AT_WORK = ("RUNNING", "SIGNALING", "RESIZING", "CONFIGURING")
WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT", "SUSPENDED")
LIVE = (*AT_WORK, *WAITING, "STOPPED", "COMPLETING", "STAGE_OUT")


# --- one job ----------------------------------------------------------------------------------------------


def ask(*command: str) -> str:
    """Run one of Slurm's programs and return what it prints, "" if it fails or is not installed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def show_job(job: str) -> dict[str, str]:
    """Return what scontrol knows of a job or, when it has forgotten, sacct. {} if neither knows it."""
    shown = ask("scontrol", "show", "job", "-o", job)
    return dict(re.findall(r"(\w+)=(\S*)", shown)) if shown else account_of(job)


def account_of(job: str) -> dict[str, str]:
    """Return what the accounting knows of a job, under scontrol's names. {} where there is no accounting."""
    shown = ask("sacct", "-j", job, "-X", "-n", "-P", "-o", "State,ExitCode,NodeList,Elapsed")
    if not shown.strip():
        return {}
    state, code, nodes, elapsed = shown.splitlines()[-1].split("|")
    return {"JobState": state.split()[0], "ExitCode": code, "NodeList": nodes, "RunTime": elapsed}


def submissions(folder: Path) -> list[dict]:
    """Return the lines of jobs.jsonl, oldest first. Warns about lines that no submission wrote, and leaves them out."""
    lines = read_json_lines(folder / "jobs.jsonl")
    fields = {"job": str, "cluster": str, "script": str, "processes": int, "time": float}
    ours = [x for x in lines if _has(x, fields) and x["job"].isdecimal() and x["processes"] > 0]
    if len(ours) < len(lines):
        count = len(lines) - len(ours)
        print(f"WARNING: {folder / 'jobs.jsonl'} has {count} lines that no submission wrote: left out", file=sys.stderr)
    return ours


def _has(record: object, fields: dict[str, type]) -> bool:
    """Whether what was read from a file is an object with these fields, each of its type."""
    return isinstance(record, dict) and all(type(record.get(k)) is kind for k, kind in fields.items())


def read_ends(folder: Path, job: str) -> list[dict]:
    """Return how the processes of a job ended since its last requeue, in the order of time.

    A process that runs, or was killed, has no entry.
    """
    fields = {"code": int, "line": str, "rank": int, "host": str, "restarts": int, "time": float}
    ends = [end for path in folder.glob(f"{job}_*_end.json") if _has(end := read_json(path), fields)]
    last = max((end["restarts"] for end in ends), default=0)
    return sorted((end for end in ends if end["restarts"] == last), key=lambda end: end["time"])


def the_cause(ends: list[dict]) -> dict | None:
    """Return the failure to report: the first that is not about another process, which only follows from it."""
    failed = [end for end in ends if end["code"] not in (0, Interrupted.exit_code)]
    own = [end for end in failed if end["code"] != PeerError.exit_code]
    return next(iter(own or failed), None)


def job_state(folder: Path, entry: dict) -> dict[str, str]:
    """Return JobState and what else is known (Reason, NodeList, RunTime, Restarts), from Slurm or the job's files."""
    job = entry["job"]
    ends = read_ends(folder, job)
    restarts = {"Restarts": str(max([end["restarts"] for end in ends], default=0))}
    if entry["cluster"] == "slurm":
        known = show_job(job)
        if known:
            return restarts | known
    elif "started" in entry and process_start(int(job)) == entry["started"]:
        return restarts | {"JobState": "RUNNING"}
    codes = {end["code"] for end in ends}
    if len(ends) < entry["processes"]:
        return restarts | {"JobState": "GONE"}  # how it ended is not known
    ended = "COMPLETED" if codes == {0} else "FAILED" if the_cause(ends) else "INTERRUPTED"
    return restarts | {"JobState": ended}


# --- the jobs of a folder ---------------------------------------------------------------------------------


def status(output_dir: str) -> list[str]:
    """Return a line per job of a folder: state, progress, requeues, last error. Raises `UserError` without jobs."""
    folder = Path(output_dir) / FOLDER
    entries = submissions(folder)
    if not entries:
        raise UserError(f"{folder} has no jobs: was it submitted with this --output_dir?")
    newest = [entry["job"] for entry in entries if entry["script"] == "main_cplearn"][-1:]
    lines = []
    for entry in entries:
        job, now = entry["job"], job_state(folder, entry)
        state, restarts = now["JobState"], int(now.get("Restarts") or 0)
        line = f"{job:>8}  {entry['script']:<12}  {state:<10}"
        if state == "PENDING":
            line += f"  ({now.get('Reason', 'None')})"
        elif state in LIVE and now.get("NodeList", "(null)") not in ("(null)", ""):
            line += f"  on {now['NodeList']} for {now.get('RunTime', '?')}"
        line += f"  requeued {restarts} time{'s' * (restarts > 1)}" * (restarts > 0)
        if job in newest:  # the files of training are the newest job's
            line += f"  {progress(folder, job, running=state in AT_WORK)}"
        if state not in (*LIVE, "COMPLETED"):
            line += f"  {last_error(folder, entry, now)}"
        lines.append(line.rstrip())
    return lines


def progress(folder: Path, job: str, *, running: bool) -> str:
    """Return epoch, step and remaining time, from log.txt, args.json and the last line that the job printed."""
    try:
        return _progress(folder, job, running=running)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError):
        return "progress unknown: args.json or log.txt is not a run's"


def _progress(folder: Path, job: str, *, running: bool) -> str:
    start = read_json(folder.parent / "args.json")
    if not start:
        return "nothing trained yet"
    epochs, steps = start["args"]["epochs"], start["derived"]["steps_per_epoch"]
    last = min(epochs * steps, start["args"]["max_steps"] or epochs * steps)
    record = _last_json_line(folder.parent / "log.txt")
    done = record.get("step", 0)
    printed = re.findall(r"(?m)^epoch (\d+)/\d+  step (\d+)/\d+", tail(folder / f"{job}_0_log.out"))
    if printed and running:
        done = max(done, (int(printed[-1][0]) - 1) * steps + int(printed[-1][1]))
    line = f"epoch {done // steps} of {epochs}" + f" and {done % steps} of {steps} steps" * (done % steps > 0)
    if record and running:
        seconds = (last - done) * record["seconds"] / record["steps"]
        line += f"  ETA {format_duration(seconds)}"
    return line


def last_error(folder: Path, entry: dict, now: dict[str, str]) -> str:
    """Return one line on why a job ended, and where to read more."""
    ends, job = read_ends(folder, entry["job"]), entry["job"]
    end = the_cause(ends) or next((end for end in reversed(ends) if end["code"]), None)
    batch = read_json(folder / f"{job}_end.json")
    batch = batch if _has(batch, {"line": str, "restarts": int}) else {}
    if end and not ("not requeued" in batch.get("line", "") and end["restarts"] == batch["restarts"]):
        return f"exit {end['code']} on rank {end['rank']} ({end['host']}): {end['line']}"
    code = f"exit {now['ExitCode'].removesuffix(':0')}: " if now.get("ExitCode", "0:0") != "0:0" else ""
    if batch:
        return code + batch["line"]
    logs = [folder / f"{job}_{rank}_log.out" for rank in range(entry["processes"])]
    if not any(log.exists() for log in logs):
        dependency = "Dependency" in now.get("Reason", "") or "afterok" in now.get("Dependency", "")
        return f"{code}never started" + ": the job before it did not end well" * dependency
    for log in logs:
        lines = [x.strip() for x in tail(log).splitlines() if x.strip() and not x.startswith(_NOT_OURS)]
        if lines:
            return f"{code}last line of {log}: {lines[-1]}"
    return f"{code}nothing in {logs[0]}"


_NOT_OURS = ("srun:", "slurmstepd", "submitit ", "job ")  # lines of a log that the entry point did not print


def tail(path: Path, size: int = 20_000) -> str:
    """Return the last bytes of a file as text, "" if there is no file."""
    try:
        with open(path, "rb") as f:
            f.seek(max(0, path.stat().st_size - size))
            return f.read().decode("utf-8", "replace")
    except OSError:
        return ""


def _last_json_line(path: Path) -> dict:
    for line in reversed(tail(path).splitlines()):
        with contextlib.suppress(ValueError):  # cut short by a kill
            return json.loads(line)
    return {}
