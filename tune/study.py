"""The study: every trial of a search, as Optuna's storage keeps it. There is no other record of how far a search is.

A search that is started again opens the study and resumes: trials that ended stay, those that were running resume.
"""

import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import optuna
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from pipeline import terminal
from pipeline.settings.config import differences
from tune import space
from tune.goal import Values, dominates
from tune.settings import SearchConfig

Scores = Mapping[str, float]
State = Literal["running", "finished", "pruned", "failed"]
STATES: Mapping[TrialState, State] = {
    TrialState.RUNNING: "running",
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}
FEWEST = 8  # trials from which importances are computed
HEARTBEAT_S = 10.0
# attributes in the storage
IDENTITY, SECONDS, DRIVER, SCORES, FAILURE = "identity", "seconds", "driver", "scores", "failure"


@dataclass(frozen=True)
class Trial:
    """One trial as it stands.

    Attributes:
        number: from 0, in the order in which they began; 0 is the paper's setting.
        state: how it stands; a trial is ``pruned`` when others did better by then.
        parameters: as they were drawn, see ``tune.space``.
        scores: of each scored checkpoint, by step: mean PSNR, SSIM and LPIPS of the ranking weights, dev split.
        chosen: the step of the best of them, by ``checkpoint.metric``; none before the first.
        values: of the objectives there.
        failure: why it failed.
        seconds: from its start to its end, pauses of the search included; none while it runs.
    """

    number: int
    state: State
    parameters: Mapping[str, float]
    scores: Mapping[int, Scores]
    chosen: int | None
    values: Values | None
    failure: str | None
    seconds: float | None


