"""What a page can hold, as plain data: ``Block`` names all there is, and ``parts.html`` lays each of them out."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.reporting.text_table import TextTable


@dataclass(frozen=True)
class Heading:
    """A heading within a section."""

    text: str


@dataclass(frozen=True)
class Paragraph:
    """A paragraph of one of the kinds that the style knows."""

    text: str
    kind: Literal["", "note", "state", "alarm"] = ""


@dataclass(frozen=True)
class Preformatted:
    """Lines that are shown as they are."""

    text: str


@dataclass(frozen=True)
class Descriptions:
    """Texts beside their names; long ones are wrapped."""

    texts: Mapping[str, str]


@dataclass(frozen=True)
class Table:
    """A table whose first column names its rows.

    Attributes:
        columns: a title for each column.
        rows: a cell for each column.
        kind: ``sortable``, where a click on a column's title sorts, or ``texts``, where cells are no numbers.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    kind: Literal["", "sortable", "texts"] = ""


@dataclass(frozen=True)
class Chart:
    """A figure of curves, as SVG; none where there was nothing to draw."""

    caption: str
    svg: bytes | None


@dataclass(frozen=True)
class Charts:
    """Figures side by side as the width allows, below a note, which may be empty."""

    charts: Sequence[Chart]
    note: str = ""


@dataclass(frozen=True)
class View:
    """A picture.

    Attributes:
        name: what it shows.
        caption: what else there is to say, such as its scores.
        picture: WebP; equal ones are embedded once.
        legend: what the two ends of the colours stand for, of a map of errors.
    """

    name: str
    caption: str
    picture: bytes
    legend: tuple[str, str] | None = None


@dataclass(frozen=True)
class Strip:
    """Pictures in one row."""

    views: Sequence[View]


@dataclass(frozen=True)
class Comparison:
    """Two pictures on top of each other with a movable boundary between them; without a script, all in a row.

    Attributes:
        name: what the pictures show, for screen readers.
        views: all the pictures.
        left: names of those that may be shown left of the boundary, the first one at first.
        right: likewise.
        beside: a picture to show beside them.
    """

    name: str
    views: Sequence[View]
    left: Sequence[str]
    right: Sequence[str]
    beside: View | None = None


@dataclass(frozen=True)
class Details:
    """Blocks that are folded away at first."""

    summary: str
    blocks: Sequence["Block"]


Block = Heading | Paragraph | Preformatted | Descriptions | Table | TextTable | Charts | Strip | Comparison | Details


def gather_charts(charts: Iterable[Chart], note: str = "") -> list[Block]:
    """The charts in which there is anything to see as one block; no block where there is none."""
    drawn = [chart for chart in charts if chart.svg]
    return [Charts(drawn, note)] if drawn else []
