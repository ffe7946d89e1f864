"""Plain text as blocks: paragraphs between blank lines, and what people draw with signs.

Law of this room: pure. Only what is certain is more than prose: underlined,
numbered or shouted headings, lists with marks, indented code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from services.datasets.worker.documents import bounds
from services.datasets.worker.documents.blocks import CODE, HEADING, ITEM, PROSE, Block, Document
from services.datasets.worker.documents.lines import Lines

MARK = re.compile(r"(\s*)(?:([-*+•‣◦–])|(\d{1,3})[.)])\s+(?=\S)")
NUMBERED = re.compile(
    r"(?:(?:chapter|section|part|appendix)\s+)?((?:\d{1,2}|[A-Z])(?:\.\d{1,2}){0,4})[.:)]?\s+\S", re.I
)
_UNDERLINE = re.compile(r"\s*(={3,}|-{3,}|~{3,}|\^{3,}|\*{3,})\s*")
_RULE = re.compile(r"[-=*_~#+.\s]{3,}")
_MOST_WORDS = 14


def read(data: bytes) -> Document:
    """The document that the bytes are."""
    lines = Lines(bounds.text_of(data))
    blocks = list(_blocks(lines))
    bounds.checked(len(blocks), 0)
    return Document("text", blocks)


def _blocks(lines: Lines) -> Iterator[Block]:
    at, texts = 0, lines.texts
    while at < len(texts):
        if not texts[at].strip(" \t\f"):
            at += 1
            continue
        end = at
        while end < len(texts) and texts[end].strip(" \t\f"):
            end += 1
        yield from _paragraph(lines, at, end)
        at = end


def _paragraph(lines: Lines, begin: int, end: int) -> Iterator[Block]:
    while end - begin > 1 and _UNDERLINE.fullmatch(lines.texts[begin + 1]) and is_title(lines.texts[begin]):
        level = 1 if lines.texts[begin + 1].strip()[0] == "=" else 2
        yield Block(HEADING, lines.texts[begin].strip(), lines.span(begin, begin + 2), level=level)
        begin += 2
    texts = lines.texts[begin:end]
    if not texts:
        return
    if len(texts) == 1 and (level := heading_level(texts[0])):
        yield Block(HEADING, texts[0].strip(), lines.span(begin, end), level=level)
    elif all(text.startswith(("    ", "\t")) for text in texts) and not MARK.match(texts[0]):
        yield Block(CODE, _dedented(texts), lines.span(begin, end))
    elif all(_RULE.fullmatch(text.strip()) for text in texts):
        return
    else:
        yield from _items(lines, begin, end)


def _items(lines: Lines, begin: int, end: int) -> Iterator[Block]:
    """A paragraph, or the items that it is made of."""
    marks = [(n, found) for n in range(begin, end) if (found := MARK.match(lines.texts[n]))]
    if not marks or (marks[0][0] != begin and marks[0][1][3] not in (None, "1")):
        yield _joined(lines, begin, end, None, PROSE)
        return
    if marks[0][0] > begin:
        yield _joined(lines, begin, marks[0][0], None, PROSE)
    indents = sorted({len(found[1].expandtabs(4)) for _, found in marks})
    for (at, found), after in zip(marks, [n for n, _ in marks[1:]] + [end], strict=True):
        level = indents.index(len(found[1].expandtabs(4)))
        yield _joined(lines, at, after, found, ITEM, level, int(found[3]) if found[3] else None)


def _joined(
    lines: Lines, begin: int, end: int, mark: re.Match[str] | None, kind: str, level: int = 0, number: int | None = None
) -> Block:
    texts = [text.strip(" \t\f") for text in lines.texts[begin:end]]
    if mark is not None:
        texts[0] = lines.texts[begin][mark.end() :].strip()
    return Block(kind, joined(texts), lines.span(begin, end), level=level, number=number)


def joined(texts: Sequence[str]) -> str:
    """Lines of one paragraph as one line."""
    return " ".join(" ".join(texts).split())


def is_title(text: str) -> bool:
    """Whether a line can be a heading by its looks."""
    stripped = text.strip()
    return 0 < len(stripped.split()) <= _MOST_WORDS and stripped[-1] not in ".,;:" and any(map(str.isalpha, stripped))


def heading_level(text: str) -> int:
    """The level of a heading that stands alone; 0 for none."""
    stripped = text.strip()
    marked = re.match(r"(#{1,6})\s+\S", stripped)
    if marked:
        return len(marked[1])
    if not is_title(stripped):
        return 0
    found = NUMBERED.match(stripped)
    if found and stripped[found.end() - 1].isupper():
        return found[1].count(".") + 1
    letters = [c for c in stripped if c.isalpha()]
    if len(letters) > 3 and all(c.isupper() for c in letters):
        return 1
    return 1 if re.match(r"(?:chapter|part|appendix)\s+[\dIVXA-Z]+\b", stripped, re.I) else 0


def _dedented(texts: Sequence[str]) -> str:
    expanded = [text.expandtabs(4) for text in texts]
    indent = min(len(text) - len(text.lstrip()) for text in expanded)
    return "\n".join(text[indent:].rstrip() for text in expanded)
