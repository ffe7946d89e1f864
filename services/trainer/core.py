"""What callers may ask of the trainer.

Law of this room: a job that was acknowledged is on disk. Names are resolved
here, once; everything later goes by digest.
"""

from __future__ import annotations

import asyncio
import pathlib
import secrets
import shutil
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

from qlorad.v1 import errors_pb2, trainer_pb2
from services.common import idempotency, names
from services.common.errors import (
    Fault,
    already_exists,
    invalid,
    invalid_field,
    not_found,
    wrong_state,
)
from services.common.frames.v1 import training_pb2
from services.common.shelf import Shelf
from services.trainer import jobs, launch, objective, published, resize, spec
from services.trainer.book import Book, Page
from services.trainer.desk import Desk
from services.trainer.logs import lines
from services.trainer.notify import Hub, going, gone
from services.trainer.places import Places
from services.trainer.runner import Runner

T = TypeVar("T")
Events: TypeAlias = list[trainer_pb2.Event]
Wish = trainer_pb2.CancelJobRequest | trainer_pb2.PauseJobRequest | trainer_pb2.ResumeJobRequest
Answer = TypeVar("Answer", trainer_pb2.CancelJobResponse, trainer_pb2.PauseJobResponse, trainer_pb2.ResumeJobResponse)


_BEFORE = 200
"""Jobs that an estimate learns from, the newest."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What this daemon was told."""

    host: spec.Host
    max_queue: int
    heartbeat_seconds: float
    places: Places


