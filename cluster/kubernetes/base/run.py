"""Runs a job's command on the head: ``run.py COMMAND...``; ends with its status, or has the job end as stopped.

KubeRay submits a job that failed again, for whatever reason. A command that ends with 1 or 2 has found fault with its
settings or its training, and would again: its job is stopped instead, which is not tried again. 75, of a command that
was asked to stop, and ends by a signal are failures to KubeRay, as is the loss of the head.
"""

import json
import os
import subprocess
import sys
import time

from ray.job_submission import JobSubmissionClient

FINAL = (1, 2)
STOP_S = 60.0


def main() -> None:
    """Run the command and tell Ray how it ended."""
    status = subprocess.run(sys.argv[1:]).returncode
    if status in FINAL:
        print(f"the command ended with status {status}: the job is not submitted again", flush=True)
        job = json.loads(os.environ["RAY_JOB_CONFIG_JSON_ENV_VAR"])["metadata"]["job_submission_id"]
        JobSubmissionClient().stop_job(job)
        time.sleep(STOP_S)  # Ray ends this process
    sys.exit(status if status >= 0 else 128 - status)


if __name__ == "__main__":
    main()
