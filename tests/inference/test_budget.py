"""Who makes room: nothing that is held leaves, nothing leaves needlessly, what is oldest leaves first."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlorad.v1 import errors_pb2, inference_pb2
from services.common.errors import Fault
from services.common.facts import ModelFacts
from services.inference import budget
from services.inference.budget import Item
from services.inference.fitting import fit


@st.composite
def shelves(draw: st.DrawFn) -> list[Item]:
    count = draw(st.integers(0, 8))
    ages = draw(st.permutations(range(count)))
    return [
        Item(
            f"k{n}", f"models/k{n}", draw(st.integers(1, 50)), float(ages[n]), draw(st.integers(0, 3)) == 0,
            draw(st.sampled_from(["", "", "2 requests"])),
        )
        for n in range(count)
    ]  # fmt: skip


@given(shelves(), st.integers(1, 120), st.integers(1, 200))
def test_a_verdict_keeps_what_is_held_and_sends_away_no_more_than_it_must(
    items: list[Item], need: int, limit: int
) -> None:
    verdict = budget.decide(items, need, limit)
    by_key = {i.key: i for i in items}
    stays = sum(i.bytes for i in items if i.key not in verdict.leave)
    assert all(by_key[key].is_free for key in verdict.leave)
    if verdict.fits:
        assert stays + need <= limit
        for key in verdict.leave:
            assert stays + by_key[key].bytes + need > limit, "one left that could have stayed"
    else:
        held = sum(i.bytes for i in items if not i.is_free)
        assert held + need > limit and not verdict.leave
        assert {i.key for i in verdict.in_the_way} == {i.key for i in items if not i.is_free}
        assert verdict.may_fit_later == (sum(i.bytes for i in items if i.pinned) + need <= limit)


@given(shelves(), st.integers(1, 12), st.integers(1, 12))
def test_of_equals_the_oldest_leave(items: list[Item], need: int, limit: int) -> None:
    equal = [dataclasses.replace(i, bytes=1) for i in items]
    leave = budget.decide(equal, need, limit).leave
    oldest = sorted((i for i in equal if i.is_free), key=lambda i: i.used_at)
    assert leave == tuple(i.key for i in oldest[: len(leave)])


@given(shelves(), st.data(), st.integers(1, 120), st.integers(1, 200))
def test_no_more_are_closed_than_it_takes_and_never_what_is_pinned(
    items: list[Item], data: st.DataObject, need: int, limit: int
) -> None:
    items = [
        dataclasses.replace(
            i, requests=data.draw(st.integers(0, 3)) if i.busy else 0, leaves=bool(i.busy and not n % 3)
        )
        for n, i in enumerate(items)
    ]
    items = [dataclasses.replace(i, requests=0) if i.leaves else i for i in items]
    closed = budget.close(items, need, limit)
    by_key = {i.key: i for i in items}
    assert all(by_key[key].requests and not by_key[key].pinned for key in closed)

    def stays(gone: tuple[str, ...]) -> int:
        return sum(i.bytes for i in items if not (i.is_free or i.leaves or i.key in gone))

    if closed:
        assert stays(closed[:-1]) + need > limit, "one was closed that need not be"
        open_ones = [i for i in items if i.requests and not i.pinned and i.key not in closed]
        most = max((by_key[key].requests, by_key[key].used_at) for key in closed)
        assert all((i.requests, i.used_at) > most for i in open_ones)
        assert not open_ones or stays(closed) + need <= limit
    else:
        assert stays(()) + need <= limit or not any(i.requests and not i.pinned for i in items)
    assert budget.close(items, need, 0) == ()


def test_the_oldest_leaves_first() -> None:
    items = [Item("new", "new", 10, 3.0), Item("old", "old", 10, 1.0), Item("mid", "mid", 10, 2.0)]
    assert budget.decide(items, 10, 35).leave == ("old",)
    assert budget.decide(items, 20, 35).leave == ("old", "mid")
    big = [Item("small", "small", 1, 1.0), Item("large", "large", 30, 2.0)]
    assert budget.decide(big, 20, 35).leave == ("large",), "the small one need not go"


def test_no_limit_bounds_nothing() -> None:
    assert budget.decide([Item("a", "a", 1 << 60, 1.0, True)], 1 << 60, 0).fits


def test_a_refusal_names_who_is_in_the_way_and_whether_waiting_helps() -> None:
    items = [Item("a", "models/a", 10, 1.0, pinned=True), Item("b", "models/b", 20, 2.0, busy="3 requests")]
    fault = budget.too_large("models/c", 25, 40, "memory_bytes", budget.decide(items, 25, 40))
    assert fault.reason == errors_pb2.REASON_TOO_LARGE
    assert "models/b (20 bytes; 3 requests), models/a (10 bytes; pinned)" in fault.message
    assert fault.retry_seconds > 0, "once models/b is not busy, models/c fits"
    pinned = budget.too_large("models/c", 35, 40, "memory_bytes", budget.decide(items, 35, 40))
    assert pinned.retry_seconds == 0


FACTS = ModelFacts("X", "x", 1_000, 600, 512, 100, ("q_proj",), "sha256:t", "sha256:c", True, "2026-01-01", (1,))
NONE, BF16 = inference_pb2.PRECISION_UNSPECIFIED, inference_pb2.PRECISION_BF16
PINNED = [Item("a", "models/a", 1_000, 1.0, pinned=True)]


def test_a_base_that_may_be_held_in_any_way_takes_the_smaller_one_where_the_larger_has_no_room() -> None:
    def held(device: str, limit: int) -> tuple[str, int]:
        found = fit("models/m", NONE, FACTS, device, PINNED, limit, "memory_bytes")
        assert bool(found.why) == bool(found.precision) and ("memory_bytes" in found.why or not found.why)
        return inference_pb2.Precision.Name(found.precision).removeprefix("PRECISION_"), found.need

    assert held("cpu", 3_000) == ("UNSPECIFIED", 2_000), "the engine may choose"
    assert held("cpu", 2_999) == ("INT8", 1_000)
    assert held("cpu", 1_999) == ("INT4", 625)
    assert held("cuda:0", 2_999) == ("NF4", 600)
    for asked, limit in ((BF16, 2_999), (NONE, 1_500)):
        with pytest.raises(Fault) as caught:
            fit("models/m", asked, FACTS, "cpu", PINNED, limit, "memory_bytes")
        assert "models/a (1000 bytes; pinned)" in caught.value.message
