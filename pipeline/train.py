"""Trains a low-light enhancer on packed pairs and scores every checkpoint while training goes on.

python pipeline/train.py --config lol_v1 --data.url s3://bucket/lol_v1 --run.workers 8
python pipeline/train.py --config lol_v1 --data.url lol_v1/shards --run.name half --network.width 0.5 --dry-run
"""

import sys
import uuid

from pipeline import storage, terminal
from pipeline.launch import capacity, trainer
from pipeline.launch.provenance import find_start
from pipeline.reporting.report import REPORT, write_report
from pipeline.run import history, lease
from pipeline.run.history import Run
from pipeline.settings.command_line import argument_parser, user_errors
from pipeline.settings.config import Config, parse_config

DRY_RUN_STEPS = 2


def main() -> None:
    """Parse, check, train, and show where the results are."""
    parser = argument_parser(__doc__ or "")
    parser.add_argument(
        "--dry-run", action="store_true", help="print settings, check data, storage and resources, run two steps, stop"
    )
    with user_errors():
        config, options = parse_config(parser, Config)
        if "dry_run" in options:
            dry_run(config)
        else:
            run(config, storage.join(config.run.url, terminal.LOG))
            show(config)


def run(config: Config, log: str | None) -> None:
    """Train until every step is done and every checkpoint scored; for the log see ``trainer.cluster``."""
    manifests = trainer.check_data(config)
    provenance = trainer.provenance_of(manifests, find_start(config))
    trainer.check_run(config, provenance)
    if history.is_finished(config.run.url, config.train.steps):
        terminal.say(f"{config.run.url}: all {config.train.steps} steps are done and every checkpoint is scored")
        return
    lpips = trainer.check_scores(config.evaluation, config.checkpoint.metric)
    with lease.hold(config.run.url) as lease_id, trainer.cluster(capacity.cpus_needed(config), log):
        config = capacity.with_devices(config, manifests)
        terminal.say(config.to_yaml())
        trainer.check_cluster(config, manifests)
        try:
            trainer.train(config, manifests, provenance, lpips, lease_id)
        except trainer.TrainingStoppedError as reason:
            sys.exit(f"training stopped: {reason}")


def show(config: Config) -> None:
    """Print the chosen checkpoint's table and where the report is."""
    finished = Run.load(config.run.url)
    page = storage.join(finished.url, REPORT)
    write_report([finished], page)
    terminal.say(f"\n{finished.table(config.checkpoint.split)}\n\nreport: {page}")


def dry_run(config: Config) -> None:
    """Run two steps under a name that no other run can have, and delete that run afterwards."""
    settings = config.model_dump(mode="json")
    settings["run"]["name"] = f"dry-run-{config.run.name}-{uuid.uuid4().hex}"
    settings["train"].update(steps=DRY_RUN_STEPS, log_every=1)
    settings["optimizer"]["warmup_steps"] = 0
    short = Config.model_validate(settings)
    storage.check_writable(short.run.storage)
    try:
        run(short, log=None)
    finally:
        storage.delete_folder(short.run.url)
    terminal.say(f"dry run passed: data, storage and resources serve; {DRY_RUN_STEPS} steps ran and were scored")


if __name__ == "__main__":
    main()
