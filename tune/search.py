"""Searches the settings of the mirror loss: scale weights, illumination exponent, EMA rate.

python tune/search.py --config lol_v1 --data.url s3://bucket/lol_v1 --search.trials 64 --search.hours 8
python tune/search.py --config lol_v1 --data.url lol_v1/shards --search.objectives psnr lpips --search.gamma 0.5 2
"""

import sys
from collections.abc import Sequence

import ray

from pipeline import interruption, storage, terminal
from pipeline.data.manifest import Manifest
from pipeline.launch import capacity, cluster, concurrent_runs, preflight
from pipeline.launch.provenance import collect_provenance, find_initial_weights
from pipeline.reporting.run_report import REPORT
from pipeline.settings.command_line import argument_parser, user_errors
from pipeline.settings.config import Config
from pipeline.settings.files import parse_config
from tune import conclusion, report, space, trial_tables, trials
from tune.conclusion import Conclusion
from tune.estimate import estimate
from tune.settings import SearchConfig
from tune.study import Study, Trial

BEST = "best.yaml"


def main() -> None:
    """Parse, check, run the trials and the best ones over seeds, and show what came out."""
    parser = argument_parser(__doc__ or "")
    parser.add_argument(
        "--search.dry-run", dest="dry_run", action="store_true",
        help="print the space, how many trials run at the same time and about how long all takes, and stop",
    )  # fmt: skip
    with user_errors():
        config, options = parse_config(parser, SearchConfig)
        manifests = check(config)
        if "dry_run" in options:
            terminal.log(estimate(config, manifests))
            return
        study = Study(config, [manifest.checksum for manifest in manifests])
        if not study.is_complete() and study.seconds_left() != 0:
            search(config, manifests, study)
        show(config, study, over_seeds(config, study))


def check(config: SearchConfig) -> Sequence[Manifest]:
    """The data sets; ``ValueError`` when they or the storage will not serve."""
    manifests = preflight.check_data(config)
    storage.check_writable(config.url)
    return manifests


def search(config: SearchConfig, manifests: Sequence[Manifest], study: Study) -> None:
    """Run trials until there are as many as were asked for, or the time is over."""
    metrics = {metric for objective in config.objectives for metric in objective.factors}
    lpips = preflight.find_lpips_weights(config.evaluation, "lpips" if "lpips" in metrics else config.checkpoint.metric)
    log = storage.join(config.url, terminal.LOG)
    with cluster.session(capacity.cpus_needed(config, config.search.concurrent or 1), log, quiet=True):
        fitted, concurrent = capacity.fit_to_cluster(config, manifests, config.search.concurrent)
        terminal.log("\n".join([fitted.to_yaml(), capacity.describe(fitted, concurrent), *space.notes(config)]))
        preflight.check_cluster(fitted, manifests)
        training = concurrent_runs.Training(collect_provenance(manifests, find_initial_weights(config)), ray.put(lpips))
        trials.run(fitted, study, training, concurrent)
        interruption.check()
    if not study.is_complete() and study.seconds_left() != 0:
        sys.exit(f"interrupted: {trial_tables.counts(study.trials())}; run the same command again to resume")


def over_seeds(config: SearchConfig, study: Study) -> Conclusion | None:
    """Train the best trials' settings and the paper's over seeds; none when there is nothing to compare."""
    best = [trial for trial in study.best() if trial.number != 0][: config.search.top]
    if not best:
        return None
    compared = [study.trial(0), *best]
    terminal.log(f"\nover seeds: {', '.join(conclusion.arm_name(trial.number) for trial in compared)}")
    failed = concurrent_runs.train_all(conclusion.configs_over_seeds(config, compared), config.search.concurrent)
    for name, reason in failed.items():
        terminal.log(f"{name} failed: {reason}")
    return conclusion.conclude(config, compared)


def show(config: SearchConfig, study: Study, concluded: Conclusion | None) -> None:
    """Write the best settings and the page, and print what they say; exits with status 1 when no trial finished."""
    best = concluded.best if concluded else next(iter(study.best()), None)
    settings = best_settings(config, best) if best else ""
    page = storage.join(config.url, REPORT)
    sentences, table = (concluded.sentences, concluded.table) if concluded else ((), None)
    storage.write_text(page, report.render(config, study, sentences, table, settings))
    terminal.log("\n" + "\n".join([trial_tables.counts(study.trials()), *trial_tables.unfinished(config, study)]))
    for trial in study.trials():
        if trial.state == "failed":
            terminal.log(f"trial {trial.number} failed: {trial.failure}")
    if best is None:
        sys.exit(f"no trial finished; report: {page}")
    terminal.log(f"\n{trial_tables.trials_table(config, study.best()[: report.SHOWN])}")
    if concluded:
        terminal.log(f"\n{concluded.table}\n\n" + "\n".join(concluded.sentences))
    url = storage.join(config.url, BEST)
    storage.write_text(url, settings)
    terminal.log(f"\nbest settings: {url} (python pipeline/train.py --config {url})\nreport: {page}")


def best_settings(config: SearchConfig, best: Trial) -> str:
    """The settings of a trial as YAML that ``pipeline/train.py --config`` takes, for a run beside the search."""
    run = space.run_settings(config, best.parameters, f"{config.run.name}-best", config.run.seed)
    beside = run.run.model_copy(update={"root": config.run.root})
    return Config.to_yaml(run.model_copy(update={"run": beside}))


if __name__ == "__main__":
    main()
