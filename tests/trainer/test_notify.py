"""Watchers: what a ring cannot hold, the book gives; who falls behind is told where to go on."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlorad.v1 import errors_pb2, trainer_pb2
from services.common.errors import Fault
from services.common.frames.v1 import training_pb2
from services.trainer.notify import Hub


class Log:
    """A job's events as a book keeps them."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self.events: list[trainer_pb2.Event] = []
        self.reads = 0

    def write(self, count: int, end: bool = False) -> None:
        fresh = [trainer_pb2.Event(sequence=len(self.events) + n + 1) for n in range(count)]
        self.events += fresh
        self.ended = end
        self.hub.publish([("a", e) for e in fresh], {"a": self.record()})

    def record(self) -> training_pb2.JobRecord:
        record = training_pb2.JobRecord()
        record.job.last_sequence, record.job.is_terminal = len(self.events), self.ended
        return record

    async def read(self) -> training_pb2.JobRecord:
        return self.record()

    async def catch_up(self, after: int, limit: int) -> list[trainer_pb2.Event]:
        self.reads += 1
        return self.events[after : after + limit]

    def watch(self, after: int = 0):  # type: ignore[no-untyped-def]
        return self.hub.watch("a", after, self.read, self.catch_up, 5.0)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(0, 20), st.booleans())
def test_every_event_once_in_order_from_ring_or_book(bursts: list[int], after: int, early: bool) -> None:
    async def go() -> list[int]:
        log = Log(Hub(16))
        log.write(after + 1)
        seen: list[int] = []

        async def follow() -> None:
            async for update in log.watch(after):
                if update.HasField("event"):
                    seen.append(update.event.sequence)

        task = asyncio.create_task(follow()) if early else None
        for number, burst in enumerate(bursts):
            log.write(min(burst, 16), end=number == len(bursts) - 1)
            await asyncio.sleep(0)
            for _ in range(1000):
                if not early or len(seen) == len(log.events) - after:
                    break
                await asyncio.sleep(0)
        await (task or follow())
        assert seen == list(range(after + 1, len(log.events) + 1)) and log.hub.watchers == 0
        return seen

    assert asyncio.run(go())


async def test_a_reader_that_falls_behind_the_ring_is_cut_off_with_a_number() -> None:
    log = Log(Hub(16))
    log.write(3)
    stream = log.watch()
    got = [await anext(stream) for _ in range(4)]
    assert got[-1].event.sequence == 3
    waiting = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    log.write(1)
    assert (await waiting).event.sequence == 4
    log.write(100)  # while the reader does not read
    with pytest.raises(Fault) as caught:
        await anext(stream)
    assert caught.value.reason == errors_pb2.REASON_SLOW_READER
    resume = int(caught.value.metadata["resume_after_sequence"])
    assert resume == 4
    log.write(1, end=True)
    again = [u.event.sequence async for u in log.watch(resume) if u.HasField("event")]
    assert again == list(range(5, len(log.events) + 1))


async def test_draining_ends_watches_so_that_callers_try_again() -> None:
    log = Log(Hub(16))
    log.write(2)
    stream = log.watch()
    assert [await anext(stream) for _ in range(3)]
    waiting = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    log.hub.drain()
    with pytest.raises(Fault) as caught:
        await waiting
    assert caught.value.reason == errors_pb2.REASON_SHUTTING_DOWN
