"""Words of a page as lines in reading order: side by side, below one another, column after column.

Law of this room: pure. A gutter is where many lines break in one place and
both sides are filled; cells of a table are not that.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

from services.datasets.worker.documents.pdf_words import Look, Page, Word

_WIDE = 0.85
"""Of the size: a wider gap parts pieces of a line."""
_LEAST_LINES = 6
_MOST_INITIALS = 30
"""Of one page."""
_LEAST_FILL = 0.8
"""Of its column: so wide is the middle one of all lines of text, and no cell of a table."""


@dataclass(slots=True)
class Piece:
    """Words that stand side by side with the gaps of words."""

    words: list[Word]

    @property
    def left(self) -> float:
        return self.words[0].left

    @property
    def right(self) -> float:
        return max(w.right for w in self.words)

    @property
    def text(self) -> str:
        return spaced(self.words)


def spaced(words: Sequence[Word]) -> str:
    """Words with blanks between them, but where one follows the other without any."""
    found = ""
    for n, word in enumerate(words):
        found += word.text if not n or word.is_glued else f" {word.text}"
    return found


@dataclass(slots=True)
class Line:
    """A line of one column."""

    page: int
    base: float
    pieces: list[Piece]
    column: tuple[float, float] = (0.0, 0.0)
    """Left and right edge of what it stands in."""
    look: Look = field(default_factory=lambda: Look(0, False, False, False, False))

    @property
    def words(self) -> list[Word]:
        return [word for piece in self.pieces for word in piece.words]

    @property
    def left(self) -> float:
        return self.pieces[0].left

    @property
    def right(self) -> float:
        return max(piece.right for piece in self.pieces)

    @property
    def text(self) -> str:
        return " ".join(piece.text for piece in self.pieces)


def all_lines(pages: Sequence[Page]) -> list[list[Line]]:
    """The lines of each page in reading order. Text that is turned is not among them.

    Where the gutter of other pages lies, a page of few lines has one too.
    """
    placed: list[list[Placed]] = []
    for page in pages:
        rows = _rows(_initials_in_place(page.upright))
        placed.append([(base, piece) for base, pieces in rows for piece in pieces])
    gutters = sorted(x for found in placed if found and (x := _gutter(found, ())) is not None)
    usual = [x for x, after in itertools.pairwise(gutters) if after - x < 6]
    hints = usual[len(usual) // 2 :][:1]
    lines = [_ordered(found, page.number, hints) for found, page in zip(placed, pages, strict=True)]
    for line in itertools.chain.from_iterable(lines):
        line.look = look_of(line.words)
    return lines


def look_of(words: Sequence[Word]) -> Look:
    """How most letters of some words are set; as code only where all of them are."""
    weights: dict[Look, int] = {}
    plain = [word for word in words if not word.look.is_mono] or words
    for word in plain:
        weights[word.look] = weights.get(word.look, 0) + len(word.text)
    return max(weights, key=lambda look: (weights[look], look.size))


def _initials_in_place(words: Sequence[Word]) -> list[Word]:
    """Words, but that a letter which hangs over several lines begins the first of these."""
    made = list(words)
    least = 1.8 * min((w.look.size for w in words), default=0)
    large = [n for n, w in enumerate(words) if w.look.size > least and len(w.text) == 1 and w.text.isupper()]
    for at in large[:_MOST_INITIALS]:
        big = words[at]
        beside = [
            n
            for n, w in enumerate(made)
            if 1.8 * w.look.size < big.look.size
            and -1 < w.left - big.right < w.look.size
            and -0.5 * w.look.size < w.base - big.base < big.look.size
        ]
        if len(beside) < 2:
            continue
        first = max(beside, key=lambda n: made[n].base)
        follows = made[first]
        is_glued = follows.text[:1].islower()
        left = follows.left - 0.5 * follows.look.size  # as wide as a letter of the text: its line is not set in
        made[at] = replace(big, base=follows.base, left=left, right=follows.left, look=follows.look)
        made[first] = replace(follows, is_glued=is_glued)
    return made


def _rows(words: Iterable[Word]) -> list[tuple[float, list[Piece]]]:
    """Words by base line from above to below, each row in pieces from left to right."""
    rows: list[tuple[float, list[Word]]] = []
    for word in sorted(words, key=lambda w: (-w.base, w.left)):
        if rows and abs(rows[-1][0] - word.base) < 0.35 * min(word.look.size, rows[-1][1][0].look.size):
            rows[-1][1].append(word)
        else:
            rows.append((word.base, [word]))
    return [(base, _pieces(found)) for base, found in _raised(rows)]


def _raised(rows: list[tuple[float, list[Word]]]) -> list[tuple[float, list[Word]]]:
    """Rows of small signs that hang above or below another row, as powers do, go to it."""
    kept: list[tuple[float, list[Word]]] = []
    for n, (base, words) in enumerate(rows):
        size = max(w.look.size for w in words)
        beside = [r for r in (kept[-1:] + rows[n + 1 : n + 2]) if max(w.look.size for w in r[1]) > 1.2 * size]
        near = [r for r in beside if abs(r[0] - base) < 0.6 * max(w.look.size for w in r[1])]
        if near and sum(len(w.text) for w in words) <= 12:
            near[0][1].extend(words)
        else:
            kept.append((base, words))
    return kept


def _pieces(words: list[Word]) -> list[Piece]:
    pieces: list[Piece] = []
    for word in sorted(words, key=lambda w: w.left):
        gap = word.left - pieces[-1].right if pieces else 0.0
        if pieces and gap < _WIDE * max(word.look.size, 4):
            pieces[-1].words.append(word)
        else:
            pieces.append(Piece([word]))
    return pieces


Placed = tuple[float, Piece]


def _ordered(pieces: list[Placed], page: int, hints: Sequence[float]) -> list[Line]:
    """Pieces of a region in reading order: what crosses its gutter parts it, left comes before right."""
    if not pieces:
        return []
    gutter = _gutter(pieces, hints)
    if gutter is None:
        return _lines(pieces, page)
    found: list[Line] = []
    band: list[Placed] = []
    for base, piece in sorted(pieces, key=lambda p: (-p[0], p[1].left)):
        if piece.left < gutter < piece.right:
            found += _columns(band, gutter, page, hints)
            band = []
            # Others on its line stand beside it, as the cells of a wide table do.
            found += _lines([(base, piece)], page)
        else:
            band.append((base, piece))
    return found + _columns(band, gutter, page, hints)


def _columns(band: list[Placed], gutter: float, page: int, hints: Sequence[float]) -> list[Line]:
    left = [p for p in band if p[1].right <= gutter]
    right = [p for p in band if p[1].right > gutter]
    return _ordered(left, page, hints) + _ordered(right, page, hints)


def _lines(pieces: list[Placed], page: int) -> list[Line]:
    edges = min(p.left for _, p in pieces), max(p.right for _, p in pieces)
    made: list[Line] = []
    for base, piece in sorted(pieces, key=lambda p: (-p[0], p[1].left)):
        if made and made[-1].base == base:
            made[-1].pieces.append(piece)
        else:
            made.append(Line(page, base, [piece], edges))
    return made


def rejoined(pieces: list[Piece]) -> list[Piece]:
    """Pieces that are apart no more than wide blanks of a justified line are one."""
    found = [pieces[0]]
    for piece in pieces[1:]:
        size = piece.words[0].look.size
        if piece.left - found[-1].right < 1.6 * size and not piece.words[0].look.is_mono:
            found[-1] = Piece([*found[-1].words, *piece.words])
        else:
            found.append(piece)
    return found


def _gutter(pieces: list[Placed], hints: Sequence[float]) -> float | None:
    """Where a region has its gutter; None where it has none. At a hint fewer lines are enough."""
    lefts, rights = [p.left for _, p in pieces], [p.right for _, p in pieces]
    begin, end = min(lefts), max(rights)
    width = end - begin
    if width < 150:
        return None
    best: tuple[int, float] | None = None
    for x in [*hints, *_candidates(pieces, begin + 0.25 * width, end - 0.25 * width)]:
        crossing = sum(1 for _, p in pieces if p.left < x < p.right)
        left = [p for _, p in pieces if p.right <= x]
        right = [p for _, p in pieces if p.left >= x]
        is_hint = x in hints
        if min(len(left), len(right)) < (1 if is_hint else _LEAST_LINES) or crossing > 0.5 * len(pieces):
            continue
        if (is_hint or (_is_filled(left) and _is_filled(right))) and (best is None or crossing < best[0]):
            best = crossing, x
    return best[1] if best else None


def _candidates(pieces: list[Placed], begin: float, end: float) -> list[float]:
    """Places left of which some pieces end and right of which others begin."""
    begins = sorted({round(p.left, 0) for _, p in pieces if begin < p.left < end})
    return [x - 1.5 for x in begins]


def _is_filled(side: Sequence[Piece]) -> bool:
    """Whether the pieces of a side are lines of text, which fill it, and not cells."""
    begin, end = min(p.left for p in side), max(p.right for p in side)
    return median(p.right - p.left for p in side) >= _LEAST_FILL * (end - begin)
