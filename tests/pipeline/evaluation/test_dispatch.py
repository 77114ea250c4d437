"""Images given to actors that die: none is lost, none is scored by halves, and none stops the others."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import cloudpickle
from ray.exceptions import RayTaskError

from pipeline.evaluation.dispatch import FAILURES, Dispatch
from pipeline.evaluation.failures import MachineError

pytestmark = pytest.mark.usefixtures("driver")
cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Worker:
    """Notes each try of a key in a file; ``deadly`` keys end its process, so many times as they say.

    An actor named ``bad-...`` has a device that fails at once, in each new process as well.
    """

    def __init__(self, notes: Path, deadly: dict[str, int], starts: int = 1000) -> None:
        self.notes, self.deadly, self.spent = notes, deadly, False
        self.has_bad_device = (ray.get_runtime_context().get_actor_name() or "").startswith("bad-")
        with (notes / f"starts-{ray.get_runtime_context().get_actor_id()}").open("a") as file:
            file.write("x")
            assert file.tell() <= starts, "it can't be started again"

    def ready(self) -> None:
        if self.spent:
            os._exit(1)

    def work(self, key: str) -> str:
        with (self.notes / key).open("a") as file:
            file.write("x")
            if file.tell() <= self.deadly.get(key, 0):
                os._exit(1)
        if key == "faulty":
            raise KeyError(key)
        if self.has_bad_device:
            from pipeline.evaluation.failures import MachineError  # here: torch, which it brings, takes seconds

            self.spent = True
            raise MachineError("the device is lost")
        return key.upper()


def results(shares: list[list[str]], folder: Path, *arguments: Any, bad: int | None = None) -> dict[str, Any]:
    actor = ray.remote(num_cpus=0, max_restarts=-1)(Worker)
    names = [f"bad-{folder.name}" if index == bad else None for index in range(len(shares))]
    actors = [actor.options(name=name).remote(folder, *arguments) for name in names]
    return dict(Dispatch(actors, shares, lambda actor, key: actor.work.remote(key)).results())


def test_every_key_is_done_once_by_its_own_actor(tmp_path: Path) -> None:
    assert results([["a", "b"], ["c"], []], tmp_path, {}) == {"a": "A", "b": "B", "c": "C"}
    assert all((tmp_path / key).read_text() == "x" for key in "abc")


def test_a_key_whose_actor_died_is_done_again_and_others_are_not(tmp_path: Path) -> None:
    assert results([["a", "b", "c"], ["d", "e"]], tmp_path, {"b": 1, "d": FAILURES - 1}) == {
        k: k.upper() for k in "abcde"
    }
    tries = {key: len((tmp_path / key).read_text()) for key in "abcde"}
    assert tries == {"a": 1, "b": 2, "c": 1, "d": FAILURES, "e": 1}


def test_a_key_that_no_actor_survives_ends_it_with_its_name_and_the_reason(tmp_path: Path) -> None:
    with pytest.raises(
        MachineError, match=r"^a: 3 evaluation actors failed at it, the last one so: .*(died|unavailable)"
    ):
        results([["a", "b", "c"]], tmp_path, {"a": 100})
    assert len((tmp_path / "a").read_text()) == FAILURES


def test_what_a_failing_device_can_not_do_is_done_by_other_actors(tmp_path: Path) -> None:
    keys = {key: key.upper() for key in "abcdefgh"}
    assert results([["a", "b", "c", "d"], ["e", "f", "g", "h"]], tmp_path, {}, bad=0) == keys
    processes = [path.read_text() for path in tmp_path.glob("starts-*")]
    failed = sum(len((tmp_path / key).read_text()) - 1 for key in keys)
    # each failure costs a process, which takes so long that the others' images are not used up meanwhile
    assert 1 <= failed <= 4 and sum(map(len, processes)) - len(processes) in (failed - 1, failed)


@pytest.mark.slow
def test_where_every_device_fails_it_ends_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(
        MachineError, match=r"^a: 3 evaluation actors failed at it, the last one so: the device is lost"
    ):
        results([["a", "b"]], tmp_path, {}, bad=0)


def test_what_an_irreplaceable_actor_leaves_is_done_by_the_others(tmp_path: Path) -> None:
    assert results([["a", "b", "c"], ["d"]], tmp_path, {"a": 1}, 1) == {"a": "A", "b": "B", "c": "C", "d": "D"}


def test_without_any_actor_left_it_ends_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"no evaluation actor is left: .*it can't be started again"):
        results([["a", "b"]], tmp_path, {"a": 1}, 1)


def test_an_error_of_the_task_is_raised(tmp_path: Path) -> None:
    with pytest.raises(RayTaskError, match="faulty"):
        results([["a", "faulty", "b"]], tmp_path, {})
