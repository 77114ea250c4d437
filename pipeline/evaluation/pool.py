"""A pool of evaluation actors that score a checkpoint together, and the hook that Ray Train calls.

Ray Train runs ``Validation`` in a task of its own for each checkpoint, one after the other, while training
goes on, and ranks the checkpoints by what it returns.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
import ray.train

from pipeline import checkpoint as checkpoints
from pipeline import storage
from pipeline.config import Config
from pipeline.data.manifest import Manifest, PairRecord
from pipeline.evaluation.images import image_grid
from pipeline.evaluation.results import Scores, grid_file, prune, scores_file
from pipeline.evaluation.scoring import Scorer, fit_gamma, summarise
from pipeline.evaluation.settings import Split

RESTARTS = 3  # of an evaluation actor that dies, and tries of what it was scoring
COLUMNS = ("low", "gamma correction", "enhanced", "clean")


@dataclass(frozen=True)
class Pool:
    """Evaluation actors that share a split, decoded; they live as long as the driver that started them."""

    actors: Sequence[Any]
    split: Split
    protocol: str
    shown: tuple[str, ...]

    @classmethod
    def start(cls, config: Config, manifest: Manifest, split: Split) -> "Pool":
        """Start the actors; each decodes its share of ``split`` meanwhile."""
        settings, records = config.evaluation, manifest.pairs(split)
        actor = ray.remote(
            num_cpus=settings.cpus_per_actor,
            num_gpus=settings.gpus_per_actor,
            max_restarts=RESTARTS,
            max_task_retries=RESTARTS,
        )(Scorer)
        gamma = fit_gamma(manifest)
        device = "cuda" if settings.gpus_per_actor else "cpu"
        shares = [records[index :: settings.actors] for index in range(min(settings.actors, len(records)))]
        actors = [actor.remote(manifest.url, share, config.network, settings, gamma, device) for share in shares]
        return cls(actors, split, settings.protocol, _evenly(records, settings.grid_images))

    def score(self, url: str) -> Scores:
        """Score the checkpoint at ``url``; stores its scores and a picture beside it."""
        shares = [actor.score.remote(url) for actor in self.actors]
        pictures = [actor.pictures.remote(url, self.shown) for actor in self.actors]
        note = self.actors[0].lpips_note.remote()
        images = sorted((row for rows in ray.get(shares) for row in rows), key=lambda row: (row["method"], row["key"]))
        scores = {
            "checkpoint": storage.name_of(url),
            "step": checkpoints.read_progress(url).step,
            "split": self.split,
            "protocol": self.protocol,
            "lpips": ray.get(note),
            "methods": summarise(images),
            "images": images,
        }
        by_key = {key: row for part in ray.get(pictures) for key, row in part.items()}
        grid = image_grid([by_key[key] for key in self.shown], COLUMNS, self.shown)
        storage.write_bytes(storage.join(url, grid_file(self.split)), grid)
        storage.write_text(storage.join(url, scores_file(self.split)), json.dumps(scores, indent=2))
        return scores


@dataclass(frozen=True)
class Validation:
    """Ray Train's validation function: scores a checkpoint and frees the weights of those that are not kept."""

    config: Config
    pool: Pool

    def __call__(self, checkpoint: ray.train.Checkpoint) -> dict[str, float]:
        """The checkpoint's scores as Ray Train's metrics, such as ``dev_student_psnr``."""
        run = self.config.run.url
        means = self.pool.score(storage.join(run, storage.name_of(checkpoint.path)))["methods"]
        prune(run, self.config.checkpoint)
        return {
            f"{self.pool.split}_{method}_{name}": value for method in means for name, value in means[method].items()
        }


def _evenly(records: Sequence[PairRecord], count: int) -> tuple[str, ...]:
    """Keys of ``count`` records spread evenly over all of them."""
    count = min(count, len(records))
    return tuple(records[index * len(records) // count].key for index in range(count))
