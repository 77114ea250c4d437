"""Decides which trials are pruned: asynchronous successive halving (Li et al., arXiv 1810.05934), by domination."""

from tune.goal import dominates
from tune.study import Study


def should_prune(study: Study, number: int) -> bool:
    """Whether the trial has come to a rung where too many others did better; the first trial never is pruned.

    Of ``n`` trials that have come to a rung, one that at least ``n / search.reduction`` dominate goes no further: with
    one objective this is asynchronous successive halving.
    """
    search, mine = study.config.search, study.trial(number)
    step = max(mine.scores, default=0)
    if number == 0 or search.reduction is None or step not in study.config.rungs:
        return False
    there = [study.values_at(trial, step) for trial in study.trials() if step in trial.scores]
    values = study.values_at(mine, step)
    better = sum(dominates(other, values, study.config.objectives) for other in there)
    return better >= len(there) / search.reduction
