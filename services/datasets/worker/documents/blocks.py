"""What every reader makes of a document: blocks in reading order, each with its place.

Law of this room: pure. A block is text that stands in the file; nothing is
added to it but what Markdown writes around code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from services.datasets.worker.found import INFO, Problem

LINE, PAGE, PARAGRAPH = "DOCUMENT_UNIT_LINE", "DOCUMENT_UNIT_PAGE", "DOCUMENT_UNIT_PARAGRAPH"

HEADING = "heading"
PROSE = "prose"
ITEM = "item"
"""One of a list."""
CODE = "code"
TABLE = "table"
TERM, MEANING = "term", "meaning"
"""Of a list of definitions."""


class Span(NamedTuple):
    """A stretch of a file: units from one, characters from zero, as qlorad.v1.DocumentSpan tells them."""

    unit: str
    first: int
    last: int
    begin: int = 0
    end: int = 0

    def to(self, other: Span) -> Span:
        """From the beginning of this one to the end of another."""
        return Span(self.unit, self.first, other.last, self.begin, other.end)

    def plain(self) -> dict[str, Any]:
        """The span as plain.py writes messages: 64-bit numbers as text, none where it is zero."""
        numbers = {"first": self.first, "last": self.last, "begin_character": self.begin, "end_character": self.end}
        return {"unit": self.unit, **{name: str(n) for name, n in numbers.items() if n}}


@dataclass(frozen=True, slots=True)
class Block:
    """A heading, a paragraph, one item of a list, a piece of code, a table."""

    kind: str
    text: str
    span: Span
    level: int = 0
    """Of a heading, from 1; of an item, how many lists it lies in, from 0; of code and prose, in how many items."""
    number: int | None = None
    """Of an item that is counted."""
    language: str = ""
    """Of code."""
    lead: str = ""
    """The emphasised words that it begins with."""
    cells: tuple[tuple[str, ...], ...] = ()
    """Of a table, row by row, all of one length."""
    left: str = ""
    """Why its reader leaves it out: a rule of left.py."""


@dataclass(frozen=True, slots=True)
class Document:
    """A document that was read."""

    kind: str
    """"markdown", "text", "html", "pdf" or "docx"."""
    blocks: Sequence[Block]
    title: str = ""
    """What it calls itself, where it says that apart from its headings."""
    said: Sequence[tuple[int, Problem]] = ()
    """What is worth saying of it, with line or page."""


def pictures_in_text(count: int) -> list[tuple[int, Problem]]:
    """What is said of pictures that stand in text which was read: as of a document, not of a place."""
    if not count:
        return []
    told = f"{count} picture{'s' * (count > 1)} within text {'were' if count > 1 else 'was'} not read"
    return [(0, Problem("picture", told, "describe what they show in words", "", INFO))]


def table_text(cells: Sequence[Sequence[str]]) -> str:
    """A table as Markdown writes it."""
    lines = ["| " + " | ".join(cell.replace("\n", " ").replace("|", "\\|") for cell in row) + " |" for row in cells]
    if lines:
        lines.insert(1, "|" + " --- |" * len(cells[0]))
    return "\n".join(lines)


def squared(rows: Sequence[Sequence[str]]) -> tuple[tuple[str, ...], ...]:
    """Rows of one length, the short ones filled up."""
    width = max(map(len, rows), default=0)
    return tuple(tuple(row) + ("",) * (width - len(row)) for row in rows)
