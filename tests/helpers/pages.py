"""Reads the HTML pages of reports, for tests of what stands in them."""

import base64
import re
from html import unescape
from html.parser import HTMLParser

VOID = {"meta", "img", "input"}
HOSTILE = """<script>alert(1)</script>"'&"""


class _Page(HTMLParser):
    """Keeps which elements are open, and refuses what is closed in another order; keeps all texts."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.texts += [value for _, value in attrs if value]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def check_nesting(html: str) -> None:
    """Refuse a page in which an element is not closed, or in another order than it was opened."""
    page = _Page()
    page.feed(html)
    assert page.open == []


def texts(html: str) -> list[str]:
    """What a browser takes for text, and for values of attributes."""
    page = _Page()
    page.feed(html)
    return page.texts


def sections(html: str) -> dict[str, str]:
    """The content of each section, by its heading."""
    return dict(re.findall(r"<section [^>]*><h2>(.*?)</h2>(.*?)</section>", html, re.DOTALL))


def rows(html: str) -> list[list[str]]:
    """The cells of a table's rows, their names first, in the order of the rows."""
    found = re.findall(r'<tr>\s*<th scope="row">(.*?)</th>(.*?)</tr>', html, re.DOTALL)
    return [[name, *re.findall("<td>(.*?)</td>", cells, re.DOTALL)] for name, cells in found]


def rows_by_name(html: str) -> dict[str, list[str]]:
    """The same by the rows' names."""
    return {name: cells for name, *cells in rows(html)}


def figures(html: str) -> dict[str, str]:
    """Each figure's SVG, by caption."""
    found = re.findall(r'<img alt="([^"]*)" src="data:image/svg\+xml;base64,([^"]*)"', html)
    return {unescape(caption): base64.b64decode(data).decode() for caption, data in found}


def find_hostile(html: str) -> set[str]:
    """The sections in which ``HOSTILE`` stands; refuses a page in which it is anything but text."""
    check_nesting(html)
    assert html.count("alert(1)") == html.count("&lt;script&gt;alert(1)&lt;")
    assert html.count("<script") == 1
    return {name for name, content in sections(html).items() if any(HOSTILE in text for text in texts(content))}