class Trainer:
    """Jobs."""

    def __init__(
        self,
        book: Book,
        hub: Hub,
        runner: Runner,
        shelf: Shelf,
        desk: Desk,
        rules: Rules,
    ) -> None:
        self._book = book
        self._hub = hub
        self._runner = runner
        self._shelf = shelf
        self._desk = desk
        self._rules = rules

    async def objectives(self) -> list[trainer_pb2.ObjectiveKind]:
        """What a job may learn, by name."""
        return await self._desk.objectives.list()

    def templates(self) -> list[trainer_pb2.JobTemplate]:
        """The named templates, by name."""
        return [self._desk.templates[name] for name in sorted(self._desk.templates)]

    # create

    async def create(self, request: trainer_pb2.CreateJobRequest) -> trainer_pb2.CreateJobResponse:
        """Checks, resolves, and queues a job; on disk when it returns."""
        body = idempotency.body_of(request)
        asked = request.request_id and not request.validate_only
        if asked and not names.check_request_id(request.request_id):
            noted = await self._recall("CreateJob", request.request_id, body)
            if noted is not None:
                return trainer_pb2.CreateJobResponse.FromString(noted)
        record = await asyncio.to_thread(
            self._resolve, request, await self._desk.schemas(request.template, request.spec)
        )
        if request.validate_only:
            return trainer_pb2.CreateJobResponse(job=record.job)
        key = f"create {secrets.token_hex(8)}"
        await self._runner.hold(record, key)
        try:
            answer, made = await self._book.turn(lambda page: self._enqueue(page, request.request_id, body, record))
            if made:
                await self._runner.held(key, record.job.name.removeprefix("jobs/"))
        finally:
            await self._runner.let_go(key)
        self._runner.wake()
        return trainer_pb2.CreateJobResponse.FromString(answer)

    def _enqueue(self, page: Page, request_id: str, body: bytes, record: training_pb2.JobRecord) -> tuple[bytes, bool]:
        noted = idempotency.recall(page.db, "CreateJob", request_id, body)
        if noted is not None:
            return noted, False
        ident = record.job.name.removeprefix("jobs/")
        if page.read(ident) is not None:
            raise already_exists(record.job.name, "leave job_id empty to have one made")
        self._room(page)
        record.job.create_time.FromDatetime(page.now)
        made = page.add(ident, record)
        answer = trainer_pb2.CreateJobResponse(job=made.job).SerializeToString()
        idempotency.note(page.db, "CreateJob", request_id, body, answer)
        return answer, True

    def _room(self, page: Page) -> None:
        if len(page.waiting()) >= self._rules.max_queue:
            raise Fault(
                errors_pb2.REASON_QUEUE_FULL,
                f"the queue holds {self._rules.max_queue} jobs, its most",
                retry_seconds=10.0,
            )

    def _resolve(
        self, request: trainer_pb2.CreateJobRequest, schemas: objective.Schemas | None
    ) -> training_pb2.JobRecord:
        """The job as it would be; INVALID_ARGUMENT with ALL that is wrong, else NOT_FOUND."""
        found = self._desk.settle(request.template, request.spec, spec.check_request(request), schemas)
        record = training_pb2.JobRecord()
        job = record.job
        job.name = "jobs/" + (request.job_id or f"job-{secrets.token_hex(5)}")
        job.state = trainer_pb2.JOB_STATE_QUEUED
        job.spec.CopyFrom(found.spec)
        job.template = found.template
        job.priority = request.priority
        job.labels.update(request.labels)
        job.experiment = request.experiment
        return record

    # estimate

    async def estimate(self, request: trainer_pb2.EstimateJobRequest) -> trainer_pb2.EstimateJobResponse:
        """What a job would take; loads nothing."""
        schemas = await self._desk.schemas(request.template, request.spec)
        ended = [trainer_pb2.JOB_STATE_SUCCEEDED]
        found = await self._book.turn(lambda page: page.listed(0, _BEFORE, ended, ""))
        return await asyncio.to_thread(self._desk.estimate, request, schemas, [record.job for _, record in found])

    async def _recall(self, method: str, request_id: str, body: bytes) -> bytes | None:
        return await self._book.turn(lambda page: idempotency.recall(page.db, method, request_id, body))

    # read

    async def get(self, name: str) -> trainer_pb2.Job:
        """One job."""
        return (await self._record(name)).job

    async def _record(self, name: str) -> training_pb2.JobRecord:
        ident = names.parse_job("name", name)
        record = await self._book.turn(lambda page: page.read(ident))
        if record is None:
            raise await self._unknown(name)
        return record

    async def _unknown(self, name: str) -> Fault:
        return not_found(name, [f"jobs/{i}" for i in await self._book.turn(lambda page: page.ids())])

    async def list(self, request: trainer_pb2.ListJobsRequest) -> trainer_pb2.ListJobsResponse:
        """A page of jobs, newest first."""
        size = names.page_size(request.page_size)
        position = names.page_position(request.page_token)
        if position and not position.isdigit():
            raise invalid_field("page_token", request.page_token, "the next_page_token of the page before")
        before = int(position or 0)
        found = await self._book.turn(
            lambda page: page.listed(before, size + 1, list(request.states), request.experiment)
        )
        answer = trainer_pb2.ListJobsResponse(jobs=[record.job for _, record in found[:size]])
        if len(found) > size:
            answer.next_page_token = names.page_token(str(found[size - 1][0]))
        return answer

    async def watch(self, request: trainer_pb2.WatchJobRequest) -> AsyncIterator[trainer_pb2.WatchJobResponse]:
        """Follows a job."""
        job = await self.get(request.name)
        ident = job.name.removeprefix("jobs/")
        if not 0 <= request.after_sequence <= job.last_sequence:
            raise invalid_field("after_sequence", request.after_sequence, f"0 to {job.last_sequence}")
        oldest = await self._book.turn(lambda page: page.oldest(ident))
        if request.after_sequence + 1 < oldest:
            raise gone(ident, request.after_sequence, oldest)
        async for update in self._hub.watch(
            ident,
            request.after_sequence,
            lambda: self._book.turn(lambda page: page.read(ident)),
            lambda after, limit: self._book.turn(lambda page: page.events(ident, after, limit)),
            self._rules.heartbeat_seconds,
        ):
            yield update

    async def watch_log(self, request: trainer_pb2.WatchLogRequest) -> AsyncIterator[trainer_pb2.WatchLogResponse]:
        """What the worker of an attempt wrote, to its end."""
        ident = names.parse_job("name", request.name)
        job = await self.get(request.name)
        attempt = request.attempt or job.attempt
        if not 1 <= attempt <= job.attempt:
            raise not_found(f"{job.name}/attempts/{attempt}", [f"{job.name}/attempts/{job.attempt}"])

        async def is_over() -> bool:
            if self._hub.draining:
                raise going()
            record = await self._book.turn(lambda page: page.read(ident))
            return record is None or jobs.is_over(record, attempt)

        path = self._rules.places.attempt(ident, attempt) / launch.LOG
        async for text, after in lines(path, request.offset_bytes, request.follow, is_over):
            yield trainer_pb2.WatchLogResponse(attempt=attempt, text=text, next_offset_bytes=after)

    # checkpoints

    async def checkpoints(self, name: str) -> Sequence[trainer_pb2.Checkpoint]:
        """What a job keeps, oldest first."""
        record = await self._record(name)
        return await asyncio.to_thread(published.listed, self._shelf, record)

    async def publish(self, request: trainer_pb2.PublishCheckpointRequest) -> trainer_pb2.PublishCheckpointResponse:
        """Makes an adapter of a checkpoint."""
        body = idempotency.body_of(request)
        job, step = published.read_name(request)
        noted = await self._recall("PublishCheckpoint", request.request_id, body)
        if noted is not None:
            return trainer_pb2.PublishCheckpointResponse.FromString(noted)
        record = await self._record(f"jobs/{job}")
        made = await asyncio.to_thread(published.publish, self._shelf, record, step, request.adapter)
        answer = made.SerializeToString()

        def write(page: Page) -> bytes:
            again = idempotency.recall(page.db, "PublishCheckpoint", request.request_id, body)
            if again is None:
                idempotency.note(page.db, "PublishCheckpoint", request.request_id, body, answer)
            return again or answer

        return trainer_pb2.PublishCheckpointResponse.FromString(await self._book.turn(write))

    # cancel, pause, resume, delete

    async def cancel(self, request: trainer_pb2.CancelJobRequest) -> trainer_pb2.CancelJobResponse:
        """Notes the wish to stop; on disk when it returns."""
        return await self._wished(
            "CancelJob", request, trainer_pb2.CancelJobResponse, lambda r: _one(jobs.wish_to_cancel(r))
        )

    async def pause(self, request: trainer_pb2.PauseJobRequest) -> trainer_pb2.PauseJobResponse:
        """Notes the wish to hold a job back; on disk when it returns."""
        return await self._wished(
            "PauseJob", request, trainer_pb2.PauseJobResponse, lambda r: _one(jobs.wish_to_pause(r))
        )

    async def resume(self, request: trainer_pb2.ResumeJobRequest) -> trainer_pb2.ResumeJobResponse:
        """Puts a paused job back in the queue; on disk when it returns."""

        def decide(record: training_pb2.JobRecord) -> Events:
            events = _one(jobs.wish_to_resume(record, request.HasField("ranks")))
            if request.HasField("ranks"):
                host, devices = self._rules.host, self._rules.places.devices
                told = resize.resized(record.job.spec.train, request.ranks, host, devices)
                events[:0] = [trainer_pb2.Event(attempt=record.job.attempt, resized=told)] if told else []
            return events

        return await self._wished("ResumeJob", request, trainer_pb2.ResumeJobResponse, decide)

    async def _wished(
        self,
        method: str,
        request: Wish,
        kind: type[Answer],
        decide: Callable[[training_pb2.JobRecord], Events],
    ) -> Answer:
        """Writes a wish and its answer in one transaction, then tells the worker and the queue."""
        ident = self._named(request.request_id, request.name)
        body = idempotency.body_of(request)

        def write(page: Page) -> tuple[bytes, training_pb2.JobRecord | None]:
            noted = idempotency.recall(page.db, method, request.request_id, body)
            if noted is not None:
                return noted, None
            record = page.read(ident)
            if record is None:
                raise not_found(request.name, [f"jobs/{i}" for i in page.ids()])
            events = decide(record)
            if events:
                if events[-1].state_changed.to == trainer_pb2.JOB_STATE_QUEUED:
                    self._room(page)
                    page.wait_until(ident, 0.0)  # whoever resumes it wants it now, whatever was lost before
                record = page.append(ident, events)
            answer = kind(job=record.job).SerializeToString()
            idempotency.note(page.db, method, request.request_id, body, answer)
            return answer, record

        answer, record = await self._book.turn(write)
        if record is not None and record.job.state in jobs.STOPPING:
            await self._runner.tell_stop(ident, record.job.attempt)
        if record is not None and record.job.is_terminal:
            await self._runner.let_go(ident)
        self._runner.wake()
        return kind.FromString(answer)

    async def delete(self, request: trainer_pb2.DeleteJobRequest) -> trainer_pb2.DeleteJobResponse:
        """Forgets an ended job."""
        ident = self._named(request.request_id, request.name)
        body = idempotency.body_of(request)
        noted = await self._recall("DeleteJob", request.request_id, body)
        if noted is not None:
            return trainer_pb2.DeleteJobResponse.FromString(noted)
        job = await self.get(request.name)
        if not job.is_terminal:
            ended = (jobs.word(s) for s in sorted(jobs.TERMINAL))
            raise wrong_state(request.name, jobs.word(job.state), ended)
        freed = await asyncio.to_thread(
            _erase, self._rules.places.jobs / ident
        )  # an ended job stays ended: safe before the commit
        answer = trainer_pb2.DeleteJobResponse(freed_bytes=freed).SerializeToString()

        def write(page: Page) -> bytes:
            again = idempotency.recall(page.db, "DeleteJob", request.request_id, body)
            if again is None:
                page.remove(ident)
                idempotency.note(page.db, "DeleteJob", request.request_id, body, answer)
            return again or answer

        answer = await self._book.turn(write)
        self._hub.forget(ident)
        return trainer_pb2.DeleteJobResponse.FromString(answer)

    @staticmethod
    def _named(request_id: str, name: str) -> str:
        wrong = names.check_request_id(request_id)
        if wrong:
            raise invalid(wrong)
        return names.parse_job("name", name)


def _one(event: trainer_pb2.Event | None) -> Events:
    return [] if event is None else [event]


def _erase(folder: pathlib.Path) -> int:
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    shutil.rmtree(folder, ignore_errors=True)
    return size
