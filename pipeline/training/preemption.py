"""What workers are told while they train, the same on all of them at the same step."""

import time
from collections.abc import Sequence
from typing import Literal

import ray.train
import torch
import torch.distributed as dist

from pipeline import interruption

POLL_S = 2.0  # between two polls, each of which costs some milliseconds

Notice = Literal["save", "stop"]
NOTICES: tuple[Notice | None, ...] = (None, "save", "stop")


class Notices:
    """Polls whether the job is to stop or a node is about to be preempted; all workers poll together.

    Checkpoints are written by all workers together, so that one which writes while another steps on would wait for
    ever: rank 0 alone decides when to poll and what to do.

    Args:
        rank: this worker's.
        device: that the workers' process group exchanges tensors on.
    """

    def __init__(self, rank: int, device: torch.device) -> None:
        self._rank = rank
        self._device = device
        self._next = 0.0
        self._going: set[str] = set()

    def poll(self) -> Notice | None:
        """What to do after this step.

        Returns:
            ``stop``: write a checkpoint and return. ``save``: write one, once for each node of which Ray says that it
            will go, and train on; Ray Train starts the workers again elsewhere when it has gone.
        """
        if not self._from_rank_zero(time.monotonic() >= self._next):
            return None
        self._next = time.monotonic() + POLL_S
        going = ray.train.get_preemption_info()  # all workers must ask, and each may have been told at another time
        return NOTICES[self._from_rank_zero(self._decide(going.preempted_node_ids if going else []))]

    def _decide(self, going: Sequence[str]) -> int:
        """Where in ``NOTICES`` this worker sees what is to be done; rank 0's is what counts."""
        if self._rank == 0 and interruption.requested():
            return NOTICES.index("stop")
        is_known = self._going.issuperset(going)
        self._going.update(going)
        return NOTICES.index(None if is_known else "save")

    def _from_rank_zero(self, number: int) -> int:
        shared = torch.tensor(int(number), device=self._device)
        dist.broadcast(shared, src=0)
        return int(shared)
