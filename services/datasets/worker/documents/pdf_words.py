"""The words of one page of a PDF, with their places and looks, as PDFium tells its characters.

Law of this room: PDFium's numbers of characters are kept, so that a place can
be found again; nothing is put in order here.
"""

from __future__ import annotations

import ctypes
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pypdfium2.raw as pdfium

_MONO = re.compile(
    r"courier|consolas|mono|nimbusmon|menlo|inconsolata|cmtt|lmtt|typewriter|sourcecode|firacode|fixed", re.I
)
_BOLD = re.compile(r"bold|black|heavy|semibold|demi|-bd|cmbx|lmbx|\bbx\d", re.I)
_ITALIC = re.compile(r"italic|oblique|slanted|cmti|lmti|-it\b", re.I)
_FIXED_PITCH = 1
_BLANKS = frozenset((0, 9, 10, 13, 32, 0xA0, 0x2002, 0x2003, 0x2009, 0x200A, 0x200B, 0x202F, 0xFEFF))
_GAP = 0.16
"""Of the size: what is wider parts words."""
_FEW_LETTERS = 60
_LEAST_OF_PAGE = 0.5
_MOST_OBJECTS = 200
_BACK = -1.1
"""So far back the next one may begin: PDFium gives every letter of a ligature the place of the whole."""


@dataclass(frozen=True, slots=True)
class Look:
    """How a text is set."""

    size: float
    is_bold: bool
    is_italic: bool
    is_mono: bool
    is_turned: bool


@dataclass(frozen=True, slots=True)
class Word:
    """Characters without a blank between them."""

    text: str
    left: float
    right: float
    base: float
    """Height of its base line; pages begin below."""
    look: Look
    begin: int
    end: int
    """Numbers of its characters on the page, the last one behind it."""
    is_glued: bool = False
    """There is no blank between it and the word before; only the look changes."""


@dataclass(frozen=True, slots=True)
class Page:
    """The words of a page in the order of the file."""

    number: int
    width: float
    height: float
    words: tuple[Word, ...]
    is_picture: bool
    """It shows something, and has no text, or hardly any beside a picture as large as a scan."""
    unmapped: int
    """Characters that tell no letter."""

    @property
    def upright(self) -> tuple[Word, ...]:
        """The words that are read: those that stand as the page does."""
        return tuple(w for w in self.words if not w.look.is_turned and w.text)


def words_of(page: Any, number: int) -> Page:
    """The words of an open page."""
    text = pdfium.FPDFText_LoadPage(page)
    try:
        count = pdfium.FPDFText_CountChars(text)
        turn = pdfium.FPDFPage_GetRotation(page)
        width, height = pdfium.FPDF_GetPageWidthF(page), pdfium.FPDF_GetPageHeightF(page)
        reader = _Reader(text, turn, width, height)
        words = tuple(reader.words(max(0, count)))
        best = _turned(words)
        for more in (1, 3, 2) if 2 * best > letters(words) else ():  # the page lies on its side, and does not say so
            wide, high = (height, width) if more % 2 else (width, height)
            other = _Reader(text, (turn + more) % 4, wide, high)
            found = tuple(other.words(max(0, count)))
            if _turned(found) < best:
                best, reader, words, width, height = _turned(found), other, found, wide, high
                break
        is_picture = _is_picture(page, letters(words), width * height)
        return Page(number, width, height, words, is_picture, reader.unmapped)
    finally:
        pdfium.FPDFText_ClosePage(text)


def letters(words: Sequence[Word]) -> int:
    """How many there are in words."""
    return sum(len(w.text) for w in words)


def _turned(words: Sequence[Word]) -> int:
    return letters([w for w in words if w.look.is_turned])


def _is_picture(page: Any, count_of_letters: int, area: float) -> bool:
    """Whether a page has nothing to read but a picture; programs that scan write their name below it."""
    count = pdfium.FPDFPage_CountObjects(page)
    if not count_of_letters:
        return bool(count > 0)
    if count_of_letters > _FEW_LETTERS:
        return False
    sides = [ctypes.c_float() for _ in range(4)]
    for n in range(min(count, _MOST_OBJECTS)):
        one = pdfium.FPDFPage_GetObject(page, n)
        if pdfium.FPDFPageObj_GetType(one) == pdfium.FPDF_PAGEOBJ_IMAGE:
            if pdfium.FPDFPageObj_GetBounds(one, *sides):
                left, bottom, right, top = (side.value for side in sides)
                if (right - left) * (top - bottom) > _LEAST_OF_PAGE * area:
                    return True
    return False


def _whole(letters: Sequence[str]) -> str:
    """A word; half a letter without the other is none."""
    return "".join("\ufffd" if "\ud800" <= letter < "\ue000" else letter for letter in letters)


