"""Tables on a page: lines whose pieces stand below one another.

Law of this room: pure. Columns are where no piece of any row stands between
them; a row without a first cell goes on with the one above.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from services.datasets.worker.documents.blocks import PAGE, TABLE, Block, Span, squared, table_text
from services.datasets.worker.documents.pdf_lines import Line

_OFF = 4.0
_SIGN = re.compile(r"[•◦▪‣●○■□–—*·-]|\(?\d{1,3}[.)]")
_MOST_GAP = 3.2
"""Lines of a table are no further apart than so many times their size."""


def rows_of(lines: Sequence[Line]) -> list[Line]:
    """The lines at the beginning of some that are one table; none where they are no table."""
    run: list[Line] = []
    for line in lines:
        before = run[-1] if run else None
        if before is not None:
            gap = before.base - line.base
            if not 0 < gap < _MOST_GAP * line.look.size or line.look.size > 1.15 * run[0].look.size:
                break
        if _SIGN.fullmatch(line.pieces[0].text):
            break
        if len(line.pieces) < 2 and (before is None or not _fits(run, line)):
            break
        candidate = [*run, line]
        if len(columns(candidate)) < 2:
            break
        run = candidate
    while run and len(run[-1].pieces) < 2 and len(columns(run)) > 1 and _of_column(run, run[-1]) == 0:
        run.pop()
    several = [line for line in run if len(line.pieces) > 1]
    return run if len(several) >= 2 and _is_aligned(run) else []


def _is_aligned(lines: Sequence[Line]) -> bool:
    """Whether what stands in each column but the first begins, ends or is centred in one place; blanks are not."""
    places = columns(lines)
    for begin, end in places[1:]:
        pieces = [p for line in lines for p in line.pieces if begin - 1 <= p.left and p.right <= end + 1]
        edges = ([p.left for p in pieces], [p.right for p in pieces], [p.left + p.right for p in pieces])
        if not any(max(found) - min(found) <= _OFF for found in edges if found):
            return False
    return True


def _fits(run: Sequence[Line], line: Line) -> bool:
    """Whether a line of one piece goes on in a cell: it stands in one column, close below."""
    gap = run[-1].base - line.base
    return gap < 1.45 * line.look.size and len(columns([*run, line])) == len(columns(run))


def columns(lines: Sequence[Line]) -> list[tuple[float, float]]:
    """Stretches in which pieces stand, from left to right."""
    found: list[tuple[float, float]] = []
    for left, right in sorted((p.left, p.right) for line in lines for p in line.pieces):
        if found and left <= found[-1][1] + 2:
            found[-1] = found[-1][0], max(found[-1][1], right)
        else:
            found.append((left, right))
    return found


def _of_column(lines: Sequence[Line], line: Line) -> int:
    places = columns(lines)
    return next((n for n, (begin, end) in enumerate(places) if begin - 1 <= line.left <= end + 1), 0)


def block(lines: Sequence[Line]) -> Block:
    """The table that some lines are."""
    places = columns(lines)
    rows: list[list[str]] = []
    for line in lines:
        cells = [""] * len(places)
        for piece in line.pieces:
            at = next((n for n, (begin, end) in enumerate(places) if begin - 1 <= piece.left <= end + 1), 0)
            cells[at] = f"{cells[at]} {piece.text}".strip()
        if rows and (not cells[0] or len(line.pieces) == 1):
            rows[-1] = [f"{a} {b}".strip() for a, b in zip(rows[-1], cells, strict=True)]
        else:
            rows.append(cells)
    first, last = lines[0].page, lines[-1].page
    begin = min(w.begin for line in lines if line.page == first for w in line.words)
    end = max(w.end for line in lines if line.page == last for w in line.words)
    cells_of = squared(rows)
    return Block(TABLE, table_text(cells_of), Span(PAGE, first, last, begin, end), cells=cells_of)


def add(made: list[Block], table: Block) -> None:
    """Adds a table, or goes on with the one that the page before ends with."""
    last = next((n for n in range(len(made) - 1, -1, -1) if not made[n].left), None)
    before = made[last] if last is not None else None
    if last is None or before is None or before.kind != TABLE or before.span.last + 1 != table.span.first:
        made.append(table)
    elif len(before.cells[0]) != len(table.cells[0]):
        made.append(table)
    else:
        rows = table.cells[1:] if table.cells[0] == before.cells[0] else table.cells
        cells = before.cells + rows
        made[last] = Block(TABLE, table_text(cells), before.span.to(table.span), cells=cells)