class Study:
    """A search's trials in Optuna's storage.

    Args:
        config: the settings of the search.
        data: checksums of the data sets' manifests.

    Raises:
        ValueError: the storage can't be opened, or it has a search of this name with other settings or data.
    """

    def __init__(self, config: SearchConfig, data: Sequence[str]) -> None:
        self.config = config
        self._distributions = space.distributions(config)
        self._study = _open_study(config)
        self._claim(_identity(config, data))
        # a sampler that started from the same seed again would repeat what it has drawn
        self._study.sampler = _sampler(config, len(self._study.trials))
        self._waiting = self._left_running()

    def next(self) -> tuple[int, dict[str, float]] | None:
        """Number and parameters of the trial to run next: those that a killed search left running come first.

        None when there are as many trials as were asked for.
        """
        if self._waiting:
            trial = self._handle(self._waiting.pop(0))
        elif len(self.trials()) < self.config.search.trials:
            trial = self._study.ask()
        else:
            return None
        # one that was killed while its parameters were drawn has some of them
        return trial.number, {name: self._draw(trial, name) for name in self._distributions}

    def record(self, number: int, step: int, scores: Scores) -> bool:
        """Keep the mean scores of a checkpoint; whether they were new, for those that are known change nothing."""
        trial = self.trial(number)
        if step in trial.scores:
            return False
        handle = self._handle(number)
        known = {**trial.scores, step: scores}
        if len(self.config.objectives) == 1:  # Optuna knows no others; its dashboard shows them
            (value,) = self._values(known, self._chosen(known))
            handle.report(value, step)
        handle.set_user_attr(SCORES, {str(each): known[each] for each in sorted(known)})
        return True

    def finish(self, number: int) -> None:
        """The trial ran to its end, and all its checkpoints are scored."""
        self._study.tell(number, self.trial(number).values)

    def prune(self, number: int) -> None:
        """The trial is pruned."""
        self._study.tell(number, state=TrialState.PRUNED)

    def fail(self, number: int, reason: str) -> None:
        """The trial can't go on."""
        self._handle(number).set_user_attr(FAILURE, reason)
        self._study.tell(number, state=TrialState.FAIL)

    def acquire_lease(self) -> None:
        """Make this process the one that runs the trials.

        Raises:
            ValueError: another one does; trials run twice would spoil each other.
        """
        other = self._study.user_attrs.get(DRIVER)
        if other and not _is_gone(other):
            name = f"process {other['pid']} on {other['host']}"
            terminal.log(f"{name} ran this search last and has not ended it; waiting to see whether it still does")
            deadline = time.monotonic() + 3 * HEARTBEAT_S
            while time.monotonic() < deadline and self._study.user_attrs.get(DRIVER) == other:
                time.sleep(1)
            now = self._study.user_attrs.get(DRIVER)
            if now not in (None, other):
                raise ValueError(f"{self.config.run.name}: {name} runs this search; stop it first")
            self._waiting = self._left_running()
        self.heartbeat(0.0)

    def heartbeat(self, seconds: float) -> None:
        """Show, at least every ``HEARTBEAT_S``, that trials are run, and count the ``seconds`` since the last time."""
        self._study.set_user_attr(SECONDS, self.seconds + seconds)
        driver = {"host": socket.gethostname(), "pid": os.getpid(), "at": time.time()}
        self._study.set_user_attr(DRIVER, driver)

    def release_lease(self) -> None:
        """Let another process run the trials."""
        self._study.set_user_attr(DRIVER, None)

    def is_complete(self) -> bool:
        """Whether there are as many trials as were asked for, and all have ended."""
        trials = self.trials()
        return len(trials) >= self.config.search.trials and all(trial.state != "running" for trial in trials)

    def seconds_left(self) -> float | None:
        """What is left of ``search.hours``; none when there is no limit."""
        hours = self.config.search.hours
        return None if hours is None else max(0.0, hours * 3600 - self.seconds)

    @property
    def seconds(self) -> float:
        """Time that trials were run, over all starts of the search."""
        return float(self._study.user_attrs.get(SECONDS, 0.0))

    def trials(self) -> list[Trial]:
        """All trials that have begun, in the order of their numbers."""
        return [self._trial(trial) for trial in self._study.get_trials(deepcopy=False, states=list(STATES))]

    def trial(self, number: int) -> Trial:
        """One of them."""
        return self._trial(self._study.get_trials(deepcopy=False)[number])

    def best(self) -> list[Trial]:
        """Finished trials, best first; of several objectives those that fewer others dominate, then by the first."""
        return [trial for _, _, trial in self._finished_in_order()]

    def front(self) -> list[Trial]:
        """Finished trials that no other one dominates, best first by the first objective."""
        return [trial for dominators, _, trial in self._finished_in_order() if dominators == 0]

    def _finished_in_order(self) -> list[tuple[int, float, Trial]]:
        """Each finished trial after the number of those that dominate it and its first value, lower being better."""
        objectives = self.config.objectives
        sign = -1 if objectives[0].direction == "maximize" else 1
        finished = [
            (trial.values, trial) for trial in self.trials() if trial.state == "finished" and trial.values is not None
        ]
        placed = [
            (sum(dominates(other, values, objectives) for other, _ in finished), sign * values[0], trial)
            for values, trial in finished
        ]
        return sorted(placed, key=lambda place: place[:2])

    def values_at(self, trial: Trial, rung: int) -> Values:
        """The values of the best checkpoint of a trial up to the step ``rung``."""
        known = {step: each for step, each in trial.scores.items() if step <= rung}
        return self._values(known, self._chosen(known))

    def importances(self) -> list[dict[str, float]]:
        """How much each parameter decides whether a trial is among the best, for each objective, in parts of 1.

        By PED-ANOVA (Watanabe et al., arXiv 2304.10255) over the order of the trials, for which values need not be of
        the same step; empty where there are too few.
        """
        return [self._importances(index) for index in range(len(self.config.objectives))]

    def _importances(self, index: int) -> dict[str, float]:
        order = self._in_order(index)
        if len(order) < FEWEST or len({trial.values[index] for trial in order if trial.values}) < 2:
            return {}
        places = optuna.create_study(direction="minimize")
        places.add_trials(
            optuna.trial.create_trial(
                params=dict(trial.parameters), distributions=dict(self._distributions), value=float(place)
            )
            for place, trial in enumerate(order)
        )
        return get_param_importances(places, evaluator=PedAnovaImportanceEvaluator())

    def _in_order(self, index: int) -> list[Trial]:
        """Trials that ended with scores, best first by one objective; behind those that finished, the later pruned."""
        sign = -1 if self.config.objectives[index].direction == "maximize" else 1
        ended = [trial for trial in self.trials() if trial.state in ("finished", "pruned") and trial.values]
        return sorted(
            ended, key=lambda trial: (-max(trial.scores), sign * trial.values[index] if trial.values else 0.0)
        )

    def _left_running(self) -> list[int]:
        return [trial.number for trial in self._study.get_trials(deepcopy=False, states=[TrialState.RUNNING])]

    def _claim(self, identity: dict[str, Any]) -> None:
        """Take the study for these settings, or refuse when it is of others."""
        before = self._study.user_attrs.get(IDENTITY)
        if before is None:
            self._study.set_user_attr(IDENTITY, identity)
        elif before != identity:
            found = [f"  {name}: {old} before, {new} now" for name, old, new in differences(before, identity)]
            raise ValueError(
                f"{self.config.study_url}: a search named {self.config.run.name} exists with other settings or data; "
                "choose another run.name\n" + "\n".join(found)
            )
        if not self._study.trials:
            self._study.enqueue_trial(space.initial_parameters(self.config))

    def _draw(self, trial: optuna.Trial, name: str) -> float:
        limits = self._distributions[name]
        return trial.suggest_float(name, limits.low, limits.high, log=limits.log)

    def _handle(self, number: int) -> optuna.Trial:
        """The trial of this number, with parameters to draw and attributes to set, whichever process began it.

        Optuna (5.0.0) hands out such trials in public by ``ask`` alone, which begins new ones or those enqueued;
        of others it gives frozen copies, whose id of the storage is private.
        """
        return optuna.Trial(self._study, self._study.get_trials(deepcopy=False)[number]._trial_id)

    def _trial(self, trial: FrozenTrial) -> Trial:
        scores = {int(step): each for step, each in trial.user_attrs.get(SCORES, {}).items()}
        chosen = self._chosen(scores)
        values = self._values(scores, chosen) if chosen is not None else None
        seconds = trial.duration.total_seconds() if trial.duration else None
        failure = trial.user_attrs.get(FAILURE)
        return Trial(trial.number, STATES[trial.state], trial.params, scores, chosen, values, failure, seconds)

    def _chosen(self, scores: Mapping[int, Scores]) -> int | None:
        """The step of the best checkpoint, of equal ones the newest, as a run's own choice is."""
        checkpoint = self.config.checkpoint
        return min(scores, key=lambda step: checkpoint.sort_key(scores[step][checkpoint.metric], step), default=None)

    def _values(self, scores: Mapping[int, Scores], step: int | None) -> Values:
        assert step is not None
        return tuple(objective.value(scores[step]) for objective in self.config.objectives)


