"""One attempt, from its first fact to what becomes of its job.

Law of this room: effects only; jobs.py decides. Facts are copied with their
offset in one transaction, so each becomes an event exactly once, whoever dies.
An attempt is over when its lock is free and all it told was read; only then is
its job moved on. Everything here can be done again.
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

from google.protobuf import json_format

from qlorad.v1 import errors_pb2, trainer_pb2
from services.common import frames, process, telemetry
from services.common.errors import Fault, Reason
from services.common.frames.v1 import training_pb2
from services.common.shelf import Shelf
from services.trainer import jobs, launch, pulse, sealing
from services.trainer.book import Attempt, Book, Page
from services.trainer.pins import Pins
from services.trainer.places import Places

log = logging.getLogger("qlorad.trainer")

READ_BYTES = 4 << 20
FACTS_LOOK_SECONDS = 0.05


class Follower:
    """Reads what workers tell."""

    def __init__(self, book: Book, shelf: Shelf, places: Places, pins: Pins) -> None:
        self._book = book
        self._shelf = shelf
        self._places = places
        self._pins = pins
        self.attempts_lost = 0
        self.attempts_stuck = 0

    async def follow(self, job: str, number: int, child: subprocess.Popen[bytes] | None) -> bool:
        """Whether the attempt is over and done with; False means: try again, nothing is lost."""
        try:
            attempt, stuck = await self._tail(await self._book.turn(lambda page: page.attempt(job, number)), child)
            await self._conclude(attempt, child, stuck)
        except Fault as fault:
            log.warning("following attempt %d of %s waits: %s", number, job, fault)
            return False
        except Exception:  # a full disk, a broken store: the attempt is followed on when it is mended
            log.exception("following attempt %d of %s stumbled", number, job)
            return False
        return True

    async def _tail(self, attempt: Attempt, child: subprocess.Popen[bytes] | None) -> tuple[Attempt, str]:
        """Copies facts until the worker is gone and all was read; and why it was ended, where it was stuck."""
        folder = self._places.attempt(attempt.job, attempt.number)
        told = await asyncio.to_thread(_heartbeat_told, folder)
        beat = pulse.Pulse(time.monotonic(), told, self._places.stuck_seconds)
        over_since, stuck = 0.0, ""
        while True:
            alive, data, signs = await asyncio.to_thread(_look, folder, attempt.offset, child)
            beat = beat.look(signs, time.monotonic())
            if alive and (verdict := beat.verdict()):
                if not stuck:
                    self.attempts_stuck += 1
                    log.warning("attempt %d of %s is %s; it is ended", attempt.number, attempt.job, verdict)
                stuck = verdict
                await asyncio.to_thread(_end, folder, child.pid if child else attempt.pid)
            try:
                bodies, size = frames.unpack_all(data)
            except frames.BadFrame as e:
                log.error("facts of attempt %d of %s are broken: %s", attempt.number, attempt.job, e)
                if alive:
                    await asyncio.to_thread(_end, folder, child.pid if child else attempt.pid)
                bodies, size = [], 0
            if bodies:
                attempt = await self._copy(attempt, folder, bodies, size)
                continue
            if not alive:
                return attempt, stuck
            if attempt.outcome is not None and attempt.pid:
                over_since = over_since or time.monotonic()
                if time.monotonic() - over_since > self._places.exit_grace_seconds:
                    await asyncio.to_thread(_end, folder, attempt.pid)
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
            if fault.reason == errors_pb2.REASON_DISK_FULL:
                raise  # it lies whole in the attempt's folder: tried again until there is space
            event.log.level = "ERROR"
            event.log.text = f"checkpoint of step {fact.checkpoint.step} was not sealed: {fault.message}"
            return event
        event.checkpoint_sealed.step = fact.checkpoint.step
        event.checkpoint_sealed.digest = sealed.digest
        event.checkpoint_sealed.size_bytes = sealed.size_bytes
        if fact.checkpoint.HasField("eval_loss"):
            event.checkpoint_sealed.eval_loss = fact.checkpoint.eval_loss
        asked = fact.time.ToNanoseconds() / 1e9 - fact.checkpoint.seconds
        event.checkpoint_sealed.seconds = max(0.0, time.time() - asked)
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

    async def _conclude(self, attempt: Attempt, child: subprocess.Popen[bytes] | None, stuck: str) -> None:
        """What becomes of the job now that the attempt's worker is gone."""
        job, folder, outcome = attempt.job, self._places.attempt(attempt.job, attempt.number), attempt.outcome
        record = await self._book.turn(lambda page: _there(page, job))
        kind = outcome.WhichOneof("fact") if outcome is not None else None
        if record.job.state in jobs.AT_REST:
            pass  # was concluded before
        elif outcome is not None and kind == "finished":
            await self._finalize(job, folder, outcome.finished)
        elif outcome is not None and kind == "failed" and outcome.failed.reason == jobs.DISK_FULL:
            await asyncio.to_thread(_clear, folder)  # first, so that there is space to note it
            await self._wait_for_space(job, outcome.failed)
        elif outcome is not None and kind == "failed":
            error = outcome.failed
            error.log_tail = telemetry.redact(process.tail(folder / launch.LOG))
            await self._book.turn(lambda page: _close(page, job, trainer_pb2.JOB_STATE_FAILED, error=error))
        elif kind == "stopped" and record.job.state in jobs.STOPPING:
            await self._book.turn(lambda page: page.append(job, jobs.after_stopped(_there(page, job))))
        else:
            story = "the worker " + (process.exit_story(child.poll()) if child is not None else "is gone")
            await self._lost(job, attempt.number, folder, stuck or story)
        left = await self._book.turn(lambda page: page.read(job))
        if left is not None:
            await self._retain(job, left)
            left = await self._book.turn(lambda page: page.read(job))  # it may be cancelled, and deleted, meanwhile
        await asyncio.to_thread(self._clean, job, folder, left)

    async def _lost(self, job: str, number: int, folder: pathlib.Path, story: str) -> None:
        """Moves a job on whose worker told no ending; one that writes on after its time is told to stop."""
        await asyncio.to_thread((folder / launch.STOP).touch)
        tail = telemetry.redact(process.tail(folder / launch.LOG))
        self.attempts_lost += 1

        def write(page: Page) -> training_pb2.JobRecord:
            record = page.append(job, jobs.after_lost(_there(page, job), story, tail))
            page.wait_until(job, page.now.timestamp() + jobs.backoff_seconds(record.lost, self._places.backoff_seconds))
            return record

        record = await self._book.turn(write)
        log.warning("attempt %d of %s was lost: %s; now %s", number, job, story, jobs.word(record.job.state))

    async def _wait_for_space(self, job: str, error: trainer_pb2.JobError) -> None:
        def write(page: Page) -> training_pb2.JobRecord:
            record = page.append(job, jobs.after_disk_full(_there(page, job), error))
            page.wait_until(job, page.now.timestamp() + jobs.backoff_seconds(record.lost, self._places.backoff_seconds))
            return record

        record = await self._book.turn(write)
        log.warning("%s: %s; now %s", job, error.message, jobs.word(record.job.state))

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
            if fault.reason == errors_pb2.REASON_DISK_FULL:
                raise  # the adapter lies whole in the attempt's folder: tried again until there is space
            reason = trainer_pb2.JobError(reason=_word_of(fault), message=fault.message)
            await self._book.turn(lambda page: _close(page, job, trainer_pb2.JOB_STATE_FAILED, error=reason))
            return
        event = trainer_pb2.Event(attempt=record.job.attempt)
        event.adapter_sealed.digest = sealed.digest
        event.adapter_sealed.size_bytes = sealed.size_bytes
        event.adapter_sealed.alias = f"adapters/{wanted}" if wanted else ""

        def write(page: Page) -> None:
            page.append(job, [event])
            _close(page, job, trainer_pb2.JOB_STATE_SUCCEEDED, end=finished.end)

        await self._book.turn(write)

    def _clean(self, job: str, folder: pathlib.Path, record: training_pb2.JobRecord | None) -> None:
        """Removes what has been sealed; lets go of an ended job's artifacts."""
        _clear(folder)
        if record is None or record.job.is_terminal:
            self._pins.release(job)


