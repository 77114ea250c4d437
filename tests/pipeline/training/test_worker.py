"""What the driver hands to its workers."""

import subprocess
import sys

import pytest
from commands import ROOT

from pipeline.training import loop, worker

DRIVER = """
import sys
from pipeline.launch.trainer import make_trainer
from pipeline.reporting import run_report
from pipeline.settings.config import Config
settings = {"run": {"name": "run", "root": sys.argv[1], "workers": 1, "use_gpu": False}, "data": {"url": "shards"}}
make_trainer(Config.model_validate(settings | {"train": {"steps": 9000}}), {}, None, "none")
print(sorted({"deepspeed", "torch._dynamo", "torch.utils.tensorboard", "torchvision"} & set(sys.modules)))
"""


def test_the_driver_imports_nothing_that_its_workers_alone_need(tmp_path) -> None:
    command = [sys.executable, "-c", DRIVER, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stderr


def test_the_worker_runs_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "train", lambda settings: given.append(settings))
    given: list[dict[str, object]] = []
    worker.train({"config": {}})
    assert given == [{"config": {}}]
