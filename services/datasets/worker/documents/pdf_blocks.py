"""Lines of pages as blocks: what is a heading, an item, a table, code, and where paragraphs end.

Law of this room: pure. Looks are compared with those of most letters of the
document; a paragraph ends where a gap, an indent or room left on its line says so.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from statistics import median

from services.datasets.worker.documents import hyphens, pdf_tables
from services.datasets.worker.documents.blocks import CODE, HEADING, ITEM, PAGE, PROSE, Block, Span
from services.datasets.worker.documents.patterns import is_dotted
from services.datasets.worker.documents.pdf_lines import Line, Word, rejoined, spaced

_MARK = re.compile(r"(?:([•◦▪‣●○■□–—*·\-])|(?:\()?(\d{1,3})[.)])(?:\s+|$)")
_ENDS = tuple(".!?:;”\"')…。")
_DEPTH = re.compile(r"(?:(?:chapter|section|part|appendix)\s+)?((?:\d{1,2}|[A-Z])(?:\.\d{1,2}){0,4})[.:)]?\s+\S", re.I)
_MOST_HEADING_WORDS = 20
_MOST_LISTS = 8


def plain(text: str) -> str:
    """A title as it is compared: letters and digits."""
    return "".join(c for c in text.lower() if c.isalnum())


def build(pages: Sequence[Sequence[Line]], around: Set[tuple[int, int]], marks: Mapping[int, Set[str]]) -> list[Block]:
    """The blocks of a document: its lines in reading order, those that are furniture by their places, its bookmarks."""
    lines = [(line, (n, place) in around) for n, found in enumerate(pages) for place, line in enumerate(found)]
    return _Build(lines, marks).blocks() if lines else []


class _Build:
    def __init__(self, lines: Sequence[tuple[Line, bool]], marks: Mapping[int, Set[str]]) -> None:
        self._all = lines
        self._marks = marks
        text = [line for line, is_around in lines if not is_around]
        self._body, self._leading = _measures(text)
        self._rights = _right_edges(text, self._body)
        self._known = hyphens.vocabulary(line.text for line in text)
        self._made: list[Block] = []
        self._styles: list[tuple[int, tuple[float, bool, int]]] = []
        """Place of each heading's block, and how it is set."""
        self._open: list[Line] = []
        self._kind = ""
        self._item: tuple[int, int | None, float] = 0, None, 0.0
        """Of the item that is open: its level, its number, and where its text begins."""
        self._lists: list[tuple[float, int | None]] = []
        """Where the marks of lists stand that one is in, and their last numbers."""
        self._later: list[Block] = []
        """Furniture and footnotes within a paragraph that goes on behind them."""

    def blocks(self) -> list[Block]:
        """All blocks; headings have levels by how they are set, the largest first."""
        text = [line for line, is_around in self._all if not is_around]
        feet = {id(line) for line in _feet(text, self._body)}
        at, lines = 0, self._all
        while at < len(lines):
            line, is_around = lines[at]
            if is_around or id(line) in feet:
                self._later.append(
                    _block([line], PROSE, spaced(line.words), "page_furniture" if is_around else "footnote")
                )
                if not self._open:
                    self._made, self._later = self._made + self._later, []
                at += 1
                continue
            run = [] if line.look.is_mono else self._table_from(at)
            if run:
                self._end()
                pdf_tables.add(self._made, pdf_tables.block(run))
                at += len(run)
                self._lists = []
                continue
            line.pieces = rejoined(line.pieces)
            self._take(line, lines[at + 1][0] if at + 1 < len(lines) else None)
            at += 1
        self._end()
        self._made += self._later
        return _levelled(self._made, self._styles)

    def _table_from(self, at: int) -> list[Line]:
        if len(self._all[at][0].pieces) < 2:
            return []
        found = self._rest_of_page(at)
        rows = pdf_tables.rows_of(found)
        if rows or len(found) > 1:
            return rows
        # Its first row may stand alone at the foot of the page before.
        after = next((n for n in range(at + 1, len(self._all)) if not self._all[n][1]), None)
        more = pdf_tables.rows_of(self._rest_of_page(after)) if after is not None else []
        return found if more and len(pdf_tables.columns(more)) == len(found[0].pieces) else []

    def _rest_of_page(self, at: int) -> list[Line]:
        found: list[Line] = []
        for line, is_around in self._all[at:]:
            if is_around or line.page != self._all[at][0].page:
                break
            found.append(line)
        return found

    # One line

    def _take(self, line: Line, after: Line | None) -> None:
        text, before = line.text, self._open[-1] if self._open else None
        goes_on = self._kind == CODE and before is not None and self._is_same_code(before, line)
        if goes_on and _is_mostly_code(line):  # a sign that its font does not have is of another one
            self._open.append(line)
        elif line.look.is_mono and not self._is_within(before, line):
            self._begin(CODE, line)
        elif is_dotted(text):
            self._begin(PROSE, line)
            self._end("table_of_contents")
        elif self._is_heading(line, before, after):
            goes_on = self._kind == HEADING and before is not None and self._is_next(before, line, 1.7)
            if goes_on and before is not None and before.look == line.look and not _DEPTH.match(text):
                self._open.append(line)
            else:
                self._begin(HEADING, line)
                self._lists = []
        elif self._marked(line, before):
            pass
        elif before is None or self._kind in (CODE, HEADING) or self._is_new(before, line):
            within = self._lists and line.left >= self._item[2] - 2 and self._kind in (ITEM, PROSE)
            if not within:
                self._lists = []
            self._begin(PROSE, line)
        else:
            self._open.append(line)

    def _begin(self, kind: str, line: Line) -> None:
        self._end()
        self._kind, self._open = kind, [line]

    def _end(self, left: str = "") -> None:
        lines, self._open = self._open, []
        if lines:
            self._made.append(self._finished(lines, left))
        self._made, self._later = self._made + self._later, []

    def _finished(self, lines: list[Line], left: str) -> Block:
        if self._kind == CODE:
            return _block(lines, CODE, _code(lines, self._leading))
        words = [_words_of(line) for line in lines]
        level, number = 0, None
        if self._kind == ITEM:
            level, number, _ = self._item
            words[0] = _behind_mark(words[0])
        elif self._kind == PROSE and self._lists:
            level = len(self._lists)
        text = ""
        for found in words:
            text = hyphens.join(text, found, self._known) if text else found
        if self._kind == HEADING:
            text = text.replace("`", "")
            look = lines[0].look
            numbered = _DEPTH.match(text)
            self._styles.append((len(self._made), (look.size, look.is_bold, numbered[1].count(".") if numbered else 0)))
            return _block(lines, HEADING, text)
        return _block(lines, self._kind, text, left, level, number, _lead(lines))

    # What a line is

    def _is_heading(self, line: Line, before: Line | None, after: Line | None) -> bool:
        text = line.text
        if len(text.split()) > _MOST_HEADING_WORDS or not any(map(str.isalpha, text)) or len(line.pieces) > 2:
            return False
        if line.look.size >= 1.1 * self._body:
            return True
        if plain(text) in self._marks.get(line.page, ()) and (line.look.is_bold or line.look.size > self._body):
            return True
        if not all(w.look.is_bold for w in line.words) or line.look.size < 0.97 * self._body or text[-1] in ".,;:":
            return False
        if _MARK.match(text) and not _DEPTH.match(text):
            return False
        is_apart = before is None or not self._is_next(before, line, 1.25) or self._kind == HEADING
        is_bold_below = (
            after is not None and after.page == line.page and after.look.is_bold and after.look.size == line.look.size
        )
        return is_apart and (not is_bold_below or self._has_room(line, after))

    def _is_within(self, before: Line | None, line: Line) -> bool:
        """Whether a line that is all code stands in a paragraph."""
        if before is None or self._kind not in (PROSE, ITEM) or not self._is_next(before, line, 1.35):
            return False
        return abs(line.left - self._open[-1].left) < 2 and not self._has_room(before, line)

    def _marked(self, line: Line, before: Line | None) -> bool:
        """Takes a line that begins an item."""
        found = _MARK.match(line.text)
        if found is None:
            return False
        x, number = line.left, int(found[2]) if found[2] else None
        words = line.words
        inside = words[1].left if len(words) > 1 else x + line.look.size
        if before is not None and self._kind == PROSE and not self._is_new(before, line):
            # In a paragraph, unless it leads to a list.
            if not before.text.endswith(":") and not (number == 1 and before.text.endswith(_ENDS)):
                return False
        lists = [found for found in self._lists if x > found[0] - 4]
        is_deeper = not lists or x > lists[-1][0] + 4
        if number is not None and not is_deeper and number != 1 and lists[-1][1] != number - 1:
            return False
        if is_deeper and number not in (None, 1) and not self._lists:
            return False
        if not is_deeper or len(lists) == _MOST_LISTS:
            lists.pop()
        self._begin(ITEM, line)
        self._lists = lists = [*lists, (x, number)]
        self._item = len(lists) - 1, number, inside
        return True

    # Where paragraphs end

    def _is_next(self, before: Line, line: Line, most: float) -> bool:
        """Whether a line stands right below another."""
        gap = before.base - line.base
        return before.page == line.page and 0 < gap <= most * max(self._leading, 1.1 * line.look.size)

    def _is_new(self, before: Line, line: Line) -> bool:
        """Whether a line begins a paragraph."""
        if abs(before.look.size - line.look.size) > 0.12 * max(self._body, 1):
            return True
        left = self._item[2] if self._kind == ITEM else min(other.left for other in self._open[-3:])
        if before.page != line.page or line.base >= before.base or before.column != line.column:
            return self._is_done(before, line)
        if before.base - line.base > max(1.15 * self._leading, self._leading + 0.35 * line.look.size):
            return True
        if self._kind == ITEM:
            return line.left < left - 3 or line.left > left + 2.5 * line.look.size
        if line.left > left + 0.8 * line.look.size and len(self._open) > 0 and before.left <= left + 1:
            return True
        return self._has_room(before, line) and before.text.endswith(_ENDS)

    def _is_done(self, before: Line, line: Line) -> bool:
        """Whether a paragraph ends with its page or column."""
        if before.text.endswith("-") and line.text[:1].islower():
            return False
        if line.text[:1].islower() and not before.text.endswith((".", "!", "?", ":")):
            return False
        return before.text.endswith(_ENDS) or self._has_room(before, line) or self._kind == ITEM

    def _has_room(self, before: Line, line: Line | None) -> bool:
        """Whether the first word of a line would have fit on the one before."""
        if line is None or not line.words:
            return True
        first = line.words[0]
        room = self._rights.get((before.page, before.column), before.column[1]) - before.right
        return room > first.right - first.left + 1.2 * first.look.size

    def _is_same_code(self, before: Line, line: Line) -> bool:
        if before.page != line.page:
            return before.page + 1 == line.page
        return 0 < before.base - line.base < 2.6 * max(self._leading, line.look.size)


