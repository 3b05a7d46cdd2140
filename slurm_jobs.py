"""What a submitted job does where it runs, what it writes down there, and what can be told of it afterwards.

`run_with_submitit.py` submits; everything about a job lies in output_dir/slurm/:

    jobs.jsonl            one line a submission: job number, entry point, flags, size
    JOB_submission.sh     the batch script
    JOB_RANK_log.out      what each process printed, over all requeues
    JOB_RANK_end.json     how each process ended the last time: exit code, line, host
    JOB_end.json          what the batch script made of it
"""

import contextlib
import ctypes
import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # a job looks into the folder of the submission first, which may have its own utils.py

import errors  # noqa: E402
from errors import Interrupted, PeerError, UserError, WriteError  # noqa: E402
from utils import (  # noqa: E402
    check_output_dir,
    format_duration,
    host_name,
    process_start,
    read_json_lines,
    remove_quietly,
    write_text,
)

FOLDER = "slurm"  # in output_dir
# Exit code that makes submitit's local executor start the tasks again.
LOCAL_REQUEUE = 144


# --- where the job runs ---------------------------------------------------------------------------------


@dataclass
class Task:
    """What every process of a job runs: an entry point with its flags."""

    script: str  # module name
    argv: list[str]  # %j is the job number
    folder: str  # output_dir/slurm
    max_requeues: int

    def __call__(self) -> None:
        import submitit

        env = submitit.JobEnvironment()
        job, rank = env.job_id, env.global_rank
        local = env.cluster == "local"
        folder = Path(self.folder.replace("%j", job))
        end = folder / f"{job}_{rank}_end.json"
        restarts = _read_json(end).get("restarts", -1) + 1 if local else restart_count()
        remove_quietly(end)

        def report(code: int, line: str) -> None:
            content = {"code": code, "line": line, "rank": rank, "host": host_name(), "restarts": restarts}
            try:
                write_text(end, json.dumps({**content, "time": time.time()}) + "\n")
            except UserError as error:  # a full disk, perhaps the very reason of the end
                print(error, file=sys.stderr)

        early: list[str] = []

        def stop_before_the_run(number: int, frame) -> None:
            early.append(signal.Signals(number).name)
            raise Interrupted(f"{early[0]}: stopped before there was anything to save")

        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):  # until training takes them over
            signal.signal(number, stop_before_the_run)
        signal.signal(signal.SIGCONT, signal.SIG_DFL)  # Slurm sends it before others; submitit prints a warning
        os.environ.update(
            RANK=str(rank),
            WORLD_SIZE=str(env.num_tasks),
            LOCAL_RANK=str(env.local_rank),
            LOCAL_WORLD_SIZE=str(env.num_tasks // env.num_nodes),
        )
        meet = folder / f"{job}_{restarts}_rank0_address"
        sys.argv = [f"{self.script}.py", "--dist_url", f"file://{meet}", *(x.replace("%j", job) for x in self.argv)]
        if local:
            _end_with_the_parent()
        if rank == 0:
            again = f", requeue {restarts} of {self.max_requeues} at most" * (restarts > 0)
            print(f"job {job}{again}: {shlex.join(sys.argv)}", flush=True)
        try:
            errors.run_script(lambda argv: importlib.import_module(self.script).main(argv), report)
        except SystemExit as ended:
            if ended.code != Interrupted.exit_code or (early and not local):
                raise  # and srun ends the others, which may be waiting for this one
            # All stop after the same step and are on their way out: a code other than 0 would have them killed.
            if local and _read_json(end).get("line", "").startswith("SIGUSR2") and restarts < self.max_requeues:
                sys.exit(LOCAL_REQUEUE)


def _end_with_the_parent() -> None:
    """If submitit's controller is killed, nobody else would end its processes. Linux only."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def restart_count() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


# --- when all processes have ended ----------------------------------------------------------------------


def finish(folder: Path, max_requeues: int, srun_code: int) -> int:
    """The batch script's last line: requeue the job if it was told to stop, or lost a process. Returns its exit code.

    Here and not in a process of the job, because any of those may be the one that died.
    """
    job, processes = os.environ["SLURM_JOB_ID"], int(os.environ.get("SLURM_NTASKS", "1"))
    folder = Path(str(folder).replace("%j", job))

    def say(line: str) -> None:
        print(f"job {job}: {line}", flush=True)
        with contextlib.suppress(UserError):
            write_text(folder / f"{job}_end.json", json.dumps({"restarts": restart_count(), "line": line}) + "\n")

    if not folder.is_dir():
        say(f"{folder} is gone")
        return WriteError.exit_code
    try:
        check_output_dir(str(folder))  # to write into a folder also makes NFS look what others have written there
    except UserError as error:
        say(str(error))
        return WriteError.exit_code
    ends = [end for end in read_ends(folder, job) if end["restarts"] == restart_count()]
    silent = sorted(set(range(processes)) - {end["rank"] for end in ends})
    if ends and all(end["code"] == 0 for end in ends) and (srun_code == 0 or not silent):
        return 0
    failed = the_cause(ends)
    if failed and failed["code"] != PeerError.exit_code:
        say(f"failed on rank {failed['rank']} with exit code {failed['code']}: {failed['line']}")
        return failed["code"]
    if 0 < srun_code < PeerError.exit_code:  # the disk was too full to say more
        return srun_code
    now = show_job(job)
    if now.get("JobState", "RUNNING") not in AT_WORK:  # cancelled, or requeued by Slurm itself
        return Interrupted.exit_code
    stopped = [end["line"] for end in ends if end["code"] == Interrupted.exit_code]
    stopped.sort(key=lambda line: not line.startswith("SIGUSR"))  # srun sends SIGTERM, too, when one has died
    if stopped and (srun_code == 0 or not silent or stopped[0].startswith("SIGUSR")):
        code, why = Interrupted.exit_code, stopped[0]
    else:
        ranks = ", ".join(map(str, silent))
        why = f"no last word of rank {ranks} of {processes}, see srun's lines above" if silent else failed["line"]
        code = PeerError.exit_code
        if not _saved_since(folder.parent / "checkpoint.pth", now.get("StartTime", "")):
            say(f"{why} before anything was saved: not requeued (srun's code {srun_code})")
            return code
    if restart_count() >= max_requeues:
        say(f"{why}; not requeued: --max_requeues {max_requeues} is reached, submit again")
        return code
    say(f"{why}; requeueing it, {restart_count() + 1} of {max_requeues}")
    try:
        subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip()
        say(f"{why}; could not be requeued ({reason}): submit the same command again")
    return code


def _saved_since(checkpoint: Path, start: str) -> bool:
    try:
        return checkpoint.stat().st_mtime > datetime.fromisoformat(start).timestamp()
    except (OSError, ValueError):
        return False


# --- what is known of a job ------------------------------------------------------------------------------


def read_ends(folder: Path, job: str) -> list[dict]:
    """How the processes of a job ended since its last requeue, in the order of time. Some may be missing: they run, or
    died without a word."""
    ends = [end for path in folder.glob(f"{job}_*_end.json") if (end := _read_json(path))]
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
    args = _read_json(folder.parent / "args.json")
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
    batch = _read_json(folder / f"{job}_end.json")
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


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


if __name__ == "__main__":
    sys.exit(finish(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
