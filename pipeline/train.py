"""Trains a low-light enhancer on packed pairs and scores every checkpoint while training goes on."""

import sys

from pipeline import launch, storage
from pipeline.command_line import argument_parser, user_errors
from pipeline.config import Config, parse_config
from pipeline.evaluation import results

DRY_RUN_STEPS = 2


def main() -> None:
    """Parse, check, train, and show where the results are."""
    parser = argument_parser(__doc__ or "")
    parser.add_argument(
        "--dry-run", action="store_true", help="print settings, check data, storage and resources, run two steps, stop"
    )
    with user_errors():
        config, options = parse_config(parser)
        if "dry_run" in options:
            dry_run(config)
        else:
            run(config)
            show_best(config)


def run(config: Config) -> None:
    """Train until every step is done and every checkpoint scored."""
    manifests = launch.check_data(config)
    provenance = launch.provenance_of(manifests)
    launch.check_run(config, provenance)
    if results.is_finished(config):
        print(f"{config.run.url}: all {config.train.steps} steps are done and every checkpoint is scored")
        return
    lpips = launch.check_scores(config)
    with launch.cluster(config):
        config = launch.with_devices(config)
        print(f"{config.to_yaml()}\n{lpips}", flush=True)
        launch.claim(config, provenance)
        try:
            launch.fit(config, manifests, provenance)
        except launch.TrainingStoppedError as reason:
            sys.exit(f"training stopped: {reason}")


def show_best(config: Config) -> None:
    """Print the best checkpoint's table and where the report is."""
    best = results.ranked(results.read_scores(config.run.url), config.checkpoint)
    if not best:
        raise ValueError(f"{config.run.url}: no checkpoint could be scored; the reasons are in the output above")
    results.show(config, best[0])


def dry_run(config: Config) -> None:
    """Run two steps under a name of their own, which is deleted afterwards."""
    settings = config.model_dump(mode="json")
    settings["run"]["name"] = f"dry-run-{config.run.name}"
    settings["train"].update(steps=DRY_RUN_STEPS, log_every=1)
    settings["optimizer"]["warmup_steps"] = 0
    short = Config.model_validate(settings)
    storage.check_writable(short.run.storage)
    storage.delete(short.run.url)
    try:
        run(short)
    finally:
        storage.delete(short.run.url)
    print(f"dry run passed: data, storage and resources serve; {DRY_RUN_STEPS} steps ran and were scored")


if __name__ == "__main__":
    main()
