"""Blanks, line ends, characters: the same text, written in one way.

Law of this room: pure. Every step here changes nothing when it is applied again.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import Any

from services.datasets.worker.plain import Plain
from services.datasets.worker.steps import api
from services.datasets.worker.steps.protect import between, protect, settled

# Blanks inside a line; what begins a line is indentation and stays.
_RUNS = re.compile(r"(?<=[^\s])[ \t\u00a0\u2000-\u200a\u202f\u205f\u3000]+")
_TRAILING = re.compile(r"(?<![ \t\u00a0])[ \t\u00a0]++(?=\n|\Z)")
_BREAKS = re.compile(r"\r\n?|[\u2028\u2029\u0085]")
_FORMS = ("NFC", "NFD", "NFKC", "NFKD")
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufeff\u00ad]")


@dataclass(frozen=True, slots=True)
class Whitespace:
    """Collapses blanks inside lines and empty lines, and strips the ends of turns; indentation and code stay."""

    collapse: bool = api.parameter(True, help="runs of blanks inside a line become one blank")
    strip: bool = api.parameter(True, help="no blanks at the ends of lines and of turns")
    empty_lines: int = api.parameter(1, help="so many empty lines may follow one another", minimum=0, maximum=100)
    protect: tuple[str, ...] = protect("code")
    where: str = api.where()

    def apply(self, example: Plain) -> Plain:
        """Infill rows are code and stay; where a prompt ends and its completion begins nothing is stripped."""
        if "completion" in example:
            return api.map_texts(example, self._lines, self.where)
        return api.map_texts(example, self._turn, self.where, infill=False)

    def _turn(self, text: str) -> str:
        text = self._lines(text)
        return text.strip(" \t\r\n\u00a0") if self.strip else text

    def _lines(self, text: str) -> str:
        many = re.compile(rf"\n{{{self.empty_lines + 2},}}")
        return settled(lambda t: between(t, self.protect, lambda s: self._stretch(s, many)), text)

    def _stretch(self, text: str, many: re.Pattern[str]) -> str:
        if self.collapse:
            text = _RUNS.sub(" ", text)
        if self.strip:
            text = _TRAILING.sub(lambda m: "" if m.end() < len(text) else m[0], text)
        return many.sub("\n" * (self.empty_lines + 1), text)


@dataclass(frozen=True, slots=True)
class LineEnds:
    """Ends every line in a newline: CR LF, CR, and Unicode's line and paragraph separators."""

    where: str = api.where()

    def apply(self, example: Plain) -> Plain:
        """Code too."""
        return api.map_texts(example, lambda text: _BREAKS.sub("\n", text), self.where)


@dataclass(frozen=True, slots=True)
class Unicode:
    """Normalises characters to one of Unicode's forms; Greek letters, genes and raised digits stay."""

    form: str = api.parameter("NFC", help="Unicode's normalisation form", choices=_FORMS)
    drop_invisible: bool = api.parameter(
        False, help="leave out control characters but tab and line ends, soft hyphens, and byte order marks"
    )
    protect: tuple[str, ...] = protect("code", "genes", "greek", "scripts", "math", "links")
    where: str = api.where()

    def apply(self, example: Plain) -> Plain:
        """Infill rows are code and stay."""
        return api.map_texts(example, self._normal, self.where, infill=False)

    def _normal(self, text: str) -> str:
        form: Any = self.form
        if self.drop_invisible:
            text = _CONTROL.sub("", text)
        if unicodedata.is_normalized(form, text):
            return text
        return settled(lambda t: between(t, self.protect, lambda s: unicodedata.normalize(form, s)), text)


@dataclass(frozen=True, slots=True)
class StripTags:
    """Takes HTML tags and comments out of prose, writes entities as characters; code stays."""

    protect: tuple[str, ...] = protect("code")
    where: str = api.where()

    def apply(self, example: Plain) -> Plain:
        """Infill rows are code and stay."""
        return api.map_texts(example, self._bare, self.where, infill=False)

    def _bare(self, text: str) -> str:
        if "<" not in text and "&" not in text:
            return text
        return settled(lambda t: between(t, self.protect, _without_tags), text)


_TAG = re.compile(
    r"<!--(?:(?!<!--).)*?-->|</?(?:a|abbr|article|aside|b|blockquote|body|br|caption|center|cite|code|dd|del|div|dl|dt|em|figure|font"
    r"|footer|h[1-6]|head|header|hr|html|i|img|ins|label|li|link|main|mark|meta|nav|ol|p|pre|s|section|small|span|strong"
    r"|sub|sup|table|tbody|td|tfoot|th|thead|title|tr|tt|u|ul|var)(?:\s[^<>]*)?/?>",
    re.IGNORECASE | re.DOTALL,
)
_BLOCK = re.compile(r"</?(?:br|p|div|li|tr|h[1-6]|ul|ol|table|blockquote|section|article|pre)\b", re.IGNORECASE)
_ENTITIES = {"&nbsp;": " ", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&#39;": "'", "&apos;": "'", "&amp;": "&"}
_ENTITY = re.compile("|".join(_ENTITIES))


def _without_tags(text: str) -> str:
    text = _TAG.sub(lambda m: "\n" if _BLOCK.match(m[0]) and not m[0].startswith("</") else "", text)
    return _ENTITY.sub(lambda m: _ENTITIES[m[0]], text)
