"""What workers are told is the same on all of them, whatever each has heard."""

from types import SimpleNamespace
from unittest.mock import patch

import torch
from ray.train import PreemptionInfo
from workers import run_workers

from pipeline import interruption
from pipeline.training import preemption
from pipeline.training.preemption import Notices


def looks(heard):
    """What this worker is told, look after look; of ``heard``, each rank hears its part: nodes, and whether to stop."""
    rank = torch.distributed.get_rank()
    told = Notices(rank, torch.device("cpu"))
    results = []
    for by_rank in heard:
        nodes, stop = by_rank[rank]
        info = (
            PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={node: [0] for node in nodes}) if nodes else None
        )
        with (
            patch.object(preemption.ray.train, "get_preemption_info", return_value=info),
            patch.object(interruption, "requested", return_value=stop),
            patch.object(preemption, "POLL_S", 0),
        ):
            results.append(told.poll())
    return results


def test_workers_that_have_heard_different_things_do_the_same():
    none, a, both = ([], False), (["a"], False), (["a", "b"], False)
    heard = [(none, none), (none, a), (a, none), (a, a), (both, a), (none, ([], True)), (([], True), a)]
    assert run_workers(2, looks, heard) == 2 * [[None, None, "save", None, "save", None, "stop"]]


def polls(step_s, steps):
    """The steps at which this worker exchanges something, once for each time, by its own clock."""
    rank = torch.distributed.get_rank()
    now, exchanges = 0.0, []
    with (
        patch.object(preemption, "time", SimpleNamespace(monotonic=lambda: now)),
        patch.object(preemption.ray.train, "get_preemption_info", return_value=None),
        patch.object(interruption, "requested", return_value=False),
        patch.object(preemption.dist, "broadcast", wraps=preemption.dist.broadcast) as broadcast,
    ):
        told = Notices(rank, torch.device("cpu"))
        for step in range(1, steps + 1):
            now += step_s[rank]
            broadcast.reset_mock()
            told.poll()
            exchanges += broadcast.call_count * [step]
    return exchanges


def test_polls_come_about_every_two_seconds_of_rank_zeros_and_nothing_is_exchanged_between():
    assert run_workers(2, polls, (0.125, 10.0), 64) == 2 * [[1, 3, 7, 15, 31, 47, 63]]
    assert run_workers(2, polls, (10.0, 0.125), 4) == 2 * [[1, 2, 3, 4]]
