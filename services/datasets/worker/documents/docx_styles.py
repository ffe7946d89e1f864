"""What the styles and lists of a DOCX mean: headings, code, marks and numbers.

Law of this room: pure but for the parts that it is given to read. A style
means what it or the one that it is based on says; names are those that Word
gives in every language.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from services.datasets.worker.documents.packages import Package, Target, hear

_MONO = re.compile(r"courier|consolas|mono|menlo|inconsolata|source code|fira code|lucida console|cascadia", re.I)
_CODE = re.compile(r"\bcode\b|source ?code|preformatted|verbatim|macro text|listing", re.I)
_HEADING = re.compile(r"heading ([1-9])")
_LONGEST_CHAIN = 50
"""Of styles that are based on one another; Word's own end at eleven."""
_CONTENTS = re.compile(r"toc (?:\d|heading)|table of (?:figures|authorities)|index \d", re.I)


@dataclass(slots=True)
class Style:
    """What a style says itself."""

    name: str = ""
    based_on: str = ""
    outline: int | None = None
    list_id: str = ""
    list_level: int = 0
    is_mono: bool = False
    is_bold: bool = False


@dataclass(slots=True)
class Level:
    """How one level of a list counts."""

    kind: str = "decimal"
    start: int = 1


def is_mono(font: str) -> bool:
    """Whether a font is one for code."""
    return bool(_MONO.search(font))


def is_on(attributes: Mapping[str, str]) -> bool:
    """Whether a switch such as w:b is on."""
    return attributes.get("val", "1") not in ("0", "false", "off", "none")


class Styles(Target):
    """The styles of a document by id."""

    def __init__(self) -> None:
        self._styles: dict[str, Style] = {}
        self._now: Style | None = None

    def begin(self, tag: str, attributes: Mapping[str, str]) -> None:
        value = attributes.get("val", "")
        if tag == "style":
            self._now = self._styles.setdefault(attributes.get("styleId", ""), Style())
        elif self._now is None:
            return
        elif tag == "name":
            self._now.name = value.lower()
        elif tag == "basedOn":
            self._now.based_on = value
        elif tag == "outlineLvl" and value.isdigit():
            self._now.outline = int(value)
        elif tag == "numId":
            self._now.list_id = value
        elif tag == "ilvl" and value.isdigit():
            self._now.list_level = int(value)
        elif tag == "rFonts":
            self._now.is_mono = is_mono(attributes.get("ascii", ""))
        elif tag in ("b", "i"):
            self._now.is_bold = self._now.is_bold or is_on(attributes)

    def finish(self, tag: str) -> None:
        if tag == "style":
            self._now = None

    def _chain(self, ident: str) -> list[Style]:
        found: list[Style] = []
        met: set[str] = set()
        while ident in self._styles and ident not in met and len(found) < _LONGEST_CHAIN:
            met.add(ident)
            found.append(self._styles[ident])
            ident = found[-1].based_on
        return found

    def level(self, ident: str) -> int:
        """The level of headings of this style, 0 for the title; -1 for what is none."""
        for style in self._chain(ident):
            found = _HEADING.fullmatch(style.name)
            if found:
                return int(found[1])
            if style.name == "title":
                return 0
            if style.outline is not None and style.outline < 9:
                return style.outline + 1
        return -1

    def is_contents(self, ident: str) -> bool:
        """Whether it is of a table of contents."""
        return any(_CONTENTS.fullmatch(style.name) for style in self._chain(ident))

    def is_code(self, ident: str) -> bool:
        """Whether it is for code."""
        return any(_CODE.search(style.name) or style.is_mono for style in self._chain(ident))

    def is_strong(self, ident: str) -> bool:
        """Whether a run of it is emphasised."""
        return any(style.is_bold or style.name in ("strong", "emphasis") for style in self._chain(ident))

    def list_of(self, ident: str) -> tuple[str, int]:
        """The list that its paragraphs are of, and the level in it."""
        found = next((s for s in self._chain(ident) if s.list_id), None)
        return (found.list_id, found.list_level) if found else ("", 0)


class Lists(Target):
    """The lists of a document, and how far each has counted."""

    def __init__(self) -> None:
        self._abstract: dict[str, dict[int, Level]] = {}
        self._of: dict[str, str] = {}
        self._starts: dict[str, dict[int, int]] = {}
        """By list and level: where it begins anew."""
        self._in_abstract = self._in_list = ""
        self._at = 0
        self._counted: dict[str, dict[int, int]] = {}

    def begin(self, tag: str, attributes: Mapping[str, str]) -> None:
        value = attributes.get("val", "")
        if tag == "abstractNum":
            self._in_abstract = attributes.get("abstractNumId", "")
        elif tag == "num":
            self._in_list = attributes.get("numId", "")
        elif tag == "abstractNumId" and self._in_list:
            self._of[self._in_list] = value
        elif tag in ("lvl", "lvlOverride"):
            told = attributes.get("ilvl", "0")
            self._at = int(told) if told.isdigit() else 0
        elif tag == "numFmt" and self._in_abstract:
            self._level().kind = value
        elif tag == "start" and self._in_abstract and value.isdigit():
            self._level().start = int(value)
        elif tag == "startOverride" and self._in_list and value.isdigit():
            self._starts.setdefault(self._in_list, {})[self._at] = int(value)

    def _level(self) -> Level:
        return self._abstract.setdefault(self._in_abstract, {}).setdefault(self._at, Level())

    def finish(self, tag: str) -> None:
        if tag == "abstractNum":
            self._in_abstract = ""
        elif tag == "num":
            self._in_list = ""

    def count(self, ident: str, level: int) -> tuple[bool, int | None]:
        """Whether a paragraph of a list is an item of it, and the next number; None where it has a mark."""
        if not ident or ident == "0":
            return False, None
        abstract = self._of.get(ident, ident)
        told = self._abstract.get(abstract, {}).get(level, Level("bullet"))
        if told.kind in ("bullet", "none"):
            return told.kind == "bullet", None
        # Lists of one definition count on together, but those that begin anew.
        starts = self._starts.get(ident, {})
        counted = self._counted.setdefault(ident if starts else f"of {abstract}", {})
        for deeper in [key for key in counted if key > level]:
            del counted[deeper]
        start = starts.get(level, told.start)
        counted[level] = counted.get(level, start - 1) + 1
        return True, counted[level]


@dataclass(slots=True)
class Looks:
    """What a document says of its styles and lists."""

    styles: Styles = field(default_factory=Styles)
    lists: Lists = field(default_factory=Lists)

    @classmethod
    def of(cls, package: Package, folder: str) -> Looks:
        """Those of a package; of none where it says nothing."""
        looks = cls()
        for name, target in ((f"{folder}styles.xml", looks.styles), (f"{folder}numbering.xml", looks.lists)):
            if name in package:
                hear(package, name, target)
        return looks
