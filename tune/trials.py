"""Runs the trials of a search with Ray Tune: each is a training run of its own, watched by its validated scores.

study --parameters--> trial --settings--> training run: its checkpoints are scored by evaluation actors
  ^                     |                                    |
  +---- scores, end ----+--------- reads the scores ---------+
"""

import logging
import math
import os
import re
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray import tune
from ray.exceptions import RayError
from ray.tune.search import Searcher

from pipeline import interruption, storage, terminal
from pipeline.launch import cluster, concurrent_runs
from pipeline.run import scores
from pipeline.run.checkpoint import step_of
from pipeline.run.scores import scores_file
from pipeline.settings.config import Config
from tune import space, trial_tables
from tune.pruning import should_prune
from tune.settings import SearchConfig
from tune.study import HEARTBEAT_S, Study

POLL_S = 2.0
END_S = 60.0  # in which a training that is stopped gives its workers back by itself
LOST = "its watcher failed again and again: lost with its node, out of memory, or unable to read the run's scores"
WATCHER_BYTES = 512 * 2**20
TUNE_FILES = "ray-tune-"  # begins the name of a folder that Ray Tune wants; the study holds all there is to know


def run_name(number: int) -> str:
    """The name of a trial's run."""
    return f"trial-{number:04d}"


class TrialRun(tune.Trainable):  # type: ignore[misc]
    """One trial, as Ray Tune runs it: starts a training and reports each of its checkpoints when it has been scored.

    The training runs in a task outside the trial's placement group. Its scores are read from the run's folder, where
    the evaluation actors put them: what a killed search left there is reported first, and the run resumes.
    """

    def setup(self, config: dict[str, Any], search: SearchConfig, train: Callable[[Config], None]) -> None:
        """Start the training, or resume it.

        Args:
            config: ``number`` and ``parameters`` of the trial.
            search: the search's settings, with devices.
            train: trains and scores a run, given its settings.
        """
        self._number = config["number"]
        self._run = space.run_settings(search, config["parameters"], run_name(self._number), search.run.seed)
        self._objectives = search.objectives
        self._seen: set[str] = set()
        self._has_scores = False
        self._task = concurrent_runs.start(train, self._run, search.run.max_failures)

    def step(self) -> dict[str, Any]:
        """The next checkpoint's scores, or how the training ended, or nothing new.

        Returns:
            ``number`` of the trial; ``step`` and ``scores`` of a checkpoint; at the end ``ended`` and, where it failed,
            ``failure``.
        """
        ended, _ = ray.wait([self._task], timeout=POLL_S)
        result: dict[str, Any] = {"number": self._number}
        found = self._next_scores()
        if found:
            self._has_scores = True
            result["step"], result["scores"] = found
        elif ended and interruption.requested():
            result["done"] = True  # it resumes later
        elif ended:
            result |= {"done": True, "ended": True, "failure": self._failure()}
        return result

    def cleanup(self) -> None:
        """Stop the training; returns when its workers' resources are free."""
        # the interrupt makes Ray Train end its workers in order
        ray.cancel(self._task)
        ended, _ = ray.wait([self._task], timeout=END_S)
        if not ended:
            ray.cancel(self._task, force=True)

    def _next_scores(self) -> tuple[int, dict[str, float]] | None:
        """Step and mean scores of the oldest scored checkpoint that has not been reported yet."""
        for name in storage.listdir(self._run.run.url):
            if step_of(name) is None or name in self._seen:
                continue
            table = scores.read_or_empty(storage.join(self._run.run.url, name, scores_file("dev")))
            if len(table):
                self._seen.add(name)
                found = self._means(table)
                if found:
                    return int(table["step"].iloc[0]), found
        return None

    def _means(self, table: scores.Table) -> dict[str, float]:
        """Means of the ranking weights by metric; none where one that matters is not a number."""
        means = scores.means(scores.headline_rows(table, self._run.evaluation.protocols[0]))
        found = {
            metric: float(value)
            for (_, metric), value in means.loc[self._run.checkpoint.network].items()
            if math.isfinite(value)
        }
        wanted = {self._run.checkpoint.metric, *(metric for each in self._objectives for metric in each.factors)}
        return found if wanted <= found.keys() else {}

    def _failure(self) -> str | None:
        try:
            ray.get(self._task)
        except RayError as error:
            return cluster.describe_failure(error)
        return None if self._has_scores else "none of its checkpoints was scored"


class _OfThisDriver:
    """Ray Tune writes what it is given into a file, for a kind of restart that a search does without."""

    def __getstate__(self) -> dict[str, Any]:
        """Nothing."""
        return {}


