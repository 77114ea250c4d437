"""What workers are told while they train, the same on all of them at the same step."""

import time
from collections.abc import Sequence
from typing import Literal

import ray.train
import torch
import torch.distributed as dist

from pipeline import interruption

POLL_S = 2.0  # about what lies between two polls, each of which costs some milliseconds

Notice = Literal["save", "stop"]
NOTICES: tuple[Notice | None, ...] = (None, "save", "stop")


class Notices:
    """Polls whether the job is to stop or a node is about to be preempted; all workers poll together.

    Checkpoints are written by all workers together, so that one which writes while another steps on would wait for
    ever: at each poll rank 0 alone decides what to do, and after how many steps to poll again. The steps between
    exchange nothing.

    Args:
        rank: this worker's.
        device: that the workers' process group exchanges tensors on.
    """

    def __init__(self, rank: int, device: torch.device) -> None:
        self._rank = rank
        self._device = device
        self._interval = self._steps_left = 1  # polls are this many steps apart; the first step is the first poll's
        self._last_poll = time.monotonic()
        self._going: set[str] = set()

    def poll(self) -> Notice | None:
        """What to do after this step.

        Returns:
            ``stop``: write a checkpoint and return. ``save``: write one, once for each node of which Ray says that it
            will go, and train on; Ray Train starts the workers again elsewhere when it has gone.
        """
        self._steps_left -= 1
        if self._steps_left > 0:
            return None
        going = ray.train.get_preemption_info()  # all workers must ask, and each may have been told at another time
        decision = self._decide(going.preempted_node_ids if going else [])
        shared = torch.tensor([decision, self._next_interval()], device=self._device)
        dist.broadcast(shared, src=0)
        decision, self._interval = map(int, shared.tolist())
        self._steps_left, self._last_poll = self._interval, time.monotonic()
        return NOTICES[decision]

    def _next_interval(self) -> int:
        """Steps that take ``POLL_S`` at this worker's pace since the last poll; rank 0's are what counts.

        They are at most twice the last ones: a pace that a step or two had is no measure of hundreds.
        """
        steps_per_s = self._interval / (time.monotonic() - self._last_poll)
        return max(1, min(2 * self._interval, int(POLL_S * steps_per_s)))

    def _decide(self, going: Sequence[str]) -> int:
        """Where in ``NOTICES`` this worker sees what is to be done; rank 0's is what counts."""
        if self._rank == 0 and interruption.requested():
            return NOTICES.index("stop")
        is_known = self._going.issuperset(going)
        self._going.update(going)
        return NOTICES.index(None if is_known else "save")
