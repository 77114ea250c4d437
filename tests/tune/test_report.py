"""The page of a search: its sections, order and figures, however far the search is."""

import math
import re

import pytest
from pages import HOSTILE, check_nesting, figures, find_hostile, rows, sections
from searches import EVERY_RANGE, proportions

from pipeline.reporting.text_table import TextTable
from tune import report
from tune.study import FEWEST

pytestmark = pytest.mark.usefixtures("without_waiting_for_the_disk", "no_warnings")
GAMMA_ALONE = {"scale_weights": None, "ema_rate": None}  # has few figures, which take long


def page_of(played, *said, **more):
    html = report.render(played.config, played.study, *said, **more)
    check_nesting(html)
    return html


@pytest.fixture
def drawn(monkeypatch):
    """What is drawn, without the time that drawing takes: groups by label and options, by what is on the axes."""
    found = {}

    def note(groups, *, x_label, y_label, **options):
        found[x_label, y_label] = ({group.label: group for group in groups}, options)
        return b"<svg/>"

    monkeypatch.setattr(report, "scatter", note)
    return found


def pairs(points):
    return list(zip(points.x, points.y, strict=True))


def test_the_page_of_a_search_with_one_objective(search):
    played = search()
    for index in range(FEWEST + 2):
        played.play([20.0 + index % 7, 20.5 + index % 7])
    played.play([15.0], "prune")
    played.play([15.0], "fail")
    played.study.heartbeat(3725)
    comparison = TextTable("head <i>", ["arm", "PSNR dB"], [["paper", "21.00"]], ["a note"])
    html = page_of(played, ["It is <better>."], comparison, "gamma: <1>")
    found = sections(html)
    assert [*found] == [
        *("Results", "Best trials", "History", "Learning curves", "Parameter importance", "Slices", "Trade-off"),
        *("Failed trials", "All trials", "Best settings", "Settings of the search"),
    ]
    assert "<h1>Search: s</h1>" in html
    assert "12 trials: 10 finished, 1 pruned, 1 failed; time: 1 h 02 min" in html
    assert "<p>It is &lt;better&gt;.</p>" in found["Results"] and "head &lt;i&gt;" in found["Results"]
    assert rows(found["Results"]) == [["paper", "21.00"]]
    assert found["Best settings"].strip() == "<pre>gamma: &lt;1&gt;</pre>"
    labels = ["w_1 (coarsest)", "w_2", "w_3", "w_4 (finest)", "illumination exponent gamma", "EMA rate, 1 - m"]
    assert [*figures(html)] == [
        *("PSNR dB of each trial", "PSNR dB over steps", "Importance of the parameters"),
        *(f"PSNR dB by {label}" for label in labels),
        "PSNR dB and LPIPS of finished trials",
    ]
    assert all("best: trial 6" in svg for caption, svg in figures(html).items() if caption.startswith("PSNR"))
    assert "of the parameters" in html and "By PED-ANOVA" in found["Parameter importance"]
    assert re.search(r"<dt>rungs</dt><dd>\[100, 300\]</dd>", found["Settings of the search"])
    assert "study.db</dd>" in found["Settings of the search"] and "maximize psnr" in found["Settings of the search"]
    assert all(source.startswith(("data:image/", "#")) for source in re.findall(r'(?:src|href)="?([^">]{0,20})', html))


def test_the_page_of_a_search_with_two_objectives(search, drawn):
    played = search(objectives=["psnr", "lpips"])
    for psnr, lpips in ((20.0, 0.30), (22.0, 0.20), (21.0, 0.10), (19.0, 0.40)):
        played.play([psnr], lpips=lpips)
    html = page_of(played)
    assert [row[:3] for row in rows(sections(html)["Best trials"])] == [
        ["1", "22.00", "0.2000"],
        ["2", "21.00", "0.1000"],
    ]
    assert "The Pareto front" in sections(html)["Best trials"]
    captions = [*figures(html)]
    assert captions[:4] == [f"{name} {of}" for of in ("of each trial", "over steps") for name in ("PSNR dB", "LPIPS")]
    assert len(captions) == 4 + 2 * 6 + 1 and captions[-1] == "PSNR dB and LPIPS of finished trials"
    groups, _ = drawn["PSNR dB", "LPIPS (lower is better)"]
    assert pairs(groups[""]) == [(21.0, 0.1), (22.0, 0.2)] and sorted(pairs(groups["Pareto front"])) == pairs(
        groups[""]
    )
    assert len(groups["finished"].x) == 4 and pairs(groups["the paper's setting"]) == [(20.0, 0.3)]
    assert drawn["trial", "LPIPS (lower is better)"][0]["best so far"].y == [0.3, 0.2, 0.1, 0.1, 0.1]


def test_three_objectives_give_three_trade_offs(search, drawn):
    played = search(objectives=["psnr", "ssim", "lpips"])
    for index in range(3):
        played.play([20.0 + index], lpips=0.2 + index / 10)
    assert [*figures(sections(page_of(played))["Trade-off"])] == [
        f"{pair} of finished trials" for pair in ("PSNR dB and SSIM", "PSNR dB and LPIPS", "SSIM and LPIPS")
    ]


