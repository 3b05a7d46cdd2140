"""TODO cplearn.slurm.job."""

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

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the batch script runs this file by its path

from cplearn import errors  # noqa: E402
from cplearn.errors import ExpectedError, Interrupted, PeerError, WriteError  # noqa: E402
from cplearn.files import check_output_dir, read_json, remove_quietly, write_text  # noqa: E402
from cplearn.host import end_with_parent, host_name  # noqa: E402
from cplearn.slurm.status import AT_WORK, read_ends, show_job, the_cause  # noqa: E402

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
        restarts = read_json(end).get("restarts", -1) + 1 if local else restart_count()
        remove_quietly(end)

        def report(code: int, line: str) -> None:
            content = {"code": code, "line": line, "rank": rank, "host": host_name(), "restarts": restarts}
            try:
                write_text(end, json.dumps({**content, "time": time.time()}) + "\n")
            except ExpectedError as error:  # a full disk, perhaps the very reason of the end
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
            end_with_parent()  # if submitit's controller is killed, nobody else would end its processes
        if rank == 0:
            again = f", requeue {restarts} of {self.max_requeues} at most" * (restarts > 0)
            print(f"job {job}{again}: {shlex.join(sys.argv)}", flush=True)
        try:
            errors.run_script(lambda argv: importlib.import_module(self.script).main(argv), report)
        except SystemExit as ended:
            if ended.code != Interrupted.exit_code or (early and not local):
                raise  # and srun ends the others, which may be waiting for this one
            # All stop after the same step and are on their way out: a code other than 0 would have them killed.
            if local and read_json(end).get("line", "").startswith("SIGUSR2") and restarts < self.max_requeues:
                sys.exit(LOCAL_REQUEUE)


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
        with contextlib.suppress(ExpectedError):
            write_text(folder / f"{job}_end.json", json.dumps({"restarts": restart_count(), "line": line}) + "\n")

    if not folder.is_dir():
        say(f"{folder} is gone")
        return WriteError.exit_code
    try:
        check_output_dir(str(folder))  # to write into a folder also makes NFS look what others have written there
    except ExpectedError as error:
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


if __name__ == "__main__":
    sys.exit(finish(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
