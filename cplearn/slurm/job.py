"""What a submitted job does where it runs: every process runs the entry point (`Task`), then the batch script ends or
requeues the job (`finish`). What they write down is listed in `status.py`."""

import contextlib
import enum
import importlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cplearn import errors
from cplearn.errors import ExpectedError, Interrupted, PeerError, WriteError
from cplearn.files import check_output_dir, read_json, remove_quietly, write_text
from cplearn.host import end_with_parent, host_name
from cplearn.slurm.status import AT_WORK, read_ends, show_job, the_cause

# Exit code that makes submitit's local executor start the tasks again.
LOCAL_REQUEUE = 144
# Signals that tell a job to stop. SIGTERM may also be srun's, when a process has died.
FROM_SLURM = ("SIGUSR1", "SIGUSR2")


# --- every process of the job -----------------------------------------------------------------------------


@dataclass
class Task:
    """An entry point with its flags, which every process of a job runs. submitit pickles it."""

    script: str  # module name
    argv: list[str]  # %j is the job's number
    folder: str  # output_dir/slurm
    max_requeues: int

    def __call__(self) -> None:
        """Run the entry point as rank SLURM_PROCID of SLURM_NTASKS; write down how it ended."""
        from submitit import JobEnvironment
        from submitit.helpers import TorchDistributedEnvironment

        env = JobEnvironment()
        job, rank, local = env.job_id, env.global_rank, env.cluster == "local"
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        folder = Path(self.folder.replace("%j", job))
        end = folder / f"{job}_{rank}_end.json"
        restarts = read_json(end).get("restarts", -1) + 1 if local else restart_count()
        remove_quietly(end)

        def report(error: BaseException | None) -> None:
            code, line = errors.exit_status(error) if error else (0, "")
            content = {"code": code, "line": line, "rank": rank, "host": host_name(), "restarts": restarts}
            content |= {"signal": getattr(error, "signal", None), "time": time.time()}
            try:
                write_text(end, json.dumps(content) + "\n")
            except ExpectedError as full:  # which may be why the run ended
                print(full, file=sys.stderr)

        early = _stop_on_signals()
        # A port of submitit's choice may be taken; in this file rank 0 names one that was free.
        meet = folder / f"{job}_{restarts}_rank0_address"
        sys.argv = [f"{self.script}.py", "--dist_url", f"file://{meet}", *(x.replace("%j", job) for x in self.argv)]
        if local:
            end_with_parent()  # if submitit's controller is killed, nobody else would end its processes
        if rank == 0:
            requeue = f", requeue {restarts} of {self.max_requeues} at most" * (restarts > 0)
            print(f"job {job}{requeue}: {shlex.join(sys.argv)}", flush=True)
        try:
            errors.run_script(lambda argv: importlib.import_module(self.script).main(argv), report)
        except SystemExit as ended:
            if ended.code != Interrupted.exit_code or (early and not local):
                raise  # and srun ends the others, which may be waiting for this one
            # All ranks stop after the same step and are about to end: srun would kill them for a code other than 0.
            if local and read_json(end).get("signal") == "SIGUSR2" and restarts < self.max_requeues:
                sys.exit(LOCAL_REQUEUE)


def _stop_on_signals() -> list[str]:
    """Make signals stop this process until training handles them itself. Returns the list that their names go to."""
    received: list[str] = []

    def stop(number: int, frame) -> None:
        received.append(signal.Signals(number).name)
        raise Interrupted(f"{received[0]}: stopped before there was anything to save", signal=received[0])

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, stop)
    signal.signal(signal.SIGCONT, signal.SIG_DFL)  # Slurm sends it before others; submitit prints a warning
    return received


