"""What steps leave as it is: code, genes, Greek letters, raised digits, links.

Law of this room: pure. A step changes a text by matches; a match that touches a
protected span is not changed, so that what is protected stays byte for byte.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from services.datasets.worker.steps.api import parameter
from services.datasets.worker.steps.genes import GENES

# A line that begins or ends as prose does not.
_CODE_LINE = (
    r"(?:def|class|async|elif|assert|raise|yield|lambda|const|let|var|function|public|private|static|#include|SELECT)\b"
    r"[^\n]*[(){};=:]|(?:return|print|console\.log|printf)\b[ (][^\n]*|(?:from\s+[\w.]+\s+)?import\s+[\w.{*][^\n]*"
    r"|(?:for|while|if|else|try|except|with)\b[^\n]*:"
    r"|[\w.\[\]'\"]+(?:[ \t]*,[ \t]*[\w.\[\]]+)*[ \t]*(?:[-+*/|&%^:]|//|\*\*)?=[^=\n][^\n]*|>>>[^\n]*|[^\n]*[;{}]"
)
PATTERNS: Mapping[str, re.Pattern[str]] = {
    "code": re.compile(
        r"^(?P<fence>```+|~~~+)[^\n]*\n.*?(?:^(?P=fence)[^\n]*$|\Z)"  # a fence that is never closed goes to the end
        r"|(?<!`)(?P<tick>`++)[^\n]+?(?<!`)(?P=tick)(?!`)"
        rf"|^[ \t]*(?:{_CODE_LINE})[ \t]*$",
        re.MULTILINE | re.DOTALL,
    ),
    "genes": GENES,
    "greek": re.compile(r"[\u0370-\u03ff\u1f00-\u1fff\u2126\u00b5][\u0300-\u036f]*"),
    "scripts": re.compile(r"[\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u209c\u2150-\u215e\u2189]+"),
    "math": re.compile(
        r"\\\((?:(?!\\[()]).)*\\\)|\\\[(?:(?!\\[\[\]]).)*\\\]|\$\$[^$]+\$\$|\$(?=[^\s$\d])[^$\n]{1,300}?(?<=[^\s$\\])\$(?!\d)",
        re.DOTALL,
    ),
    "links": re.compile(r"(?:https?|ftp)://[^\s<>\"]+|\bwww\.[^\s<>\"]+|\bdoi:\s*10\.\S+|\b10\.\d{4,9}/\S+"),
}
_ROUNDS = 100
Spans = tuple[list[int], list[int]]
"""Beginnings and ends of what is protected, in order and apart."""


def protect(*default: str) -> Any:
    """A parameter that names what a step leaves as it is."""
    return parameter(default, help="what stays as it is, byte for byte", choices=tuple(PATTERNS))


def spans(text: str, names: Iterable[str]) -> Spans:
    """Where a text is protected."""
    found = sorted(m.span() for name in names for m in PATTERNS[name].finditer(text))
    begins: list[int] = []
    ends: list[int] = []
    for begin, end in found:
        if ends and begin <= ends[-1]:
            ends[-1] = max(ends[-1], end)
        else:
            begins.append(begin)
            ends.append(end)
    return begins, ends


def touches(guarded: Spans, begin: int, end: int) -> bool:
    """Whether a stretch shares a character with what is protected."""
    begins, ends = guarded
    at = bisect.bisect_right(ends, begin)
    return at < len(begins) and begins[at] < end


def replace(pattern: re.Pattern[str], change: Callable[[re.Match[str]], str], text: str, names: Iterable[str]) -> str:
    """The text with every match changed that touches nothing protected."""
    if pattern.search(text) is None:
        return text
    guarded = spans(text, names)
    return pattern.sub(lambda m: m[0] if touches(guarded, *m.span()) else change(m), text)


def between(text: str, names: Iterable[str], change: Callable[[str], str]) -> str:
    """The text with all changed that is not protected."""
    pieces: list[str] = []
    at = 0
    for begin, end in zip(*spans(text, names), strict=True):
        pieces += (change(text[at:begin]), text[begin:end])
        at = end
    return "".join((*pieces, change(text[at:])))


def settled(change: Callable[[str], str], text: str) -> str:
    """The text, changed until the change finds nothing more: what it made may be a match beside what stood there."""
    for _ in range(_ROUNDS):
        once = change(text)
        if once == text:
            break
        text = once
    return text
