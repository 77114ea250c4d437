"""Where a run's workers train: which ranks on which node, and on which of its devices."""

import socket
from collections.abc import Sequence
from dataclasses import dataclass

import ray
import torch.distributed as dist


@dataclass(frozen=True)
class Place:
    """Where a worker trains: on which node, and on which GPU by the node's own count, if any."""

    node: str
    gpu: str | None


def gather() -> list[Place]:
    """Each worker's place, by rank; all workers must call this together, with their devices set."""
    gpus = ray.get_runtime_context().get_accelerator_ids()["GPU"]
    places = [Place(socket.gethostname(), None)] * dist.get_world_size()
    dist.all_gather_object(places, Place(socket.gethostname(), gpus[0] if gpus else None))
    return places


def describe(places: Sequence[Place]) -> list[str]:
    """A line for each node, as ``node n1: ranks 0-3 on GPU 0-3``."""
    nodes: dict[str, list[int]] = {}
    for rank, place in enumerate(places):
        nodes.setdefault(place.node, []).append(rank)
    lines = []
    for node, ranks in nodes.items():
        gpus = [gpu for rank in ranks if (gpu := places[rank].gpu) is not None]
        devices = f"GPU {_spans(gpus)}" if gpus else "CPU"
        lines.append(f"node {node}: rank{'s' * (len(ranks) > 1)} {_spans([str(rank) for rank in ranks])} on {devices}")
    return lines


def _spans(names: Sequence[str]) -> str:
    """``0-2, 5`` for 0, 1, 2 and 5; what is no number, as a part of a GPU, stands alone."""
    spans: list[list[str]] = []
    for name in names:
        if spans and name.isdigit() and spans[-1][-1].isdigit() and int(name) == int(spans[-1][-1]) + 1:
            spans[-1].append(name)
        else:
            spans.append([name])
    return ", ".join(span[0] if len(span) == 1 else f"{span[0]}-{span[-1]}" for span in spans)