def test_history_shows_each_trial_and_the_best_so_far(search, drawn):
    played = search()
    for psnr, end in (
        ([21.0], "finish"),
        ([15.0], "prune"),
        ([22.0, 20.0], "finish"),
        ([21.5], "finish"),
        ([], "fail"),
    ):
        played.play(psnr, end)
    played.play([16.0], None)
    page_of(played)
    groups, options = drawn["trial", "PSNR dB"]
    assert pairs(groups["best so far"]) == [(0, 21), (2, 22), (3, 22), (5, 22)]
    assert pairs(groups["finished"]) == [(0, 21), (2, 22), (3, 21.5)]
    assert pairs(groups["pruned"]) == [(1, 15)] and pairs(groups["running"]) == [(5, 16)]
    assert pairs(groups["best: trial 2"]) == [(2, 22)] and pairs(groups["the paper's setting"]) == [(0, 21)]
    low, high = options["y_limits"]
    assert 20.5 < low < 21 and 22 < high < 22.5  # trials that were pruned do not stretch the axis


def test_the_best_and_the_paper_are_within_the_axis_and_outliers_are_not(search, drawn):
    played = search()
    for psnr in (10.0, 20.0, 20.1, 20.2, 20.3, 20.4, 20.5, 5.0, 30.0):
        played.play([psnr])
    page_of(played)
    low, high = drawn["trial", "PSNR dB"][1]["y_limits"]
    assert 5 < low < 10 and high > 30


def test_learning_curves_show_where_trials_were_stopped(search, drawn):
    played = search()
    played.play([10.0, 18.0, 19.0])
    played.play([11.0, 12.0, 14.0], "prune")
    played.play([12.0, 19.0, 20.0])
    played.play([9.0], "prune")
    page_of(played)
    groups, options = drawn["step", "PSNR dB"]
    stopped = [pair for pair in pairs(groups["pruned"]) if not math.isnan(pair[0])]
    assert stopped == [(100, 11), (200, 12), (300, 14), (100, 9)] and math.isnan(groups["pruned"].x[3])
    assert pairs(groups[""]) == [(300, 14), (100, 9)] and groups[""].marker == "x"
    assert pairs(groups["best: trial 2"])[:3] == [(100, 12), (200, 19), (300, 20)]
    assert groups["the paper's setting"].y[:3] == [10, 18, 19]
    assert options["marks"] == {"trials are pruned": (100, 300)}
    low, high = options["y_limits"]
    assert 8 < low < 9 and 20 < high < 21  # from the first rung's lowest on
    assert groups["best: trial 2"].width > groups["finished"].width


def test_slices_are_over_the_settings_that_resulted(search, drawn):
    played = search(**EVERY_RANGE)
    played.play([20.0])
    parameters = played.play([22.0])
    page_of(played)
    expected = dict(zip(("w_1 (coarsest)", "w_2", "w_3", "w_4 (finest)"), proportions(parameters), strict=True)) | {
        "illumination exponent gamma": parameters["gamma"],
        "EMA rate, 1 - m": parameters["1 - ema_rate"],
        "illumination strength beta": parameters["beta"],
        "mirror loss weight lambda": parameters["mirror_weight"],
        "learning rate": parameters["learning_rate"],
    }
    for label, value in expected.items():
        groups, options = drawn[label, "PSNR dB"]
        assert pairs(groups["best: trial 1"]) == [(pytest.approx(value, rel=2e-3), 22.0)], label
        assert options["log_x"] == (label[:2] != "w_" and not label.endswith("beta"))
    paper = {
        label: groups["the paper's setting"].x[0] for (label, _), (groups, _) in drawn.items() if label in expected
    }
    assert [*paper.values()] == [pytest.approx(value) for value in (*4 * [0.25], 1.0, 0.001, 0.6, 0.8, 0.0002)]
    assert drawn["w_2", "PSNR dB"][1]["x_limits"] == (0, 1)
    assert drawn["EMA rate, 1 - m", "PSNR dB"][1]["x_limits"] == pytest.approx((1e-4, 0.1))


def test_what_is_not_searched_has_no_slice_and_without_lpips_the_trade_off_is_with_ssim(search, drawn):
    played = search(scale_weights=None, gamma=None)
    played.play([20.0], lpips=None)
    found = sections(page_of(played))
    assert [*figures(found["Slices"])] == ["PSNR dB by EMA rate, 1 - m"]
    assert [*figures(found["Trade-off"])] == ["PSNR dB and SSIM of finished trials"]


