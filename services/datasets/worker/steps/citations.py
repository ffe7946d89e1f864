"""References to literature, taken out of prose.

Law of this room: pure. What might be an index, a list or a unit stays; a step
that takes too little leaves a wart, one that takes too much breaks a row.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from services.datasets.worker.plain import Plain
from services.datasets.worker.steps import api
from services.datasets.worker.steps.protect import protect, settled, spans, touches

Wanted: TypeAlias = Callable[[str, re.Match[str]], bool]

_STYLES = ("numbers", "authors", "raised", "latex")

_RANGE = r"[1-9]\d{0,2}(?:\s*[-\u2010-\u2013]\s*[1-9]\d{0,2})?"
_LIST = rf"\[\s*{_RANGE}(?:\s*[,;]\s*{_RANGE})*\s*\]"
_NUMBERS = re.compile(rf"(?P<gap>(?<![ \t])[ \t]*+|){_LIST}(?:[ \t]*+(?:(?:,|;|-|\u2013|and|to)[ \t]*+)?{_LIST})*")
_PAIR = re.compile(r"([1-9]\d{0,2})(?:\s*[-\u2010-\u2013]\s*([1-9]\d{0,2}))?")

# Nouns that a list of numbers may follow.
_LISTED = frozenset(
    "array arrays list lists vector vectors tuple tuples set sets matrix sequence sequences interval intervals range "
    "ranges values value numbers number elements element input output nums indices index equation eq eqs example "
    "examples as return print equals is are be".split()
)

_NAME = r"(?:(?:van|von|de|der|den|di|la|le|al|el|ter)\s+)*[A-Z\u00c0-\u00de][\w\u2019'\-\u2010\u2011]*+"
_NAMES = rf"{_NAME}(?:\s+{_NAME})?(?:(?:\s*,\s*|\s*,?\s*(?:&|and)\s+){_NAME})*"
_YEAR = r"(?:1[89]|20)\d\d[a-z]?"
_YEARS = rf"(?:{_YEAR}|in press|n\.d\.)(?:\s*,\s*(?:{_YEAR}|[a-z]\b))*(?:\s*[,:]\s*(?:pp?\.\s*)?\d+(?:[-\u2013]\d+)?)?"
_ENTRY = (
    r"(?:(?:see|see also|e\.g\.,?|cf\.|reviewed in|reviewed by|as in|but see|for review see)\s+)?"
    rf"{_NAMES}(?:\s*,?\s*et\s+al\.?\s*,?\s*|\s*,\s*){_YEARS}"
)
_AUTHORS = re.compile(rf"(?:(?<![ \t])[ \t]*+|)[(\[]\s*{_ENTRY}(?:\s*;\s*(?:{_ENTRY}|{_YEARS}))*\s*[)\]]")
_MONTH = re.compile(r"[(\[]\s*(?:(?:early|mid|late)\s+)?(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)[a-z]*\.?\b")

_DIGITS = "\u00b9\u00b2\u00b3\u2070\u2074-\u2079"
_RAISED = re.compile(
    rf"(?:(?<=[a-z]{{4}})|(?<=[a-z][.,;:)\u201d\"]))[\u00b9\u00b2\u00b3\u2074-\u2079][{_DIGITS}]{{0,2}}"
    rf"(?:[,\u02d2\u207b\u2013-][{_DIGITS}]{{1,3}})*(?![\w\u207a\u207b(^])"
    rf"|(?<=[a-z.,;:)\u201d\"])[ \t]?<sup>\s*\[?{_RANGE}(?:\s*,\s*{_RANGE})*\]?\s*</sup>"
)
# Words that are raised to a power, not cited.
_POWERS = frozenset(
    "sinh cosh tanh asin acos atan grad curl meter meters metre metres inch inches foot feet yard yards mile miles "
    "kilometer kilometers kilometre kilometres centimeter centimeters centimetre centimetres millimeter millimeters "
    "millimetre millimetres second seconds unit units".split()
)
_WORD = re.compile(r"([A-Za-z]+)[^\w\s]*\s*\Z")
_LATEX = re.compile(
    r"(?:(?<![ \t~])[ \t~]*+|)\\(?:cite|citep|citealp|parencite|autocite|footcite|supercite|nocite)\*?"
    r"(?:\[[^\[\]]*\]){0,2}\{[^{}]*\}"
    r"|(?:(?<![ \t])[ \t]*+|)\[(?:[^\[\]\n@]{0,40}\s)?-?@[\w:.#$%&+?<>~/-]+(?:\s*[;,][^\[\]\n]*)?\]"
)


@dataclass(frozen=True, slots=True)
class Citations:
    """Removes citations from prose: [1], [2, 4-6], (Author et al., 2020), raised digits, LaTeX and Pandoc keys."""

    styles: tuple[str, ...] = api.parameter(_STYLES, help="which kinds of citations go", choices=_STYLES)
    attached: bool = api.parameter(
        False, help="also [1] directly behind a word, as encyclopaedias write it; x[1] outside of fences then goes too"
    )
    protect: tuple[str, ...] = protect("code", "genes", "math", "links")
    where: str = api.where()

    def apply(self, example: Plain) -> Plain:
        """Infill rows are code and stay."""
        return api.map_texts(example, self.cleaned, self.where, infill=False)

    def cleaned(self, text: str) -> str:
        """The text without citations; cleaning again changes nothing, for it goes on until nothing is found."""
        return settled(self._once, text)

    def _once(self, text: str) -> str:
        if "numbers" in self.styles and "[" in text:
            text = self._without(_NUMBERS, text, self._is_citation)
        if "authors" in self.styles and ("(" in text or "[" in text):
            text = self._without(_AUTHORS, text, lambda t, m: _MONTH.search(m[0]) is None)
        if "raised" in self.styles:
            text = self._without(_RAISED, text, _is_no_power)
        if "latex" in self.styles and ("\\" in text or "@" in text):
            text = self._without(_LATEX, text, lambda t, m: True)
        return text

    def _without(self, pattern: re.Pattern[str], text: str, wanted: Wanted) -> str:
        if pattern.search(text) is None:
            return text
        guarded = spans(
            text, [p for p in self.protect if p != "genes" or pattern is not _LATEX]
        )  # keys look like genes

        def gone(match: re.Match[str]) -> str:
            begin = match.start() + len(match[0]) - len(match[0].lstrip(" \t"))
            return match[0] if touches(guarded, begin, match.end()) or not wanted(text, match) else ""

        return pattern.sub(gone, text)

    def _is_citation(self, text: str, match: re.Match[str]) -> bool:
        """Whether a bracket of numbers cites: it rises, stands behind a word of prose, and no operator follows."""
        for bracket in re.findall(_LIST, match[0]):
            before = 0
            for first, last in _PAIR.findall(bracket):
                if int(first) <= before or (last and int(last) <= int(first)):
                    return False
                before = int(last or first)
        behind = text[match.end() : match.end() + 2]
        if behind[:1] in ("[", "(", "=", "{", "_") or behind[:1].isalnum() or behind == ":\n":
            return False
        ahead = text[max(0, match.start() - 40) : match.start()]
        if not ahead.strip(" \t") or ahead[-1] in "\n=+*/<>[({|&^~\\_":
            return False
        if not match["gap"] and ahead[-1] not in ".,;:)\u201d\"'\u2019%" and not self.attached:
            return False
        word = _WORD.search(ahead)
        return word is None or word[1].lower() not in _LISTED


def _is_no_power(text: str, match: re.Match[str]) -> bool:
    word = _WORD.search(text[max(0, match.start() - 40) : match.start()])
    return word is None or word[1].lower() not in _POWERS
