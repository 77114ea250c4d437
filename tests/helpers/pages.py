"""Reads the HTML pages of reports, for tests of what stands in them."""

import base64
import re
from html import unescape
from html.parser import HTMLParser

VOID = {"meta", "img", "input"}


class _Tags(HTMLParser):
    """Keeps which elements are open, and refuses what is closed in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check_nesting(html: str) -> None:
    """Refuse a page in which an element is not closed, or in another order than it was opened."""
    tags = _Tags()
    tags.feed(html)
    assert tags.open == []


def sections(html: str) -> dict[str, str]:
    """The content of each section, by its heading."""
    return dict(re.findall(r"<section [^>]*><h2>(.*?)</h2>(.*?)</section>", html, re.DOTALL))


def rows(html: str) -> list[list[str]]:
    """The cells of a table's rows, their names first, in the order of the rows."""
    found = re.findall(r"<tr><th scope=row>(.*?)</th>(.*?)</tr>", html, re.DOTALL)
    return [[name, *re.findall("<td>(.*?)</td>", cells, re.DOTALL)] for name, cells in found]


def rows_by_name(html: str) -> dict[str, list[str]]:
    """The same by the rows' names."""
    return {name: cells for name, *cells in rows(html)}


def figures(html: str) -> dict[str, str]:
    """Each figure's SVG, by caption."""
    found = re.findall(r'<img alt="([^"]*)" src="data:image/svg\+xml;base64,([^"]*)"', html)
    return {unescape(caption): base64.b64decode(data).decode() for caption, data in found}
