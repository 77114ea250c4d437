"""What a run has been scored: which checkpoint is best, which keep their weights, and its report."""

import json
import math
from typing import Any

from pipeline import checkpoint, storage
from pipeline.config import Config
from pipeline.evaluation.report import format_table, render_report
from pipeline.evaluation.settings import SPLITS, Split
from pipeline.training.monitor import read_metrics
from pipeline.training.settings import CheckpointSettings

REPORT = "report.html"
GRIDS_SHOWN = 6  # pictures in the report: the newest checkpoints', and the best one's
Scores = dict[str, Any]


def scores_file(split: Split) -> str:
    """Name of the file beside a checkpoint that holds its scores on ``split``."""
    return f"scores-{split}.json"


def grid_file(split: Split) -> str:
    """Name of the picture beside a checkpoint that shows images of ``split``."""
    return f"grid-{split}.png"


def read_scores(run: str, split: Split = "dev") -> list[Scores]:
    """The scores of the run's checkpoints on ``split``, oldest first; those not scored are left out."""
    names = [name for name in storage.listdir(run) if name.startswith(checkpoint.PREFIX)]
    urls = [storage.join(run, name, scores_file(split)) for name in names]
    return [json.loads(storage.read_text(url)) for url in urls if storage.exists(url)]


def ranked(scores: list[Scores], settings: CheckpointSettings) -> list[Scores]:
    """The scores, best first, by the metric that ranks checkpoints; of equal ones the newest first, NaN last."""
    sign = -1 if settings.higher_is_better else 1

    def rank(entry: Scores) -> tuple[bool, float, int]:
        value = float(entry["methods"][settings.weights][settings.metric])
        return math.isnan(value), sign * value, -int(entry["step"])

    return sorted(scores, key=rank)


def best_checkpoint(run: str, settings: CheckpointSettings) -> str:
    """URL of the run's best checkpoint by its development scores; ``ValueError`` when none is scored."""
    scores = ranked(read_scores(run), settings)
    if not scores:
        raise ValueError(f"{run}: none of its checkpoints has been scored; name a checkpoint's folder instead")
    return storage.join(run, scores[0]["checkpoint"])


def is_finished(config: Config) -> bool:
    """Whether a run has taken its last step and every checkpoint of it is scored."""
    run = config.run.url
    scored = {entry["step"] for entry in read_scores(run)}
    taken = {checkpoint.read_progress(url).step for url in checkpoint.complete_checkpoints(run)}
    return config.train.steps in scored and taken <= scored


def prune(run: str, settings: CheckpointSettings) -> None:
    """Delete the weights of scored checkpoints that are neither among the last nor among the best."""
    scores = read_scores(run)
    complete = checkpoint.complete_checkpoints(run)
    kept = {entry["checkpoint"] for entry in ranked(scores, settings)[: settings.keep_best]}
    kept |= {storage.name_of(url) for url in complete[-settings.keep_last :]}
    scored = {entry["checkpoint"] for entry in scores}
    for url in complete:
        if storage.name_of(url) in scored - kept:
            checkpoint.delete_weights(url)


def write_report(config: Config, chosen: str) -> str:
    """Write the run's report, headed by the scores of the checkpoint named ``chosen``; returns its URL."""
    run = config.run.url
    scores = [entry for split in SPLITS for entry in read_scores(run, split)]
    provenance = json.loads(storage.read_text(storage.join(run, checkpoint.PROVENANCE)))
    page = render_report(
        config.run.name,
        config.to_yaml(),
        provenance,
        read_metrics(run),
        scores,
        _grids(run, scores, chosen),
        chosen=chosen,
    )
    url = storage.join(run, REPORT)
    storage.write_text(url, page)
    return url


def show(config: Config, scores: Scores) -> None:
    """Print a checkpoint's table and where the run's report is."""
    print(f"\n{format_table(scores)}\n\nreport: {write_report(config, scores['checkpoint'])}")


def _grids(run: str, scores: list[Scores], chosen: str) -> list[tuple[str, bytes]]:
    newest = sorted(scores, key=lambda entry: int(entry["step"]))[-GRIDS_SHOWN:]
    shown = [entry for entry in scores if entry["checkpoint"] == chosen or entry in newest]
    shown.sort(key=lambda entry: (entry["checkpoint"] != chosen, entry["split"] != "test", -int(entry["step"])))
    urls = {f"{entry['checkpoint']}, {entry['split']} split": _grid_url(run, entry) for entry in shown}
    return [(caption, storage.read_bytes(url)) for caption, url in urls.items() if storage.exists(url)]


def _grid_url(run: str, entry: Scores) -> str:
    return storage.join(run, entry["checkpoint"], grid_file(entry["split"]))
