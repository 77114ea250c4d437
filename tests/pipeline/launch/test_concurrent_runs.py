"""Many runs: the same devices for all of them."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest

from pipeline.launch import capacity, cluster, concurrent_runs, preflight
from pipeline.run import record
from pipeline.settings.config import Config


def config(name: str, **evaluation: Any) -> Config:
    settings = {"run": {"name": name, "root": "/nowhere"}, "data": {"url": "/data"}, "train": {"steps": 4}}
    return Config.model_validate(settings | {"evaluation": evaluation})


def test_devices_are_decided_once_for_all_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    free = iter([{"gpus_per_actor": 0.5, "actors": 2}, {"gpus_per_actor": 0.0, "actors": 9}])

    def decide(config: Config, manifests: Any, concurrent: int) -> tuple[Config, int]:
        """As a cluster whose GPU the first run takes."""
        evaluation = config.evaluation.model_copy(update=next(free))
        run = config.run.model_copy(update={"use_gpu": True, "cpus_per_worker": 3})
        return config.model_copy(update={"evaluation": evaluation, "run": run}), concurrent

    started: list[Config] = []

    def in_turn(configs: list[Config], concurrent: int, training: Callable[[Config], None]) -> list[tuple[str, None]]:
        started.extend(configs)
        return [(each.run.name, None) for each in configs]

    for module, name in (
        (preflight, "check_data"),
        (preflight, "find_lpips_weights"),
        (preflight, "check_cluster"),
        (record, "check_run"),
        (concurrent_runs, "collect_provenance"),
    ):
        monkeypatch.setattr(module, name, lambda *arguments: None)
    monkeypatch.setattr(cluster, "session", lambda *arguments, **options: nullcontext())
    monkeypatch.setattr(capacity, "fit_to_cluster", decide)
    monkeypatch.setattr(concurrent_runs.ray, "put", lambda value: value)
    monkeypatch.setattr(concurrent_runs, "_in_turn", in_turn)
    assert concurrent_runs.train_all([config("a"), config("b", tile=512), config("c")], concurrent=2) == {}
    assert [each.run.name for each in started] == ["a", "b", "c"]
    devices = [(each.run.use_gpu, each.evaluation.gpus_per_actor, each.evaluation.actors) for each in started]
    assert devices == [(True, 0.5, 2)] * 3 and {each.run.cpus_per_worker for each in started} == {3}
    assert [each.evaluation.tile for each in started] == [2048, 512, 2048]
