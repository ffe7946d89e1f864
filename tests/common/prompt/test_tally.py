"""One number for rows: the same in any order, another for any change."""

from __future__ import annotations

import functools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common.prompt import tally

ROWS = st.lists(
    st.lists(st.tuples(st.integers(0, 2**32 - 1), st.booleans()), min_size=1, max_size=6), min_size=1, max_size=8
)
Row = list[tuple[int, bool]]


def number(rows: list[Row]) -> int:
    each = [tally.row_number(np.array([i for i, _ in r], np.uint32), bytes(m for _, m in r)) for r in rows]
    return functools.reduce(tally.plus, each, 0)


@settings(max_examples=100, deadline=None)
@given(ROWS, st.randoms())
def test_the_order_does_not_count_and_everything_else_does(rows: list[Row], draw: object) -> None:
    told = number(rows)
    shuffled = list(rows)
    draw.shuffle(shuffled)  # type: ignore[attr-defined]
    assert number(shuffled) == told
    assert number([*rows, rows[0]]) != told and number(rows[1:]) != told
    ids = [[(i ^ (n == 0 and k == 0), m) for k, (i, m) in enumerate(r)] for n, r in enumerate(rows)]
    assert number(ids) != told
    masks = [[(i, m ^ (n == 0 and k == len(r) - 1)) for k, (i, m) in enumerate(r)] for n, r in enumerate(rows)]
    assert (number(masks) != told) == (len(rows[0]) > 1), "a first token cannot carry loss"
    moved = [[*rows[0], (7, True)], *rows[1:]]
    assert number(moved) != told


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 2**128 - 1), min_size=1, max_size=8))
def test_ranks_add_it_as_floats_without_loss(numbers: list[int]) -> None:
    whole = functools.reduce(tally.plus, numbers, 0)
    assert tally.number_of(tally.text_of(whole)) == whole
    sums = [sum(column) for column in zip(*map(tally.pieces, numbers), strict=True)]
    assert tally.joined(sums) == whole
