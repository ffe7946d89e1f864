"""Who follows a job hears every event once, in order.

Law of this room: events come from a ring in memory, from the book where the
ring does not reach. A watcher is a number, not a queue: it costs the job
nothing, however slow it is.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field

from qlorad.v1 import errors_pb2, trainer_pb2
from services.common.errors import Fault, not_found
from services.common.frames.v1 import training_pb2

CATCH_UP_EVENTS = 256
Heard = Callable[[str, trainer_pb2.Event, training_pb2.JobRecord], None]
"""Told of each event once it is on disk, with the job as it is after the transaction."""


@dataclass(slots=True)
class Topic:
    """The newest events of one job."""

    ring: deque[trainer_pb2.Event]
    record: training_pb2.JobRecord
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def add(self, event: trainer_pb2.Event) -> None:
        """Takes an event; a gap empties the ring, so that readers turn to the book."""
        if self.ring and event.sequence <= self.ring[-1].sequence:
            return
        if self.ring and event.sequence != self.ring[-1].sequence + 1:
            self.ring.clear()
        self.ring.append(event)

    def after(self, sequence: int) -> list[trainer_pb2.Event] | None:
        """What follows a number; None if the ring does not reach back so far."""
        if not self.ring or sequence + 1 < self.ring[0].sequence:
            return None
        return [self.ring[n] for n in range(sequence + 1 - self.ring[0].sequence, len(self.ring))]


class Hub:
    """Live jobs and their watchers."""

    def __init__(self, ring_events: int, heard: Heard = lambda job, event, record: None) -> None:
        self._ring_events = ring_events
        self._heard = heard
        self._topics: dict[str, Topic] = {}
        self._draining = False
        self.watchers = 0
        self.events_written = 0
        self.counts: Counter[int] = Counter()
        """Jobs by state; the app fills it at the start."""

    def live(self) -> list[training_pb2.JobRecord]:
        """The newest state of every job that this process has seen move and that has not ended."""
        return [t.record for t in self._topics.values() if not t.record.job.is_terminal]

    @property
    def draining(self) -> bool:
        """Whether the daemon is going."""
        return self._draining

    def publish(
        self,
        events: Iterable[tuple[str, trainer_pb2.Event]],
        records: Mapping[str, training_pb2.JobRecord],
        moves: Iterable[tuple[int, int]] = (),
    ) -> None:
        """Tells watchers what has been written."""
        for left, taken in moves:
            self.counts[left] -= 1
            self.counts[taken] += 1
        for job, record in records.items():
            topic = self._topics.get(job)
            if topic is None:
                topic = self._topics[job] = Topic(deque(maxlen=self._ring_events), record)
            if record.job.last_sequence >= topic.record.job.last_sequence:
                topic.record = record
        for job, event in events:
            self.events_written += 1
            self._topics[job].add(event)
            self._heard(job, event, self._topics[job].record)
        for job, record in records.items():
            self._wake(self._topics[job])
            if record.job.is_terminal:
                del self._topics[job]  # watchers keep their own hold on it

    def forget(self, job: str) -> None:
        """A removed job has no watchers."""
        topic = self._topics.pop(job, None)
        if topic is not None:
            self._wake(topic)

    def drain(self) -> None:
        """Ends every watch: the daemon is going."""
        self._draining = True
        for topic in self._topics.values():
            self._wake(topic)

    @staticmethod
    def _wake(topic: Topic) -> None:
        topic.changed.set()
        topic.changed = asyncio.Event()

    async def watch(
        self,
        job: str,
        after: int,
        read: Callable[[], Awaitable[training_pb2.JobRecord | None]],
        catch_up: Callable[[int, int], Awaitable[list[trainer_pb2.Event]]],
        heartbeat_seconds: float,
    ) -> AsyncIterator[trainer_pb2.WatchJobResponse]:
        """A snapshot, then every event after a number; ends when the job has ended and all was sent.

        SLOW_READER for one who had caught up and then fell behind what the ring holds;
        HISTORY_GONE where the book begins later than he would go on.
        """
        self.watchers += 1
        try:
            record = await read()
            if record is None:
                raise not_found(f"jobs/{job}")
            yield trainer_pb2.WatchJobResponse(snapshot=record.job)
            caught_up = False
            while True:
                if self._draining:
                    raise going()
                topic = self._topics.get(job)
                changed = topic.changed if topic is not None else None
                events = topic.after(after) if topic is not None else None
                if events is None:
                    if caught_up and topic is not None and topic.ring:
                        raise _slow(job, after)
                    events = await catch_up(after, CATCH_UP_EVENTS)
                if events and events[0].sequence != after + 1:
                    raise gone(job, after, events[0].sequence)
                for event in events:
                    yield trainer_pb2.WatchJobResponse(event=event)
                    after = event.sequence
                if events:
                    continue
                record = await read() if topic is None else topic.record
                if record is None:
                    raise not_found(f"jobs/{job}")
                if record.job.last_sequence > after:
                    continue
                if record.job.is_terminal:
                    return
                caught_up = True
                if not await _within(changed, heartbeat_seconds):
                    beat = trainer_pb2.Heartbeat(last_sequence=after)
                    beat.interval.FromMilliseconds(int(heartbeat_seconds * 1000))
                    yield trainer_pb2.WatchJobResponse(heartbeat=beat)
        finally:
            self.watchers -= 1


async def _within(changed: asyncio.Event | None, seconds: float) -> bool:
    """Whether something changed in time; a job without a topic is asked for again soon."""
    if changed is None:
        await asyncio.sleep(min(1.0, seconds))
        return True
    try:
        await asyncio.wait_for(changed.wait(), seconds)
        return True
    except TimeoutError:
        return False


def going() -> Fault:
    """UNAVAILABLE: the daemon is shutting down."""
    return Fault(errors_pb2.REASON_SHUTTING_DOWN, "the daemon is shutting down", retry_seconds=1.0)


def gone(job: str, after: int, oldest: int) -> Fault:
    """OUT_OF_RANGE: what follows a number is not kept any more."""
    return Fault(
        errors_pb2.REASON_HISTORY_GONE,
        f"events of jobs/{job} after {after} are not kept any more; the oldest is {oldest}",
        resource=f"jobs/{job}",
        metadata={"oldest_sequence": str(oldest)},
    )


def _slow(job: str, after: int) -> Fault:
    return Fault(
        errors_pb2.REASON_SLOW_READER,
        f"this reader of jobs/{job} is too slow; call again with after_sequence={after}",
        resource=f"jobs/{job}",
        metadata={"resume_after_sequence": str(after)},
    )