def _clear(folder: pathlib.Path) -> None:
    for name in ("checkpoints", "adapter"):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / launch.RESERVE).unlink(missing_ok=True)


def _there(page: Page, job: str) -> training_pb2.JobRecord:
    record = page.read(job)
    if record is None:
        raise jobs.Unlawful(f"jobs/{job} is gone")
    return record


def _close(
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


def _look(
    folder: pathlib.Path, offset: int, child: subprocess.Popen[bytes] | None
) -> tuple[bool, bytes, dict[str, bytes]]:
    """Whether the worker lives, what it has told since, its signs of life; in this order, so nothing is missed."""
    alive = _held(folder / launch.LOCK)
    if child is not None:
        child.poll()  # reaps it
    signs = {path.name: path.read_bytes() for path in folder.glob(f"{pulse.SIGN}*")}
    try:
        with (folder / launch.FACTS).open("rb") as f:
            f.seek(offset)
            return alive, f.read(READ_BYTES), signs
    except FileNotFoundError:
        return alive, b"", signs


def _heartbeat_told(folder: pathlib.Path) -> float:
    """How often the worker shows life, as its own order says; 0 where it was started before there were signs."""
    try:
        return training_pb2.Order.FromString((folder / launch.ORDER).read_bytes()).heartbeat_seconds
    except FileNotFoundError:
        return 0.0


def _end(folder: pathlib.Path, pid: int) -> None:
    """Kills the worker of an attempt whose lock is held, if that is who has this pid today."""
    if not pid:
        return
    if os.path.exists("/proc/self/cmdline"):
        try:
            words = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except FileNotFoundError:
            return
        if os.fsencode(folder) not in words:
            log.error("pid %d is no worker of %s any more; it is left alone", pid, folder)
            return
    process.kill(pid)


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