def _measures(lines: Sequence[Line]) -> tuple[float, float]:
    """Size of most letters, and the usual distance of lines that are set so."""
    sizes: Counter[float] = Counter()
    for line in lines:
        if not line.look.is_mono:
            sizes[line.look.size] += len(line.text)
    body = sizes.most_common(1)[0][0] if sizes else 10.0
    gaps = [
        a.base - b.base
        for a, b in itertools.pairwise(lines)
        if a.page == b.page and a.look.size == b.look.size == body and 0 < a.base - b.base < 3 * body
    ]
    return body, median(gaps) if gaps else 1.2 * body


def _right_edges(lines: Sequence[Line], body: float) -> dict[tuple[int, tuple[float, float]], float]:
    """How far lines of text reach in each column, those of code and tables aside."""
    found: dict[tuple[int, tuple[float, float]], list[float]] = {}
    for line in lines:
        if line.look.size == body and not line.look.is_mono and len(line.pieces) == 1:
            found.setdefault((line.page, line.column), []).append(line.right)
    return {key: sorted(rights)[int(0.93 * (len(rights) - 1))] for key, rights in found.items() if len(rights) > 4}


def _feet(lines: Sequence[Line], body: float) -> list[Line]:
    """Lines of footnotes: small, counted, at the end of their column."""
    found: list[Line] = []
    run: list[Line] = []
    for line, after in zip(lines, [*lines[1:], None], strict=True):
        is_small = line.look.size <= 0.92 * body and not line.look.is_mono
        run = [*run, line] if is_small else []
        ends = after is None or after.page != line.page or after.column != line.column
        if ends:
            begun = next((n for n, one in enumerate(run) if re.match(r"[\d*†‡]{1,3}[\s.)]?\S", one.text)), None)
            if begun is not None and run[begun].base < 350:
                found += run[begun:]
            run = []
    return found


