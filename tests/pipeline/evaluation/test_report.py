import base64
import json
import math
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from pipeline.evaluation.report import METRICS, MOST_POINTS, format_table, render_report

ALEX = {"backbone": "alex", "source": "alexnet.ckpt", "sha256": "443c5bc3" + 56 * "0"}
PNG = b"\x89PNG, or so it says"


def scores(step: int = 100, split: str = "development", **methods: tuple[float, ...]) -> dict[str, Any]:
    """A scores dict, with LPIPS where the methods' values are three."""
    methods = methods or {"input": (7.774, 0.19139, 0.41), "student": (20.0 + step / 100, 0.8, 0.2)}
    named = {method: dict(zip(METRICS, values, strict=False)) for method, values in methods.items()}
    return {
        "checkpoint": f"step-{step:06d}",
        "step": step,
        "split": split,
        "protocol": "rgb_u8",
        "lpips": ALEX if len(next(iter(methods.values()))) == 3 else {"missing": "no alex backbone"},
        "methods": named,
        "images": [{"key": key, "method": method, **named[method]} for key in ("22", "23") for method in named],
    }


def records(steps: int) -> list[dict[str, float]]:
    constants = {"learning_rate": 2e-4, "grad_norm": 0.5, "images_per_s": 50.0, "ema_rate": 0.99}
    return [{"step": step, "loss": 1 / step, "mirror": 0.1 / step} | constants for step in range(1, steps + 1)]


def page(**changes: Any) -> str:
    settings: dict[str, Any] = {
        "title": "A run",
        "settings_yaml": "seed: 1\n",
        "provenance": {"git": "abc123"},
        "records": [],
        "scores": [scores(100)],
        "grids": [("Development", PNG)],
    }
    return render_report(**(settings | changes))


def figures(html: str) -> dict[str, str]:
    """Each curve's SVG source, by caption."""
    found = re.findall(r'<img alt="([^"]*)" src="data:image/svg\+xml;base64,([^"]*)"', html)
    return {caption: base64.b64decode(data).decode() for caption, data in found}


def test_table_says_what_its_numbers_are() -> None:
    assert format_table(scores(100)) == (
        "checkpoint: step-000100, split: development, protocol: rgb_u8, "
        "LPIPS: alex (weights 443c5bc3), 2 images\n"
        "method   PSNR dB    SSIM   LPIPS\n"
        "input       7.77  0.1914  0.4100\n"
        "student    21.00  0.8000  0.2000"
    )


def test_table_without_lpips_gives_the_reason() -> None:
    lines = format_table(scores(input=(7.774, 0.19139))).splitlines()
    assert lines[1:] == [
        "method  PSNR dB    SSIM",
        "input      7.77  0.1914",
        "LPIPS left out: no alex backbone",
    ]
    assert "alex (" not in lines[0]


def test_an_infinite_psnr_survives_json_and_is_shown() -> None:
    perfect = json.loads(json.dumps(scores(100, student=(math.inf, 1.0))))
    assert " inf  1.0000" in format_table(perfect)
    assert "<td>inf</td>" in page(scores=[perfect])


def test_page_loads_nothing_and_nests_properly() -> None:
    html = page(records=records(2))
    sources = re.findall(r'(?:src|href)="([^"]{0,10})', html)
    assert sources and all(source.startswith("data:image") for source in sources)
    assert "<script" not in html and "<link" not in html
    stack: list[str] = []

    class Nesting(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            if tag not in ("meta", "img"):
                stack.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert stack.pop() == tag

    Nesting().feed(html)
    assert stack == []


def test_page_holds_every_part() -> None:
    html = page(records=records(20), scores=[scores(100), scores(200)])
    assert list(figures(html)) == [
        *("PSNR dB", "SSIM", "LPIPS", "Loss and its terms"),
        *("Learning rate", "Gradient norm", "EMA rate", "Images per second"),
    ]
    assert ">mirror<" in figures(html)["Loss and its terms"]
    assert f"data:image/png;base64,{base64.b64encode(PNG).decode()}" in html
    assert "seed: 1" in html and "abc123" in html


def test_the_chosen_checkpoint_heads_the_page_on_every_split_beside_the_mean_of_the_last() -> None:
    html = page(scores=[scores(300), scores(100), scores(200), scores(200, "test")], chosen="step-000200")
    headings = re.findall("<p>checkpoint: (.*?), split: (.*?),", html)
    assert headings == [
        ("step-000200", "development"),
        ("mean of the last 3", "development"),
        ("step-000200", "test"),
    ]
    assert re.findall(r"<tr><th>student</th><td>(.*?)</td>", html) == ["22.00", "22.00", "22.00"]
    assert "checkpoint: step-000300" in page(scores=[scores(300), scores(100, "test")])
    with pytest.raises(ValueError, match="'step-000400' is not among those scored: step-000100, step-000200"):
        page(scores=[scores(100), scores(200)], chosen="step-000400")


def test_scores_of_different_kinds_are_not_averaged() -> None:
    without_lpips = scores(100, student=(20.0, 0.8))
    html = page(scores=[without_lpips, scores(200), scores(300, "test")], chosen="step-000200")
    assert "mean of the last" not in html


def test_a_run_without_scores_records_or_pictures_still_has_a_page() -> None:
    html = page(scores=[], records=[], grids=[], provenance={})
    assert "No checkpoint of this run has been scored" in html
    assert "<img" not in html


def test_names_and_text_are_escaped() -> None:
    html = page(title="<b>1</b>", settings_yaml="a: <i>", provenance={"<u>": {"x": "<s>"}}, grids=[('"<q>', PNG)])
    for tag in ("<b>", "<i>", "<u>", "<s>", "<q>", '""<'):
        assert tag not in html


def test_long_and_interrupted_logs_are_drawn_once_and_small() -> None:
    log = [*records(8000), {"step": 8000, "loss": math.nan, "mirror": 1.0}]
    loss = figures(page(records=log))["Loss and its terms"]
    assert "nan" not in loss.lower()
    assert loss.count("\nL ") < 2.5 * MOST_POINTS
