"""DOCX as blocks: the main part of the document, paragraph by paragraph.

Law of this room: heads and feet of pages, comments and deleted text are not
read; notes are told, since they are text. Paragraphs count as they stand in the
part, whatever lies between them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from services.datasets.worker.documents import bounds
from services.datasets.worker.documents.blocks import (
    CODE,
    HEADING,
    ITEM,
    PARAGRAPH,
    PROSE,
    TABLE,
    Block,
    Document,
    Span,
    pictures_in_text,
    squared,
    table_text,
)
from services.datasets.worker.documents.docx_styles import Looks, is_mono, is_on
from services.datasets.worker.documents.packages import Package, Target, hear
from services.datasets.worker.found import INFO, Problem, Unreadable

_MAIN = "word/document.xml"
_BLANK_LINES = 3
_SIGNS = {"tab": " ", "noBreakHyphen": "-", "softHyphen": "", "cr": "\n"}


def read(data: bytes) -> Document:
    """The document that the bytes are."""
    package = Package(data)
    main = _main(package)
    folder = main.rpartition("/")[0] + "/"
    walk = _Walk(Looks.of(package, folder))
    hear(package, main, walk)
    notes = _notes(package, folder)
    return Document("docx", walk.blocks(), said=[*notes, *pictures_in_text(walk.pictures)])


def _main(package: Package) -> str:
    found = _Main()
    if "_rels/.rels" in package:
        hear(package, "_rels/.rels", found)
    name = found.name or _MAIN
    if name not in package:
        told = "the file is a zip archive, but no DOCX: there is no document in it"
        raise Unreadable(Problem("not_text", told, "unpack it and send the documents that it holds"))
    return name


class _Main(Target):
    name = ""

    def begin(self, tag: str, attributes: Mapping[str, str]) -> None:
        if tag == "Relationship" and attributes.get("Type", "").endswith("/officeDocument"):
            self.name = attributes.get("Target", "").lstrip("/")


class _Notes(Target):
    count = 0

    def begin(self, tag: str, attributes: Mapping[str, str]) -> None:
        if tag in ("footnote", "endnote") and "type" not in attributes:
            self.count += 1


def _notes(package: Package, folder: str) -> list[tuple[int, Problem]]:
    found = _Notes()
    for name in (f"{folder}footnotes.xml", f"{folder}endnotes.xml"):
        if name in package:
            hear(package, name, found)
    if not found.count:
        return []
    told = f"{found.count} foot- or endnote{'s were' if found.count > 1 else ' was'} not read"
    return [(0, Problem("notes_left_out", told, "write what is worth learning into the text", "", INFO))]


@dataclass(slots=True)
class _Paragraph:
    """A paragraph on its way."""

    number: int
    style: str = ""
    list_id: str | None = None
    list_level: int = 0
    outline: int | None = None
    pieces: list[tuple[str, bool, bool]] = field(default_factory=list)
    """Text of each run, whether it is emphasised, whether it is code."""
    has_picture: bool = False


@dataclass(slots=True)
class _Table:
    rows: list[list[list[Block]]] = field(default_factory=list)
    first: int = 0
    skip: int = 0


class _Walk(Target):
    """Hears the main part."""

    def __init__(self, looks: Looks) -> None:
        self._looks = looks
        self._number = 0
        self._open: list[_Paragraph] = []
        self._tables: list[_Table] = []
        self._texts = 0
        """Whether text that is heard is the document's."""
        self._run_strong = self._run_mono = False
        self._in_run = self._in_fallback = self._in_deleted = 0
        self._made: list[Block] = []
        self.pictures = 0
        """Within text."""

    def blocks(self) -> list[Block]:
        """All blocks, headings below the title where there is one."""
        bounds.checked(len(self._made), sum(len(b.text) for b in self._made))
        if not any(b.kind == HEADING and b.level == 0 for b in self._made):
            return self._made
        return [replace(b, level=b.level + 1) if b.kind == HEADING else b for b in self._made]

    # What is heard

    def begin(self, tag: str, attributes: Mapping[str, str]) -> None:
        if tag == "Fallback":  # the same once more, for older programs
            self._in_fallback += 1
        if self._in_fallback:
            self._number += tag == "p"  # it counts, and is not read
            return
        value = attributes.get("val", "")
        if tag == "p":
            self._number += 1
            self._open.append(_Paragraph(self._number))
        elif tag == "tbl":
            self._tables.append(_Table(first=self._number + 1))
        elif tag == "tr" and self._tables:
            self._tables[-1].rows.append([])
        elif tag == "tc" and self._tables:
            if not self._tables[-1].rows:
                self._tables[-1].rows.append([])
            self._tables[-1].rows[-1].append([])
        elif tag == "gridSpan" and self._tables and value.isdigit() and self._tables[-1].rows:
            self._tables[-1].rows[-1] += [[] for _ in range(min(int(value), 64) - 1)]
            self._tables[-1].skip = min(int(value), 64) - 1
        elif tag in ("del", "moveFrom"):
            self._in_deleted += 1
        elif self._open:
            self._in_paragraph(tag, attributes, value)

    def _in_paragraph(self, tag: str, attributes: Mapping[str, str], value: str) -> None:
        now = self._open[-1]
        if tag == "pStyle":
            now.style = value
        elif tag == "numId":
            now.list_id = value
        elif tag == "ilvl" and value.isdigit():
            now.list_level = int(value)
        elif tag == "outlineLvl" and value.isdigit():
            now.outline = int(value)
        elif tag == "r":
            self._in_run += 1
            self._run_strong = self._run_mono = False
        elif tag in ("b", "i") and self._in_run:
            self._run_strong = self._run_strong or is_on(attributes)
        elif tag == "rStyle" and self._in_run:
            self._run_strong = self._run_strong or self._looks.styles.is_strong(value)
            self._run_mono = self._run_mono or self._looks.styles.is_code(value)
        elif tag == "rFonts" and self._in_run:
            self._run_mono = self._run_mono or is_mono(attributes.get("ascii", ""))
        elif tag == "t":
            self._texts += 1
        elif tag in _SIGNS and self._in_run:
            self._add(_SIGNS[tag])
        elif tag == "br" and attributes.get("type", "textWrapping") == "textWrapping":
            self._add("\n")
        elif tag in ("drawing", "pict", "object"):
            now.has_picture = True

    def data(self, text: str) -> None:
        if self._texts and self._open and not self._in_fallback:
            self._add(text)

    def _add(self, text: str) -> None:
        if not self._in_deleted:
            self._open[-1].pieces.append((text, self._run_strong, self._run_mono))

    def finish(self, tag: str) -> None:
        if tag == "Fallback":
            self._in_fallback -= 1
        if self._in_fallback:
            return
        if tag == "t" and self._texts:
            self._texts -= 1
        elif tag == "r" and self._in_run:
            self._in_run -= 1
            self._run_strong = self._run_mono = False
        elif tag in ("del", "moveFrom") and self._in_deleted:
            self._in_deleted -= 1
        elif tag == "p" and self._open:
            block = self._block(self._open.pop())
            if block is not None:
                self._place(block)
        elif tag == "tc" and self._tables:
            self._tables[-1].skip = 0
        elif tag == "tbl" and self._tables:
            self._end_table(self._tables.pop())

    # What comes of it

    def _place(self, block: Block) -> None:
        if self._tables and self._tables[-1].rows and self._tables[-1].rows[-1]:
            table = self._tables[-1]
            table.rows[-1][-1 - table.skip].append(block)
        else:
            _append(self._made, block)

    def _end_table(self, table: _Table) -> None:
        rows = [row for row in table.rows if any(row)]
        if not rows:
            return
        if max(map(len, rows)) == 1 or len(rows) == 1:  # a box around text, and no table
            for row in rows:
                for cell in row:
                    for block in cell:
                        self._place(block)
            return
        cells = squared([["\n".join(b.text for b in cell) for cell in row] for row in rows])
        span = Span(PARAGRAPH, table.first, self._number)
        self._place(Block(TABLE, table_text(cells), span, cells=cells))

    def _block(self, made: _Paragraph) -> Block | None:
        looks, span = self._looks, Span(PARAGRAPH, made.number, made.number)
        text = _text(made.pieces)
        if not text.strip():
            return Block(PROSE, "", span, left="picture") if made.has_picture else None
        if looks.styles.is_contents(made.style):
            return Block(PROSE, text.strip(), span, left="table_of_contents")
        self.pictures += made.has_picture
        level = looks.styles.level(made.style)
        if made.outline is not None and made.outline < 9:
            level = made.outline + 1
        if level >= 0 and not self._tables:
            return Block(HEADING, " ".join(text.split()), span, level=level)
        shown = [p for p in made.pieces if p[0].strip()]
        if looks.styles.is_code(made.style) or all(is_code for _, _, is_code in shown):
            plain = "".join(piece for piece, _, _ in made.pieces)
            return Block(CODE, plain.rstrip(), span)
        ident, depth = looks.styles.list_of(made.style)
        if made.list_id is not None:
            ident, depth = made.list_id, made.list_level
        is_item, number = looks.lists.count(ident, depth)
        more: dict[str, Any] = {"level": depth, "number": number} if is_item else {}
        lead = _lead(made.pieces)
        return Block(ITEM if is_item else PROSE, text.strip(), span, lead=lead, **more)


def _append(made: list[Block], block: Block) -> None:
    """Adds a block; paragraphs of code that follow one another are one piece of it."""
    before = made[-1] if made else None
    if block.kind == CODE and before and before.kind == CODE and block.span.first - before.span.last <= _BLANK_LINES:
        ends = "\n" * (block.span.first - before.span.last)  # nothing but empty ones lies between them
        made[-1] = replace(before, text=f"{before.text}{ends}{block.text}", span=before.span.to(block.span))
    else:
        made.append(block)


def _text(pieces: list[tuple[str, bool, bool]]) -> str:
    """The text of a paragraph, code between its marks."""
    found, is_open = "", False
    for text, _, is_code in pieces:
        if is_code != is_open and text.strip():
            found, is_open = found + "`", is_code
        found += text
    found += "`" if is_open else ""
    return "\n".join(" ".join(line.split()) for line in found.split("\n")).strip()


def _lead(pieces: list[tuple[str, bool, bool]]) -> str:
    found = ""
    for text, is_strong, _ in pieces:
        if not is_strong and text.strip():
            break
        found += text
    return " ".join(found.split())