def _block(
    lines: Sequence[Line],
    kind: str,
    text: str,
    left: str = "",
    level: int = 0,
    number: int | None = None,
    lead: str = "",
) -> Block:
    first, last = lines[0].page, lines[-1].page
    begin = min(w.begin for line in lines if line.page == first for w in line.words)
    end = max(w.end for line in lines if line.page == last for w in line.words)
    return Block(kind, text, Span(PAGE, first, last, begin, end), level=level, number=number, lead=lead, left=left)


def _words_of(line: Line) -> str:
    """The text of a line, code between its marks."""
    runs: list[list[Word]] = []
    for word in line.words:
        if runs and runs[-1][0].look.is_mono == word.look.is_mono:
            runs[-1].append(word)
        else:
            runs.append([word])
    text = ""
    for run in runs:
        told = f"`{spaced(run)}`" if run[0].look.is_mono else spaced(run)
        text += told if not text or run[0].is_glued else f" {told}"
    return text


def _is_mostly_code(line: Line) -> bool:
    letters = sum(len(w.text) for w in line.words)
    return sum(len(w.text) for w in line.words if w.look.is_mono) > 0.8 * letters


def _behind_mark(text: str) -> str:
    found = _MARK.match(text)
    return text[found.end() :] if found else text


def _lead(lines: Sequence[Line]) -> str:
    found: list[Word] = []
    for word in (w for line in lines[:3] for w in line.words):
        if not (word.look.is_bold or word.look.is_italic):
            if not found and _MARK.fullmatch(word.text):
                continue
            break
        found.append(word)
    return spaced(found)