class Suggestions(_OfThisDriver, Searcher):  # type: ignore[misc]
    """Ray Tune's view of the study: what to run next, and how it ended.

    Ray's own ``OptunaSearch`` keeps its place in a pickled file beside the storage, and after a crash the two differ;
    here the storage alone is asked.
    """

    def __init__(self, search: SearchConfig, study: Study, show: Callable[[str], None]) -> None:
        super().__init__()
        self._search = search
        self._study = study
        self._show = show
        self._numbers: dict[str, int] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """What the trial is to run."""
        drawn = None if interruption.requested() else self._study.next()
        if drawn is None:
            return Searcher.FINISHED  # type: ignore[no-any-return]
        number, parameters = drawn
        self._numbers[trial_id] = number
        self._show(f"trial {number}: {trial_tables.settings_line(self._search, parameters)}")
        return {"number": number, "parameters": parameters}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Keep how the trial ended; one that was cut off stays as running, to resume later."""
        number = self._numbers.pop(trial_id)
        if error:
            self._study.fail(number, LOST)
        elif result and result.get("pruned"):
            self._study.prune(number)
        elif result and result.get("failure"):
            self._study.fail(number, result["failure"])
        elif result and result.get("ended"):
            self._study.finish(number)
        self._show(f"trial {number}: {trial_tables.outcome(self._search, self._study.trial(number))}")

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the storage has it all."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the storage has it all."""


class EarlyStopping(_OfThisDriver, tune.Stopper):  # type: ignore[misc]
    """Tells the study of each scored checkpoint and prunes trials."""

    def __init__(self, study: Study, show: Callable[[str], None]) -> None:
        self._study = study
        self._show = show

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Whether the trial stops here."""
        if "scores" not in result:
            return False
        number, step = result["number"], result["step"]
        if self._study.record(number, step, result["scores"]):
            scores = "  ".join(f"{metric} {value:.4g}" for metric, value in result["scores"].items())
            self._show(f"trial {number}: step {step}  {scores}")
        result["pruned"] = should_prune(self._study, number)
        return bool(result["pruned"])

    def stop_all(self) -> bool:
        """Never all at once."""
        return False


class Heartbeat(_OfThisDriver, tune.Callback):  # type: ignore[misc]
    """Shows in the study that its trials are still run, and for how long they have been."""

    def __init__(self, study: Study) -> None:
        self._study = study
        self._since = time.monotonic()

    def on_step_end(self, iteration: int, trials: Sequence[Any], **info: Any) -> None:
        """Beat, now and then."""
        if time.monotonic() - self._since > HEARTBEAT_S:
            self._heartbeat()

    def on_experiment_end(self, trials: Sequence[Any], **info: Any) -> None:
        """Count the rest of the time."""
        self._heartbeat()

    def _heartbeat(self) -> None:
        before, self._since = self._since, time.monotonic()
        self._study.heartbeat(self._since - before)


def run(search: SearchConfig, study: Study, train: Callable[[Config], None], concurrent: int) -> None:
    """Run trials until there are as many as were asked for, or the time is over.

    Args:
        search: the search's settings, with devices.
        study: its trials so far.
        train: trains and scores a run in a Ray task, given its settings.
        concurrent: trials at the same time.

    Raises:
        ValueError: another process runs them.
    """
    study.acquire_lease()
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # Ray Tune's own tables, whose trials have other names
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # Ctrl-C stops the trials gracefully
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # and its files, since the study has all
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    filesystem, path = storage.arrow_filesystem(search.url)
    _delete_tune_files(search)  # of a process that was killed
    total = search.search.trials
    with terminal.bar(title=f"trials, {concurrent} at a time", total=total, unit="trial") as bar:

        def show(line: str) -> None:
            terminal.log(line)
            bar.update(sum(trial.state != "running" for trial in study.trials()) - bar.n)

        tuner = tune.Tuner(
            # the trial itself only watches, and must not take the CPU that its training counts on
            tune.with_resources(tune.with_parameters(TrialRun, search=search, train=train), {"memory": WATCHER_BYTES}),
            tune_config=tune.TuneConfig(
                search_alg=Suggestions(search, study, show),
                num_samples=-1,
                max_concurrent_trials=concurrent,
                time_budget_s=study.seconds_left(),
            ),
            run_config=tune.RunConfig(
                name=f"{TUNE_FILES}{uuid.uuid4().hex}",
                storage_path=path,
                storage_filesystem=filesystem,
                stop=EarlyStopping(study, show),
                callbacks=[Heartbeat(study)],
                failure_config=tune.FailureConfig(max_failures=search.run.max_failures),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # the runs have their own
                verbose=0,
            ),
        )
        tuner.fit()
    study.release_lease()
    _delete_tune_files(search)


def _delete_tune_files(search: SearchConfig) -> None:
    for name in storage.listdir(search.url):
        if re.fullmatch(rf"{TUNE_FILES}[0-9a-f]{{32}}", name):
            storage.delete_folder(storage.join(search.url, name))
