"""Arithmetic on what the nodes of a cluster have."""

import os
import signal
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import ray

from pipeline.data.manifest import Manifest, load_manifest
from pipeline.launch import capacity
from pipeline.settings.config import Config
from pipeline.settings.evaluation import EvaluationSettings


def config(run: dict[str, Any], **evaluation: Any) -> Config:
    return Config.model_validate(
        {
            "run": {"name": "r"} | run,
            "data": {"url": "/data"},
            "train": {"steps": 4, "global_batch": run["workers"]},
            "evaluation": evaluation,
        }
    )


def nodes_of(*resources: dict[str, float]) -> list[dict[str, Any]]:
    """What Ray says of such nodes."""
    return [{"NodeID": str(index), "Alive": True, "Resources": node} for index, node in enumerate(resources)]


@pytest.mark.parametrize(
    ("free", "workers", "use_gpu", "room"),
    [
        ([{"CPU": 8.0}], 1, False, 2),  # each takes two cores to train and one to score
        ([{"CPU": 5.0}], 1, False, 1),
        ([{"CPU": 2.0}] * 4, 1, False, 2),  # the scorer of each needs a node of its own
        ([{"CPU": 1.0}, {"CPU": 2.0}], 1, False, 1),
        ([{"CPU": 64.0, "GPU": 8.0}], 1, True, 5),  # 1.5 GPUs each
        ([{"CPU": 64.0, "GPU": 4.0}] * 2, 4, True, 1),
        ([{}], 1, False, 1),  # it waits for others
    ],
)
def test_as_many_runs_as_the_nodes_have_room_for(monkeypatch, free, workers, use_gpu, room) -> None:
    monkeypatch.setattr(capacity, "free_on_nodes", lambda: {str(index): dict(node) for index, node in enumerate(free)})
    run = {"workers": workers, "use_gpu": use_gpu, "cpus_per_worker": 2}
    assert capacity.count_runs(config(run, actors=1, gpus_per_actor=0.5 if use_gpu else 0.0)) == room


def test_actors_are_placed_where_they_leave_room_for_whole_workers(monkeypatch) -> None:
    whole = config({"workers": 7, "use_gpu": True}, actors=2, gpus_per_actor=0.5)
    node = {"CPU": 64.0, "GPU": 4.0}
    monkeypatch.setattr(capacity, "free_on_nodes", lambda: {"n1": dict(node), "n2": dict(node)})
    assert capacity.nodes_for_actors(whole) == ["n2", "n2"]  # one on each would leave room for six workers
    monkeypatch.setattr(capacity, "free_on_nodes", lambda: {"n1": dict(node)})
    assert capacity.nodes_for_actors(whole) == []  # it waits for others


@pytest.mark.parametrize(
    ("settings", "free", "actors", "share"),
    [
        ({}, [{"CPU": 6.0}], 6, 0.0),
        ({}, [{"CPU": 100.0}], 10, 0.0),  # 4 images for each of them
        ({}, [{"CPU": 0.0}], 1, 0.0),
        ({}, [], 1, 0.0),
        ({"cpus_per_actor": 3}, [{"CPU": 8.0}], 2, 0.0),
        ({"cpus_per_actor": 3}, [{"CPU": 2.0}] * 3 + [{"CPU": 4.0}], 1, 0.0),  # each must fit into a node
        ({}, [{"CPU": 64.0, "GPU": 2.0}], 4, 0.5),
        ({}, [{"CPU": 3.0, "GPU": 2.0}], 3, 0.5),
        ({}, [{"CPU": 8.0}, {"CPU": 1.0, "GPU": 1.0}], 1, 0.5),  # the GPU's node has one core
        ({}, [{"CPU": 8.0, "GPU": 0.5}] * 2, 10, 0.0),  # no GPU is free
        ({"gpus_per_actor": 1}, [{"CPU": 8.0, "GPU": 1.5}] * 2, 2, 1.0),
        ({"gpus_per_actor": 0.25}, [{"CPU": 64.0, "GPU": 1.0}], 4, 0.25),
        ({"gpus_per_actor": 0.0}, [{"CPU": 5.0, "GPU": 4.0}], 5, 0.0),
        ({"actors": 7}, [{"CPU": 2.0}], 7, 0.0),
    ],
)
def test_actors_take_what_is_free(
    settings: dict[str, Any], free: list[dict[str, float]], actors: int, share: float
) -> None:
    found = capacity.choose_actor_count(EvaluationSettings.model_validate(settings), 40, free)
    assert (found.actors, found.gpus_per_actor) == (actors, share)


