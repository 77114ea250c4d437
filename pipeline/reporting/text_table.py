"""Tables of text for a terminal: columns are aligned, and stand below a heading and above notes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class TextTable:
    """A table of texts; as a string, texts are aligned to the left and numbers to the right.

    Attributes:
        heading: what the table shows; an empty one takes no line.
        columns: a title for each column.
        rows: a cell for each column.
        notes: a line each.
        texts: how many columns, from the first on, hold texts; the others hold numbers.
    """

    heading: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    texts: int = 1

    def __str__(self) -> str:
        """The table for a terminal."""
        rows = [self.columns, *self.rows]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join([*self._align(row, widths)]).rstrip() for row in rows]
        return "\n".join([*filter(None, [self.heading]), *lines, *self.notes])

    def _align(self, row: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
        yield from map(str.ljust, row[: self.texts], widths[: self.texts])
        yield from map(str.rjust, row[self.texts :], widths[self.texts :])
