"""HTML as blocks, as forgiving as browsers are where it matters here.

Law of this room: pure. No page is rendered and nothing is fetched: tags alone
say what is a heading, a list or code. What pages repeat around their text
(menus, footers, forms) is left out by name; scripts and styles are no text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any

from services.datasets.worker import charset_names
from services.datasets.worker.documents import bounds
from services.datasets.worker.documents.blocks import (
    CODE,
    HEADING,
    ITEM,
    MEANING,
    PROSE,
    TABLE,
    TERM,
    Block,
    Document,
    Span,
    pictures_in_text,
    squared,
    table_text,
)
from services.datasets.worker.documents.lines import Lines
from services.datasets.worker.found import INFO, Problem

_CHARSET = re.compile(rb"""<meta[^>]+charset\s*=\s*["']?\s*([A-Za-z0-9._-]{2,30})""", re.I)
_NO_TEXT = {"script", "style", "template", "noscript", "svg", "math", "iframe", "object", "canvas", "audio", "video"}
_AROUND = {"nav", "footer", "aside", "form", "button", "select", "menu", "dialog"}
_BLOCKS = {
    "address", "article", "aside", "blockquote", "body", "caption", "center", "dd", "details", "dialog", "div", "dl",
    "dt", "fieldset", "figcaption", "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr",
    "html", "head", "legend", "li", "main", "menu", "nav", "ol", "p", "pre", "section", "select", "button", "summary",
    "table", "tbody", "td", "tfoot", "th", "thead", "title", "tr", "ul",
}  # fmt: skip
_EMPTY = {"hr", "br", "img", "input", "meta", "link", "wbr", "area", "base", "col", "embed", "source", "track"}
_STRONG = {"b", "strong", "em", "i", "dfn"}
_MARKED = {"code", "kbd", "samp", "tt", "var"}
# What closes without being told, and how far up that is looked for.
_CLOSES: dict[str, tuple[set[str], set[str]]] = {
    "li": ({"li"}, {"ul", "ol", "menu"}),
    "dt": ({"dt", "dd"}, {"dl"}),
    "dd": ({"dt", "dd"}, {"dl"}),
    "tr": ({"tr", "td", "th"}, {"table"}),
    **dict.fromkeys(("thead", "tbody", "tfoot"), ({"thead", "tbody", "tfoot", "tr", "td", "th", "caption"}, {"table"})),
    "td": ({"td", "th"}, {"tr", "table"}),
    "th": ({"td", "th"}, {"tr", "table"}),
}
_BLANKS = re.compile(r"[ \t\r\n\f]+")
_SPACE, _BREAKS = re.compile(r"\s*"), re.compile(r"[\r\n]*")


def read(data: bytes) -> Document:
    """The document that the bytes are."""
    text = bounds.text_of(data, encoding_of(data))
    walk = _Walk(text, Lines(text))
    blocks = walk.run()
    return Document(
        "html", blocks, title=walk.title, said=[*_formulas(walk.formulas), *pictures_in_text(walk.pictures)]
    )


def _formulas(count: int) -> list[tuple[int, Problem]]:
    if not count:
        return []
    told = f"{count} formula{'s were' if count > 1 else ' was'} not read: how they are drawn is no text"
    return [(0, Problem("formulas_left_out", told, "write them in words or as TeX", "", INFO))]


def encoding_of(data: bytes) -> str:
    """The encoding that the file names in its head; none where it names none that is known."""
    found = _CHARSET.search(data[:4096])
    if found is None:
        return ""
    return charset_names.of_meta(found[1].decode())


def blocks_of(text: str) -> Sequence[Block]:
    """The blocks of a piece of HTML, with places inside of it."""
    return _Walk(text, Lines(text)).run()


@dataclass(slots=True)
class _Run:
    """Text of one block on its way."""

    pieces: list[tuple[str, bool, bool]] = field(default_factory=list)
    """Each with whether it is emphasised, and whether it links."""
    begin: int = -1
    pictures: int = 0


@dataclass(slots=True)
class _Table:
    """A table on its way."""

    at: int
    """Where it begins."""
    rows: list[list[list[Block]]] = field(default_factory=list)
    """Of cells, each with what lies in it."""


