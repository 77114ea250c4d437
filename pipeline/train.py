"""Trains a low-light enhancer on packed pairs and scores every checkpoint while training goes on.

python pipeline/train.py --config lol_v1 --data.url s3://bucket/lol_v1 --run.workers 8
python pipeline/train.py --config lol_v1 --data.url lol_v1/shards --run.name half --network.width 0.5 --dry-run
"""

import gc
import sys

from pipeline import storage, terminal
from pipeline.launch import capacity, cluster, preflight, trainer
from pipeline.launch.dry_run import throwaway_run
from pipeline.launch.provenance import collect_provenance, find_initial_weights
from pipeline.run import history, lease, record
from pipeline.run.history import Run
from pipeline.settings.command_line import argument_parser, user_errors
from pipeline.settings.config import Config
from pipeline.settings.files import parse_config

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
    """Train until every step is done and every checkpoint scored; for the log see ``cluster.session``."""
    manifests = preflight.check_data(config)
    provenance = collect_provenance(manifests, find_initial_weights(config))
    record.check_run(config, provenance)
    if history.is_finished(config.run.url, config.train.steps):
        terminal.log(f"{config.run.url}: all {config.train.steps} steps are done and every checkpoint is scored")
        return
    lpips = preflight.find_lpips_weights(config.evaluation, config.checkpoint.metric)
    with lease.hold(config.run.url) as lease_id, cluster.session(capacity.cpus_needed(config), log):
        config = capacity.choose_devices(config, manifests)
        terminal.log(f"{config.to_yaml()}\n{capacity.describe(config)}")
        preflight.check_cluster(config, manifests)
        try:
            trainer.train(config, manifests, provenance, lpips, lease_id)
        except trainer.TrainingStoppedError as reason:
            sys.exit(f"training stopped: {reason}")


def show(config: Config) -> None:
    """Print the chosen checkpoint's table and where the report is.

    What draws is imported here: it takes 1.2 s of CPU time, which training would wait for.
    """
    from pipeline.reporting.run_report import REPORT, write_report
    from pipeline.reporting.tables import run_table

    finished = Run.load(config.run.url)
    page = storage.join(finished.url, REPORT)
    write_report([finished], page)
    terminal.log(f"\n{run_table(finished, config.checkpoint.split)}\n\nreport: {page}")


def dry_run(config: Config) -> None:
    """Take two steps in a run of their own, which is deleted afterwards."""
    with throwaway_run(config, DRY_RUN_STEPS) as short:
        run(short, log=None)
    terminal.log(f"dry run passed: data, storage and resources serve; {DRY_RUN_STEPS} steps ran and were scored")


if __name__ == "__main__":
    main()
    gc.freeze()  # spares the interpreter a last look at 2,700 modules' objects: 0.9 s of CPU time
