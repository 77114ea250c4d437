"""How far arms differ from a reference, and how sure that is: over seeds and images, for all arms of a table together.

The difference of an arm to the reference, with the same seed on the same image, is

    difference[seed, image] = mean + over seeds + over images + rest

Seeds are draws of what training may come to, images draws of what may be enhanced, so that the variance of the mean has
a part for each. An interval claims the mean for other seeds and other images of the same kind.
"""

from collections import defaultdict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

Arm = TypeVar("Arm", bound=Hashable)
LEVEL = 0.95


@dataclass(frozen=True)
class Difference:
    """The mean difference of an arm to the reference.

    Attributes:
        mean: over the seeds that both have, and all images.
        low: the lower end of its interval; NaN where there is none, since a difference is not finite, or is but one.
        high: the upper end.
        seeds: how many both have; of a single one, the interval speaks of other images, not of other seeds.
    """

    mean: float
    low: float
    high: float
    seeds: int


def differences_to_first(arms: Mapping[Arm, Mapping[int, NDArray[np.float64]]]) -> dict[Arm, Difference]:
    """The difference of each arm to the first, where they have seeds in common; intervals hold together at ``LEVEL``.

    Args:
        arms: by name and seed each image's score, float64 [images], all in the same order.
    """
    (_, first), *others = arms.items()
    names: dict[tuple[int, ...], list[Arm]] = defaultdict(list)
    for name, scores in others:
        names[tuple(sorted(first.keys() & scores.keys()))].append(name)
    names.pop((), None)
    count = sum(map(len, names.values()))
    found = {}
    for seeds, same in names.items():
        stacked = np.array([[_subtract(arms[name][seed], first[seed]) for seed in seeds] for name in same])
        with np.errstate(invalid="ignore"):  # the mean of inf and -inf
            means = stacked.mean((1, 2))
        half = half_widths(stacked, count)
        for name, mean, low, high in zip(same, means, means - half, means + half, strict=True):
            found[name] = Difference(float(mean), float(low), float(high), len(seeds))
    return {name: found[name] for name, _ in others if name in found}


def half_widths(differences: NDArray[np.float64], comparisons: int) -> NDArray[np.float64]:
    """Half the width of the interval of each arm's mean difference to one reference.

    The part over seeds is what a two-way analysis of variance leaves, with arms and the reference as one factor and
    seeds as the other: noise over seeds is taken to be alike in all arms, as in Dunnett's test, since three seeds of
    one arm would say next to nothing. The part over images is each arm's own. The mean's t interval has the harmonic
    mean of their degrees of freedom, weighted by the parts (Satterthwaite's, weighted by their squares, are too many
    where a part of few has come out small by chance), and Bonferroni's correction for all comparisons.

    Args:
        differences: float64 [arms, seeds, images], of the same seeds.
        comparisons: how many intervals are to hold together.

    Returns:
        float64 [arms]; NaN for an arm with a difference that is not finite, or with one seed and one image alone.
    """
    half = np.full(len(differences), np.nan)
    finite = np.isfinite(differences).all((1, 2))
    known = differences[finite]
    arms, seeds, images = known.shape
    if arms == 0 or seeds == images == 1:
        return half
    level = 1 - (1 - LEVEL) / 2 / comparisons
    if seeds == 1:
        half[finite] = stdtrit(images - 1, level) * np.sqrt(_variance_over_images(known))
    elif images == 1:
        half[finite] = stdtrit(arms * (seeds - 1), level) * np.sqrt(_variance_over_seeds(known))
    else:
        over_seeds, over_images = _variance_over_seeds(known), _variance_over_images(known)
        own = np.maximum(over_images - _variance_of_rest(known), 0)  # the rest is in both
        total = over_seeds + own
        inverse = over_seeds / (arms * (seeds - 1)) + own / (images - 1)
        degrees = np.divide(total, inverse, out=np.ones(arms), where=total > 0)
        of_images = stdtrit(images - 1, level) * np.sqrt(over_images)  # of few, the rest may be overrated
        half[finite] = np.maximum(stdtrit(degrees, level) * np.sqrt(total), of_images)
    return half


def _variance_over_seeds(differences: NDArray[np.float64]) -> NDArray[np.float64]:
    """Variance of the mean that comes of the seeds, float64 [arms]: the same for all."""
    arms, seeds, _ = differences.shape
    means = np.concatenate([np.zeros((1, seeds)), differences.mean(2)])  # that of the reference to itself is 0
    residuals = means - means.mean(0) - means.mean(1, keepdims=True) + means.mean()
    return np.full(arms, 2 * (residuals**2).sum() / (arms * (seeds - 1)) / seeds)


def _variance_over_images(differences: NDArray[np.float64]) -> NDArray[np.float64]:
    """Variance of the mean that comes of the images, float64 [arms]."""
    variances: NDArray[np.float64] = differences.mean(1).var(1, ddof=1) / differences.shape[2]
    return variances


def _variance_of_rest(differences: NDArray[np.float64]) -> NDArray[np.float64]:
    """Variance of the mean that comes of neither seeds nor images alone, float64 [arms]."""
    _, seeds, images = differences.shape
    by_seed, by_image = differences.mean(2, keepdims=True), differences.mean(1, keepdims=True)
    residuals = differences - by_seed - by_image + differences.mean((1, 2), keepdims=True)
    variances: NDArray[np.float64] = (residuals**2).sum((1, 2)) / ((seeds - 1) * (images - 1)) / (seeds * images)
    return variances


def _subtract(one: NDArray[np.float64], two: NDArray[np.float64]) -> NDArray[np.float64]:
    """The difference, 0 where both are the same: so are two infinite PSNR, of images that are both exact."""
    return np.subtract(one, two, out=np.zeros_like(one), where=one != two)
