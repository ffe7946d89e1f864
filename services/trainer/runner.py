"""Starts workers, copies their facts, seals what they made.

Law of this room: effects only; what to do is decided in jobs.py and launch.py.
A worker lives as long as its attempt's lock is held. The daemon may die at any
line: everything here can be done again.
"""

from __future__ import annotations

import asyncio
import dataclasses
import fcntl
import logging
import os
import pathlib
import shutil
import subprocess
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

from google.protobuf import json_format

from qlorad.v1 import trainer_pb2
from services.common import devices, frames, process, telemetry
from services.common.errors import Fault, Reason
from services.common.frames.v1 import training_pb2
from services.common.shelf import Shelf, fsync_path, write_durable
from services.trainer import jobs, launch, sealing
from services.trainer.book import Attempt, Book, Page
from services.trainer.pins import Pins

log = logging.getLogger("qlorad.trainer")

READ_BYTES = 4 << 20
QUEUE_LOOK_SECONDS = 0.25
FACTS_LOOK_SECONDS = 0.05
TRY_AGAIN_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Places:
    """Where things lie and what attempts are given."""

    jobs: pathlib.Path
    leases: pathlib.Path
    device: str
    extensions: str
    backoff_seconds: float
    exit_grace_seconds: float

    def attempt(self, job: str, number: int) -> pathlib.Path:
        """An attempt's folder."""
        return self.jobs / job / "attempts" / str(number)


