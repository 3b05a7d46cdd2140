"""What a submitted job does where it runs, what it writes down there, and what can be told of it afterwards.

`run_with_submitit.py` submits; everything about a job lies in output_dir/slurm/:

    jobs.jsonl            one line a submission: job number, entry point, flags, size
    JOB_submission.sh     the batch script
    JOB_RANK_log.out      what each process printed, over all requeues
    JOB_RANK_end.json     how each process ended the last time: exit code, line, host
    JOB_end.json          what the batch script made of it
"""

import contextlib
import json
import re
import subprocess
from pathlib import Path

from cplearn.errors import Interrupted, PeerError, UserError
from cplearn.files import read_json, read_json_lines
from cplearn.host import process_start
from cplearn.text import format_duration

FOLDER = "slurm"  # in output_dir


# --- what is known of a job ------------------------------------------------------------------------------


def read_ends(folder: Path, job: str) -> list[dict]:
    """How the processes of a job ended since its last requeue, in the order of time. Some may be missing: they run, or
    died without a word."""
    ends = [end for path in folder.glob(f"{job}_*_end.json") if (end := read_json(path))]
    last = max((end["restarts"] for end in ends), default=0)
    return sorted((end for end in ends if end["restarts"] == last), key=lambda end: end["time"])


def the_cause(ends: list[dict]) -> dict | None:
    """The failure to tell: the first that is not about another process, which only follows from it."""
    failed = [end for end in ends if end["code"] not in (0, Interrupted.exit_code)]
    own = [end for end in failed if end["code"] != PeerError.exit_code]
    return next(iter(own or failed), None)


def show_job(job: str) -> dict[str, str]:
    """What Slurm knows: of scontrol, or, when it has forgotten, of sacct. {} if neither knows."""
    found = ask("scontrol", "show", "job", "-o", job)
    return dict(re.findall(r"(\w+)=(\S*)", found)) if found else account_of(job)


def account_of(job: str) -> dict[str, str]:
    """The accounting's words for the same. {} where there is no accounting."""
    found = ask("sacct", "-j", job, "-X", "-n", "-P", "-o", "State,ExitCode,NodeList,Elapsed")
    if not found.strip():
        return {}
    state, code, nodes, elapsed = found.splitlines()[-1].split("|")
    return {"JobState": state.split()[0], "ExitCode": code, "NodeList": nodes, "RunTime": elapsed}


