"""What a run has been scored: which checkpoint is best, which keep their weights, and all that its report shows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pipeline import storage
from pipeline.run import checkpoint, scores
from pipeline.run.checkpoint import read_config
from pipeline.run.pictures import find_pictures
from pipeline.run.ranking import rank_checkpoints
from pipeline.run.record import data_of, read_metrics, read_provenance
from pipeline.run.scores import Table, scores_file
from pipeline.settings.config import Config, differences
from pipeline.settings.evaluation import Split


@dataclass(frozen=True)
class Run:
    """A run as it lies in its folder, finished or not.

    Attributes:
        url: its folder.
        config: its resolved settings.
        provenance: what else its weights come from; empty where no file of it can be read.
        metrics: records of training: ``step``, the loss terms, ``learning_rate``, ``images_per_s`` ...
        scores: every number of every scored checkpoint.
    """

    url: str
    config: Config
    provenance: dict[str, Any]
    metrics: list[dict[str, Any]]
    scores: Table

    @classmethod
    def load(cls, url: str) -> "Run":
        """Read the run in the folder ``url``; ``ValueError`` when there is none."""
        if checkpoint.kind_of(url) == "checkpoint":
            raise ValueError(f"{url}: is a checkpoint; give the folder of its run")
        config = read_config(url)
        return cls(url, config, read_provenance(url), read_metrics(url), scores.read_run(url))

    @property
    def name(self) -> str:
        """The folder's name."""
        return storage.name_of(self.url)

    @property
    def identity(self) -> dict[str, Any]:
        """What decides its weights, data apart: its settings', and the weights that it began with."""
        start = self.provenance.get("start_from")
        return self.config.identity() | ({"start_from": start["sha256"][checkpoint.STUDENT][:12]} if start else {})

    @cached_property
    def chosen(self) -> str | None:
        """Name of the best checkpoint by the development split; none while none has been scored."""
        order = rank_checkpoints(self.scores[self.scores["data"] == self.data], self.config)
        return order[0] if order else None

    @cached_property
    def data(self) -> str | None:
        """SHA-256 of the manifest whose development split chooses its checkpoints: that of its first data set.

        Where no provenance is left, that of its only scores; none where there are several.
        """
        scored = self.scores.loc[self.scores["split"] == "dev", "data"].unique()
        return data_of(self.provenance) or (str(scored[0]) if len(scored) == 1 else None)

    def scores_of(self, name: str, split: Split) -> Table:
        """A checkpoint's scores on one split; empty when there are none.

        On the development split they are those of the run's own data, on the test split of the data scored last.
        """
        rows = self.scores[(self.scores["checkpoint"] == name) & (self.scores["split"] == split)]
        data = self.data if split == "dev" else rows["data"].iloc[-1:].max()
        return rows[rows["data"] == data]

    def pictures(self, name: str, split: Split) -> Mapping[str, Mapping[str, str]]:
        """URLs of a checkpoint's pictures of ``split``, by image and view."""
        return find_pictures(storage.join(self.url, name), split)


def arms(runs: Sequence[Run]) -> dict[str, dict[int, Run]]:
    """The runs by arm and seed; an arm's runs share all settings but the seed.

    The first run's arm is ``reference``; others are named by the settings in which they differ from it.

    Raises:
        ValueError: two runs have the same settings and seed.
    """
    grouped: dict[str, dict[int, Run]] = {}
    for run in runs:
        differing = [
            f"{name.rsplit('.', 1)[-1]} {value}"
            for name, _, value in differences(runs[0].identity, run.identity)
            if name != "seed"
        ]
        arm = grouped.setdefault(", ".join(differing) or "reference", {})
        seed = run.config.run.seed
        if seed in arm:
            raise ValueError(f"{arm[seed].url} and {run.url} have the same settings and seed; name one of them")
        arm[seed] = run
    return grouped


def best_checkpoint(run: Run) -> str:
    """URL of the run's best checkpoint by its development scores; ``ValueError`` when none is scored."""
    if run.chosen is None:
        raise ValueError(f"{run.url}: none of its checkpoints has been scored; name a checkpoint's folder instead")
    return storage.join(run.url, run.chosen)


def unscored_checkpoints(run: str, conditions: str | None = None) -> list[str]:
    """URLs of the run's whole checkpoints that have no scores on the development split of its data yet, oldest first.

    Args:
        run: its folder.
        conditions: those that count, as ``scores.conditions_of`` names them; by default any.
    """
    return _without_scores(run, checkpoint.complete_checkpoints(run), conditions)


def is_finished(run: str, steps: int) -> bool:
    """Whether a run has taken its last step and every checkpoint of it is scored."""
    last = storage.join(run, checkpoint.name_at(steps))
    return storage.exists(last) and not _without_scores(run, [last, *checkpoint.complete_checkpoints(run)])


def _without_scores(run: str, urls: Sequence[str], conditions: str | None = None) -> list[str]:
    """Those of a run's checkpoints without scores, since those on other data count for nothing here."""
    data = data_of(read_provenance(run)) if urls else None
    found = []
    for url in urls:
        table = scores.read_or_empty(storage.join(url, scores_file("dev")))
        counts = (table["data"] == data) | (data is None)
        if conditions:
            counts &= scores.conditions_of(table) == conditions
        if not counts.any():
            found.append(url)
    return found


def prune(config: Config, table: Table) -> None:
    """Delete the weights of those of a run's scored checkpoints that are neither among the last nor among the best.

    Args:
        config: the run's settings.
        table: its checkpoints' scores on the data set that chooses among them.
    """
    order, settings = rank_checkpoints(table, config), config.checkpoint
    complete = checkpoint.complete_checkpoints(config.run.url)
    kept = {*order[: settings.keep_best], *(storage.name_of(url) for url in complete[-settings.keep_last :])}
    for url in complete:
        if storage.name_of(url) in set(order) - kept:
            checkpoint.delete_weights(url)
