"""One HTML page that needs nothing but itself: tables, curves, and pictures to compare.

Functions here return HTML. Their arguments are plain text, which they escape, unless they are called ``content``.
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

from matplotlib import colormaps
from matplotlib.colors import to_hex

from pipeline.reporting.tables import TextTable


@dataclass(frozen=True)
class View:
    """One picture of several of the same place.

    Attributes:
        name: what it shows.
        caption: what else there is to say, such as its scores.
        picture: an encoded image.
    """

    name: str
    caption: str
    picture: bytes


@dataclass(frozen=True)
class Album:
    """The pictures of a page, of which each is embedded once: the script copies it to where it is shown again."""

    kind: str
    _names: dict[bytes, str] = field(default_factory=dict)

    def image(self, picture: bytes, text: str) -> str:
        """An image, described by ``text`` for those who can't see it."""
        digest = hashlib.sha256(picture).digest()
        if digest in self._names:
            return f'<img data-same="{self._names[digest]}" alt="{escape(text)} (as shown above)">'
        self._names[digest] = name = f"picture-{len(self._names)}"
        return f'<img id="{name}" alt="{escape(text)}" src="{_data_url(self.kind, picture)}">'

    def figure(self, view: View, extra: str = "") -> str:
        """An image above its name and caption, and above ``extra`` HTML."""
        caption = f"<b>{escape(view.name)}</b> {escape(view.caption)}{extra}"
        return f"<figure>{self.image(view.picture, view.name)}<figcaption>{caption}</figcaption></figure>"

    def strip(self, views: Sequence[View]) -> str:
        """Pictures in one row."""
        return f"<div class=strip tabindex=0>{''.join(map(self.figure, views))}</div>"

    def comparison(
        self, views: Sequence[View], left: Sequence[str], right: Sequence[str], content: str = "", *, name: str = ""
    ) -> str:
        """Two pictures on top of each other with a movable boundary between them; without a script, all in a row.

        Args:
            views: all the pictures.
            left: names of those that may be shown left of the boundary, the first one at first.
            right: likewise.
            content: HTML to show beside them.
            name: what they show, for screen readers.
        """
        names = [view.name for view in views]
        choices = [
            f"<label>{side} <select>{''.join(_option(names.index(each), each) for each in allowed)}</select></label>"
            for side, allowed in (("left", left), ("right", right))
        ]
        boundary = (
            f'<input type=range min=0 max=100 value=50 aria-label="boundary between the pictures {escape(name)}">'
        )
        pictures = "".join(map(self.figure, views))
        return (
            f"<div class=compare><div class=main><div class=choices>{''.join(choices)}</div>"
            f"<div class=views>{pictures}{boundary}</div></div>{content}</div>"
        )


def render(title: str, head: str, sections: Mapping[str, str]) -> str:
    """The whole page, which no browser lets load anything.

    Args:
        title: the page's name.
        head: HTML to stand above the sections.
        sections: HTML by heading; empty ones are left out.
    """
    shown = {name: content for name, content in sections.items() if content}
    links = "".join(f'<a href="#{_anchor(name)}">{escape(name)}</a>' for name in shown)
    body = "\n".join(
        f'<section id="{_anchor(name)}"><h2>{escape(name)}</h2>\n{content}</section>' for name, content in shown.items()
    )
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        f"style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'\">\n"
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<h1>{escape(title)}</h1>\n{head}\n<nav>{links}</nav>\n{body}\n<script>{SCRIPT}</script>\n"
        "</body>\n</html>\n"
    )


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of one of the kinds that the style knows."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def text_table(table: TextTable, title: str = "") -> str:
    """A table below its title and heading, above its notes; intervals stand below their means."""
    head = f"<h3>{escape(title)}</h3>" if title else ""
    below = "".join(paragraph(note, "note") for note in table.notes)
    rows = [[cell.replace(" [", "\n[") for cell in row] for row in table.rows]
    return f"{head}{paragraph(table.heading, 'note')}{rows_table(table.columns, rows)}{below}"


