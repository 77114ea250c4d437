"""Measures what scoring every checkpoint costs training, and prints the table: part of ``make bench``.

Runs that score their checkpoints and runs that write but do not score them take turns. "On cores of its own" keeps the
training worker on one half of the machine's cores and all of evaluation on the other half, as on two nodes;
"on the same cores" lets a training worker for each core share them with evaluation.
"""

import argparse
import os
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from statistics import median
from typing import Any

import ray
from measure import machine, spread, stay_on, table
from packed_pairs import pack_pairs

from pipeline import storage
from pipeline.data.manifest import load_manifest
from pipeline.evaluation.scorer import find_lpips
from pipeline.evaluation.validation import Validation
from pipeline.launch import capacity, cluster, trainer
from pipeline.launch.provenance import collect_provenance
from pipeline.run import lease
from pipeline.run.record import read_metrics
from pipeline.settings.command_line import user_errors
from pipeline.settings.config import Config
from pipeline.training import loop

ROUNDS = 3
STEPS, WARM_UP, CHECKPOINT_EVERY, LOG_EVERY = 240, 60, 60, 20
CORES = sorted(os.sched_getaffinity(0))
TRAINING_CORES, EVALUATION_CORES = CORES[: len(CORES) // 2], CORES[len(CORES) // 2 :]
train = loop.train


class OnCores(Validation):
    """Validation that stays, with its actors, on some cores; or on none, where it does nothing."""

    cores: Collection[int] = ()

    def __call__(self, checkpoint: Any) -> dict[str, float]:
        if not self.cores:
            return {}
        stay_on(self.cores)
        cores = self.cores
        ray.get([actor.__ray_call__.remote(lambda _: stay_on(cores)) for actor in self.pool.actors])
        return super().__call__(checkpoint)

    def score(self, url: str) -> float:
        return super().score(url) if self.cores else 0.0


def main() -> None:
    """Measure, print the table and write it to a file."""
    parser = argparse.ArgumentParser(description="Measure what scoring costs training.")
    parser.add_argument("--pairs", type=Path, help="folder of pairs; by default scikit-image's photographs are taken")
    parser.add_argument("--out", type=Path, required=True, help="Markdown file to write")
    options = parser.parse_args()
    with user_errors(), tempfile.TemporaryDirectory(prefix="bench-") as root:
        data = pack_pairs(Path(root), options.pairs)
        own = compare(Path(root), data, workers=1, training=TRAINING_CORES, evaluation=EVALUATION_CORES)
        same = compare(Path(root), data, workers=len(CORES), training=CORES, evaluation=CORES)
        head = f"{machine()}; every {CHECKPOINT_EVERY} steps a checkpoint of {scored(data)}"
    rows = [["on cores of its own", *own], ["on the same cores", *same]]
    header = ["evaluation", "training without it, images/s", "with it, images/s", "with / without"]
    report = f"{head}\n\n{table(header, rows)}"
    print(f"\n{report}")
    storage.write_text(str(options.out), f"{report}\n")


def scored(data: str) -> str:
    """What is scored of each checkpoint, in words."""
    pairs = load_manifest(data).pairs("dev")
    return f"{len(pairs)} images of {pairs[0].width}x{pairs[0].height} or so, four methods, PSNR, SSIM and LPIPS"


def compare(root: Path, data: str, workers: int, training: list[int], evaluation: list[int]) -> list[str]:
    """Speeds without and with evaluation, and the median of the rounds' ratios."""
    without, with_it = [], []
    for _ in range(ROUNDS):
        without.append(speed(root, data, workers, training, []))
        with_it.append(speed(root, data, workers, training, evaluation))
    ratios = [one / other for one, other in zip(with_it, without, strict=True)]
    return [spread(without), spread(with_it), spread(ratios, 3)]


def speed(root: Path, data: str, workers: int, training: list[int], evaluation: list[int]) -> float:
    """Images per second of a run: the median over the stretches after the first steps."""
    config = settings(root, data, workers)
    storage.delete_folder(config.run.url)
    manifests = [load_manifest(data)]
    OnCores.cores = evaluation
    trainer.Validation = OnCores  # type: ignore[misc]
    loop.train = on_cores(training)
    stay_on(EVALUATION_CORES if training == TRAINING_CORES else CORES)  # and so do Ray's own processes
    with lease.hold(config.run.url) as lease_id, cluster.session(capacity.cpus_needed(config), None):
        config = capacity.choose_devices(config, manifests)
        trainer.train(config, manifests, collect_provenance(manifests), find_lpips(config.evaluation), lease_id)
    return median(each["images_per_s"] for each in read_metrics(config.run.url) if each["step"] > WARM_UP)


def settings(root: Path, data: str, workers: int) -> Config:
    """A small network's run."""
    return Config.model_validate(
        {
            "run": {"name": "run", "root": str(root / "runs"), "workers": workers, "cpus_per_worker": 1},
            "data": {"url": data, "crop": 64, "cache": str(root / "cache")},
            "train": {"steps": STEPS, "global_batch": 8, "log_every": LOG_EVERY},
            "network": {"width": 0.25},
            "checkpoint": {"every": CHECKPOINT_EVERY},
            "evaluation": {"actors": 1},
        }
    )


def on_cores(cores: list[int]) -> Callable[[dict[str, Any]], None]:
    """The training loop, kept on some cores."""

    def pinned(settings: dict[str, Any]) -> None:
        stay_on(cores)
        train(settings)

    return pinned


if __name__ == "__main__":
    main()
