"""Scores a checkpoint, or the best one of a run, on a packed split."""

from pydantic import Field

from iaml import Settings
from pipeline import checkpoint, launch, storage
from pipeline.command_line import parse_settings, user_errors
from pipeline.data.manifest import load_manifest
from pipeline.evaluation import results
from pipeline.evaluation.pool import Pool
from pipeline.evaluation.settings import EvaluationSettings, Split


class EvaluateData(Settings):
    """The data to score on."""

    url: storage.Url | None = Field(
        None, description="folder or s3://bucket/prefix that pipeline/pack.py wrote; by default the run's"
    )


class EvaluateSettings(Settings):
    """What to score, and on what."""

    checkpoint: storage.Url = Field(
        description="folder or s3:// URL of a checkpoint, or of a run for its best checkpoint"
    )
    split: Split = Field("test", description="split to score; the test split is for the end, once")
    data: EvaluateData = EvaluateData()
    evaluation: EvaluationSettings = EvaluationSettings()


def main() -> None:
    """Score and print a table; scores, picture and the run's report are stored with the run."""
    settings = parse_settings(EvaluateSettings, description=__doc__ or "")
    with user_errors():
        given = settings.checkpoint
        config = checkpoint.read_config(given)
        is_run = not storage.name_of(given).startswith(checkpoint.PREFIX)
        url = results.best_checkpoint(given, config.checkpoint) if is_run else given
        data = config.data.model_copy(update={"url": settings.data.url or config.data.url})
        # where the run lies now, which is not where it was trained if it was moved since
        folder, name, _ = url.rsplit("/", 2)
        run = config.run.model_copy(update={"storage": folder, "name": name})
        config = config.model_copy(update={"run": run, "data": data, "evaluation": settings.evaluation})
        manifest = load_manifest(data.url)
        with launch.cluster(config):
            scores = Pool.start(config, manifest, settings.split).score(url)
        results.show(config, scores)


if __name__ == "__main__":
    main()
