"""How sure a difference is: the arithmetic against SciPy's and by hand, and how often intervals hold."""

import math

import numpy as np
import pytest
from scipy import stats
from score_tables import draw_arms

from pipeline.reporting.intervals import differences_to_first, half_widths

NAN = math.nan


def found_in(scores):
    """The differences in a study, as ``draw_arms`` gives it."""
    return list(differences_to_first({arm: dict(enumerate(seeds)) for arm, seeds in enumerate(scores)}).values())


def t_interval(values, level=0.95):
    return stats.ttest_1samp(values, 0).confidence_interval(level)


@pytest.mark.parametrize(("seeds", "images"), [(3, 20), (3, 500), (5, 20)])
def test_the_interval_of_one_difference_covers_it_in_95_of_100_studies(seeds, images):
    draw = np.random.default_rng(0)
    found = [found_in(draw_arms(draw, 2, seeds, images))[0] for _ in range(1600)]
    assert 0.93 <= np.mean([each.low <= 0 <= each.high for each in found]) <= 0.97


@pytest.mark.parametrize(("arms", "seeds", "images"), [(3, 3, 20), (3, 3, 500), (9, 3, 5)])
def test_the_intervals_of_several_differences_cover_all_of_them(arms, seeds, images):
    draw = np.random.default_rng(0)
    studies = [found_in(draw_arms(draw, 1 + arms, seeds, images)) for _ in range(400)]
    covered = [all(each.low <= 0 <= each.high for each in found) for found in studies]
    assert 0.93 <= np.mean(covered) <= 0.98


def test_a_difference_of_seeds_alone_has_the_t_interval_of_its_seeds():
    by_seed = np.array([0.4, 1.0, 0.1])
    (found,) = found_in([np.zeros((3, 4)), np.repeat(by_seed[:, None], 4, axis=1)])
    assert (found.low, found.high) == pytest.approx(t_interval(by_seed))
    assert found.mean == pytest.approx(0.5) and found.seeds == 3


def test_a_difference_of_images_alone_has_the_t_interval_of_its_images_whatever_the_seeds():
    by_image = np.array([0.4, 1.0, 0.1, -0.3])
    for seeds in (1, 2, 5):
        (found,) = found_in([np.zeros((seeds, 4)), np.tile(by_image, (seeds, 1))])
        assert (found.low, found.high) == pytest.approx(t_interval(by_image))


def test_seeds_and_images_that_vary_alike_are_weighted_by_their_variances():
    # no rest: the means over images are -1 and 1, so are those over seeds; each part has the variance 1
    differences = np.add.outer([-1.0, 1.0], [-1.0, 1.0])[None]
    assert half_widths(differences, 1) == pytest.approx(stats.t.ppf(0.975, 1) * math.sqrt(2))
    # of three images -1, 0 and 1 the variance of the mean is 1/3; it has two degrees of freedom, that over seeds one
    differences = np.add.outer([-1.0, 1.0], [-1.0, 0.0, 1.0])[None]
    degrees = (1 + 1 / 3) / (1 / 1 + (1 / 3) / 2)
    assert half_widths(differences, 1) == pytest.approx(stats.t.ppf(0.975, degrees) * math.sqrt(1 + 1 / 3))


def test_noise_over_seeds_is_that_of_a_two_way_analysis_of_variance_of_all_arms():
    draw = np.random.default_rng(2)
    scores = draw.normal(size=(4, 3, 1)) + np.zeros(5)  # arms, seeds, equal images
    # an effect of each arm and of each seed is fitted, which leaves 12 - 6 degrees of freedom
    design = np.array([[*np.eye(4)[arm], *np.eye(3)[seed]] for arm in range(4) for seed in range(3)])
    values = scores[..., 0].ravel()
    fit, *_ = np.linalg.lstsq(design, values)
    variance = ((values - design @ fit) ** 2).sum() / 6
    half = stats.t.ppf(1 - 0.025 / 3, 6) * math.sqrt(2 * variance / 3)
    for found in found_in(scores):
        assert found.high - found.mean == pytest.approx(half) == pytest.approx(found.mean - found.low)


def test_each_of_several_intervals_of_one_seed_is_as_wide_as_all_together_need():
    by_image = np.array([0.4, 1.0, 0.1, -0.3])
    first, second = found_in([np.zeros((1, 4)), by_image[None], 2 * by_image[None]])
    assert (first.low, first.high) == pytest.approx(t_interval(by_image, 0.975))
    assert (second.low, second.high) == pytest.approx(t_interval(2 * by_image, 0.975))


def test_arms_are_compared_over_the_seeds_that_they_share_with_the_first():
    found = differences_to_first(
        {
            "first": {0: np.array([0.0, 1.0]), 1: np.array([5.0, 5.0])},
            "none": {7: np.zeros(2)},
            "one": {1: np.array([7.0, 9.0]), 7: np.zeros(2)},
            "both": {1: np.array([6.0, 6.0]), 0: np.array([1.0, 2.0])},
        }
    )
    assert [(name, each.mean, each.seeds) for name, each in found.items()] == [("one", 3.0, 1), ("both", 1.0, 2)]
    half = stats.t.ppf(1 - 0.025 / 2, 1)  # two intervals, of differences 2 and 4
    assert (found["one"].low, found["one"].high) == pytest.approx((3 - half, 3 + half))
    assert (found["both"].low, found["both"].high) == pytest.approx((1, 1))


@pytest.mark.usefixtures("no_warnings")
def test_infinite_and_missing_scores_have_no_interval_and_leave_the_others_theirs():
    first = np.array([[math.inf, 1.0, 2.0]] * 2)
    equal, infinite, both = first.copy(), first + 1, np.array([[0.0, math.inf, 2.0]] * 2)
    infinite[0, 1] = math.inf
    found = found_in([first, equal, infinite, both, np.full((2, 3), NAN)])
    assert (found[0].mean, found[0].low, found[0].high) == (0, 0, 0)  # two infinite scores are equal
    assert found[1].mean == math.inf and math.isnan(found[1].low) and math.isnan(found[1].high)
    assert all(math.isnan(each.mean) and math.isnan(each.low) for each in found[2:])


@pytest.mark.usefixtures("no_warnings")
def test_a_single_number_has_no_interval():
    (found,) = found_in([np.zeros((1, 1)), np.ones((1, 1))])
    assert found.mean == 1 and math.isnan(found.low)
    (found,) = found_in([np.zeros((2, 1)), np.array([[1.0], [3.0]])])  # over seeds alone
    assert (found.low, found.high) == pytest.approx(t_interval([1.0, 3.0]))
