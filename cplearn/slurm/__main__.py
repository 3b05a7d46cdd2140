"""What the batch script starts, by the path of this file:

    python cplearn/slurm/__main__.py task FOLDER                              # under srun: one process of the job
    python cplearn/slurm/__main__.py finish FOLDER MAX_REQUEUES SRUN_CODE     # the last line: requeue the job or not

By its path, because `python -m` puts the working folder first on the path: a `cplearn` or a `utils.py` that lies there
would be imported instead of this checkout's. The working folder itself stays, so relative paths keep their meaning.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parents[1]), *(x for x in sys.path if x != str(here))]
    what, folder, *more = sys.argv[1:]
    if what == "task":
        import submitit.core.submission

        submitit.core.submission.process_job(folder)
    else:
        from cplearn.slurm.job import finish

        sys.exit(finish(Path(folder), int(more[0]), int(more[1])))
