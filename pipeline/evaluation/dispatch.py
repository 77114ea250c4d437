"""Gives images to actors one by one, so that a failing device, actor or node costs an image a second try, no more."""

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from pipeline import interruption
from pipeline.evaluation.failures import MachineError

POLL_S = 1.0  # between two checks of whether the job is to stop
FAILURES = 3  # of actors that had the same image in hand, after which it is given up
Task = Callable[[Any, str], ray.ObjectRef]


class Dispatch:
    """One pass of a task over images that actors share.

    Ray replaces an actor that dies, on another node if need be; meanwhile the others take over its images. The image
    that it had in hand goes to another actor, since the same device may fail again.

    Args:
        actors: handles of restartable actors with a method ``ready``, which ends an actor whose device failed.
        shares: keys of the images that each of them should get, as long as it lives.
        task: starts the work on an image: ``task(actor, key)`` gives its reference.
    """

    def __init__(self, actors: Sequence[Any], shares: Sequence[Sequence[str]], task: Task) -> None:
        self._actors = actors
        self._waiting = [deque(share) for share in shares]
        self._task = task
        self._running: dict[ray.ObjectRef, tuple[int, str | None]] = {}  # no key: waits until the actor is replaced
        self._failures: Counter[str] = Counter()

    def results(self) -> Iterator[tuple[str, Any]]:
        """Each image's key with what the task gave.

        Raises:
            MachineError: an image had several actors die or their devices fail, or no actor is left.
            RayTaskError: the task raised any other error.
            JobInterruptedError: the job is asked to stop.
        """
        for index in range(len(self._actors)):
            self._occupy(index)
        while any(self._waiting) or any(key for _, key in self._running.values()):
            done, _ = ray.wait(list(self._running), num_returns=1, timeout=POLL_S)
            interruption.check()
            for reference in done:
                index, key = self._running.pop(reference)
                try:
                    result = ray.get(reference)
                except RayError as failure:
                    if isinstance(failure, RayTaskError) and not isinstance(failure.cause, MachineError):
                        raise
                    self._after(failure, index, key)
                else:
                    if key is not None:
                        yield key, result
                    self._occupy(index)

    def _occupy(self, index: int) -> None:
        """Give an actor its next image, or another's where its own are done."""
        queue = self._waiting[index] or max(self._waiting, key=len)
        if queue:
            key = queue.popleft()
            self._running[self._task(self._actors[index], key)] = (index, key)

    def _after(self, failure: RayError, index: int, key: str | None) -> None:
        reason = " ".join(str(failure.cause if isinstance(failure, RayTaskError) else failure).split())
        if key is None:  # it can't be replaced, so that the others must do
            if not self._running:
                raise MachineError(f"no evaluation actor is left: {reason}") from failure
            return
        self._running[self._actors[index].ready.options(max_task_retries=-1).remote()] = (index, None)
        self._failures[key] += 1
        if self._failures[key] == FAILURES:
            raise MachineError(
                f"{key}: {FAILURES} evaluation actors failed at it, the last one so: {reason}"
            ) from failure
        self._waiting[(index + 1) % len(self._actors)].appendleft(key)
        for idle in set(range(len(self._actors))) - {busy for busy, _ in self._running.values()}:
            self._occupy(idle)