def rows_table(columns: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """A table whose first column names its rows; of the kind ``sortable``, a click on a column's head sorts it."""
    heads = (f"<button>{escape(name)}</button>" if kind == "sortable" else escape(name) for name in columns)
    head = "".join(f"<th scope=col>{name}</th>" for name in heads)
    body = "".join(
        f"<tr><th scope=row>{escape(first)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>\n"
        for first, *cells in rows
    )
    return (
        f'<div class="scroll {kind}" tabindex=0><table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>\n"
    )


def names_table(values: Mapping[str, str]) -> str:
    """Values beside their names; long ones are wrapped."""
    return f"<dl>{''.join(f'<dt>{escape(name)}</dt><dd>{escape(text)}</dd>' for name, text in values.items())}</dl>"


def chart(svg: bytes, caption: str) -> str:
    """A figure of curves."""
    image = f'<img alt="{escape(caption)}" src="{_data_url("svg+xml", svg)}">'
    return f"<figure class=chart><figcaption>{escape(caption)}</figcaption>{image}</figure>\n"


def charts(figures: Sequence[str]) -> str:
    """Figures side by side as the width allows; empty when there are none.

    Args:
        figures: HTML of each one, some perhaps empty.
    """
    content = "".join(figures)
    return f"<div class=charts>{content}</div>" if content else ""


def details(summary: str, content: str) -> str:
    """HTML that is folded away at first."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def legend(low: str, high: str) -> str:
    """The colours of an error map, between the names of its ends."""
    return f"<span class=legend>{escape(low)}<i></i>{escape(high)}</span>"


def _data_url(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _option(value: int, text: str) -> str:
    return f"<option value={value}>{escape(text)}</option>"


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "-")


COLOURS = ", ".join(to_hex(colormaps["inferno"](share / 8)) for share in range(9))
STYLE = """
:root { color-scheme: light dark; --text: #1c2024; --dim: #5c6570; --line: #dde1e6; --ground: #fff; --soft: #f4f5f7;
  --link: #0b5cad; --alarm: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e7ea; --dim: #9aa4af; --line: #343a41; --ground: #15181b; --soft: #1f2428; --link: #7db7f5;
    --alarm: #ff8a80; }
  .chart img { filter: invert(0.9) hue-rotate(180deg); }
}
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 1rem; color: var(--text);
  background: var(--ground); overflow-wrap: anywhere; }
h1 { margin: 0.5rem 0 0; line-height: 1.2; }
h2 { margin: 2.5rem 0 0.5rem; padding-top: 0.5rem; border-top: 1px solid var(--line); }
h3 { margin: 1.5rem 0 0.25rem; font-size: 1rem; }
a, summary { color: var(--link); }
nav { display: flex; flex-wrap: wrap; gap: 0.1rem 1rem; margin: 0.75rem 0; font-size: 0.9rem; }
p { margin: 0.4rem 0; }
.note, .state { color: var(--dim); }
.note { font-size: 0.875rem; max-width: 60rem; }
.alarm { border-left: 4px solid var(--alarm); padding: 0.5rem 0.8rem; background: var(--soft); color: var(--alarm);
  white-space: pre-wrap; }
.scroll { overflow: auto; margin: 0.5rem 0; }
.sortable { max-height: 40rem; }
table { border-collapse: collapse; font-size: 0.925rem; width: max-content; }
th, td { padding: 0.25rem 0.75rem; border-bottom: 1px solid var(--line); text-align: right; white-space: pre;
  font-variant-numeric: tabular-nums; }
thead th { position: sticky; top: 0; z-index: 2; background: var(--ground); vertical-align: bottom; }
th:first-child { text-align: left; padding-left: 0; position: sticky; left: 0; z-index: 1; background: var(--ground);
  padding-right: 0.75rem; max-width: min(16rem, 45vw); white-space: pre-wrap; overflow-wrap: break-word; }
