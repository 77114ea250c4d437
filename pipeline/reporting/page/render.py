"""Renders a page: ``page.html`` with its style, its script and all its pictures inside."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined

from pipeline.reporting import page
from pipeline.reporting.page.blocks import Block


def render_page(title: str, head: Sequence[Block], sections: Mapping[str, Sequence[Block]]) -> str:
    """The whole page as HTML, which no browser lets load anything.

    Args:
        title: the page's name.
        head: what stands above the sections.
        sections: blocks by heading; empty sections are left out.
    """
    shown = {name: blocks for name, blocks in sections.items() if blocks}
    return environment().get_template("page.html").render(title=title, head=head, sections=shown, album={})


@cache
def environment() -> Environment:
    """The templates, in which every text is escaped and a name that is not known is an error."""
    environment = Environment(
        loader=PackageLoader(page.__name__, ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"style": _read("page.css"), "script": _read("page.js")}
    environment.filters |= {"base64": _base64, "sha256": _sha256, "kind": lambda block: type(block).__name__}
    return environment


def _read(name: str) -> str:
    return files(page).joinpath(name).read_text("utf-8")


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _sha256(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