class _Walk(HTMLParser):
    """Tags and texts, one after the other, as blocks."""

    def __init__(self, text: str, lines: Lines) -> None:
        super().__init__(convert_charrefs=True)
        self._text = text
        self._lines = lines
        self._breaks = [0, *(m.end() for m in re.finditer("\n", text))]
        self._stack: list[str] = []
        self._strong = self._marked = self._links = 0
        self._lists: list[int | None] = []
        self._opened: list[int | None] = []
        """Numbers of the items that are open; None = they have a mark."""
        self._fresh = False
        """The next text is the first of the innermost."""
        self._silent = 0
        """So many elements are open whose text is not the page's."""
        self._run = _Run()
        self._tables: list[_Table] = []
        """Those that are open, the innermost last."""
        self._language = ""
        self._made: list[Block] = []
        self.title = ""
        self.formulas = self.pictures = 0

    def run(self) -> list[Block]:
        """All blocks."""
        self.feed(self._text)
        self.close()
        self._flush(len(self._text))
        while self._tables:
            self._end_table(len(self._text))
        bounds.checked(len(self._made), 0)
        return self._made

    def _at(self) -> int:
        line, column = self.getpos()
        return self._breaks[line - 1] + column

    # What the parser tells

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._silent:
            if tag not in _EMPTY and (tag in _BLOCKS or tag in _NO_TEXT):
                self._open_one(tag)
                self._silent += tag in _NO_TEXT
        elif tag in _BLOCKS:
            self._flush(self._at())
            self._close_silently(tag)
            if tag not in _EMPTY:
                self._open_one(tag)
            self._enter(tag, dict(attrs))
        elif tag in _NO_TEXT:
            self._open_one(tag)
            self._silent += 1
            self.formulas += tag == "math"
        elif tag == "br":
            if self._run.pieces:
                self._add("\n")
        elif tag == "img":
            self._run.pictures += 1
        else:
            self._count(tag, 1, dict(attrs))

    def _open_one(self, tag: str) -> None:
        self._stack.append(tag)
        if len(self._stack) > 4 * bounds.MAX_NESTING:
            raise bounds.too_deep(4 * bounds.MAX_NESTING)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag in _NO_TEXT:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in _BLOCKS and tag not in _NO_TEXT:
            if not self._silent:
                self._count(tag, -1, {})
            return
        if tag not in self._stack:
            return
        place = len(self._stack) - 1 - self._stack[::-1].index(tag)
        if not self._silent or not _NO_TEXT.intersection(self._stack[: place + 1]):
            self._flush(self._at())  # what shows beside text, as an icon does, parts none
        while True:
            closed = self._stack.pop()
            self._leave(closed)
            if closed == tag:
                return

    def handle_data(self, data: str) -> None:
        if self._silent:
            return
        if not self._is_pre():
            data = _BLANKS.sub(" ", data)
        if data.strip() or self._run.pieces:
            self._add(data)

    # What is open

    def _close_silently(self, tag: str) -> None:
        if "p" in self._stack and tag != "p" and self._stack[-1] == "p":
            self._stack.pop()
        elif tag == "p" and self._stack and self._stack[-1] == "p":
            self._stack.pop()
        closes, within = _CLOSES.get(tag, (set(), set()))
        lowest = len(self._stack)
        for depth in range(len(self._stack) - 1, -1, -1) if closes else ():
            if self._stack[depth] in within:
                break
            if self._stack[depth] in closes:
                lowest = depth
        while len(self._stack) > lowest:
            self._leave(self._stack.pop())

    def _enter(self, tag: str, attrs: dict[str, str | None]) -> None:
        if tag in ("ul", "ol", "menu"):
            start = attrs.get("start") or "1"
            self._lists.append(None if tag != "ol" else int(start) if start.isdigit() and len(start) < 7 else 1)
        elif tag == "li":
            number = self._lists[-1] if self._lists else None
            self._opened.append(number)
            self._fresh = True
            if self._lists and number is not None:
                self._lists[-1] = number + 1
        elif tag == "table":
            self._tables.append(_Table(self._at()))
        elif tag == "tr" and self._tables:
            self._tables[-1].rows.append([])
        elif tag in ("td", "th") and self._tables:
            if not self._tables[-1].rows:
                self._tables[-1].rows.append([])
            self._tables[-1].rows[-1].append([])
        elif tag == "pre":
            self._language = _language(attrs)

    def _leave(self, tag: str) -> None:
        if self._silent:
            self._silent -= tag in _NO_TEXT
        elif tag in ("ul", "ol", "menu") and self._lists:
            self._lists.pop()
        elif tag == "li" and self._opened:
            self._opened.pop()
            self._fresh = False
        elif tag == "table" and self._tables:
            self._end_table(self._at())

    def _count(self, tag: str, by: int, attrs: dict[str, str | None]) -> None:
        if tag in _STRONG:
            self._strong = max(0, self._strong + by)
        elif tag in _MARKED:
            if not self._is_pre():
                self._add("`")
            elif by > 0:
                self._language = self._language or _language(attrs)
            self._marked = max(0, self._marked + by)
        elif tag == "a":
            self._links = max(0, self._links + by)

    def _is_pre(self) -> bool:
        return "pre" in self._stack

    def _add(self, text: str) -> None:
        if self._run.begin < 0:
            blanks = _BREAKS if self._is_pre() else _SPACE
            found = blanks.match(self._text, self._at())
            self._run.begin = found.end() if found else self._at()
        self._run.pieces.append((text, self._strong > 0, self._links > 0))

    # What comes of it

    def _flush(self, end: int) -> None:
        run, self._run = self._run, _Run()
        text = "".join(piece for piece, _, _ in run.pieces)
        if self._is_pre():
            text = text.strip("\n").rstrip()
        else:
            text = "\n".join(_BLANKS.sub(" ", line).strip() for line in text.split("\n")).strip().replace("``", "")
        if not text:
            if run.pictures and not self._is_around():
                self._put(Block(PROSE, "", self._lines.at(max(0, end - 1), end), left="picture"))
            return
        while end > run.begin + 1 and self._text[end - 1].isspace():
            end -= 1
        span = self._lines.at(run.begin, max(end, run.begin + 1))
        self._place(text, span, run)

    def _place(self, text: str, span: Span, run: _Run) -> None:
        inside = next((t for t in reversed(self._stack) if t in _BLOCKS), "")
        if "title" in self._stack:
            self.title = self.title or " ".join(text.split())
            return
        left = "navigation" if self._is_around() else _only(run)
        self.pictures += 0 if left else run.pictures
        if inside[:1] == "h" and inside[1:].isdigit():  # many link to themselves
            left = "" if left == "links_only" else left
            self._put(Block(HEADING, " ".join(text.split()), span, level=int(inside[1]), left=left))
        elif self._is_pre():
            self._put(Block(CODE, text, span, level=len(self._opened), language=self._language, left=left))
            self._fresh = False
        elif inside in ("dt", "dd"):
            kind = TERM if inside == "dt" else MEANING
            self._put(Block(kind, text, span, left=left))
        elif self._opened and self._fresh:
            self._fresh = False
            more: dict[str, Any] = {"level": len(self._opened) - 1, "number": self._opened[-1]}
            self._put(Block(ITEM, text, span, lead=_lead(run), left=left, **more))
        else:
            self._put(Block(PROSE, text, span, level=len(self._opened), lead=_lead(run), left=left))

    def _put(self, block: Block) -> None:
        """Lays a block into the cell that is open, or behind all others. A caption stands outside of its table."""
        around = self._tables[:-1] if "caption" in self._stack else self._tables
        if around and around[-1].rows and around[-1].rows[-1]:
            around[-1].rows[-1][-1].append(block)
        else:
            self._made.append(block)

    def _is_around(self) -> bool:
        if any(tag in _AROUND for tag in self._stack):
            return True
        return "header" in self._stack and not {"main", "article"} & set(self._stack) and "h1" not in self._stack

    def _end_table(self, end: int) -> None:
        table = self._tables.pop()
        rows = [row for row in table.rows if any(row)]
        if not rows:
            return
        if len(rows) == 1 or max(map(len, rows)) == 1:  # it holds a page together and is no table
            for row in rows:
                for cell in row:
                    for block in cell:
                        self._put(block)
            return
        self.pictures += sum(block.left == "picture" for row in rows for cell in row for block in cell)
        cells = squared([["\n".join(block.text for block in cell).strip() for cell in row] for row in rows])
        left = "navigation" if self._is_around() else ""
        self._put(Block(TABLE, table_text(cells), self._lines.at(table.at, end), cells=cells, left=left))


def _language(attrs: dict[str, str | None]) -> str:
    found = re.search(r"(?:language|lang|highlight-source|brush:)[-\s]?([\w+#-]+)", attrs.get("class") or "")
    return found[1].lower() if found else ""


def _lead(run: _Run) -> str:
    found = ""
    for text, is_strong, _ in run.pieces:
        if not is_strong and text.strip(" `"):
            break
        found += text if is_strong else ""
    return found.strip()


def _only(run: _Run) -> str:
    outside = "".join(text for text, _, links in run.pieces if not links)
    if any(c.isalnum() for c in outside) or not any(links for _, _, links in run.pieces):
        return ""
    return "links_only"
