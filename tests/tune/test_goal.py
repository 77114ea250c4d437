"""What a search improves: read from text, computed from scores, compared by domination."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tune.goal import Goal, dominates

SCORES = {"psnr": 20.0, "ssim": 0.75, "lpips": 0.25}
SIGNS = {"psnr": "+", "ssim": "+", "lpips": "-"}  # of a sum that improves upwards
FACTORS = st.dictionaries(st.sampled_from(list(SIGNS)), st.floats(1e-6, 1e6), min_size=2)
OBJECTIVES = [Goal.parse(text) for text in ("psnr", "lpips", "ssim - 2 lpips")]
VALUES = st.tuples(*[st.integers(0, 2)] * len(OBJECTIVES))  # few, so that many are equal


@pytest.mark.parametrize(("metric", "direction"), [("psnr", "maximize"), ("ssim", "maximize"), ("lpips", "minimize")])
def test_a_metric_improves_as_it_does(metric, direction):
    objective = Goal.parse(f" {metric} ")
    assert (objective.text, objective.direction) == (metric, direction)
    assert objective.value(SCORES) == SCORES[metric]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("psnr - 20 lpips", 15.0),
        ("psnr + 10 ssim - 20 lpips", 22.5),
        ("-20lpips+psnr", 15.0),
        ("0.5 * psnr + 2e1 ssim", 25.0),
        ("- lpips", -0.25),
        ("1.5e-1 psnr", 3.0),
    ],
)
def test_a_sum_improves_upwards(text, value):
    objective = Goal.parse(text)
    assert objective.direction == "maximize"
    assert objective.value(SCORES) == pytest.approx(value)


@given(FACTORS)
def test_a_sum_reads_back_its_factors(factors):
    objective = Goal.parse(" ".join(f"{SIGNS[metric]} {factor!r} {metric}" for metric, factor in factors.items()))
    assert objective.factors == {metric: float(f"{SIGNS[metric]}{factor!r}") for metric, factor in factors.items()}
    assert Goal.parse(objective.text) == objective


@given(FACTORS, st.data())
def test_a_sum_that_improves_downwards_by_any_metric_is_refused(factors, data):
    wrong = data.draw(st.sampled_from(list(factors)))
    signs = SIGNS | {wrong: "+" if SIGNS[wrong] == "-" else "-"}
    with pytest.raises(ValueError, match=f"a sum improves upwards, so {wrong} must be (added|subtracted)"):
        Goal.parse(" ".join(f"{signs[metric]} {factor!r} {metric}" for metric, factor in factors.items()))


@pytest.mark.parametrize("text", ["psnr + 0 ssim", "psnr - 0 lpips", "2 lpips", "+ lpips", "-psnr"])
def test_a_term_that_improves_nothing_is_refused(text):
    with pytest.raises(ValueError, match="a sum improves upwards"):
        Goal.parse(text)


@pytest.mark.parametrize(
    "text", ["", " ", "colour", "PSNR", "psnr ssim", "psnr +", "psnr + psnr", "psnr, ssim", "psnr - - lpips", "20"]
)
def test_what_is_no_sum_of_metrics_is_refused(text):
    with pytest.raises(ValueError, match=r"must be a metric \(psnr, ssim, lpips\) or a sum of some"):
        Goal.parse(text)


@given(VALUES, VALUES)
def test_one_dominates_when_it_is_better_by_some_and_worse_by_none(one, other):
    (psnr, lpips, both), (its_psnr, its_lpips, its_both) = one, other
    worse = psnr < its_psnr or lpips > its_lpips or both < its_both
    better = psnr > its_psnr or lpips < its_lpips or both > its_both
    assert dominates(one, other, OBJECTIVES) == (better and not worse)


@given(VALUES, VALUES, VALUES)
def test_domination_is_a_strict_partial_order(one, two, three):
    def over(left, right):
        return dominates(left, right, OBJECTIVES)

    assert not over(one, one)
    assert not (over(one, two) and over(two, one))
    assert over(one, three) or not (over(one, two) and over(two, three))
