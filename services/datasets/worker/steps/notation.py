"""One way to write numbers, dashes and quotes.

Law of this room: pure. A number keeps its value; Greek letters, genes and code
stay byte for byte.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from services.datasets.worker.plain import Plain
from services.datasets.worker.steps import api
from services.datasets.worker.steps.protect import protect, replace, settled

_MINUS = "-\u2010-\u2013\u2212"
_PLAIN = "0123456789+-"
_HIGH = "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207a\u207b"
_RAISED = str.maketrans(_HIGH, _PLAIN)
_LOWERED = str.maketrans(_PLAIN, _HIGH)
_NUMBER = r"(?<![\w.^*])(?<![eE^*][-+\u2212])(?P<number>\d+(?:\.\d+)?)"
# "3 x 10-5" may be a range or a sum, so a plain hyphen alone makes no exponent.
_POWER = re.compile(
    rf"{_NUMBER}\s*(?:[\u00d7\u00b7\u22c5*xX]|\\times)\s*10\s*"
    rf"(?:(?:\^|\*\*)\s*(?:\{{(?P<braced>[+{_MINUS}]?\d{{1,3}})\}}|\(?(?P<plain>[+{_MINUS}]?\d{{1,3}})\)?)"
    r"|(?P<raised>[\u207a\u207b]?[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]{1,3})|(?P<minus>\u2212\d{1,3}))"
    r"(?![\w.]*\d|\s*[\u00d7\u00b7\u22c5*^])"
)
# "5E3" may be an antibody, so a point or a sign is asked for.
_E = re.compile(
    rf"(?<![\w.])(?:(?P<number>\d+\.\d+)[eE](?P<exponent>[+{_MINUS}]?\d{{1,3}})"
    rf"|(?P<whole>\d+)[eE](?P<signed>[+{_MINUS}]\d{{1,3}}))(?![\w.]*\d)(?!\w)"
)
_DASHES = re.compile("[\u2010-\u2013\u2212\ufe63\uff0d]")
_QUOTES = {ord(c): '"' for c in "\u201c\u201d\u201e\u201f"} | {ord(c): "'" for c in "\u2018\u2019\u201a\u201b"}
_ANY_QUOTE = re.compile("[\u2018-\u201f]")
_UNITS = re.compile(
    r"(?<![\w.])(?P<number>\d+(?:\.\d+)?)(?P<unit>[kmnp\u00b5\u03bc]g|[kcmn\u00b5\u03bc]m|[dm\u00b5\u03bc][Ll]"
    r"|[fpnm\u00b5\u03bc]M|[fpnm\u00b5\u03bc]?mol|k?Da|bp|kb|[kMGT]?Hz|[kM]?Pa|m[VWA]|kcal|kJ|rpm|pp[mb]|\u00b0[CF])(?![\w\u0370-\u03ff])"
)
_CELSIUS = re.compile("[\u2103\u2109]")


@dataclass(frozen=True, slots=True)
class Notation:
    """Writes powers of ten, dashes, quotes and the gap before a unit in one way."""

    scientific: str = api.parameter(
        "e", help="powers of ten: 1.5e-5, 1.5 x 10^-5, 1.5 x 10 with raised digits, or as they are",
        choices=("e", "caret", "raised", "keep"),
    )  # fmt: skip
    dashes: bool = api.parameter(True, help="hyphens, minus signs and en dashes become '-'; em dashes stay")
    quotes: bool = api.parameter(True, help="curly quotes become straight ones; primes stay")
    units: bool = api.parameter(True, help="5mg becomes 5 mg, and the one-character degree signs two characters")
    protect: tuple[str, ...] = protect("code", "genes", "greek", "math", "links")
    where: str = api.where()

    def apply(self, example: Plain) -> Plain:
        """Infill rows are code and stay."""
        return api.map_texts(example, self.written, self.where, infill=False)

    def written(self, text: str) -> str:
        """The text in one notation; writing it again changes nothing."""
        return settled(self._once, text)

    def _once(self, text: str) -> str:
        if self.scientific != "keep":
            text = replace(_POWER, self._power, text, self.protect)
            text = replace(_E, self._power, text, self.protect)
        if self.units:
            text = replace(_CELSIUS, lambda m: "\u00b0C" if m[0] == "\u2103" else "\u00b0F", text, self.protect)
            text = replace(
                _UNITS, lambda m: f"{m['number']} {m['unit']}", text, [p for p in self.protect if p != "greek"]
            )
        if self.dashes:
            text = replace(_DASHES, lambda m: "-", text, self.protect)
        if self.quotes:
            text = replace(_ANY_QUOTE, lambda m: m[0].translate(_QUOTES), text, self.protect)
        return text

    def _power(self, match: re.Match[str]) -> str:
        told = {k: v for k, v in match.groupdict().items() if v}
        number = told.get("number") or told["whole"]
        given = next((told[k] for k in ("exponent", "signed", "braced", "plain", "minus") if k in told), "")
        raised = told.get("raised", "")
        exponent = int(re.sub("[\u2010-\u2013\u2212]", "-", given or raised.translate(_RAISED)))
        if self.scientific == "e":
            return f"{number}e{exponent}"
        if self.scientific == "caret":
            return f"{number} \u00d7 10^{exponent}"
        return f"{number} \u00d7 10{str(exponent).translate(_LOWERED)}"
