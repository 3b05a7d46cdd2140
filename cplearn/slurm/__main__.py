"""What the batch script starts, by the path of this file:

    python cplearn/slurm/__main__.py task FOLDER                              # a process of a job queued by older code
    python cplearn/slurm/__main__.py finish FOLDER MAX_REQUEUES SRUN_CODE     # the last line: requeue the job or not

By its path, because `python -m` puts the working folder first on the path: a `cplearn` or a `torch.py` that lies there
would be imported instead of the real one. The working folder itself stays, so relative paths keep their meaning.
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    here = os.path.dirname(os.path.realpath(__file__))
    # An empty part of PYTHONPATH (as in $PYTHONPATH:/x) is the working folder, too.
    others = [x for x in sys.path if os.path.realpath(x) not in (here, os.getcwd())]
    sys.path[:] = [os.path.dirname(os.path.dirname(here)), *others]
    what, folder, *more = sys.argv[1:]
    if what == "task":
        import submitit.core.submission

        submitit.core.submission.process_job(folder)
    else:
        from cplearn.slurm.job import finish

        sys.exit(finish(Path(folder), int(more[0]), int(more[1])))
