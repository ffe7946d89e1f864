"""A job's history is bounded: the job is whole, the oldest events are gone, and nobody is told less than he thinks."""

from __future__ import annotations

import asyncio
import pathlib

import pytest

from qlorad.v1 import errors_pb2, trainer_pb2
from services.common.errors import Fault
from services.common.frames.v1 import training_pb2
from services.common.store import Store
from services.trainer import jobs
from services.trainer.book import MIGRATIONS, Book, Page
from services.trainer.notify import Hub

KEPT = 100


def step(number: int) -> trainer_pb2.Event:
    return trainer_pb2.Event(step=trainer_pb2.StepMetrics(step=number, tokens=10))


def made(page: Page) -> None:
    record = training_pb2.JobRecord()
    record.job.name = "jobs/a"
    record.job.spec.train.checkpoints.keep_last = 2
    record = page.add("a", record)
    record = page.append("a", [jobs.moved(record, trainer_pb2.JOB_STATE_PREPARING)])
    page.append("a", [jobs.moved(record, trainer_pb2.JOB_STATE_RUNNING)])


async def test_the_oldest_events_go_and_the_job_stays_whole(tmp_path: pathlib.Path) -> None:
    hub = Hub(16)
    book = Book(Store.open(tmp_path / "b.sqlite", MIGRATIONS), hub, KEPT)

    async def watch(after: int, limit: int) -> list[int]:
        seen: list[int] = []
        stream = hub.watch(
            "a",
            after,
            lambda: book.turn(lambda page: page.read("a")),
            lambda a, n: book.turn(lambda page: page.events("a", a, n)),
            5.0,
        )
        async for update in stream:
            if update.HasField("event"):
                seen.append(update.event.sequence)
            if len(seen) == limit:
                break
        await stream.aclose()  # type: ignore[attr-defined]
        return seen

    await book.turn(made)
    for first in range(1, 400, 40):
        await book.turn(lambda page, first=first: page.append("a", [step(first + n) for n in range(40)]))  # type: ignore[misc]
    record = await book.turn(lambda page: page.read("a"))
    assert record is not None and record.job.state == trainer_pb2.JOB_STATE_RUNNING
    last = record.job.last_sequence
    assert last == 403 and record.job.result.tokens == 4000 and record.job.result.steps == 400
    oldest = await book.turn(lambda page: page.oldest("a"))
    assert oldest == last - KEPT + 1
    assert await watch(oldest - 1, KEPT) == list(range(oldest, last + 1))
    with pytest.raises(Fault) as caught:
        await watch(oldest - 2, 1)
    assert caught.value.reason == errors_pb2.REASON_HISTORY_GONE
    assert caught.value.metadata["oldest_sequence"] == str(oldest)
    await book.close()
    await asyncio.sleep(0)
