"""Gives images to actors one by one, so that the death of an actor or a node costs an image a second try, no more."""

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from pipeline import interruption

LOOK_S = 1.0  # between two looks at whether the job is to make way
DEATHS = 3  # of actors while they had the same image in hand, after which it is given up
Task = Callable[[Any, str], ray.ObjectRef]


class Dispatch:
    """One pass of a task over images that actors share.

    Ray replaces an actor that dies, on another node if need be; meanwhile the others take over its images.

    Args:
        actors: handles of restartable actors with a method ``ready``.
        shares: keys of the images that each of them should get, as long as it lives.
        task: starts the work on an image: ``task(actor, key)`` gives its reference.
    """

    def __init__(self, actors: Sequence[Any], shares: Sequence[Sequence[str]], task: Task) -> None:
        self._actors = actors
        self._waiting = [deque(share) for share in shares]
        self._task = task
        self._running: dict[ray.ObjectRef, tuple[int, str | None]] = {}  # no key: waits until the actor is replaced
        self._deaths: Counter[str] = Counter()

    def results(self) -> Iterator[tuple[str, Any]]:
        """Each image's key with what the task gave, or the ``RayError`` of the last of the actors that died of it.

        Raises:
            RayTaskError: the task raised an error.
            JobInterruptedError: the job is asked to make way.
            RayError: no actor is left and none can be replaced.
        """
        for index in range(len(self._actors)):
            self._occupy(index)
        while any(self._waiting) or any(key for _, key in self._running.values()):
            done, _ = ray.wait(list(self._running), num_returns=1, timeout=LOOK_S)
            interruption.check()
            for reference in done:
                index, key = self._running.pop(reference)
                try:
                    result = ray.get(reference)
                except RayTaskError:
                    raise
                except RayError as death:
                    yield from self._after(death, index, key)
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

    def _after(self, death: RayError, index: int, key: str | None) -> Iterator[tuple[str, RayError]]:
        if key is None:  # it can't be replaced, so that the others must do
            if not self._running:
                raise death
            return
        self._running[self._actors[index].ready.options(max_task_retries=-1).remote()] = (index, None)
        self._deaths[key] += 1
        if self._deaths[key] == DEATHS:
            yield key, death
        else:
            self._waiting[index].appendleft(key)
        for idle in set(range(len(self._actors))) - {busy for busy, _ in self._running.values()}:
            self._occupy(idle)