class _Reader:
    def __init__(self, text: Any, turn: int, width: float, height: float) -> None:
        self._text = text
        self._turn = turn
        self._width, self._height = width, height
        self._look = Look(0, False, False, False, False)
        self._object: int | None = -1
        self.unmapped = 0
        self._rect = pdfium.FS_RECTF()
        self._x, self._y = ctypes.c_double(), ctypes.c_double()

    def words(self, count: int) -> Iterator[Word]:
        """Every word. A blank that PDFium made up parts none: places alone do."""
        letters: list[str] = []
        begin = last = 0
        left = right = base = 0.0
        look = self._look
        is_glued = is_behind = False
        for n in range(count):
            code = pdfium.FPDFText_GetUnicode(self._text, n)
            if code in _BLANKS:
                if pdfium.FPDFText_IsGenerated(self._text, n) != 1:
                    if letters:
                        yield Word(_whole(letters), left, right, base, look, begin, last + 1, is_glued)
                        letters = []
                    is_behind = False
                continue
            x, to, height = self._box(n)
            style = self._style(n)
            size = max(look.size, 1)
            small = max(min(look.size, style.size), 1)  # after a large initial the blanks are those of the text
            is_near = is_behind and abs(height - base) < 0.5 * size and _BACK * size < x - right < _GAP * small
            # A sign of another look in the same word, as a bold letter or a raised number, goes with it.
            if letters and not (is_near and style.is_mono == look.is_mono):
                yield Word(_whole(letters), left, right, base, look, begin, last + 1, is_glued)
                letters = []
            if not letters:
                begin, left, base, look, right, is_glued = n, x, height, style, to, is_near
            if 0xDC00 <= code < 0xE000 and letters and "\ud800" <= letters[-1] < "\udc00":
                letters[-1] = chr(0x10000 + ((ord(letters[-1]) - 0xD800) << 10) + code - 0xDC00)  # PDFium counts halves
            else:
                letters.append(self._letter(code, n))
            right, last, is_behind = max(right, to), n, True
        if letters:
            yield Word(_whole(letters), left, right, base, look, begin, last + 1, is_glued)

    def _letter(self, code: int, n: int) -> str:
        if code in (2, 0xAD):
            return "-"  # PDFium's sign, and Unicode's, for a hyphen at the end of a line
        if code in (0xF0B7, 0xF0A7, 0xF0D8):
            return "•"  # of fonts that hold nothing but signs
        if (
            code in (0xFFFD, 0xFFFE)
            or 0xE000 <= code <= 0xF8FF
            or pdfium.FPDFText_HasUnicodeMapError(self._text, n) == 1
        ):
            self.unmapped += 1
            return "\ufffd"
        if code < 32:
            return ""
        return chr(code)  # PDFium takes ligatures apart itself

    def _box(self, n: int) -> tuple[float, float, float]:
        """Left, right and base line, of the page as it is shown."""
        rect = self._rect
        pdfium.FPDFText_GetLooseCharBox(self._text, n, rect)
        pdfium.FPDFText_GetCharOrigin(self._text, n, self._x, self._y)
        if not self._turn:
            return rect.left, rect.right, self._y.value
        if self._turn == 1:
            return rect.bottom, rect.top, self._height - self._x.value
        if self._turn == 2:
            return self._width - rect.right, self._width - rect.left, self._height - self._y.value
        return self._width - rect.top, self._width - rect.bottom, self._x.value

    def _style(self, n: int) -> Look:
        found = pdfium.FPDFText_GetTextObject(self._text, n)
        address = ctypes.cast(found, ctypes.c_void_p).value
        if address == self._object and address is not None:
            return self._look
        self._object = address
        look = self._looks(n)
        if look != self._look:
            self._look = look
        return self._look

    def _looks(self, n: int) -> Look:
        matrix = pdfium.FS_MATRIX()
        scale = 1.0
        if pdfium.FPDFText_GetMatrix(self._text, n, matrix):
            scale = math.hypot(matrix.c, matrix.d) or 1.0
        size = round(pdfium.FPDFText_GetFontSize(self._text, n) * scale, 1)
        flags = ctypes.c_int()
        buffer = ctypes.create_string_buffer(128)
        pdfium.FPDFText_GetFontInfo(self._text, n, buffer, 128, flags)
        name = buffer.value.decode("utf-8", "replace").rpartition("+")[2]
        weight = pdfium.FPDFText_GetFontWeight(self._text, n)
        angle = pdfium.FPDFText_GetCharAngle(self._text, n) if scale else 0.0
        turned = math.degrees(angle) + 90 * self._turn
        is_turned = angle >= 0 and min(turned % 360, 360 - turned % 360) > 10
        is_bold = bool(_BOLD.search(name)) or weight >= 600
        is_mono = bool(_MONO.search(name)) or bool(flags.value & _FIXED_PITCH)
        return Look(size, is_bold, bool(_ITALIC.search(name)), is_mono, is_turned)
