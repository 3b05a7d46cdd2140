"""What can be known of submitted jobs, from Slurm and from the files that they write into output_dir/slurm/:

jobs.jsonl            one line per submission: job number, time, entry point, flags, size, commit
JOB_submission.sh     the batch script
JOB_RANK_log.out      what each process printed, over all requeues
JOB_RANK_end.json     how each process ended the last time: exit code, message, host, signal
JOB_end.json          what the batch script decided: failed, requeued, given up
"""

import re
import subprocess
from pathlib import Path

from cplearn.errors import Interrupted, PeerError, UserError
from cplearn.files import read_json, read_json_lines, reading
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


def fields_of(line: str) -> dict[str, str]:
    """Return the fields of a line that scontrol prints with -o."""
    return dict(re.findall(r"(\w+)=(\S*)", line))


def show_job(job: str) -> dict[str, str]:
    """Return what scontrol knows of a job or, when it has forgotten, sacct. {} if neither knows it."""
    return fields_of(ask("scontrol", "show", "job", "-o", job)) or account_of(job)


def account_of(job: str) -> dict[str, str]:
    """Return what the accounting knows of a job, under scontrol's names. {} where there is no accounting."""
    shown = ask("sacct", "-j", job, "-X", "-n", "-P", "-o", "State,ExitCode,NodeList,Elapsed")
    if not shown.strip():
        return {}
    state, code, nodes, elapsed = shown.splitlines()[-1].split("|")
    return {"JobState": state.split()[0], "ExitCode": code, "NodeList": nodes, "RunTime": elapsed}


def submissions(folder: Path) -> list[dict]:
    """Return the lines of jobs.jsonl, oldest first."""
    return read_json_lines(folder / "jobs.jsonl")


def read_ends(folder: Path, job: str) -> list[dict]:
    """Return how the processes of a job ended since its last requeue, in the order of time.

    A process that runs, or was killed, has no entry. Raises `UserError` for a file that is damaged.
    """
    with reading(folder / f"{job}_RANK_end.json"):
        ends = [end for path in folder.glob(f"{job}_*_end.json") if (end := read_json(path))]
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
    known = {"Restarts": str(ends[0]["restarts"] if ends else 0)}
    if entry["cluster"] == "slurm":
        if answer := show_job(job):
            return known | answer
    elif "started" in entry and process_start(int(job)) == entry["started"]:
        return known | {"JobState": "RUNNING"}
    if len(ends) < entry["processes"]:
        state = "GONE"  # how it ended is not known
    elif all(end["code"] == 0 for end in ends):
        state = "COMPLETED"
    else:
        state = "FAILED" if the_cause(ends) else "INTERRUPTED"
    return known | {"JobState": state}


# --- the jobs of a folder ---------------------------------------------------------------------------------


def status(output_dir: str) -> list[str]:
    """Return a line per job of a folder: state, progress, requeues, last error. Raises `UserError` without jobs."""
    folder = Path(output_dir) / FOLDER
    entries = submissions(folder)
    if not entries:
        raise UserError(f"{folder} has no jobs: was it submitted with this --output_dir?")
    with reading(folder / "jobs.jsonl"):
        newest = [entry["job"] for entry in entries if entry["script"] == "main_cplearn"][-1:]
        return [_status_line(folder, entry, trains=entry["job"] in newest) for entry in entries]


def _status_line(folder: Path, entry: dict, *, trains: bool) -> str:
    """Return a job's line; `trains`: the files of training in the folder are this job's."""
    job, now = entry["job"], job_state(folder, entry)
    state, restarts = now["JobState"], int(now.get("Restarts") or 0)
    parts = [f"{job:>8}", f"{entry['script']:<12}", f"{state:<10}"]
    if state == "PENDING":
        parts.append(f"({now.get('Reason', 'None')})")
    elif state in LIVE and now.get("NodeList", "(null)") not in ("(null)", ""):
        parts.append(f"on {now['NodeList']} for {now.get('RunTime', '?')}")
    if restarts:
        parts.append(f"requeued {restarts} time{'s' * (restarts > 1)}")
    if trains:
        parts.append(progress(folder, job, running=state in AT_WORK))
    if state not in (*LIVE, "COMPLETED"):
        parts.append(last_error(folder, entry, now))
    return "  ".join(parts).rstrip()


def progress(folder: Path, job: str, *, running: bool) -> str:
    """Return epoch, step and remaining time, from log.txt, args.json and the last line that the job printed.

    Raises `UserError` for a file that is damaged.
    """
    start = read_json(folder.parent / "args.json")
    if not start:
        return "nothing trained yet"
    with reading(folder.parent / "args.json"):
        epochs, steps = start["args"]["epochs"], start["derived"]["steps_per_epoch"]
        last = min(epochs * steps, start["args"]["max_steps"] or epochs * steps)
    records = read_json_lines(folder.parent / "log.txt")
    with reading(folder.parent / "log.txt"):
        done = records[-1]["step"] if records else 0
        pace = records[-1]["seconds"] / records[-1]["steps"] if records else None  # seconds per step
    printed = re.findall(r"(?m)^epoch (\d+)/\d+  step (\d+)/\d+", tail(folder / f"{job}_0_log.out"))
    if printed and running:
        done = max(done, (int(printed[-1][0]) - 1) * steps + int(printed[-1][1]))
    line = f"epoch {done // steps} of {epochs}" + f" and {done % steps} of {steps} steps" * (done % steps > 0)
    if running and pace is not None:
        line += f"  ETA {format_duration((last - done) * pace)}"
    return line


def last_error(folder: Path, entry: dict, now: dict[str, str]) -> str:
    """Return one line on why a job ended, and where to read more."""
    ends, job = read_ends(folder, entry["job"]), entry["job"]
    end = the_cause(ends) or next((end for end in reversed(ends) if end["code"]), None)
    batch = read_json(folder / f"{job}_end.json")
    if end and not (batch.get("given_up") and batch["restarts"] == end["restarts"]):
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
