"""The training loop on one worker, in Ray Train's local mode: no cluster, the same loop."""

import contextlib
import io

from datasets import packed
from workers import run_workers

STEPS = 20


def train(settings):
    """Run the loop on a worker; what it printed."""
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer

    from pipeline.training import loop

    config = {"config": settings, "provenance": {}}
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.redirect_stderr(printed):
        TorchTrainer(loop.train, train_loop_config=config, scaling_config=ScalingConfig(num_workers=0)).fit()
    return printed.getvalue()


def test_a_loss_that_stays_not_finite_stops_the_run_with_the_reason(tmp_path):
    settings = {
        "run": {"name": "nan", "storage": str(tmp_path)},
        "data": {"url": packed(tmp_path / "pairs"), "crop": 32, "cache_gib": 0},
        "network": {"width": 1 / 16},
        "optimizer": {"learning_rate": 1e30, "warmup_steps": 0},
        "train": {"steps": STEPS, "nonfinite_limit": 3, "log_every": 1},
    }
    (printed,) = run_workers(1, train, settings)
    assert printed.count("left out: the loss or its gradient is not finite") == 3
    assert (tmp_path / "nan/stopped.txt").read_text().startswith("3 steps in a row (train.nonfinite_limit)")
    assert f"step {STEPS}/" not in printed
