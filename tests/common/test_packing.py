"""The forecast of packing is best fit, longest first, whatever way it is counted."""

from __future__ import annotations

import collections

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common import packing


def one_by_one(lengths: list[int], room: int) -> int:
    """Best fit decreasing, as it is written in books."""
    free: list[int] = []
    for length in sorted(lengths, reverse=True):
        fits = [f for f in free if f >= length]
        if fits:
            free.remove(min(fits))
            free.append(min(fits) - length)
        else:
            free.append(room - length)
    return len(free)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 64), st.data())
def test_the_forecast_is_best_fit_of_the_longest_first(room: int, data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, room), max_size=60))
    made = packing.forecast(collections.Counter(lengths), room)
    assert made == one_by_one(lengths, room)
    assert -(-sum(lengths) // room) <= made <= len(lengths)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 64), min_size=1, max_size=60))
def test_the_trainer_packs_longest_first_into_as_many(lengths: list[int]) -> None:
    """With as many open bins as it needs, the trainer's own packing gives the forecast."""
    order = sorted(range(len(lengths)), key=lambda n: -lengths[n])
    assert len(packing.pack(order, lengths, 64)) == packing.forecast(collections.Counter(lengths), 64)


def test_a_million_rows_are_counted_by_their_lengths() -> None:
    counts = {length: 1_000_000 // length for length in range(1, 2048)}
    made = packing.forecast(counts, 2048)
    tokens = sum(length * many for length, many in counts.items())
    assert 0.99 < packing.fill(tokens, made, 2048) <= 1.0


def test_nothing_packs_into_nothing() -> None:
    assert packing.forecast({}, 8) == 0 and packing.fill(0, 0, 8) == 0.0
    assert packing.forecast({8: 3}, 8) == 3 and packing.fill(24, 3, 8) == 1.0
    assert packing.fill(12, 2, 8) == pytest.approx(0.75)
