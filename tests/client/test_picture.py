"""The loss picture."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qlorad.cli import picture

NUMBERS = st.floats(-1e6, 1e6)


@given(
    st.lists(st.tuples(NUMBERS, NUMBERS), max_size=60),
    st.lists(st.tuples(NUMBERS, NUMBERS), max_size=5),
    st.integers(2, 100),
    st.integers(2, 30),
    st.booleans(),
)
def test_it_is_never_larger_than_asked_and_ascii_where_asked(
    points: list[picture.Point], marks: list[picture.Point], width: int, height: int, fancy: bool
) -> None:
    lines = picture.draw(points, width, height, fancy, marks)
    if not points and not marks:
        assert lines == []
        return
    assert len(lines) == height + 3
    margin = lines[-2].index("└" if fancy else "+")
    assert all(len(line) <= margin + 1 + max(width, 40) for line in lines)
    assert fancy or all(line.isascii() for line in lines)


def test_a_falling_loss_falls() -> None:
    lines = picture.draw([(0, 4.0), (10, 2.0), (20, 0.0)], width=21, height=5, fancy=False)
    columns = [line[line.index("|") + 1 :].rstrip() for line in lines[1:6]]
    assert [len(c) for c in columns] == sorted(len(c) for c in columns)
    assert columns[0].startswith("*") and columns[-1].endswith("*") and len(columns[-1]) == 21
    assert lines[0].strip() == "loss" and lines[-1].endswith("step 20") and lines[1].split()[0] == "4"


def test_marks_are_seen_over_the_curve_and_what_is_not_finite_is_left_out() -> None:
    drawn = "\n".join(picture.draw([(0, 1.0), (1, float("nan")), (2, 2.0)], 20, 5, True, [(1, float("inf")), (2, 2.0)]))
    assert drawn.count("o") - "loss".count("o") == 1
    assert picture.draw([(0, float("nan"))]) == []


def test_braille_holds_eight_dots_a_cell() -> None:
    full = picture.draw([(x, y) for x in range(2) for y in range(4)] * 2, width=1, height=1)
    assert full[1].split()[-1][-1] in {chr(c) for c in range(0x2801, 0x2900)}


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=20), st.integers(1, 60), st.booleans())
def test_a_histogram_has_a_bar_for_each_count_between_the_full_ones(counts: list[int], width: int, fancy: bool) -> None:
    bounds = [1 << n for n in range(len(counts) - 1)]
    lines = picture.histogram(bounds, counts, width, fancy)
    full = [i for i, n in enumerate(counts) if n]
    assert len(lines) == (full[-1] - full[0] + 1 if full else 0)
    wall, bar = ("│", "█▏▎▍▌▋▊▉") if fancy else ("|", "#")
    for line, count in zip(lines, counts[full[0] :] if full else [], strict=False):
        drawn, told = line.partition(wall)[2].rsplit(" ", 1)
        assert int(told) == count and bool(drawn) == bool(count) and set(drawn) <= set(bar)
        assert len(drawn) <= width and (count < max(counts) or len(drawn) == width)
        assert fancy or line.isascii()
