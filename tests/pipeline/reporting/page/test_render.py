"""The page itself: every kind of block, what is escaped, what a browser is allowed, whether its files are installed."""

import base64
import dataclasses
import hashlib
import re
import tomllib
from pathlib import Path
from typing import get_args

import pytest
from jinja2 import UndefinedError
from matplotlib import colormaps
from matplotlib.colors import to_hex
from pages import HOSTILE, check_nesting, figures, find_hostile, rows, sections, texts

from pipeline.reporting import page
from pipeline.reporting.page.blocks import (
    Block,
    Chart,
    Charts,
    Comparison,
    Descriptions,
    Details,
    Heading,
    Paragraph,
    Preformatted,
    Strip,
    Table,
    View,
    gather_charts,
)
from pipeline.reporting.page.render import environment, render_page
from pipeline.reporting.text_table import TextTable

ROOT = Path(__file__).parents[4]
VIEW = View(HOSTILE, HOSTILE, b"one", (HOSTILE, HOSTILE))
SAMPLES = (
    Heading(HOSTILE),
    Paragraph(HOSTILE, "note"),
    Preformatted(HOSTILE),
    Descriptions({HOSTILE: HOSTILE}),
    Table([HOSTILE, HOSTILE], [[HOSTILE, HOSTILE]], "sortable"),
    TextTable(HOSTILE, [HOSTILE, HOSTILE], [[HOSTILE, HOSTILE]], [HOSTILE]),
    Charts([Chart(HOSTILE, b"<svg/>")], HOSTILE),
    Strip([VIEW, VIEW]),
    Comparison(HOSTILE, [VIEW], [HOSTILE], [HOSTILE], VIEW),
    Details(HOSTILE, [Paragraph(HOSTILE), Details(HOSTILE, [Heading(HOSTILE)])]),
)


def section(*blocks: Block) -> str:
    """The section of a page that holds these blocks."""
    html = render_page("title", [], {"name": blocks})
    check_nesting(html)
    return sections(html)["name"]


@pytest.mark.parametrize("block", SAMPLES, ids=lambda block: type(block).__name__)
def test_no_text_of_a_block_becomes_a_part_of_the_page(block: Block) -> None:
    html = render_page("title", [block], {"name": [block]})
    assert find_hostile(html) == {"name"}
    given = str(dataclasses.asdict(block)).count("alert")
    assert sum(text.count(HOSTILE) for text in texts(html)) >= 2 * given


def test_every_kind_of_block_has_a_sample() -> None:
    assert sorted(type(block).__name__ for block in SAMPLES) == sorted(kind.__name__ for kind in get_args(Block))


def test_names_of_the_page_and_of_its_sections_are_escaped() -> None:
    html = render_page(HOSTILE, [], {HOSTILE: [Paragraph("text")]})
    assert find_hostile(html) == set()
    found = texts(html)
    assert found.count(HOSTILE) == 5 and f"#{HOSTILE}" in found  # title, heading, link, and section with its name


def test_templates_escape_all_but_the_style_and_the_script() -> None:
    templates = environment().list_templates(extensions=["html"])
    assert templates == ["page.html", "parts.html"] and environment().autoescape is True
    text = "".join(Path(page.__path__[0], name).read_text() for name in templates)
    assert re.findall(r"(?:(\w+) \| )?\bsafe\b", text) == ["style", "script"]
    assert "autoescape" not in text


def test_what_a_template_does_not_know_is_refused() -> None:
    with pytest.raises(UndefinedError):
        environment().from_string("{{ unheard_of }}").render()
    with pytest.raises(UndefinedError):
        render_page("title", [object()], {})  # type: ignore[list-item]


def test_the_policy_admits_no_more_than_it_must() -> None:
    html = render_page("title", [], {})
    (script,) = re.findall("<script>(.*?)</script>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert script == Path(page.__path__[0], "page.js").read_text()
    assert re.findall('Content-Security-Policy" content="([^"]*)"', html) == [
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    ]


def test_sections_without_blocks_are_left_out() -> None:
    html = render_page("title", [], {"one": [], "two words": [Paragraph("text")]})
    assert [*sections(html)] == ["two words"]
    assert re.findall('href="(.*?)"', html) == ["#two-words"] and '<section id="two-words">' in html


def test_charts_without_anything_to_see_are_left_out() -> None:
    assert gather_charts([Chart("one", None)], "note") == []
    html = section(*gather_charts([Chart("one", None), Chart("two", b"<svg/>")], "a note"))
    assert figures(html) == {"two": "<svg/>"} and '<p class="note">a note</p>' in html


def test_an_interval_stands_below_its_mean_in_a_text_table_alone() -> None:
    cells = ["arm [a]", "1.0 [0.5, 1.5]"]
    assert rows(section(TextTable("", ["", ""], [cells]))) == [["arm\n[a]", "1.0\n[0.5, 1.5]"]]
    assert rows(section(Table(["", ""], [cells]))) == [cells]


def test_a_picture_is_embedded_where_it_is_first_shown() -> None:
    one, two = View("one", "", b"first"), View("two", "", b"second")
    html = section(Strip([one]), Comparison("all", [two, one], ["two"], ["one"], beside=one))
    assert re.findall(r'<img (id|data-same)="(.*?)"', html) == [
        *(("id", "picture-0"), ("id", "picture-1"), ("data-same", "picture-0"), ("data-same", "picture-0"))
    ]
    first, second = re.findall('base64,(.*?)"', html)
    assert (base64.b64decode(first), base64.b64decode(second)) == (b"first", b"second")
    assert re.findall('<option value="(.)">(.*?)<', html) == [("0", "two"), ("1", "one")]
    assert "picture-0" in render_page("another page", [Strip([two])], {})


def test_the_legend_has_the_colours_of_the_error_map() -> None:
    inferno = [to_hex(colormaps["inferno"](share / 8)) for share in range(9)]
    (gradient,) = re.findall(r"linear-gradient\(90deg,([^)]*)\)", Path(page.__path__[0], "page.css").read_text())
    assert re.findall(r"#\w+", gradient) == inferno


def test_all_files_of_the_packages_are_installed() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {ROOT / name.replace(".", "/") for name in settings["packages"]}
    files = {path for name in ("iaml", "pipeline", "tune") for path in (ROOT / name).rglob("*.*")}
    needed = {path for path in files if path.suffix not in {".py", ".pyc", ".md", ".webp"}}
    assert {path.parent for path in files if path.suffix == ".py"} == folders
    carried = {
        path
        for package, patterns in settings["package-data"].items()
        for pattern in patterns
        for path in (ROOT / package.replace(".", "/")).glob(pattern)
    }
    assert carried == needed != set()
