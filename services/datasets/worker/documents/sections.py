"""A document cut at its headings, and what of each section is still free.

Law of this room: pure. A section has its own blocks alone; what stands below a
deeper heading is that one's. Every block is in exactly one section.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from services.datasets.worker.documents import patterns
from services.datasets.worker.documents.blocks import CODE, HEADING, ITEM, MEANING, PROSE, TABLE, TERM, Block, Span

_NUMBER = re.compile(
    r"(?:(?:chapter|section|part|appendix|kapitel|abschnitt|teil|anhang)\s+[\dIVXA-Z]+(?:\.\d+)*\s*[.:–—-]\s*"
    r"|(?:\d{1,2}|[A-Z])(?:\.\d{1,2})+[.)]?\s+|(?:\d{1,2}|[A-Z]|[IVX]{1,5})[.):]\s+|\d{1,2}\s+)(?=\S)",
    re.I,
)


@dataclass(slots=True)
class Section:
    """A heading with the blocks up to the next one."""

    blocks: Sequence[Block]
    """Of the whole document."""
    heading: int | None
    """Number of its heading; None before the first one."""
    path: tuple[str, ...]
    """Headings from the outermost to its own, without their numbers."""
    body: list[int] = field(default_factory=list)
    free: set[int] = field(default_factory=set)
    """Of its body: what nobody took yet."""
    has_parts: bool = False
    """There are sections inside of it."""
    title: str = ""
    """Of the document."""

    @property
    def topic(self) -> str:
        """What it is about."""
        return self.path[-1] if self.path else ""

    @property
    def above(self) -> str:
        """What the section around it is about; the document, where there is none."""
        return self.path[-2] if len(self.path) > 1 else self.title

    def left(self) -> list[int]:
        """What is still free, in order."""
        return [n for n in self.body if n in self.free]

    def runs(self, kind: str) -> Iterator[list[int]]:
        """Free blocks of a kind that follow one another."""
        run: list[int] = []
        for n in self.body:
            if n in self.free and self.blocks[n].kind == kind:
                run.append(n)
            elif run:
                yield run
                run = []
        if run:
            yield run

    def neighbour(self, n: int, by: int) -> int | None:
        """The free block beside another."""
        return n + by if n + by in self.free else None


def cut(blocks: Sequence[Block], title: str) -> list[Section]:
    """The sections of blocks that nobody left out; a lone heading above all others is a title and in no path below."""
    heads = [n for n, b in enumerate(blocks) if b.kind == HEADING]
    top = _title_of(blocks, heads)
    name = bare(blocks[top].text) if top is not None else title
    sections = [Section(blocks, None, (title,) if title else ())]
    open_: list[tuple[int, Section]] = []
    for n, block in enumerate(blocks):
        if block.kind == HEADING:
            while open_ and open_[-1][0] >= block.level:
                open_.pop()
            for _, around in open_:
                around.has_parts = True
            above = [s.topic for _, s in open_ if s.heading != top and not patterns.CONTENTS.fullmatch(s.topic)]
            made = Section(blocks, n, (*above, bare(block.text)), title="" if n == top else name)
            open_.append((block.level, made))
            sections.append(made)
        else:
            sections[-1].body.append(n)
            sections[-1].free.add(n)
    return sections


def _title_of(blocks: Sequence[Block], heads: Sequence[int]) -> int | None:
    if not heads:
        return None
    lowest = min(blocks[n].level for n in heads)
    highest = [n for n in heads if blocks[n].level == lowest]
    if patterns.CONTENTS.fullmatch(bare(blocks[heads[0]].text)):  # it stands before all others, and above none
        return None
    return heads[0] if highest == [heads[0]] and len(heads) > 1 else None


def bare(heading: str) -> str:
    """A heading without its number and its marks of code."""
    text = " ".join(heading.replace("`", "").split()).strip("# ")
    return _NUMBER.sub("", text, count=1) if _NUMBER.match(text) else text


def written(blocks: Iterable[Block]) -> str:
    """Blocks as Markdown."""
    made, before = "", None
    for block in blocks:
        text = _written(block)
        if before is not None:
            is_list = block.kind in (ITEM, MEANING) and before.kind in (ITEM, TERM, MEANING)
            made += "\n" if is_list else "\n\n"
        made += text
        before = block
    return made


def _written(block: Block) -> str:
    if block.kind == ITEM:
        mark = "- " if block.number is None else f"{block.number}. "
        return _indented(block.text, "  " * block.level + mark)
    if block.kind == CODE:
        fence = "```"
        while fence in block.text:
            fence += "`"
        return f"{fence}{block.language}\n{block.text}\n{fence}"
    if block.kind == MEANING:
        return _indented(block.text, ": ")
    if block.kind in (PROSE, TABLE, TERM, HEADING):
        return block.text
    raise AssertionError(block.kind)


def _indented(text: str, mark: str) -> str:
    first, *rest = text.split("\n")
    return "\n".join([mark + first, *(" " * len(mark) + line for line in rest)])


def spans(blocks: Sequence[Block], numbers: Iterable[int]) -> tuple[Span, ...]:
    """Where blocks stand; those that follow one another are one stretch."""
    found: list[Span] = []
    last = -2
    for n in sorted(numbers):
        span = blocks[n].span
        if found and n == last + 1 and span >= found[-1]:
            found[-1] = found[-1].to(span)
        else:
            found.append(span)
        last = n
    return tuple(found)


def words(text: str) -> int:
    """Words of a text, by its blanks; a script without blanks counts two signs as a word."""
    by_blanks = len(text.split())
    return max(by_blanks, sum(1 for c in text if c > "\u2e80") // 2)