@pytest.fixture
def cluster_of(monkeypatch) -> Callable[..., Manifest]:
    """Stands in for a cluster of such nodes, of which nothing takes anything; a data set of 40 images to score."""

    def stand_in(*nodes: dict[str, float]) -> Manifest:
        free = {str(index): node for index, node in enumerate(nodes)}
        total = {name: sum(node.get(name, 0.0) for node in nodes) for name in ("CPU", "GPU")}
        monkeypatch.setattr(capacity, "free_on_nodes", lambda: {name: dict(node) for name, node in free.items()})
        monkeypatch.setattr(capacity.ray, "nodes", lambda: nodes_of(*nodes))
        monkeypatch.setattr(capacity.ray, "cluster_resources", lambda: total)
        monkeypatch.setattr(capacity.ray_internals, "has_autoscaler", lambda: False)
        return cast(Manifest, SimpleNamespace(split=lambda name: SimpleNamespace(pairs=np.array([40]))))

    return stand_in


@pytest.mark.parametrize(
    ("nodes", "run", "line"),
    [
        ([{"CPU": 8.0}], {}, "1 worker with 7 threads; 1 evaluation actor beside it"),
        ([{"CPU": 2.0}], {}, "1 worker with 1 thread; 1 evaluation actor beside it"),
        ([{"CPU": 8.0}], {"workers": 2}, "2 workers with 3 threads each; 2 evaluation actors beside them"),
        ([{"CPU": 8.0}] * 2, {"workers": 2}, "2 workers with 7 threads each; 2 evaluation actors beside them"),
        ([{"CPU": 4.0}, {"CPU": 8.0}], {}, "1 worker with 8 threads; 4 evaluation actors beside it"),
        ([{"CPU": 8.0}], {"cpus_per_worker": 2}, "1 worker with 2 threads; 6 evaluation actors beside it"),
        (
            [{"CPU": 64.0, "GPU": 2.0}],
            {},  # two threads of the loader, and one that feeds the GPU
            "1 worker with a GPU and 3 threads; 2 evaluation actors with 0.5 of a GPU beside it",
        ),
        (
            [{"CPU": 5.0, "GPU": 2.0}],
            {"workers": 2},
            "2 workers with a GPU and 2 threads each; 1 evaluation actor beside them",
        ),
    ],
)
def test_a_worker_computes_with_what_actors_leave_of_its_node(cluster_of, nodes, run, line) -> None:
    manifest = cluster_of(*nodes)
    chosen = capacity.choose_devices(config({"workers": 1} | run), [manifest])
    assert capacity.describe(chosen) == line
    assert capacity.choose_devices(chosen, [manifest]) == chosen


def test_threads_are_what_others_leave_or_what_a_run_waits_for(cluster_of, monkeypatch) -> None:
    cluster_of({"CPU": 8.0})
    run = config({"workers": 1, "use_gpu": False})
    chosen = []
    for free in (4.0, 1.0):
        monkeypatch.setattr(capacity, "free_on_nodes", lambda free=free: {"0": {"CPU": free}})
        chosen.append(capacity.choose_threads(run, 1).run.cpus_per_worker)
    assert chosen == [3, 7]


@pytest.mark.parametrize(
    ("cores", "run", "evaluation", "runs", "cpus"),
    [
        (2, {}, {}, 1, 3),  # two threads, and an actor that shares their cores
        (1, {}, {}, 1, 2),
        (2, {"workers": 2}, {}, 1, 3),
        (2, {}, {}, 2, 4),
        (2, {}, {"actors": 2}, 1, 4),
        (2, {"cpus_per_worker": 1}, {}, 1, 2),
        (4, {}, {}, 1, 2),  # all four are counted anyway, one of them for the actor
    ],
)
def test_on_one_or_two_cores_actors_are_counted_beside_them(monkeypatch, cores, run, evaluation, runs, cpus) -> None:
    monkeypatch.setattr(capacity.ray_internals, "count_cores", lambda: cores)
    assert capacity.cpus_needed(config({"workers": 1} | run, **evaluation), runs) == cpus