def test_what_decides_is_the_first_bar(search, drawn, monkeypatch):
    played = search(trials=40)
    for _ in range(40):
        number, parameters = played.study.next()
        played.study.record(number, 900, {"psnr": 20 - abs(math.log(parameters["gamma"])), "ssim": 0.5})
        played.study.finish(number)
    calls = []
    monkeypatch.setattr(report, "bars", lambda *given, **options: calls.append(given) or b"<svg/>")
    page_of(played)
    ((names, series),) = calls
    assert names[0] == "illumination exponent gamma" and len(names) == 6 and [*series] == ["PSNR dB"]
    assert series["PSNR dB"] == sorted(series["PSNR dB"], reverse=True)
    assert sum(series["PSNR dB"]) == pytest.approx(1)


def test_best_trials_are_ten_at_most_best_first(search, drawn):
    played = search()
    for index in range(12):
        played.play([20 + index * 5 % 12])
    found = [row[0] for row in rows(sections(page_of(played))["Best trials"])]
    assert found == [str(number) for number in sorted(range(12), key=lambda index: -(index * 5 % 12))[:10]]


def test_all_trials_are_listed_in_a_table_that_sorts(search, drawn):
    played = search()
    for index in range(12):
        played.play([20.0], "prune" if index == 3 else "finish")
    section = sections(page_of(played))["All trials"]
    assert '<div class="scroll sortable"' in section
    found = rows(section)
    assert [row[0] for row in found] == ["0 (paper)", *map(str, range(1, 12))]
    assert found[3][1] == "pruned"


def test_failed_trials_have_their_settings_and_reason_escaped(search):
    played = search()
    number, _ = played.study.next()
    played.study.fail(number, "<script>alert(1)</script> & more")
    html = page_of(played)
    assert html.count("<script>") == 1
    assert '<div class="scroll texts"' in sections(html)["Failed trials"]
    settings = "scale weights 0.25 0.25 0.25 0.25\ngamma 1\nEMA rate 0.999"
    assert rows(sections(html)["Failed trials"]) == [
        ["0", settings, "&lt;script&gt;alert(1)&lt;/script&gt; &amp; more"]
    ]
    assert not {"Best trials", "History", "Slices", "Trade-off", "Parameter importance"} & {*sections(html)}
    assert rows(sections(html)["All trials"])[0][1:3] == ["failed", "nan"]


def test_no_text_of_a_search_becomes_a_part_of_its_page(search, drawn):
    played = search()
    played.play([20.0])
    number, _ = played.study.next()
    played.study.fail(number, HOSTILE)
    config = played.config.model_copy(update={"search": played.config.search.model_copy(update={"database": HOSTILE})})
    table = TextTable(HOSTILE, [HOSTILE, HOSTILE], [[HOSTILE, HOSTILE]], [HOSTILE])
    html = report.render(config, played.study, [HOSTILE], table, HOSTILE)
    assert find_hostile(html) == {"Results", "Failed trials", "Best settings", "Settings of the search"}


def test_a_search_that_has_not_begun_has_a_page(search):
    html = page_of(search())
    assert [*sections(html)] == ["Results", "Settings of the search"] and "<img" not in html
    assert "The search is not at its end. Trials begun: 0 of 14; ended: 0." in html and "0 trials; time: 0 min" in html


@pytest.mark.parametrize("end", ["finish", "prune", None])
def test_a_search_with_one_trial_has_a_page(search, end):
    played = search(**GAMMA_ALONE)
    played.play([20.0], end)
    html = page_of(played)
    assert ("Best trials" in sections(html)) == (end == "finish")
    assert all(">the paper's setting<" in svg for svg in figures(html).values())
    assert f"Trials begun: 1 of 14; ended: {int(end is not None)}." in html


def test_a_trial_that_was_cut_off_while_it_was_drawn_is_in_no_slice(search, drawn):
    played = search()
    played.play([20.0])
    played.study._study.ask().suggest_float("scale_1", 1 / 8, 8.0, log=True)
    assert [row[:2] for row in rows(sections(page_of(played))["All trials"])] == [
        ["0 (paper)", "finished"],
        ["1", "running"],
    ]
    assert drawn["w_2", "PSNR dB"][0]["running"].x == []


def test_whether_the_search_goes_on_is_said(search, drawn):
    played = search(trials=3, hours=2)
    played.play([20.0])
    played.play([20.0], None)
    assert "The search is not at its end. Trials begun: 2 of 3; ended: 1." in page_of(played)
    played.study.heartbeat(7200)
    assert "The search came to the end of its 2 h. Trials begun: 2 of 3; ended: 1." in page_of(played)


def test_when_all_trials_have_ended_nothing_is_said_to_be_left(search, drawn):
    played = search(trials=2, hours=2)
    played.play([20.0])
    played.play([20.0], "prune")
    assert "Trials begun" not in page_of(played) and "Results" not in sections(page_of(played))


def test_scores_that_are_no_numbers_break_nothing(search):
    played = search(**GAMMA_ALONE)
    for psnr in (20.0, math.inf, 21.0):
        played.play([psnr])
    html = page_of(played)
    assert rows(sections(html)["Best trials"])[0][:2] == ["1", "inf"]
    assert all(not re.search(r"\b(nan|inf)\b", svg) for svg in figures(html).values())
