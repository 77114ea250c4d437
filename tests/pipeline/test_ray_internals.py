"""What Ray gives in private alone: each test is named after the upgrade that would break it."""

import contextlib
import os
import subprocess
import sys
import time

import grpc
import pytest
import ray
from commands import ROOT, RayHead

from pipeline import interruption, ray_internals

PRINTER = """
import ray, time
from pipeline import ray_internals
ray.init()
lines = []
with ray_internals.redirect_worker_output(lambda source, line: lines.append((source, line))):
    ray.get(ray.remote(num_cpus=0)(lambda: print("from a task")).options(name="printer").remote())
    deadline = time.monotonic() + 20
    while not lines and time.monotonic() < deadline:
        time.sleep(0.1)
print(lines)
"""


def test_an_upgrade_of_ray_that_moves_its_key_value_store(driver) -> None:
    key = f"test-{os.getpid()}"
    look = ray.remote(num_cpus=0)(lambda: ray_internals.has_mark(key))
    assert not ray_internals.has_mark(key) and not ray.get(look.remote())
    ray_internals.set_mark(key)
    assert ray_internals.has_mark(key) and ray.get(look.remote())


def test_an_upgrade_of_ray_that_tells_drivers_from_workers_otherwise(driver) -> None:
    assert not ray_internals.is_worker()
    assert ray.get(ray.remote(num_cpus=0)(ray_internals.is_worker).remote())


def test_an_upgrade_of_ray_that_counts_free_resources_otherwise(driver) -> None:
    def free() -> float:
        return sum(node.get("CPU", 0.0) for node in ray_internals.free_resources_by_node().values())

    holder = ray.remote(num_cpus=1)(lambda: time.sleep(60)).remote()
    try:
        deadline = time.monotonic() + 20
        while free() > ray.cluster_resources()["CPU"] - 1 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert free() == ray.cluster_resources()["CPU"] - 1
        assert set(ray_internals.free_resources_by_node()) == {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    finally:
        ray.cancel(holder, force=True)


def test_an_upgrade_of_ray_that_counts_cores_otherwise(monkeypatch) -> None:
    assert 1 <= ray_internals.count_cores() <= len(os.sched_getaffinity(0))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    monkeypatch.setattr("multiprocessing.cpu_count", lambda: 64)
    monkeypatch.setattr("ray._private.utils._get_docker_cpus", lambda: 3.5)  # a container's limit
    assert ray_internals.count_cores() == 3


def test_an_upgrade_of_ray_that_reports_its_autoscaler_otherwise(driver) -> None:
    assert ray_internals.has_autoscaler() is False


def test_an_upgrade_of_ray_whose_trainers_start_other_actors(driver, tmp_path, monkeypatch) -> None:
    from ray._private.state import actors
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    monkeypatch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    before = set(actors())
    trainer = TorchTrainer(
        lambda: None,
        scaling_config=ScalingConfig(num_workers=1),
        run_config=RunConfig(name="few", storage_path=str(tmp_path)),
    )
    ray_internals.start_fewer_actors(trainer, keep_cleaner=False)
    with interruption.graceful_shutdown():
        interruption.run_shielded(trainer.fit)
    started = {actor["ActorClassName"] for name, actor in actors().items() if name not in before}
    needed = {"TrainController", "SynchronizationActor", "RayTrainWorker"}
    assert needed <= started <= needed | {"_AutoscalingCoordinatorActor"}


def test_an_upgrade_of_ray_whose_trainers_ask_another_actor_for_room(driver) -> None:
    from ray.train.v2._internal.execution.scaling_policy.autoscaling_coordinator_client import (
        TrainAutoscalingCoordinatorClient,
    )

    ray_internals.start_resource_coordinator()
    ours = [each["name"] for each in ray.util.list_named_actors(all_namespaces=True)]
    asked = TrainAutoscalingCoordinatorClient("test")._autoscaling_coordinator
    assert ours == [each["name"] for each in ray.util.list_named_actors(all_namespaces=True)]
    assert asked == ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator")


def test_an_upgrade_of_ray_that_forwards_the_output_of_workers_otherwise(ray_head: RayHead) -> None:
    environment = {**os.environ, "RAY_ADDRESS": ray_head.address}
    command = [sys.executable, "-c", PRINTER]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert "'from a task')" in done.stdout.splitlines()[-1] and "printer pid=" in done.stdout
    assert "from a task" not in done.stderr  # Ray's own printing is off


def test_an_upgrade_of_ray_that_words_the_autoscalers_lines_otherwise(driver) -> None:
    lines = ["======== Autoscaler status ========", ":event_summary:Resized to 4 CPUs.", "Demands: none"]
    *tips, event = ray_internals.keep_autoscaler_events(lines)
    assert event == "Resized to 4 CPUs." and all(tip.startswith("Tip: ") for tip in tips)


def test_an_upgrade_of_ray_that_hands_variables_on_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.train.v2._internal.constants import get_env_vars_to_propagate

    monkeypatch.setenv("IAML_TEST_VARIABLE", "before")
    with ray_internals.propagate_variable("IAML_TEST_VARIABLE", "within"):
        assert get_env_vars_to_propagate()["IAML_TEST_VARIABLE"] == "within"
    assert "IAML_TEST_VARIABLE" not in get_env_vars_to_propagate() and os.environ["IAML_TEST_VARIABLE"] == "before"


def test_an_upgrade_of_ray_that_finds_its_local_head_otherwise(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", list)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with pytest.raises(ConnectionError):
        ray_internals.find_local_head()
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:4321")
    assert ray_internals.find_local_head().endswith(":4321")


def test_an_upgrade_of_ray_that_asks_its_head_otherwise(ray_head: RayHead) -> None:
    with contextlib.closing(ray_internals.open_head_channel(ray_head.address)) as channel:
        ray_internals.ask_head(channel, 20.0)
    nobody = ray_internals.open_head_channel("127.0.0.1:9")
    with contextlib.closing(nobody), pytest.raises(grpc.RpcError):
        ray_internals.ask_head(nobody, 20.0)
