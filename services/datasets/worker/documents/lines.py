"""Where the lines of a text begin and end.

Law of this room: pure. Lines end with LF, CR LF or CR, as editors count them.
"""

from __future__ import annotations

import bisect
import re

from services.datasets.worker.documents.blocks import LINE, Span

_END = re.compile(r"\r\n|\n|\r")


class Lines:
    """A text by lines; numbers here are from zero."""

    def __init__(self, text: str) -> None:
        self._begins = [0]
        self._ends: list[int] = []
        for found in _END.finditer(text):
            self._ends.append(found.start())
            self._begins.append(found.end())
        self._ends.append(len(text))
        self.texts = [text[b:e] for b, e in zip(self._begins, self._ends, strict=True)]

    def span(self, first: int, end: int) -> Span:
        """Lines from `first` to before `end`, without blank ones at either side."""
        end = min(end, len(self.texts))
        while end > first + 1 and not self.texts[end - 1].strip():
            end -= 1
        while first < end - 1 and not self.texts[first].strip():
            first += 1
        return Span(LINE, first + 1, end, self._begins[first], self._ends[end - 1])

    def at(self, begin: int, end: int) -> Span:
        """Characters from `begin` to before `end`."""
        first = bisect.bisect_right(self._begins, begin)
        last = max(first, bisect.bisect_left(self._begins, end))
        return Span(LINE, first, last, begin, end)

    def normal(self) -> str:
        """The text with LF alone."""
        return "\n".join(self.texts)