def _code(lines: Sequence[Line], leading: float) -> str:
    """Lines of code with their blanks, as far as their places tell them."""
    words = [w for line in lines for w in line.words]
    widths = [(w.right - w.left) / len(w.text) for w in words if w.right > w.left]
    width = median(widths) if widths else 6.0
    left = min(line.left for line in lines)
    gaps = [a.base - b.base for a, b in itertools.pairwise(lines) if a.page == b.page and a.base > b.base]
    usual = min(gaps, default=leading)
    text = ""
    for before, line in zip([None, *lines], lines, strict=False):
        if before is not None:
            gap = before.base - line.base if before.page == line.page else usual
            text += "\n" * max(1, min(3, round(gap / max(usual, 1))))
        column = 0
        for word in line.words:
            place = round((word.left - left) / width)
            text += " " * max(place - column, 1 if column else 0) + word.text
            column = max(place, column + (1 if column else 0)) + len(word.text)
    return text


def _levelled(made: list[Block], styles: Sequence[tuple[int, tuple[float, bool, int]]]) -> list[Block]:
    order = sorted({style for _, style in styles}, key=lambda s: (-s[0], not s[1], s[2]))
    of_place = dict(styles)
    return [
        replace(block, level=min(6, 1 + order.index(of_place[n]))) if n in of_place else block
        for n, block in enumerate(made)
    ]
