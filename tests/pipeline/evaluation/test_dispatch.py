"""Images given to actors that die: none is lost, none is scored by halves, and none stops the others."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import cloudpickle
from ray.exceptions import RayError, RayTaskError

from pipeline.evaluation.dispatch import DEATHS, Dispatch

pytestmark = pytest.mark.usefixtures("driver")
cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Worker:
    """Notes each try of a key in a file; ``deadly`` keys end its process, so many times as they say."""

    def __init__(self, notes: Path, deadly: dict[str, int], starts: int = 1000) -> None:
        self.notes, self.deadly = notes, deadly
        with (notes / f"starts-{ray.get_runtime_context().get_actor_id()}").open("a") as file:
            file.write("x")
            assert file.tell() <= starts, "it can't be started again"

    def ready(self) -> None:
        pass

    def work(self, key: str) -> str:
        with (self.notes / key).open("a") as file:
            file.write("x")
            if file.tell() <= self.deadly.get(key, 0):
                os._exit(1)
        if key == "faulty":
            raise KeyError(key)
        return key.upper()


def results(shares: list[list[str]], folder: Path, *arguments: Any) -> dict[str, Any]:
    actor = ray.remote(num_cpus=0, max_restarts=-1)(Worker)
    actors = [actor.remote(folder, *arguments) for _ in shares]
    return dict(Dispatch(actors, shares, lambda actor, key: actor.work.remote(key)).results())


def test_every_key_is_done_once_by_its_own_actor(tmp_path: Path) -> None:
    assert results([["a", "b"], ["c"], []], tmp_path, {}) == {"a": "A", "b": "B", "c": "C"}
    assert all((tmp_path / key).read_text() == "x" for key in "abc")


def test_a_key_whose_actor_died_is_done_again_and_others_are_not(tmp_path: Path) -> None:
    assert results([["a", "b", "c"], ["d", "e"]], tmp_path, {"b": 1, "d": DEATHS - 1}) == {
        k: k.upper() for k in "abcde"
    }
    tries = {key: len((tmp_path / key).read_text()) for key in "abcde"}
    assert tries == {"a": 1, "b": 2, "c": 1, "d": DEATHS, "e": 1}


def test_a_key_that_no_actor_survives_is_given_up_and_the_rest_is_done(tmp_path: Path) -> None:
    found = results([["a", "b", "c"]], tmp_path, {"a": 100})
    assert isinstance(found.pop("a"), RayError)
    assert found == {"b": "B", "c": "C"}
    assert len((tmp_path / "a").read_text()) == DEATHS


def test_what_an_irreplaceable_actor_leaves_is_done_by_the_others(tmp_path: Path) -> None:
    assert results([["a", "b", "c"], ["d"]], tmp_path, {"a": 1}, 1) == {"a": "A", "b": "B", "c": "C", "d": "D"}


def test_without_any_actor_left_it_ends_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(RayError, match="it can't be started again"):
        results([["a", "b"]], tmp_path, {"a": 1}, 1)


def test_an_error_of_the_task_is_raised(tmp_path: Path) -> None:
    with pytest.raises(RayTaskError, match="faulty"):
        results([["a", "faulty", "b"]], tmp_path, {})
