"""What workers are told is the same on all of them, whatever each has heard."""

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