def test_runs_at_the_same_time_are_as_many_as_are_asked_for_and_share_the_cores(cluster_of) -> None:
    manifest = cluster_of({"CPU": 8.0})
    run = config({"workers": 1})  # a core to train, and one to score, though it might take more
    found = [capacity.fit_to_cluster(run, [manifest], concurrent) for concurrent in (None, 3, 2, 1)]
    assert [count for _, count in found] == [4, 3, 2, 1] and {each.evaluation.actors for each, _ in found} == {1}
    assert [each.run.cpus_per_worker for each, _ in found] == [1, 1, 3, 7]
    text = "2 runs at the same time, each: 1 worker with 3 threads; 1 evaluation actor beside it"
    assert capacity.describe(*found[2]) == text
    with pytest.raises(ValueError, match=r"^5 runs at the same time are asked for, the Ray cluster has room for 4;"):
        capacity.fit_to_cluster(run, [manifest], 5)


@pytest.mark.parametrize(
    ("run", "evaluation", "message"),
    [
        ({"workers": 1, "cpus_per_worker": 6}, {}, "each of run.workers needs 6 CPUs and 0 GPUs of one node; none has"),
        ({"workers": 1}, {"cpus_per_actor": 5}, "each of evaluation.actors needs 5 CPUs and 0 GPUs of one node"),
        ({"workers": 9}, {}, "the run needs 10 CPUs, the Ray cluster has 8"),
    ],
)
def test_what_fits_into_no_node_is_refused_rather_than_waited_for(cluster_of, run, evaluation, message) -> None:
    manifest = cluster_of({"CPU": 4.0}, {"CPU": 4.0})
    with pytest.raises(ValueError, match=message):
        capacity.choose_devices(config(run, **evaluation), [manifest])


PARTS = [{"CPU": 2.0, "GPU": 1.0}, {"CPU": 2.0, "GPU": 0.0}]


@pytest.fixture
def requests(monkeypatch) -> list[Any]:
    """What the autoscaler is asked for; nothing else happens to it, and a second passes at once."""
    asked: list[Any] = []
    monkeypatch.setattr(capacity, "request_resources", lambda bundles: asked.append(bundles))
    monkeypatch.setattr(capacity, "POLL_S", 0.01)
    monkeypatch.setattr(capacity.ray_internals, "has_autoscaler", lambda: True)
    return asked


def test_an_autoscaler_is_asked_for_what_the_cluster_lacks_until_it_is_there(monkeypatch, requests, capsys) -> None:
    head, gpu = {"CPU": 1.0}, {"CPU": 8.0, "GPU": 1.0}
    polls = iter([nodes_of(head), nodes_of(head), nodes_of(head, gpu)])
    monkeypatch.setattr(capacity.ray, "nodes", lambda: next(polls))
    capacity.wait_for(PARTS)
    assert requests == [[{"CPU": 2.0, "GPU": 1.0}, {"CPU": 2.0}], []]  # the request would outlive the command
    assert capsys.readouterr().out == "waiting up to 600 s for nodes with 4 CPUs and 1 GPUs (run.wait_s)\n"


def test_the_wait_has_an_end(monkeypatch, requests) -> None:
    monkeypatch.setattr(capacity.ray, "nodes", lambda: nodes_of({"CPU": 1.0}))
    capacity.wait_for(PARTS, 0.05)
    assert requests[-1] == [] and len(requests) == 2


@pytest.mark.parametrize(
    ("nodes", "autoscaler", "limit_s"),
    [([{"CPU": 8.0, "GPU": 1.0}], True, None), ([{"CPU": 1.0}], False, None), ([{"CPU": 1.0}], True, 0.0)],
    ids=["all is there", "none would come", "told not to"],
)
def test_nothing_is_waited_for_in_vain(monkeypatch, requests, capsys, nodes, autoscaler, limit_s) -> None:
    monkeypatch.setattr(capacity.ray_internals, "has_autoscaler", lambda: autoscaler)
    monkeypatch.setattr(capacity.ray, "nodes", lambda: nodes_of(*nodes))
    capacity.wait_for(PARTS, limit_s)
    assert requests == [] and capsys.readouterr().out == ""


@pytest.mark.slow
def test_a_node_that_joins_is_waited_for(driver, ray_head, shards) -> None:
    cpus = int(ray.cluster_resources()["CPU"])
    manifests = [load_manifest(shards)]
    run = {"workers": 2, "cpus_per_worker": cpus - 1, "use_gpu": False}
    with pytest.raises(ValueError, match=r"^the run needs .* CPUs, the Ray cluster has"):
        capacity.choose_devices(config(run), manifests)
    node = ray_head.add_node(num_cpus=cpus)
    try:
        found = capacity.choose_devices(config(run | {"wait_s": 120}), manifests)
        assert found.evaluation.actors and ray.cluster_resources()["CPU"] == 2 * cpus
    finally:
        os.killpg(node.pid, signal.SIGTERM)
        node.wait(60)
