"""Markdown as blocks: CommonMark with tables, and front matter at its head.

Law of this room: pure. The parser tells lines, so spans are whole lines.
Markup goes, but for the marks of code; what only links or shows is left out by
name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from markdown_it import MarkdownIt

from services.datasets.worker.documents import bounds, html
from services.datasets.worker.documents.blocks import (
    CODE,
    HEADING,
    ITEM,
    PROSE,
    TABLE,
    Block,
    Document,
    Span,
    pictures_in_text,
    squared,
    table_text,
)
from services.datasets.worker.documents.lines import Lines

_FENCE = re.compile(r"(-{3}|\+{3})\s*")
_TITLE = re.compile(r"""title\s?[:=]\s*(?P<quote>["']?)(?P<title>[^\s"'|>].*?)(?P=quote)\s*""")
_MOST_TITLE = 200
_ANCHOR = re.compile(r"[ \t]+\{[#.:][^{}]{0,200}\}\Z")
"""What some programs write behind a heading, to link to it."""
_BLANKS = re.compile(r"[ \t]+")


def read(data: bytes) -> Document:
    """The document that the bytes are."""
    text = bounds.text_of(data)
    lines = Lines(text)
    after = _front_matter(lines.texts)
    blocks = [Block(PROSE, "\n".join(lines.texts[:after]), lines.span(0, after), left="front_matter")] if after else []
    body = "\n" * after + "\n".join(lines.texts[after:])
    parser = MarkdownIt("commonmark", {"maxNesting": bounds.MAX_NESTING}).enable(["table", "strikethrough"])
    tokens = parser.parse(body)
    if any(token.level >= bounds.MAX_NESTING - 1 for token in tokens):
        raise bounds.too_deep()
    walk = _Walk(tokens, lines)
    blocks += walk.blocks()
    bounds.checked(len(blocks), 0)
    return Document("markdown", blocks, _title(lines.texts[:after]), said=pictures_in_text(walk.pictures))


def _front_matter(lines: Sequence[str]) -> int:
    """How many lines it has, its fences too."""
    fence = _FENCE.fullmatch(lines[0])
    if fence is None:
        return 0
    for number, line in enumerate(lines[1:200], 2):
        if line.rstrip() == fence[1]:
            return number
        if number == 2 and not re.match(r"[\w\"'#-]", line):
            return 0
    return 0


def _title(front_matter: Sequence[str]) -> str:
    """What the data at the head call the document."""
    found = next(filter(None, map(_TITLE.fullmatch, front_matter)), None)
    return " ".join(found["title"].split())[:_MOST_TITLE] if found else ""


class _Walk:
    """Tokens, one after the other, as blocks."""

    def __init__(self, tokens: Sequence[Any], lines: Lines) -> None:
        self._tokens = tokens
        self._lines = lines
        self._lists: list[int | None] = []
        """The numbers of the lists that one is in; None = marks."""
        self._item: tuple[int | None, int] | None = None
        """An item whose first text is still to come: its number and level."""
        self._made: list[Block] = []
        self.pictures = 0
        """Within text."""

    def blocks(self) -> list[Block]:
        at = 0
        while at < len(self._tokens):
            at = self._take(at)
        return self._made

    def _take(self, at: int) -> int:
        token = self._tokens[at]
        kind = token.type
        if kind == "heading_open":
            inline = _Inline(self._tokens[at + 1])
            self._add(HEADING, token, inline, level=int(token.tag[1:]))
            return at + 3
        if kind == "paragraph_open":
            self._prose(token, _Inline(self._tokens[at + 1]))
            return at + 3
        if kind in ("fence", "code_block"):
            language = token.info.split()[0] if token.info.split() else ""
            text = token.content.removesuffix("\n")
            self._item = None
            self._append(CODE, text, token, level=len(self._lists), language=language.strip("{}.").lower())
        elif kind == "html_block":
            self._html(token)
        elif kind == "table_open":
            return self._table(at)
        elif kind == "bullet_list_open":
            self._lists.append(None)
        elif kind == "ordered_list_open":
            self._lists.append(int(token.attrGet("start") or 1))
        elif kind in ("bullet_list_close", "ordered_list_close"):
            self._lists.pop()
            self._item = None
        elif kind == "list_item_open":
            number = self._lists[-1]
            self._item = number, len(self._lists) - 1
            if number is not None:
                self._lists[-1] = number + 1
        return at + 1

    def _prose(self, token: Any, inline: _Inline) -> None:
        if not inline.text and not inline.left:
            return
        if self._item is not None:
            number, level = self._item
            self._item = None
            self._add(ITEM, token, inline, level=level, number=number)
        else:
            self._add(PROSE, token, inline, level=len(self._lists))

    def _add(self, kind: str, token: Any, inline: _Inline, **more: Any) -> None:
        left = "" if kind == HEADING and inline.text else inline.left
        self.pictures += 0 if left else inline.pictures
        self._append(kind, inline.text, token, lead=inline.lead, left=left, **more)

    def _append(self, kind: str, text: str, token: Any, **more: Any) -> None:
        if kind == HEADING:
            text = _ANCHOR.sub("", text)
        if text or more.get("left"):
            self._made.append(Block(kind, text, self._span(token), **more))

    def _span(self, token: Any) -> Span:
        first, end = token.map
        return self._lines.span(first, end)

    def _table(self, at: int) -> int:
        opened = self._tokens[at]
        rows: list[list[str]] = []
        while self._tokens[at].type != "table_close":
            token = self._tokens[at]
            if token.type == "tr_open":
                rows.append([])
            elif token.type == "inline":
                rows[-1].append(_Inline(token).text)
            at += 1
        cells = squared(rows)
        self._append(TABLE, table_text(cells), opened, cells=cells, level=len(self._lists))
        return at + 1

    def _html(self, token: Any) -> None:
        span = self._span(token)
        for block in html.blocks_of(token.content):
            # Where in these lines is not told apart: a block of HTML here is some lines.
            self._made.append(replace(block, span=span))


class _Inline:
    """The text of an inline token, and what it is made of."""

    def __init__(self, token: Any) -> None:
        children = list(token.children or ())
        self.text = _clean("".join(_texts(children)))
        self.lead = _lead(children)
        self.left = _only(children)
        self.pictures = sum(child.type == "image" for child in children)


def _texts(children: Sequence[Any]) -> Iterator[str]:
    for child in children:
        if child.type == "text":
            yield child.content
        elif child.type == "code_inline":
            yield f"`{child.content}`"
        elif child.type == "softbreak":
            yield " "
        elif child.type == "hardbreak" or (child.type == "html_inline" and child.content.lower().startswith("<br")):
            yield "\n"


def _clean(text: str) -> str:
    return "\n".join(_BLANKS.sub(" ", line).strip() for line in text.split("\n")).strip()


def _lead(children: Sequence[Any]) -> str:
    """The emphasised words at the beginning."""
    begun = [c for c in children if c.type != "text" or c.content.strip()]
    if not begun or begun[0].type not in ("strong_open", "em_open"):
        return ""
    end = begun[0].type.replace("_open", "_close")
    inside: list[Any] = []
    for child in begun[1:]:
        if child.type == end:
            break
        inside.append(child)
    return _clean("".join(_texts(inside)))


def _only(children: Sequence[Any]) -> str:
    """Why there is nothing to learn in it: it shows, or links, and says nothing besides."""
    depth, outside, links, pictures = 0, "", 0, 0
    for child in children:
        if child.type == "link_open":
            depth, links = depth + 1, links + 1
        elif child.type == "link_close":
            depth -= 1
        elif child.type == "image":
            pictures += 1
        elif child.type in ("text", "code_inline") and not depth:
            outside += child.content
    if any(c.isalnum() for c in outside):
        return ""
    return "links_only" if links else "picture" if pictures else ""