class Runner:
    """The queue at work."""

    def __init__(self, book: Book, shelf: Shelf, places: Places) -> None:
        self._book = book
        self._shelf = shelf
        self._places = places
        self._pins = Pins(shelf)
        self._wake = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._following: set[str] = set()
        self.attempts_begun = 0
        self.attempts_lost = 0

    # begin and end

    async def start(self) -> None:
        """Takes up every job that has not ended, then serves the queue."""
        live, known = await self._book.turn(lambda page: (page.live(), page.ids()))
        await asyncio.to_thread(self._sweep, known)
        for record in live:
            job = record.job.name.removeprefix("jobs/")
            await asyncio.to_thread(self._pins.hold_for, record)
            if record.job.state in jobs.WITH_WORKER:
                if record.job.state == trainer_pb2.JOB_STATE_CANCELLING:
                    await self.tell_cancel(job, record.job.attempt)
                self._follow(job, record.job.attempt, None)
        self._own(self._serve_queue(), "queue")

    async def stop(self) -> None:
        """Lets go of everything; workers go on and are found again."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self._pins.hand_over)

    def wake(self) -> None:
        """Something about the queue changed."""
        self._wake.set()

    async def hold(self, record: training_pb2.JobRecord) -> None:
        """Keeps what a job needs from removal; NOT_FOUND if it is gone."""
        await asyncio.to_thread(self._pins.hold_for, record, True)

    async def let_go(self, job: str) -> None:
        """Ends the hold of a job that never was or has ended."""
        await asyncio.to_thread(self._pins.release, job)

    def _own(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("task %s broke", task.get_name(), exc_info=task.exception())

    def _sweep(self, known: set[str]) -> None:
        """Removes folders of jobs that are not in the book (a DeleteJob cut short)."""
        self._places.jobs.mkdir(parents=True, exist_ok=True)
        for folder in self._places.jobs.iterdir():
            if folder.name not in known:
                shutil.rmtree(folder, ignore_errors=True)

    # the queue

    async def _serve_queue(self) -> None:
        while True:
            self._wake.clear()
            waiting = False
            try:
                waiting = await self._serve_once()
            except (Fault, OSError) as e:
                log.error("the queue stumbled: %s", e)
                waiting = True
            try:
                await asyncio.wait_for(self._wake.wait(), QUEUE_LOOK_SECONDS if waiting else None)
            except TimeoutError:
                continue

    async def _serve_once(self) -> bool:
        """Starts the next job if the device is free; tells the others why they wait."""
        queue = await self._book.turn(lambda page: page.waiting())
        if not queue:
            return False
        now = time.time()
        busy: tuple[str, int] | None = None
        chosen = None if self._following else jobs.next_to_start(queue, now)
        if chosen is not None:
            owner = chosen.record.job.name
            got = await asyncio.to_thread(devices.try_acquire, self._places.leases, self._places.device, owner)
            if isinstance(got, devices.Lease):
                await self._launch(chosen.record, got)
                return True
            busy = got
        places = jobs.places(queue, now, busy, bool(self._following))
        moved = [(w.record, p) for w, p in zip(queue, places, strict=True) if w.record.job.queue != p]
        if moved:
            await self._book.turn(lambda page: _replace(page, moved))
        return True

    async def _launch(self, record: training_pb2.JobRecord, lease: devices.Lease) -> None:
        job = record.job.name.removeprefix("jobs/")
        number = record.job.attempt + 1
        folder = self._places.attempt(job, number)
        child: subprocess.Popen[bytes] | None = None
        try:
            await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
        except OSError:
            lease.release()
            raise
        try:
            begun = await self._book.turn(lambda page: self._begin(page, job, number))
            if begun is None:
                return
            self.attempts_begun += 1
            order = launch.order_of(begun, str(self._shelf.root), self._places.device, time.time())
            child = await asyncio.to_thread(self._exec, order, folder, lease)
        except OSError as e:
            log.error("attempt %d of %s could not be started: %s", number, job, e)
        finally:
            lease.release()
        self._follow(job, number, child)

    def _begin(self, page: Page, job: str, number: int) -> training_pb2.JobRecord | None:
        record = page.read(job)
        if record is None or record.job.state != trainer_pb2.JOB_STATE_QUEUED:
            return None  # cancelled meanwhile
        preparing = jobs.moved(record, trainer_pb2.JOB_STATE_PREPARING)
        preparing.attempt = number
        started = trainer_pb2.Event(attempt=number)
        started.attempt_started.attempt = number
        started.attempt_started.from_step = jobs.resume_from(record).step
        started.attempt_started.device = self._places.device
        page.begin_attempt(job, number)
        return page.append(job, [preparing, started])

    def _exec(self, order: training_pb2.Order, folder: pathlib.Path, lease: devices.Lease) -> subprocess.Popen[bytes]:
        write_durable(folder / launch.ORDER, order.SerializeToString())
        lock = os.open(folder / launch.LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = (lock, lease.fd, *self._pins.fds(order))
            return process.start_detached(
                launch.module_of(order.spec),
                ["--attempt", str(folder), "--hold", ",".join(map(str, held))],
                folder / launch.LOG,
                held,
                launch.environ_of(order.spec, self._places.extensions),
            )
        finally:
            os.close(lock)

    async def tell_cancel(self, job: str, attempt: int) -> None:
        """Lays the wish to stop where the worker looks."""

        def lay() -> None:
            folder = self._places.attempt(job, attempt)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / launch.CANCEL).touch()
            fsync_path(folder)

        await asyncio.to_thread(lay)

    # one attempt

    def _follow(self, job: str, number: int, child: subprocess.Popen[bytes] | None) -> None:
        self._following.add(job)
        self._own(self._followed(job, number, child), f"follow {job}/{number}")

    async def _followed(self, job: str, number: int, child: subprocess.Popen[bytes] | None) -> None:
        """Follows an attempt to its end, whatever gets in the way."""
        try:
            with telemetry.context(job=job, attempt=str(number)):
                while True:
                    if await self._to_the_end(job, number, child):
                        return
                    await asyncio.sleep(TRY_AGAIN_SECONDS)
        finally:
            self._following.discard(job)
            self.wake()

    async def _to_the_end(self, job: str, number: int, child: subprocess.Popen[bytes] | None) -> bool:
        """Whether the attempt is over and done with; False means: try again, nothing is lost."""
        try:
            attempt = await self._tail(await self._book.turn(lambda page: page.attempt(job, number)), child)
            await self._conclude(attempt, child)
        except Exception:  # a full disk, a broken store: the attempt is followed on when it is mended
            log.exception("following attempt %d of %s stumbled", number, job)
            return False
        return True

    async def _tail(self, attempt: Attempt, child: subprocess.Popen[bytes] | None) -> Attempt:
        """Copies facts until the worker is gone and all was read."""
        folder = self._places.attempt(attempt.job, attempt.number)
        over_since = 0.0
        while True:
            alive, data = await asyncio.to_thread(_look, folder, attempt.offset, child)
            try:
                bodies, size = frames.unpack_all(data)
            except frames.BadFrame as e:
                log.error("facts of attempt %d of %s are broken: %s", attempt.number, attempt.job, e)
                if alive:
                    process.kill(child.pid if child else attempt.pid)
                bodies, size = [], 0
            if bodies:
                attempt = await self._copy(attempt, folder, bodies, size)
                continue
            if not alive:
                return attempt
            if attempt.outcome is not None and attempt.pid:
                over_since = over_since or time.monotonic()
                if time.monotonic() - over_since > self._places.exit_grace_seconds:
                    process.kill(attempt.pid)
            await asyncio.sleep(FACTS_LOOK_SECONDS)

    async def _copy(self, attempt: Attempt, folder: pathlib.Path, bodies: list[bytes], size: int) -> Attempt:
        """Turns new facts into events, with the offset, in one transaction."""
        job = attempt.job
        facts = [training_pb2.Fact.FromString(body) for body in bodies]
        sealed = [await self._seal_checkpoint(job, attempt.number, folder, fact) for fact in facts]
        after = dataclasses.replace(
            attempt,
            offset=attempt.offset + size,
            pid=next((f.started.pid for f in facts if f.HasField("started")), attempt.pid),
            outcome=next((f for f in facts if jobs.is_outcome(f)), attempt.outcome),
        )

        def write(page: Page) -> training_pb2.JobRecord:
            record = _there(page, job)
            for fact, event in zip(facts, sealed, strict=True):
                events = jobs.events_of(record, fact) if event is None else [event]
                record = page.append(job, events) if events else record
            page.copied(after)
            return record

        record = await self._book.turn(write)
        if any(event is not None for event in sealed):
            await asyncio.to_thread(self._drop_written, folder, facts)
            await self._retain(job, record)
        elif any(f.HasField("planned") for f in facts):
            await asyncio.to_thread(self._pins.hold_for, record)
        return after

    async def _seal_checkpoint(
        self, job: str, number: int, folder: pathlib.Path, fact: training_pb2.Fact
    ) -> trainer_pb2.Event | None:
        """The event of a checkpoint fact: sealed, or a line that tells why it was not."""
        if not fact.HasField("checkpoint"):
            return None
        event = trainer_pb2.Event(attempt=number)
        story = {"job": f"jobs/{job}", "attempt": number, "step": fact.checkpoint.step}
        try:
            sealed = await asyncio.to_thread(sealing.seal_checkpoint, self._shelf, folder, fact.checkpoint, job, story)
        except Fault as fault:
            event.log.level = "ERROR"
            event.log.text = f"checkpoint of step {fact.checkpoint.step} was not sealed: {fault.message}"
            return event
        event.checkpoint_sealed.step = fact.checkpoint.step
        event.checkpoint_sealed.digest = sealed.digest
        event.checkpoint_sealed.size_bytes = sealed.size_bytes
        return event

    async def _retain(self, job: str, record: training_pb2.JobRecord) -> None:
        """Holds the newest checkpoints and removes those that they supersede."""
        await asyncio.to_thread(self._pins.hold_for, record)
        superseded = await self._book.turn(lambda page: page.superseded(job))
        if superseded:
            gone = await asyncio.to_thread(sealing.remove_checkpoints, self._shelf, superseded)
            await self._book.turn(lambda page: page.checkpoints_gone(job, gone))

    @staticmethod
    def _drop_written(folder: pathlib.Path, facts: list[training_pb2.Fact]) -> None:
        for fact in facts:
            if fact.HasField("checkpoint"):
                shutil.rmtree(sealing.inside(folder, fact.checkpoint.folder), ignore_errors=True)

    async def _conclude(self, attempt: Attempt, child: subprocess.Popen[bytes] | None) -> None:
        """What becomes of the job now that the attempt's worker is gone."""
        job, folder, outcome = attempt.job, self._places.attempt(attempt.job, attempt.number), attempt.outcome
        record = await self._book.turn(lambda page: _there(page, job))
        kind = outcome.WhichOneof("fact") if outcome is not None else None
        if record.job.is_terminal or record.job.state == trainer_pb2.JOB_STATE_QUEUED:
            pass  # was concluded before
        elif outcome is not None and kind == "finished":
            await self._finalize(job, folder, outcome.finished)
        elif outcome is not None and kind == "failed":
            error = outcome.failed
            error.log_tail = telemetry.redact(process.tail(folder / launch.LOG))
            await self._book.turn(lambda page: _end(page, job, trainer_pb2.JOB_STATE_FAILED, error=error))
        elif outcome is not None and kind == "stopped" and record.job.state == trainer_pb2.JOB_STATE_CANCELLING:
            message = f"stopped as asked; step {jobs.resume_from(record).step} is kept"
            await self._book.turn(lambda page: _end(page, job, trainer_pb2.JOB_STATE_CANCELLED, message))
        else:
            await self._lost(job, attempt.number, folder, child)
        record = await self._book.turn(lambda page: _there(page, job))
        await self._retain(job, record)
        await asyncio.to_thread(self._clean, job, folder, record)

    async def _lost(self, job: str, number: int, folder: pathlib.Path, child: subprocess.Popen[bytes] | None) -> None:
        story = "the worker " + (process.exit_story(child.poll()) if child is not None else "is gone")
        tail = telemetry.redact(process.tail(folder / launch.LOG))
        self.attempts_lost += 1

        def write(page: Page) -> training_pb2.JobRecord:
            record = page.append(job, jobs.after_lost(_there(page, job), story, tail))
            page.wait_until(job, page.now.timestamp() + jobs.backoff_seconds(record.lost, self._places.backoff_seconds))
            return record

        record = await self._book.turn(write)
        log.warning("attempt %d of %s was lost: %s; now %s", number, job, story, jobs.word(record.job.state))

    async def _finalize(self, job: str, folder: pathlib.Path, finished: training_pb2.Finished) -> None:
        """Seals the adapter and ends the job."""
        record = await self._book.turn(lambda page: _there(page, job))
        story = {
            "job": record.job.name,
            "attempt": record.job.attempt,
            "spec": json_format.MessageToDict(record.job.spec, preserving_proto_field_name=True),
            "ledger": record.ledger_digest,
            "result": json_format.MessageToDict(record.job.result, preserving_proto_field_name=True),
        }
        wanted = record.job.spec.train.adapter.removeprefix("adapters/")
        try:
            sealed = await asyncio.to_thread(sealing.seal_adapter, self._shelf, folder, finished, job, story)
            if wanted:
                await asyncio.to_thread(self._shelf.set_alias, "adapters", wanted, sealed.digest)
        except Fault as fault:
            reason = trainer_pb2.JobError(reason=_word_of(fault), message=fault.message)
            await self._book.turn(lambda page: _end(page, job, trainer_pb2.JOB_STATE_FAILED, error=reason))
            return
        event = trainer_pb2.Event(attempt=record.job.attempt)
        event.adapter_sealed.digest = sealed.digest
        event.adapter_sealed.size_bytes = sealed.size_bytes
        event.adapter_sealed.alias = f"adapters/{wanted}" if wanted else ""

        def write(page: Page) -> None:
            page.append(job, [event])
            _end(page, job, trainer_pb2.JOB_STATE_SUCCEEDED, end=finished.end)

        await self._book.turn(write)

    def _clean(self, job: str, folder: pathlib.Path, record: training_pb2.JobRecord) -> None:
        """Removes what has been sealed; lets go of an ended job's artifacts."""
        for name in ("checkpoints", "adapter"):
            shutil.rmtree(folder / name, ignore_errors=True)
        if record.job.is_terminal:
            self._pins.release(job)