thead th:first-child { z-index: 3; }
@media (max-width: 30rem) { th, td { padding: 0.25rem 0.35rem; } }
tbody th { font-weight: normal; }
tbody tr > * { vertical-align: top; }
.texts td, .texts th { text-align: left; white-space: pre-wrap; }
.texts td { max-width: min(30rem, 70vw); overflow-wrap: break-word; }
th button { font: inherit; color: inherit; background: none; border: 0; padding: 0; cursor: pointer; }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
dl { display: grid; grid-template-columns: minmax(6rem, auto) 1fr; gap: 0.25rem 1rem; font-size: 0.925rem; }
dt { color: var(--dim); }
dd { margin: 0; min-width: 0; white-space: pre-wrap; }
pre { overflow-x: auto; background: var(--soft); padding: 0.8rem; font-size: 0.85rem; overflow-wrap: normal; }
figure { margin: 0; min-width: 0; }
figcaption { font-size: 0.85rem; color: var(--dim); padding-top: 0.25rem; }
figcaption b { display: block; color: var(--text); font-weight: 600; }
img { display: block; width: 100%; height: auto; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: 1.5rem 1rem; }
.chart figcaption { color: var(--text); font-weight: 600; }
.strip { display: flex; gap: 0.5rem; overflow-x: auto; margin: 0.5rem 0; }
.strip figure { flex: 1 0 10rem; max-width: 20rem; }
.compare { display: flex; flex-wrap: wrap; gap: 1rem; margin: 0.5rem 0 1.5rem; align-items: flex-end; }
.main { flex: 1 1 100%; min-width: 0; }
.compare > figure { flex: 1 1 14rem; max-width: 28rem; }
.views { display: flex; flex-wrap: wrap; gap: 0.5rem; }
.views figure { flex: 1 1 9rem; }
.choices { display: none; }
.views input { display: none; }
.legend { display: flex; align-items: center; gap: 0.4rem; }
.legend i { flex: 1; height: 0.7rem; background: linear-gradient(90deg, COLOURS); }
.js .main { flex: 2 1 20rem; max-width: 40rem; }
.js .choices { display: flex; justify-content: space-between; flex-wrap: wrap; font-size: 0.85rem;
  margin-bottom: 0.3rem; }
.js .choices select { font: inherit; max-width: 70vw; }
.js .views { display: grid; gap: 0; }
.js .views figure { display: contents; }
.js .views img, .js .views input, .js .views::before, .js .views::after { grid-area: 1 / 1; }
.js .views figcaption { grid-area: 2 / 1; }
.js .views figure:not(.left, .right) > * { visibility: hidden; }
.js .left img { z-index: 1; clip-path: inset(0 calc(100% - var(--at)) 0 0); }
.js .left figcaption { padding-right: 52%; }
.js .right figcaption { padding-left: 52%; text-align: right; }
.js .views::before, .js .views::after { content: ""; z-index: 2; position: relative; pointer-events: none;
  background: #fff; box-shadow: 0 0 3px #000; }
.js .views::before { width: 2px; left: calc(var(--at) - 1px); }
.js .views::after { width: 1.5rem; height: 1.5rem; left: calc(var(--at) - 0.75rem); align-self: center;
  border-radius: 50%; }
.js .views:focus-within::after { outline: 3px solid var(--link); }
.js .views input { display: block; z-index: 3; opacity: 0; width: calc(100% + 16px); height: 100%; margin: 0 -8px;
  cursor: ew-resize; touch-action: pan-y; }
""".replace("COLOURS", COLOURS)
# The policy lets run this text alone, so nothing that a file slips into the page could run.
SCRIPT = """
"use strict";
document.documentElement.classList.add("js");
for (const image of document.querySelectorAll("img[data-same]")) {
  image.src = document.getElementById(image.dataset.same).src;
}
for (const box of document.querySelectorAll(".compare")) {
  const [left, right] = box.querySelectorAll("select");
  const [views, range] = [box.querySelector(".views"), box.querySelector("input")];
  const show = () => {
    views.querySelectorAll("figure").forEach((figure, index) => {
      figure.className = index == right.value ? "right" : index == left.value ? "left" : "";
    });
    views.style.setProperty("--at", range.value + "%");
  };
  for (const control of [left, right, range]) control.addEventListener("input", show);
  show();
}
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th"), body = head.closest("table").tBodies[0];
    const order = head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
    const cell = row => row.cells[head.cellIndex].textContent;
    const number = text =>
      text === "inf" ? Infinity : text === "nan" ? -Infinity : text.trim() === "" ? NaN : Number(text);
    const compare = (one, two) => {
      const [x, y] = [number(one), number(two)];
      if (isNaN(x) || isNaN(y)) return one.localeCompare(two, undefined, {numeric: true});
      return x < y ? -1 : x > y ? 1 : 0;
    };
    const rows = [...body.rows].sort((one, two) => compare(cell(one), cell(two)));
    body.append(...(order === "ascending" ? rows : rows.reverse()));
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", order);
  });
}
"""
