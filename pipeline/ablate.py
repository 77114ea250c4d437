"""Trains the ablations of the method over seeds and compares them with the reference.

python pipeline/ablate.py --config lol_v1 --data.url s3://bucket/lol_v1 --seeds 0 1 2
python pipeline/ablate.py --config lol_v1 --data.url lol_v1/shards --arms no-mirror no-ema --seeds 0 1 --at-once 2
"""

from pipeline import storage, terminal
from pipeline.launch import ablation, concurrent_runs
from pipeline.reporting.comparison import chosen_table
from pipeline.reporting.run_report import REPORT, write_report
from pipeline.run.history import Run, arms
from pipeline.settings.command_line import argument_parser, user_errors
from pipeline.settings.config import Config
from pipeline.settings.files import parse_config


def main() -> None:
    """Train every arm with every seed, then print the table and where the report is."""
    parser = argument_parser(__doc__ or "")
    parser.add_argument(
        "--arms", nargs="+", choices=ablation.ARMS, metavar="ARM", default=list(ablation.ARMS),
        help=f"which ablations; all by default: {', '.join(ablation.ARMS)}",
    )  # fmt: skip
    parser.add_argument(
        "--seeds", nargs="+", type=int, metavar="INT", default=[0, 1, 2], help="seeds of each arm [default 0 1 2]"
    )
    parser.add_argument(
        "--at-once", type=int, metavar="INT", default=None, help="runs at the same time; by default as many as fit"
    )
    with user_errors():
        base, options = parse_config(parser, Config)
        if options["at_once"] is not None and options["at_once"] < 1:
            raise ValueError(f"--at-once: must be at least 1, not {options['at_once']}")
        configs = ablation.configs_of(base, options["arms"], options["seeds"])
        failed = concurrent_runs.train_all(configs, options["at_once"])
        if failed:
            reasons = "".join(f"\n  {name}: {reason}" for name, reason in failed.items())
            raise ValueError(
                f"{len(failed)} of {len(configs)} runs failed; the same command tries them again:{reasons}"
            )
        trained = [Run.load(config.run.url) for config in configs]
        page = storage.join(base.run.url, REPORT)
        write_report(trained, page)
        terminal.log(f"\n{chosen_table(arms(trained), base.checkpoint.split)}\n\nreport: {page}")


if __name__ == "__main__":
    main()