def _there(page: Page, job: str) -> training_pb2.JobRecord:
    record = page.read(job)
    if record is None:
        raise jobs.Unlawful(f"jobs/{job} is gone")
    return record


def _replace(page: Page, moved: list[tuple[training_pb2.JobRecord, trainer_pb2.QueuePlace]]) -> None:
    for record, place in moved:
        job = record.job.name.removeprefix("jobs/")
        now = page.read(job)
        if now is not None and now.job.state == trainer_pb2.JOB_STATE_QUEUED:
            page.append(job, [trainer_pb2.Event(attempt=now.job.attempt, queue=place)])


def _end(
    page: Page,
    job: str,
    to: trainer_pb2.JobState.ValueType,
    message: str = "",
    end: trainer_pb2.EndReason.ValueType = trainer_pb2.END_REASON_UNSPECIFIED,
    error: trainer_pb2.JobError | None = None,
) -> None:
    page.append(job, [jobs.moved(_there(page, job), to, message, end, error)])


def _word_of(fault: Fault) -> str:
    name = Reason.Name(fault.reason).removeprefix("REASON_")
    return name if name in ("DISK_FULL", "REJECTED") else "REJECTED" if name == "CORRUPT" else "INTERNAL"


def _look(folder: pathlib.Path, offset: int, child: subprocess.Popen[bytes] | None) -> tuple[bool, bytes]:
    """Whether the worker lives, and what it has told since; asked in this order, so nothing is missed."""
    alive = _held(folder / launch.LOCK)
    if child is not None:
        child.poll()  # reaps it
    try:
        with (folder / launch.FACTS).open("rb") as f:
            f.seek(offset)
            return alive, f.read(READ_BYTES)
    except FileNotFoundError:
        return alive, b""


def _held(lock: pathlib.Path) -> bool:
    """Whether a worker still holds its attempt's lock."""
    try:
        fd = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
