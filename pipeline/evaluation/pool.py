"""A pool of evaluation actors that score a checkpoint together."""

import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import ray
import ray.train
from PIL import Image
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline import storage, terminal
from pipeline.data.manifest import Manifest
from pipeline.evaluation.dispatch import Dispatch, Task
from pipeline.evaluation.failures import MachineError
from pipeline.evaluation.lpips_weights import BackboneWeights
from pipeline.evaluation.scorer import Row, Scorer, Shared, fit_gamma
from pipeline.images.codecs import read_rgb
from pipeline.images.grid import image_grid
from pipeline.run import checkpoint as checkpoints
from pipeline.run import scores
from pipeline.run.pictures import EXTREMES, PICTURE, PICTURES, grid_file, pictures_folder
from pipeline.run.ranking import score_of_images
from pipeline.run.scores import Table, scores_file
from pipeline.settings.evaluation import EvaluationSettings, Split

QUALITY = 90  # of those pictures, WebP
METRICS_S = 2.0
ADVICE = (
    "The same command scores it again; where memory is short, with a smaller evaluation.tile, fewer evaluation.actors, "
    "or evaluation.gpus_per_actor 0, on the CPU"
)
COLUMNS = {"low": "low", "gamma": "gamma correction", "enhanced": "enhanced", "clean": "clean"}


