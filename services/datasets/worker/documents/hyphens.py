"""Words that a line's end cut in two.

Law of this room: pure. A hyphen stays where the document itself writes the
word with one, and goes where it writes it whole; else it goes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Set

_END = re.compile(r"([^\W\d_]{2,})-$")
_BEGIN = re.compile(r"([^\W\d_][\w’']*)")
_LONGEST = 100
"""Letters of a word: no more of a long text is looked at for each of its lines."""
_WORD = re.compile(r"[^\W\d_]+(?:-[^\W\d_]+)*")


def vocabulary(lines: Iterable[str]) -> Set[str]:
    """Words that stand whole within lines."""
    found: set[str] = set()
    for line in lines:
        found.update(word.lower() for word in _WORD.findall(line.rstrip("-")))
    return found


def join(first: str, second: str, known: Set[str]) -> str:
    """Two lines as one text."""
    end, begin = _END.search(first[-_LONGEST:]), _BEGIN.match(second[:_LONGEST])
    if not first or not second:
        return first or second
    if end is None or begin is None or not second[0].islower():
        is_open = first[-1] in "-/" and first[-2:-1].isalnum() and second[0].isalnum()
        return f"{first}{'' if is_open else ' '}{second}"
    whole, hyphened = f"{end[1]}{begin[1]}".lower(), f"{end[1]}-{begin[1]}".lower()
    keeps = hyphened in known and whole not in known
    return f"{first}{second}" if keeps else f"{first[:-1]}{second}"
