"""Which trials are pruned."""

import math
import random

import pytest
from studies import scores

from tune.pruning import should_prune

RUNGS = (100, 300)  # of 900 steps, a checkpoint each 100, reduction 3


def is_among_the_best(value, values, reduction, direction):
    """Successive halving's rule: the best ``1 / reduction`` of those at a rung go on, at least one of them."""
    ordered = sorted(values, reverse=direction == "maximize")
    last = ordered[math.ceil(len(ordered) / reduction) - 1]
    return value >= last if direction == "maximize" else value <= last


@pytest.mark.parametrize(
    ("objective", "metric", "direction", "reduction"),
    [
        ("psnr", "psnr", "maximize", 3.0),
        ("lpips", "lpips", "minimize", 2.0),
        ("lpips", "psnr", "minimize", 3.0),
        ("psnr - 20 lpips", "ssim", "maximize", 2.0),
    ],
)
def test_with_one_objective_it_is_successive_halving(searches, objective, metric, direction, reduction):
    value_of = {
        "psnr": lambda best: best["psnr"],
        "lpips": lambda best: best["lpips"],
        "psnr - 20 lpips": lambda best: best["psnr"] - 20 * best["lpips"],
    }[objective]
    study = searches.open(
        search__objectives=[objective], checkpoint__metric=metric, search__reduction=reduction, train__steps=600
    )
    rungs = searches.config(search__reduction=reduction, train__steps=600).rungs
    randoms = random.Random(3)
    at = {rung: [] for rung in rungs}  # the values of the trials that have come there
    poor = dict.fromkeys(rungs, 0)
    for number in range(12):
        study.next()
        best, quality = None, randoms.randint(0, 4)
        for step in range(100, 500, 100):  # better and better, as later scores must not count at a rung
            new = scores(
                psnr=18 + quality + randoms.randint(0, 1) + step / 100,
                ssim=randoms.randint(0, 4) / 8,
                lpips=(10 - quality + randoms.randint(0, 1)) / 16 - step / 2000,
            )
            higher = 1 if metric != "lpips" else -1
            if best is None or higher * new[metric] >= higher * best[metric]:
                best = new
            study.record(number, step, new)
            expected = False
            if step in rungs:
                at[step].append(value_of(best))
                expected = number != 0 and not is_among_the_best(at[step][-1], at[step], reduction, direction)
            assert should_prune(study, number) == expected
            if expected:
                poor[step] += 1
                study.prune(number)
                break
    assert all(poor.values())
    assert sum(poor.values()) < 11


def test_with_two_objectives_trials_are_poor_that_many_dominate(searches):
    study = searches.open(search__objectives=["psnr", "lpips"])
    randoms = random.Random(1)
    there, poor = [], 0
    for _ in range(20):
        number, _ = study.next()
        psnr, lpips = randoms.randint(18, 22), randoms.randint(1, 5) / 8
        there.append((psnr, lpips))
        study.record(number, 100, scores(psnr, lpips=lpips))
        dominators = [each for each in there if each[0] >= psnr and each[1] <= lpips and each != (psnr, lpips)]
        expected = number != 0 and len(dominators) >= len(there) / 3
        assert should_prune(study, number) == expected
        poor += expected
        (study.prune if expected else study.finish)(number)
    assert 3 <= poor <= 17


def test_only_at_a_rung_is_a_trial_poor_and_equal_ones_are_not(searches):
    study = searches.open()
    for psnr in (20, 25, 25):
        number, _ = study.next()
        study.record(number, 100, scores(psnr))
        assert not should_prune(study, number)
    number, _ = study.next()
    assert not should_prune(study, number)  # it has no scores yet
    for step, expected in ((100, True), (200, False), (300, False)):  # it is the only one at the second rung
        study.record(number, step, scores(20))
        assert should_prune(study, number) == expected


def test_the_first_trial_is_never_poor(searches):
    study = searches.open()
    numbers = [study.next()[0] for _ in range(4)]
    for number in numbers[::-1]:
        for step in RUNGS:
            study.record(number, step, scores(20 + number))
    assert [should_prune(study, number) for number in numbers] == [False, True, False, False]


def test_without_reduction_no_trial_is_poor(searches):
    study = searches.open(search__reduction=None)
    for psnr in (25, 24, 23, 22):
        number, _ = study.next()
        study.record(number, 100, scores(psnr))
        assert not should_prune(study, number)