def restart_count() -> int:
    """Return how often Slurm has requeued this job."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


# --- when all processes have ended ------------------------------------------------------------------------


class Ending(enum.Enum):
    """How all processes of a job ended, since its last requeue."""

    DONE = enum.auto()
    FAILED = enum.auto()  # one of them, by itself: it would fail again
    STOPPED = enum.auto()  # they were told to: the time limit, preemption
    LOST = enum.auto()  # one of them has ended without a word, or with its machine


def classify(ends: list[dict], processes: int, srun_code: int) -> Ending:
    """Return how a job ended, of which `ends` are known (`read_ends`); srun's code is the highest of all processes'."""
    codes = {end["code"] for end in ends}
    heard_all = len(ends) == processes or srun_code == 0
    if codes == {0} and heard_all:
        return Ending.DONE
    if codes - {0, Interrupted.exit_code, PeerError.exit_code}:
        return Ending.FAILED
    if 0 < srun_code < PeerError.exit_code:  # an error that a full disk could not record
        return Ending.FAILED
    told = any(end.get("signal") in FROM_SLURM for end in ends)
    if told or (Interrupted.exit_code in codes and heard_all):
        return Ending.STOPPED
    return Ending.LOST


def finish(folder: Path, max_requeues: int, srun_code: int) -> int:
    """Requeue the job if it was told to stop or lost a process, and return the batch script's exit code.

    The batch script does this and not a process of the job, because any of those may be the one that died.
    """
    job, processes = os.environ["SLURM_JOB_ID"], int(os.environ.get("SLURM_NTASKS", "1"))
    folder = Path(str(folder).replace("%j", job))
    try:
        if not folder.is_dir():
            raise WriteError(f"{folder} is gone")
        check_output_dir(str(folder))  # on NFS, writing also makes visible what other nodes have written there
    except ExpectedError as error:
        print(f"job {job}: {error}", flush=True)
        return WriteError.exit_code
    ends = [end for end in read_ends(folder, job) if end["restarts"] == restart_count()]
    ending, cause = classify(ends, processes, srun_code), the_cause(ends)
    if ending is Ending.DONE:
        return 0
    if ending is Ending.FAILED:
        if cause is None or cause["code"] == PeerError.exit_code:
            return srun_code
        _decide(folder, job, f"failed on rank {cause['rank']} with exit code {cause['code']}: {cause['line']}")
        return cause["code"]
    if (now := show_job(job)).get("JobState", "RUNNING") not in AT_WORK:  # cancelled, or requeued by Slurm itself
        return Interrupted.exit_code
    if ending is Ending.STOPPED:
        stopped = [end for end in ends if end["code"] == Interrupted.exit_code]
        stopped.sort(key=lambda end: end.get("signal") not in FROM_SLURM)  # the others only heard of it
        _requeue(folder, job, stopped[0]["line"], max_requeues)
        return Interrupted.exit_code
    silent = ", ".join(str(rank) for rank in sorted(set(range(processes)) - {end["rank"] for end in ends}))
    reason = f"no last message of rank {silent} of {processes}, see srun's lines above" if silent else cause["line"]
    if _saved_since(folder.parent / "checkpoint.pth", now.get("StartTime", "")):
        _requeue(folder, job, reason, max_requeues)
    else:
        reason += f" before anything was saved: not requeued (srun's code {srun_code})"
        _decide(folder, job, reason, given_up=True)
    return PeerError.exit_code


def _requeue(folder: Path, job: str, reason: str, max_requeues: int) -> None:
    """Ask Slurm to requeue the job, unless it was requeued often enough."""
    if restart_count() >= max_requeues:
        line = f"{reason}; not requeued: --max_requeues {max_requeues} is reached, submit again"
        return _decide(folder, job, line, given_up=True)
    _decide(folder, job, f"{reason}; requeueing it, {restart_count() + 1} of {max_requeues}")
    try:
        subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        problem = (getattr(error, "stderr", None) or str(error)).strip()
        line = f"{reason}; could not be requeued ({problem}): submit the same command again"
        _decide(folder, job, line, given_up=True)


def _decide(folder: Path, job: str, line: str, *, given_up: bool = False) -> None:
    """Print and write down what becomes of the job; `given_up`: it should go on, and does not."""
    print(f"job {job}: {line}", flush=True)
    with contextlib.suppress(ExpectedError):
        content = {"restarts": restart_count(), "line": line, "given_up": given_up}
        write_text(folder / f"{job}_end.json", json.dumps(content) + "\n")


def _saved_since(checkpoint: Path, start: str) -> bool:
    try:
        return checkpoint.stat().st_mtime > datetime.fromisoformat(start).timestamp()
    except (OSError, ValueError):
        return False
