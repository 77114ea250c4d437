"""The hook that Ray Train calls for each checkpoint, one after the other, in tasks beside the training."""

import time
from dataclasses import dataclass

import ray.train

from pipeline import storage, terminal
from pipeline.evaluation.failures import MachineError
from pipeline.evaluation.pool import Pool
from pipeline.interruption import JobInterruptedError
from pipeline.run import scores
from pipeline.run.history import prune
from pipeline.run.ranking import score_of_images
from pipeline.settings.config import Config


@dataclass(frozen=True)
class Validation:
    """Ray Train's validation function: scores a checkpoint and frees the weights of those that are not kept."""

    config: Config
    pool: Pool

    def __call__(self, checkpoint: ray.train.Checkpoint) -> dict[str, float]:
        """Score the checkpoint; Ray Train, which has no use for scores, gets none."""
        try:
            self.score(storage.join(self.config.run.url, storage.name_of(checkpoint.path)))
        except JobInterruptedError:
            pass  # it is scored when the run continues
        except MachineError as error:
            terminal.log(str(error))  # it is scored when training is over
        return {}

    def score(self, url: str) -> None:
        """Score the run's checkpoint at ``url``."""
        began = time.monotonic()
        scored = self.pool.score(url)
        self.pool.record_metrics(self.config.run.name, scored, time.monotonic() - began)
        score = float(score_of_images(scored, self.config).mean(skipna=False))
        table = scores.rebuild_run_table(self.config.run.url)
        prune(self.config, table[table["data"] == self.pool.data])
        ranking, step = self.config.checkpoint, int(scored["step"].iloc[0])
        terminal.log(
            f"{storage.name_of(url)} scored: {ranking.ranking} {score:.4f}",
            score=f"{ranking.network} {ranking.metric.upper()} {score:.4g} (checkpoint {step})",
        )
