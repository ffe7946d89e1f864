"""A curve in characters: braille dots where the terminal can, ASCII elsewhere.

Law of this room: pure; numbers in, lines out.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

Point = tuple[float, float]

# Bit of each dot of a braille cell, by (column, row) inside the 2 x 4 cell.
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))


def draw(
    points: Sequence[Point],
    width: int = 60,
    height: int = 10,
    fancy: bool = True,
    marks: Sequence[Point] = (),
    labels: tuple[str, str] = ("step", "loss"),
) -> list[str]:
    """The curve through points, with axes; `marks` are set apart as "o".

    `width` and `height` count characters inside the axes. Points that are not
    finite are left out; nothing to draw gives no lines.
    """
    curve = [p for p in points if _finite(p)]
    apart = [p for p in marks if _finite(p)]
    both = curve + apart
    if not both:
        return []
    left, right = min(x for x, _ in both), max(x for x, _ in both)
    low, high = min(y for _, y in both), max(y for _, y in both)
    across, down = (2, 4) if fancy else (1, 1)
    columns, rows = width * across, height * down

    def place(point: Point) -> tuple[int, int]:
        x = (point[0] - left) / (right - left) if right > left else 0.0
        y = (point[1] - low) / (high - low) if high > low else 0.5
        return round(x * (columns - 1)), round((1 - y) * (rows - 1))

    cells = [[0] * width for _ in range(height)]
    for column, row in _trace([place(p) for p in curve]):
        cells[row // down][column // across] |= _DOTS[column % 2][row % 4] if fancy else 1
    grid = [[_cell(c, fancy) for c in line] for line in cells]
    for point in apart:
        column, row = place(point)
        grid[row // down][column // across] = "o"
    return _framed(grid, (left, right), (low, high), labels, fancy)


def _finite(point: Point) -> bool:
    return all(v == v and abs(v) != float("inf") for v in point)


def _cell(bits: int, fancy: bool) -> str:
    if not fancy:
        return "*" if bits else " "
    return chr(0x2800 + bits) if bits else " "


def _trace(spots: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The spots and what lies between neighbours."""
    traced = list(spots[:1])
    for (x0, y0), (x1, y1) in pairwise(spots):
        steps = max(abs(x1 - x0), abs(y1 - y0), 1)
        traced += [(x0 + round((x1 - x0) * i / steps), y0 + round((y1 - y0) * i / steps)) for i in range(1, steps + 1)]
    return traced


def _framed(
    grid: list[list[str]], xs: tuple[float, float], ys: tuple[float, float], labels: tuple[str, str], fancy: bool
) -> list[str]:
    wall, corner, floor = ("│", "└", "─") if fancy else ("|", "+", "-")
    height, width = len(grid), len(grid[0])
    names = {0: f"{ys[1]:.4g}", height // 2: f"{(ys[0] + ys[1]) / 2:.4g}", height - 1: f"{ys[0]:.4g}"}
    margin = max(len(n) for n in (*names.values(), labels[1]))
    lines = [f"{labels[1]:>{margin}}"]
    lines += [f"{names.get(i, ''):>{margin}} {wall}{''.join(row).rstrip()}" for i, row in enumerate(grid)]
    lines.append(" " * (margin + 1) + corner + floor * width)
    first, last = f"{xs[0]:g}", f"{labels[0]} {xs[1]:g}"
    lines.append(" " * (margin + 2) + first + last.rjust(max(width - len(first), len(last) + 1)))
    return lines


def histogram(bounds: Sequence[int], counts: Sequence[int], width: int = 40, fancy: bool = True) -> list[str]:
    """A bar for each count: values at most bounds[i], the last above all of them.

    Empty bars before the first and behind the last full one are left out; where
    every count is 0 there are no lines. A count above 0 has at least the smallest bar.
    """
    full = [i for i, n in enumerate(counts) if n]
    if not full:
        return []
    most = max(counts)
    at_most, above = ("≤", ">") if fancy else ("<=", ">")
    rows = range(full[0], full[-1] + 1)
    names = {
        i: f"{at_most} {bounds[i]}" if i < len(bounds) else f"{above} {bounds[-1]}" if bounds else "all" for i in rows
    }
    margin = max(len(name) for name in names.values())
    wall = "│" if fancy else "|"
    return [f"{names[i]:>{margin}} {wall}{_bar(counts[i] / most * width, counts[i], fancy)} {counts[i]}" for i in rows]


def _bar(length: float, count: int, fancy: bool) -> str:
    """A bar in eighths of a character where the terminal can."""
    if not count:
        return ""
    if not fancy:
        return "#" * max(1, round(length))
    eighths = max(1, round(length * 8))
    return "█" * (eighths // 8) + "▏▎▍▌▋▊▉"[eighths % 8 - 1 : eighths % 8]
