"""Arithmetic on what the nodes of a cluster have."""

from typing import Any

import pytest

from pipeline import resources
from pipeline.config import Config


def config(run: dict[str, Any], **evaluation: Any) -> Config:
    return Config.model_validate(
        {
            "run": {"name": "r"} | run,
            "data": {"url": "/data"},
            "train": {"steps": 4, "global_batch": run["workers"]},
            "evaluation": evaluation,
        }
    )


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
    monkeypatch.setattr(resources, "free_on_nodes", lambda: {str(index): dict(node) for index, node in enumerate(free)})
    run = {"workers": workers, "use_gpu": use_gpu, "cpus_per_worker": 2}
    assert resources.runs_at_once(config(run, actors=1, gpus_per_actor=0.5 if use_gpu else 0.0)) == room


def test_actors_are_placed_where_they_leave_room_for_whole_workers(monkeypatch) -> None:
    whole = config({"workers": 7, "use_gpu": True}, actors=2, gpus_per_actor=0.5)
    node = {"CPU": 64.0, "GPU": 4.0}
    monkeypatch.setattr(resources, "free_on_nodes", lambda: {"n1": dict(node), "n2": dict(node)})
    assert resources.beside_training(whole) == ["n2", "n2"]  # one on each would leave room for six workers
    monkeypatch.setattr(resources, "free_on_nodes", lambda: {"n1": dict(node)})
    assert resources.beside_training(whole) == []  # it waits for others


@pytest.mark.parametrize(
    ("run", "evaluation", "message"),
    [
        ({"workers": 1, "cpus_per_worker": 6}, {}, "each of run.workers needs 6 CPUs and 0 GPUs of one node; none has"),
        ({"workers": 1}, {"cpus_per_actor": 5}, "each of evaluation.actors needs 5 CPUs and 0 GPUs of one node"),
        ({"workers": 9}, {}, "the run needs 10 CPUs, the Ray cluster has 8"),
    ],
)
def test_what_fits_into_no_node_is_refused_rather_than_waited_for(monkeypatch, run, evaluation, message) -> None:
    nodes = [{"CPU": 4.0}] * 2
    monkeypatch.setattr(
        resources, "free_on_nodes", lambda: {str(index): dict(node) for index, node in enumerate(nodes)}
    )
    monkeypatch.setattr(resources.ray, "nodes", lambda: [{"Alive": True, "Resources": node} for node in nodes])
    monkeypatch.setattr(resources.ray, "cluster_resources", lambda: {"CPU": 8.0})
    with pytest.raises(ValueError, match=message):
        resources.with_devices(config(run, **evaluation), [])
