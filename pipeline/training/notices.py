"""What workers are told while they train, the same on all of them at the same step."""

import time
from typing import Literal

import ray.train
import ray.train.collective
import torch
import torch.distributed as dist

from pipeline import interruption

LOOK_S = 2.0  # between two looks, each of which costs some milliseconds

Notice = Literal["save", "stop"]


class Notices:
    """Looks now and then whether the job is to make way or a node is about to go; all workers look together.

    Args:
        rank: this worker's; rank 0 looks for all.
        device: that the workers' process group exchanges tensors on.
    """

    def __init__(self, rank: int, device: torch.device) -> None:
        self._rank = rank
        self._device = device
        self._next = 0.0
        self._going: set[str] = set()

    def look(self) -> Notice | None:
        """What to do after this step.

        Returns:
            ``stop``: write a checkpoint and return. ``save``: write one, once for each node of which Ray says that it
            will go, and train on; Ray Train starts the workers again elsewhere when it has gone.
        """
        due = torch.tensor(time.monotonic() >= self._next, device=self._device)
        dist.broadcast(due, src=0)
        if not due:
            return None
        self._next = time.monotonic() + LOOK_S
        if ray.train.collective.broadcast_from_rank_zero(self._rank == 0 and interruption.requested()):
            return "stop"
        going = ray.train.get_preemption_info()
        if going is None or self._going.issuperset(going.preempted_node_ids):
            return None
        self._going.update(going.preempted_node_ids)
        return "save"