def ask(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def submissions(folder: Path) -> list[dict]:
    """Lines of jobs.jsonl, oldest first."""
    return read_json_lines(folder / "jobs.jsonl")


def job_state(folder: Path, entry: dict) -> dict[str, str]:
    """JobState and what else is known (Reason, NodeList, RunTime, Restarts), from Slurm or from what the job wrote."""
    job = entry["job"]
    ends = read_ends(folder, job)
    restarts = {"Restarts": str(max([end["restarts"] for end in ends], default=0))}
    if entry["cluster"] == "slurm":
        known = show_job(job)
        if known:
            return restarts | known
    elif process_start(int(job)) == entry["started"]:
        return restarts | {"JobState": "RUNNING"}
    codes = {end["code"] for end in ends}
    if len(ends) < entry["processes"]:
        return restarts | {"JobState": "GONE"}  # and nobody says how
    ended = "COMPLETED" if codes == {0} else "FAILED" if the_cause(ends) else "INTERRUPTED"
    return restarts | {"JobState": ended}


# SIGNALING: for the moment in which a signal is sent
AT_WORK = ("RUNNING", "SIGNALING", "RESIZING", "CONFIGURING")


WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT", "SUSPENDED")


LIVE = (*AT_WORK, *WAITING, "STOPPED", "COMPLETING", "STAGE_OUT")


def status(output_dir: str) -> list[str]:
    """A line for each job of a folder: state, progress, requeues, last error. Raises `UserError` if there is none."""
    folder = Path(output_dir) / FOLDER
    found = submissions(folder)
    if not found:
        raise UserError(f"{folder} has no jobs: was it submitted with this --output_dir?")
    lines, latest = [], [entry["job"] for entry in found if entry["script"] == "main_cplearn"][-1:]
    for entry in found:
        job, now = entry["job"], job_state(folder, entry)
        state, restarts = now["JobState"], int(now.get("Restarts") or 0)
        line = f"{job:>8}  {entry['script']:<12}  {state:<10}"
        if state == "PENDING":
            line += f"  ({now.get('Reason', 'None')})"
        elif state in LIVE and now.get("NodeList", "(null)") not in ("(null)", ""):
            line += f"  on {now['NodeList']} for {now.get('RunTime', '?')}"
        line += f"  requeued {restarts} time{'s' * (restarts > 1)}" * (restarts > 0)
        if job in latest:  # what is in the folder is the newest job's
            line += f"  {progress(folder, job, running=state in AT_WORK)}"
        if state not in (*LIVE, "COMPLETED"):
            line += f"  {last_error(folder, entry, now)}"
        lines.append(line.rstrip())
    return lines


def progress(folder: Path, job: str, *, running: bool) -> str:
    """Epoch, step and remaining time, from log.txt, args.json and the last line that the job printed."""
    args = read_json(folder.parent / "args.json")
    if not args:
        return "nothing trained yet"
    epochs, steps = args["args"]["epochs"], args["derived"]["steps_per_epoch"]
    last = min(epochs * steps, args["args"]["max_steps"] or epochs * steps)
    record = _last_json_line(folder.parent / "log.txt")
    done = record.get("step", 0)
    shown = re.findall(r"(?m)^epoch (\d+)/\d+  step (\d+)/\d+", tail(folder / f"{job}_0_log.out"))
    if shown and running:
        done = max(done, (int(shown[-1][0]) - 1) * steps + int(shown[-1][1]))
    line = f"epoch {done // steps} of {epochs}" + f" and {done % steps} of {steps} steps" * (done % steps > 0)
    if record and running:
        seconds = (last - done) * record["seconds"] / record["steps"]
        line += f"  ETA {format_duration(seconds)}"
    return line


def last_error(folder: Path, entry: dict, now: dict[str, str]) -> str:
    """Why a job is no more, in one line, and where to read on."""
    ends, job = read_ends(folder, entry["job"]), entry["job"]
    told = the_cause(ends) or next((end for end in reversed(ends) if end["code"]), None)
    batch = read_json(folder / f"{job}_end.json")
    if told and not ("not requeued" in batch.get("line", "") and told["restarts"] == batch["restarts"]):
        return f"exit {told['code']} on rank {told['rank']} ({told['host']}): {told['line']}"
    code = f"exit {now['ExitCode'].removesuffix(':0')}: " if now.get("ExitCode", "0:0") != "0:0" else ""
    if batch:
        return code + batch["line"]
    logs = [folder / f"{job}_{rank}_log.out" for rank in range(entry["processes"])]
    if not any(log.exists() for log in logs):
        dependency = "Dependency" in now.get("Reason", "") or "afterok" in now.get("Dependency", "")
        return f"{code}never started" + ": the job before it did not end well" * dependency
    for log in logs:  # of the job itself, if any
        lines = [x.strip() for x in tail(log).splitlines() if x.strip() and not x.startswith(_NOT_OURS)]
        if lines:
            return f"{code}last line of {log}: {lines[-1]}"
    return f"{code}nothing in {logs[0]}"


_NOT_OURS = ("srun:", "slurmstepd", "submitit ", "job ")


def tail(path: Path, size: int = 20_000) -> str:
    try:
        with open(path, "rb") as f:
            f.seek(max(0, path.stat().st_size - size))
            return f.read().decode("utf-8", "replace")
    except OSError:
        return ""


def _last_json_line(path: Path) -> dict:
    for line in reversed(tail(path).splitlines()):
        with contextlib.suppress(ValueError):  # half written
            return json.loads(line)
    return {}
