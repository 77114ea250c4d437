"""Asks the jobs of this Ray head to stop and waits until they have: the head pod's preStop hook.

Kubernetes ends the wait with the pod's grace period. ``ray job stop`` would do the same, but mark the jobs as stopped
by their user, and KubeRay tries again only those that failed.
"""

import os
import signal
import time

from ray.job_submission import JobDetails, JobSubmissionClient


def running(client: JobSubmissionClient) -> list[JobDetails]:
    """Submitted jobs that haven't ended."""
    return [job for job in client.list_jobs() if job.submission_id and not job.status.is_terminal()]


def main() -> None:
    """Send SIGTERM to each job's driver, then wait."""
    client = JobSubmissionClient()
    for job in running(client):
        if job.driver_info:  # a job that has not come to ray.init() yet has nothing to save
            os.kill(int(job.driver_info.pid), signal.SIGTERM)
    while running(client):
        time.sleep(1)


if __name__ == "__main__":
    main()
