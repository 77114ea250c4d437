"""What a search would do: its space, how many trials fit side by side, and about how long it takes."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline import terminal
from pipeline.data.manifest import Manifest
from pipeline.evaluation.lpips_weights import BackboneWeights
from pipeline.launch import capacity, cluster, preflight, trainer
from pipeline.launch.dry_run import throwaway_run
from pipeline.launch.provenance import collect_provenance
from pipeline.reporting.text_table import TextTable
from pipeline.run import lease
from pipeline.run.record import read_metrics
from tune import space
from tune.settings import SearchConfig

STEPS = 8  # that are trained to see how long they take
MEASURED = 4  # of them, the last ones


@dataclass(frozen=True)
class Pace:
    """How fast a single run is.

    Attributes:
        start_s: seconds to start it and to score its last checkpoint.
        step_s: seconds of a step.
    """

    start_s: float
    step_s: float


def estimate(config: SearchConfig, manifests: Sequence[Manifest]) -> str:
    """The answer to a dry run, as text; trains a few steps, which are deleted again."""
    lpips = preflight.find_lpips_weights(config.evaluation)
    with cluster.session(capacity.cpus_needed(config, config.search.concurrent or 1), None, quiet=True):
        fitted, concurrent = capacity.fit_to_cluster(config, manifests, config.search.concurrent)
        terminal.log(capacity.describe(fitted, concurrent))
        return plan(config, concurrent, _measure_pace(fitted, manifests, lpips))


def plan(config: SearchConfig, concurrent: int, pace: Pace) -> str:
    """The space, and about how long all takes if trials side by side do not slow each other."""
    whole = pace.start_s + config.train.steps * pace.step_s
    trials, over_seeds = config.search.trials, (config.search.top + 1) * config.search.seeds
    lines = [
        str(_space_table(config)),
        *space.notes(config),
        "",
        f"trials at the same time: {concurrent}",
        f"one trial: about {_clock(whole)} ({1 / pace.step_s:.3g} steps/s, {pace.start_s:.0f} s to start and score)",
        f"{trials} trials: at most {_clock(math.ceil(trials / concurrent) * whole)}",
    ]
    if config.rungs:
        expected = pace.start_s + expected_steps(config) * pace.step_s
        share = (
            f"if one in {config.search.reduction:g} goes on at each of the steps {', '.join(map(str, config.rungs))}"
        )
        lines.append(f"{trials} trials: about {_clock(math.ceil(trials / concurrent) * expected)} {share}")
    if config.search.hours:
        lines.append(f"trials: no longer than {config.search.hours:g} h")
    lines.append(f"then {over_seeds} runs over seeds: about {_clock(math.ceil(over_seeds / concurrent) * whole)}")
    return "\n".join(lines)


def expected_steps(config: SearchConfig) -> float:
    """Steps of a trial on average, if one in ``search.reduction`` goes on at each rung."""
    share, before, steps = 1.0, 0, 0.0
    for rung in [*config.rungs, config.train.steps]:
        steps += share * (rung - before)
        share, before = share / (config.search.reduction or 1.0), rung
    return steps


def _space_table(config: SearchConfig) -> TextTable:
    """A row for each parameter: its range, its scale, and where the search begins."""
    first = space.initial_parameters(config)
    rows = [
        [name, f"{limits.low:g} to {limits.high:g}", "log" if limits.log else "linear", f"{first[name]:g}"]
        for name, limits in space.distributions(config).items()
    ]
    return TextTable("", ["parameter", "range", "scale", "begins at"], rows, texts=3)


def _measure_pace(config: SearchConfig, manifests: Sequence[Manifest], lpips: BackboneWeights | str) -> Pace:
    begun = time.monotonic()
    with throwaway_run(config, STEPS, root=config.url) as short:
        with lease.hold(short.run.url) as lease_id:
            trainer.train(short, manifests, collect_provenance(manifests), lpips, lease_id)
        rates = [record["images_per_s"] for record in read_metrics(short.run.url)][-MEASURED:]
    step_s = config.train.global_batch * sum(1 / rate for rate in rates) / len(rates)
    return Pace(max(0.0, time.monotonic() - begun - STEPS * step_s), step_s)


def _clock(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"