@dataclass(frozen=True)
class Pool:
    """Evaluation actors that share a split, decoded; they live as long as the driver that started them.

    Attributes:
        actors: handles of ``Scorer``.
        shares: keys of the images that each of them holds.
        settings: protocols, LPIPS, pictures.
        split: which split.
        data: SHA-256 of the data set's manifest.
        lpips: reference to what ``find_lpips`` found, since the actors' nodes may lack it.
    """

    actors: Sequence[Any]
    shares: Sequence[Sequence[str]]
    settings: EvaluationSettings
    split: Split
    data: str
    lpips: ray.ObjectRef

    @classmethod
    def start(
        cls,
        settings: EvaluationSettings,
        manifest: Manifest,
        split: Split,
        lpips: BackboneWeights | str,
        nodes: Sequence[str] = (),
    ) -> "Pool":
        """Start the actors; each decodes its share of ``split`` meanwhile.

        Args:
            settings: as ``capacity.choose_actor_count`` gave them.
            manifest: the data set.
            split: which of its splits.
            lpips: what ``find_lpips`` found.
            nodes: id of each actor's node, as long as there is room; by default they are spread over all nodes.
        """
        assert settings.actors is not None and settings.gpus_per_actor is not None
        actor = ray.remote(
            num_cpus=settings.cpus_per_actor,
            num_gpus=settings.gpus_per_actor,
            max_restarts=-1,  # also on another node
        )(Scorer)
        keys = [record.key for record in manifest.pairs(split)]
        count = min(settings.actors, len(keys))
        device = "cuda" if settings.gpus_per_actor else "cpu"
        arguments = (count, settings, fit_gamma(manifest), device)
        there = [NodeAffinitySchedulingStrategy(node, soft=True, _spill_on_unavailable=True) for node in nodes]
        placed = [actor.options(scheduling_strategy=strategy) for strategy in there or ["SPREAD"] * count]
        actors = [placed[index].remote(manifest.url, split, index, *arguments) for index in range(count)]
        shares = [keys[index::count] for index in range(count)]
        return cls(actors, shares, settings, split, manifest.checksum, ray.put(lpips))

    def stop(self) -> None:
        """End the actors, whose resources are free at once; else they last as long as anything refers to them."""
        for actor in self.actors:
            ray.kill(actor)

    def score(self, url: str, *, progress: bool = False) -> Table:
        """Score the checkpoint at ``url``; pictures and, last, its scores are stored beside it.

        Raises:
            MachineError: an image could not be scored for a reason that may pass; no scores are stored.
        """
        config = checkpoints.read_config(url).model_copy(update={"evaluation": self.settings})
        networks = checkpoints.load_candidates(url, config.network)
        if "averaged" not in networks:
            terminal.log(f"{url}: has no {checkpoints.TEACHER}, so that only the student is scored")
        shared = Shared(self.lpips, ray.put(networks))
        found = self._each(url, lambda actor, key: actor.score.remote(key, shared), progress=progress)
        table = self._table(url, _step_of(url), found)
        self._store_pictures(url, score_of_images(table, config), shared)
        return scores.store(storage.join(url, scores_file(self.split)), table)

    def score_pictures(self, url: str, pictures: Mapping[str, Path], *, progress: bool = False) -> Table:
        """Score pictures made elsewhere, one for each key of the split; ``url`` names them; raises as ``score``."""
        shared = Shared(self.lpips)
        found = self._each(
            url, lambda actor, key: actor.score_picture.remote(key, read_rgb(pictures[key]), shared), progress=progress
        )
        return self._table(url, 0, found)

    def record_metrics(self, run: str, table: Table, seconds: float) -> None:
        """Record for Prometheus a checkpoint's scores and how long they took, by an actor, which lasts."""
        recorded = self.actors[0].record_metrics.remote(run, table, seconds)
        ray.wait([recorded], timeout=METRICS_S)  # it may be stopped right after

    def _each(
        self, url: str, task: Task, *, keys: Collection[str] | None = None, progress: bool = False
    ) -> dict[str, Any]:
        """What ``task(actor, key)`` gives for each of ``keys``, all by default, of what lies at ``url``."""
        shares = [[key for key in share if keys is None or key in keys] for share in self.shares]
        results = Dispatch(self.actors, shares, task).results()
        count = sum(map(len, shares))
        try:
            return dict(terminal.bar(results, title="scoring", total=count, unit="image", hidden=not progress))
        except MachineError as error:
            raise MachineError(f"{url}: not scored, for a reason that may pass: {error}. {ADVICE}") from error

    def _table(self, url: str, step: int, found: Mapping[str, list[Row]]) -> Table:
        """All rows, image by image, those included that only say why an image could not be scored."""
        common = {"checkpoint": storage.name_of(url), "step": step, "split": self.split, "data": self.data}
        return scores.to_table([row | common for key in sorted(found) for row in found[key]])

    def _store_pictures(self, url: str, values: pd.Series, shared: Shared) -> None:
        """Pictures of the best and the worst images by ``values``, and of some fixed ones, and a grid of the latter."""
        fixed = self._evenly(self.settings.grid_images)
        order = list(values.dropna().sort_values().index)
        wanted = {*fixed, *order[:EXTREMES], *order[-EXTREMES:]}
        found = self._each(url, lambda actor, key: actor.views.remote(key, shared), keys=wanted)
        views = {key: made for key, made in found.items() if made}
        with tempfile.TemporaryDirectory() as folder:
            for key, made in views.items():
                for view, picture in made.items():
                    Image.fromarray(picture).save(Path(folder, f"{key}.{view}.{PICTURE}"), quality=QUALITY)
            storage.upload_folder(Path(folder), storage.join(url, pictures_folder(self.split)), stale=PICTURES)
        shown = [key for key in fixed if key in views]
        if shown:
            grid = image_grid([[views[key][view] for view in COLUMNS] for key in shown], list(COLUMNS.values()), shown)
            storage.write_bytes(storage.join(url, grid_file(self.split)), grid)

    def _evenly(self, count: int) -> list[str]:
        """So many keys, spread evenly over all of them."""
        keys = sorted(key for share in self.shares for key in share)
        count = min(count, len(keys))
        return [keys[index * len(keys) // count] for index in range(count)]


def _step_of(url: str) -> int:
    """The step of a checkpoint; 0 where its weights were copied without it."""
    return checkpoints.read_progress(url).step if storage.exists(storage.join(url, checkpoints.STATE)) else 0