def _open_study(config: SearchConfig) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        return optuna.create_study(
            storage=config.study_url,
            study_name=config.run.name,
            directions=[objective.direction for objective in config.objectives],
            load_if_exists=True,
        )
    except Exception as error:
        raise ValueError(f"search.database: {config.study_url} can't be opened: {error}") from error


def _is_gone(driver: Mapping[str, Any]) -> bool:
    """Whether a process is known to have ended, which can be said of this machine's alone."""
    if driver["host"] != socket.gethostname():
        return False
    try:
        os.kill(driver["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # another user's
        return False
    return False


def _sampler(config: SearchConfig, begun: int) -> BaseSampler:
    seed = (config.run.seed * 1_000_003 + begun) % 2**32
    if config.search.sampler == "random":
        return RandomSampler(seed)
    return GPSampler(seed=seed) if config.search.sampler == "gp" else TPESampler(seed=seed)


def _identity(config: SearchConfig, data: Sequence[str]) -> dict[str, Any]:
    """What a search may only be resumed with."""
    ranges = space.distributions(config).items()
    return config.identity() | {
        "manifest_sha256": list(data),
        "objectives": [objective.text for objective in config.objectives],
        "ranges": {name: [limits.low, limits.high] for name, limits in ranges},
        "reduction": config.search.reduction,
        "checkpoint": config.checkpoint.model_dump(include={"every", "network", "metric"}),
        "evaluation": config.evaluation.model_dump(mode="json", include={"protocols", "lpips"}),
    }
