"""A cluster of three nodes, two with GPUs that Ray is only told of: what is checked on them, and who trains where."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import ray.train
import ray.train.torch
from commands import RayHead
from datasets import packed
from ray import cloudpickle
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from s3 import S3Server

from pipeline import storage
from pipeline.data.manifest import Manifest, load_manifest
from pipeline.launch import node_checks
from pipeline.training import topology
from pipeline.training.topology import Place

cloudpickle.register_pickle_by_value(sys.modules[__name__])
PLAIN, ODD = "127.0.0.2", "127.0.0.3"  # addresses of their own: Ray counts local ranks by address
CACHE = Path(f"~/cache-{uuid.uuid4().hex[:8]}")
HELD = 9  # GPUs of the odd node that something else holds: training gets the last two, 9 and 10


@pytest.fixture(scope="module")
def cluster(driver: None, ray_head: RayHead, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Nodes of 2 and 11 GPUs beside the head, by address; the odd one also has wrong keys, packages and no home."""
    package = tmp_path_factory.mktemp("packages") / "webdataset-0.1.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Name: webdataset\nVersion: 0.1\n")
    plain = {"HOME": str(tmp_path_factory.mktemp("home"))}
    odd = {"HOME": "/dev/null", "AWS_SECRET_ACCESS_KEY": "wrong", "PYTHONPATH": str(package.parent)}
    folders = [tempfile.mkdtemp(prefix="ray-", dir="/tmp") for _ in (PLAIN, ODD)]
    started = [
        ray_head.add_node(PLAIN, plain, num_gpus=2, temp_dir=folders[0]),
        ray_head.add_node(ODD, odd, num_gpus=HELD + 2, temp_dir=folders[1]),
    ]
    try:
        yield wait_for(PLAIN, ODD)
    finally:
        for node in started:
            node.send_signal(signal.SIGTERM)  # so that it leaves at once
        for node, folder in zip(started, folders, strict=True):
            try:
                node.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(node.pid, signal.SIGKILL)
            shutil.rmtree(folder, ignore_errors=True)
        wait_for(PLAIN, ODD, alive=False)


def wait_for(*addresses: str, alive: bool = True) -> dict[str, str]:
    """Ids of all nodes by address, once those of these addresses have come, or have gone."""
    deadline = time.monotonic() + 60
    while True:
        found = {node["NodeManagerAddress"]: node["NodeID"] for node in ray.nodes() if node["Alive"]}
        if all((address in found) == alive for address in addresses):
            return found
        assert time.monotonic() < deadline, f"nodes after a minute: {', '.join(found)}"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return load_manifest(packed(tmp_path_factory.mktemp("pairs"), test=1))


@pytest.mark.slow
def test_every_node_is_asked_and_what_is_amiss_is_said_of_it_alone(
    cluster: dict[str, str], s3: S3Server, manifest: Manifest
) -> None:
    bucket = s3.make_bucket()
    with pytest.raises(ValueError) as error:
        node_checks.check_nodes([manifest], f"{bucket}/runs", CACHE, use_gpu=True)
    lines = str(error.value).split("\n  ")
    assert lines[0] == "cluster preflight failed:"
    assert f"({ODD}): {bucket}/runs: cannot be read (" in lines[1] and "AWS_SECRET_ACCESS_KEY" in lines[1]
    assert f"({ODD}): /dev/null/{CACHE.name}: cannot be written to" in lines[2] and "data.cache-gib 0" in lines[2]
    assert lines[3].split() == ["package", "requirements.lock", "driver", "nodes"]
    assert lines[4].startswith("webdataset  1.0.2") and lines[4].endswith(f"({ODD})") and "0.1 on " in lines[4]
    assert lines[5].startswith("these packages must agree") and len(lines) == 6
    assert storage.listdir(f"{bucket}/runs") == []
    assert not CACHE.expanduser().exists()  # the head, which has no GPU, does not train


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_nodes_that_do_not_answer_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_checks, "TIMEOUT_S", 0.0)
    with pytest.raises(ValueError, match=r"\(127[^:]*\(127[^:]*: no answer in 0 s;"):
        node_checks.check_nodes([])


@pytest.mark.slow
def test_ranks_are_packed_by_node_and_each_has_the_gpu_that_ray_gave_it(
    cluster: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # a process more, which takes seconds to start
    there = NodeAffinitySchedulingStrategy(cluster[ODD], soft=False)
    holder = ray.remote(num_cpus=0, num_gpus=HELD, scheduling_strategy=there)(Holder).remote()
    assert ray.get(holder.gpus.remote()) == list(range(HELD))
    TorchTrainer(
        note_place,
        train_loop_config=str(tmp_path),
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=4, use_gpu=True),
        run_config=RunConfig(name="placement", storage_path=str(tmp_path)),
    ).fit()
    places = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(4)]
    assert [place["node"] for place in places] in ([PLAIN] * 2 + [ODD] * 2, [ODD] * 2 + [PLAIN] * 2)
    assert [place["local_rank"] for place in places] == [0, 1, 0, 1]
    gpus = {PLAIN: ["0", "1"], ODD: ["9", "10"]}
    for place in places:
        assert place["gpu"] == gpus[place["node"]][place["local_rank"]]
        assert place["visible"].split(",")[place["device"]] == place["gpu"]
    # the engine must be told: by its local rank it would take the other worker's
    assert [place["device"] for place in places if place["node"] == ODD] == [1, 0]
    order = "0-1, 9-10" if places[0]["node"] == PLAIN else "9-10, 0-1"
    assert all(place["lines"] == [f"node {socket.gethostname()}: ranks 0-3 on GPU {order}"] for place in places)


def test_each_node_that_trains_has_a_line() -> None:
    gpus = [Place("n1", str(gpu)) for gpu in (0, 1, 2, 5)]
    parts = [Place("n2", "MIG-a"), Place("n2", "MIG-b")]
    assert topology.describe([*gpus, *parts, Place("n3", None), Place("n3", None), Place("n4", "7")]) == [
        "node n1: ranks 0-3 on GPU 0-2, 5",
        "node n2: ranks 4-5 on GPU MIG-a, MIG-b",
        "node n3: ranks 6-7 on CPU",
        "node n4: rank 8 on GPU 7",
    ]


class Holder:
    """Holds GPUs."""

    def gpus(self) -> list[int]:
        return [int(gpu) for gpu in ray.get_gpu_ids()]


def note_place(folder: str) -> None:
    """On a worker: write down where it is."""
    context = ray.train.get_context()
    place = {
        "node": ray.util.get_node_ip_address(),
        "local_rank": context.get_local_rank(),
        "gpu": ray.get_runtime_context().get_accelerator_ids()["GPU"][0],
        "visible": os.environ["CUDA_VISIBLE_DEVICES"],
        "device": ray.train.torch.get_device().index,
        "lines": topology.describe(topology.gather()),
    }
    Path(folder, f"{context.get_world_rank()}.json").write_text(json.dumps(place))
