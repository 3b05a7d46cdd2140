"""What a submitted job does where it runs: every process runs the entry point (`Task`), then the batch script ends or
requeues the job (`finish`). What they write down is listed in `status.py`."""

import contextlib
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
        import submitit

        env = submitit.JobEnvironment()
        job, rank, local = env.job_id, env.global_rank, env.cluster == "local"
        folder = Path(self.folder.replace("%j", job))
        end = folder / f"{job}_{rank}_end.json"
        restarts = read_json(end).get("restarts", -1) + 1 if local else restart_count()
        remove_quietly(end)

        def report(code: int, line: str) -> None:
            content = {"code": code, "line": line, "rank": rank, "host": host_name(), "restarts": restarts}
            try:
                write_text(end, json.dumps({**content, "time": time.time()}) + "\n")
            except ExpectedError as error:  # a full disk, which may be why the run ended
                print(error, file=sys.stderr)

        early = _stop_on_signals()
        os.environ.update(
            RANK=str(rank),
            WORLD_SIZE=str(env.num_tasks),
            LOCAL_RANK=str(env.local_rank),
            LOCAL_WORLD_SIZE=str(env.num_tasks // env.num_nodes),
        )
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
            if local and read_json(end).get("line", "").startswith("SIGUSR2") and restarts < self.max_requeues:
                sys.exit(LOCAL_REQUEUE)


def _stop_on_signals() -> list[str]:
    """Make signals stop this process until training handles them itself. Returns the list that their names go to."""
    received: list[str] = []

    def stop(number: int, frame) -> None:
        received.append(signal.Signals(number).name)
        raise Interrupted(f"{received[0]}: stopped before there was anything to save")

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, stop)
    signal.signal(signal.SIGCONT, signal.SIG_DFL)  # Slurm sends it before others; submitit prints a warning
    return received


def restart_count() -> int:
    """Return how often Slurm has requeued this job."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


# --- when all processes have ended ------------------------------------------------------------------------


def finish(folder: Path, max_requeues: int, srun_code: int) -> int:
    """Requeue the job if it was told to stop or lost a process, and return the batch script's exit code.

    The batch script does this and not a process of the job, because any of those may be the one that died.
    """
    job, processes = os.environ["SLURM_JOB_ID"], int(os.environ.get("SLURM_NTASKS", "1"))
    folder = Path(str(folder).replace("%j", job))

    def decide(line: str) -> None:
        print(f"job {job}: {line}", flush=True)
        with contextlib.suppress(ExpectedError):
            write_text(folder / f"{job}_end.json", json.dumps({"restarts": restart_count(), "line": line}) + "\n")

    if not folder.is_dir():
        decide(f"{folder} is gone")
        return WriteError.exit_code
    try:
        check_output_dir(str(folder))  # on NFS, writing also makes visible what other nodes have written there
    except ExpectedError as error:
        decide(str(error))
        return WriteError.exit_code
    ends = [end for end in read_ends(folder, job) if end["restarts"] == restart_count()]
    silent = sorted(set(range(processes)) - {end["rank"] for end in ends})
    if ends and all(end["code"] == 0 for end in ends) and (srun_code == 0 or not silent):
        return 0
    failed = the_cause(ends)
    if failed and failed["code"] != PeerError.exit_code:
        decide(f"failed on rank {failed['rank']} with exit code {failed['code']}: {failed['line']}")
        return failed["code"]
    if 0 < srun_code < PeerError.exit_code:  # an error that the full disk could not record
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
        why = f"no last message of rank {ranks} of {processes}, see srun's lines above" if silent else failed["line"]
        code = PeerError.exit_code
        if not _saved_since(folder.parent / "checkpoint.pth", now.get("StartTime", "")):
            decide(f"{why} before anything was saved: not requeued (srun's code {srun_code})")
            return code
    if restart_count() >= max_requeues:
        decide(f"{why}; not requeued: --max_requeues {max_requeues} is reached, submit again")
        return code
    decide(f"{why}; requeueing it, {restart_count() + 1} of {max_requeues}")
    problem = _requeue(job)
    if problem:
        decide(f"{why}; could not be requeued ({problem}): submit the same command again")
    return code


def _requeue(job: str) -> str:
    """Ask Slurm to requeue the job. Returns "" or why it refused."""
    try:
        subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        return (getattr(error, "stderr", None) or str(error)).strip()
    return ""


def _saved_since(checkpoint: Path, start: str) -> bool:
    try:
        return checkpoint.stat().st_mtime > datetime.fromisoformat(start).timestamp()
    except (OSError, ValueError):
        return False
