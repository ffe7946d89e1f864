"""What every page repeats: running heads, feet and the numbers of pages.

Law of this room: pure. Only lines at the head or foot of a page are looked at,
and only what comes back on other pages, in one place, is furniture.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence

from services.datasets.worker.documents.pdf_lines import Line
from services.datasets.worker.documents.pdf_words import Page

_EDGE = 0.13
"""Of the height of a page."""
_LOOKED_AT = 3
_NUMBER = re.compile(
    r"(?:(?:page|seite|p\.)\s*)?[-–—|\s]*(?:\d{1,4}|[ivxlc]{1,7})[-–—|\s]*(?:(?:of|/|von)\s*\d{1,4})?", re.I
)


def furniture(pages: Sequence[Page], lines: Sequence[Sequence[Line]]) -> set[tuple[int, int]]:
    """Place of the page and place of the line in it, of every line that is furniture."""
    edges: list[list[tuple[int, Line]]] = [_edges(p, found) for p, found in zip(pages, lines, strict=True)]
    texts: Counter[tuple[str, int]] = Counter()
    heights: dict[int, set[int]] = defaultdict(set)
    for n, found in enumerate(edges):
        for key in {(_plain(line.text), _height(pages[n], line)) for _, line in found}:
            texts[key] += 1
    least = 2 if len(pages) < 6 else 3
    repeated = {key for key, count in texts.items() if count >= least and key[0]}
    taken: set[tuple[int, int]] = set()
    for n, found in enumerate(edges):
        for place, line in found:
            height = _height(pages[n], line)
            if any((_plain(line.text), height + d) in repeated for d in (-1, 0, 1)):
                taken.add((n, place))
                heights[height].add(n)
    busy = {height for height, seen in heights.items() if len(seen) >= max(3, len(pages) // 2)}
    for n, found in enumerate(edges):
        for place, line in found:
            # A head that changes with the chapter, in the place of all heads; a number that stands alone.
            is_in_place = any(_height(pages[n], line) + d in busy for d in (-1, 0, 1))
            if is_in_place or (len(pages) > 1 and _NUMBER.fullmatch(line.text.strip()) and _is_last(line, found)):
                taken.add((n, place))
    return taken


def _edges(page: Page, lines: Sequence[Line]) -> list[tuple[int, Line]]:
    """The outermost lines at head and foot."""
    if not lines:
        return []
    by_height = sorted(enumerate(lines), key=lambda found: -found[1].base)
    head = [f for f in by_height[:_LOOKED_AT] if f[1].base > (1 - _EDGE) * page.height]
    foot = [f for f in by_height[-_LOOKED_AT:] if f[1].base < _EDGE * page.height]
    return head + [f for f in foot if f not in head]


def _is_last(line: Line, found: Sequence[tuple[int, Line]]) -> bool:
    bases = [other.base for _, other in found]
    return line.base in (min(bases), max(bases))


def _plain(text: str) -> str:
    """A text as it comes back: its numbers are one sign."""
    found = re.sub(r"\d+", "#", text.lower())
    return re.sub(r"\s+", " ", re.sub(r"^[ivxlc]{1,7}$", "#", found)).strip()


def _height(page: Page, line: Line) -> int:
    return round(line.base / page.height * 200)
