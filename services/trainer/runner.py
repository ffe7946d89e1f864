"""Serves the queue: starts workers, finds them again, has them followed.

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
from typing import Any

from qlorad.v1 import trainer_pb2
from services.common import devices, facts, process, telemetry
from services.common.errors import Fault
from services.common.frames.v1 import training_pb2
from services.common.shelf import Shelf, fsync_path, write_durable
from services.trainer import jobs, launch, slots
from services.trainer.book import Book, Page
from services.trainer.follower import Follower
from services.trainer.pins import Pins
from services.trainer.places import Places

log = logging.getLogger("qlorad.trainer")

QUEUE_LOOK_SECONDS = 0.25
TRY_AGAIN_SECONDS = 1.0


class Runner:
    """The queue at work."""

    def __init__(self, book: Book, shelf: Shelf, places: Places) -> None:
        self._book = book
        self._shelf = shelf
        self._places = places
        self._pins = Pins(shelf)
        self._follower = Follower(book, shelf, places, self._pins)
        self._wake = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._following: dict[str, int] = {}
        """Jobs under way and how many slots each takes."""
        self._launching = asyncio.Lock()
        """Held while descriptors are being handed to a worker: no stop in between."""
        self.attempts_begun = 0

    @property
    def attempts_lost(self) -> int:
        """Attempts that ended without an outcome, as this process saw it."""
        return self._follower.attempts_lost

    @property
    def attempts_stuck(self) -> int:
        """Attempts that were ended because they showed no life or no progress."""
        return self._follower.attempts_stuck

    # begin and end

    async def start(self) -> None:
        """Takes up every job that has not ended, then serves the queue."""
        live, known = await self._book.turn(lambda page: (page.live(), page.ids()))
        await asyncio.to_thread(self._sweep, known)
        for record in live:
            job = record.job.name.removeprefix("jobs/")
            await asyncio.to_thread(self._pins.hold_for, record)
            if record.job.state in jobs.WITH_WORKER:
                if record.job.state in jobs.STOPPING:
                    await self.tell_stop(job, record.job.attempt)
                self._follow(record, record.job.attempt, None)
        self._own(self._serve_queue(), "queue")

    async def stop(self) -> None:
        """Lets go of everything; workers go on and are found again."""
        async with self._launching:
            for task in self._tasks:
                task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self._pins.hand_over)

    def wake(self) -> None:
        """Something about the queue changed."""
        self._wake.set()

    async def hold(self, record: training_pb2.JobRecord, key: str) -> None:
        """Keeps what a job to be needs from removal; NOT_FOUND if it is gone."""
        await asyncio.to_thread(self._pins.hold_first, record, key)

    async def held(self, key: str, job: str) -> None:
        """The job is on disk; its holds are its own now."""
        await asyncio.to_thread(self._pins.take_over, key, job)

    async def let_go(self, job: str) -> None:
        """Ends the holds of a job that has ended, or of a key that became none."""
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
        """Starts the next job if its devices are free; tells the others why they wait."""
        queue, live, ended = await self._book.turn(
            lambda page: (page.waiting(), page.live(), page.ended_well(slots.RECENT))
        )
        if not queue:
            return False
        now = time.time()
        hindrance: trainer_pb2.QueuePlace | None = None
        chosen = jobs.next_to_start(queue, now)
        if chosen is not None and self._wanted(chosen.record) <= self._free():
            got = await asyncio.to_thread(self._take, chosen.record)
            if isinstance(got, list):
                async with self._launching:
                    await self._launch(chosen.record, got)
                return True
            hindrance = got
        places = jobs.places(queue, now, hindrance, self._forecast(queue, live, ended, now))
        moved = [
            (w.record, p) for w, p in zip(queue, places, strict=True) if slots.worth_telling(w.record.job.queue, p, now)
        ]
        if moved:
            await self._book.turn(lambda page: _replace(page, moved))
        return True

    def _wanted(self, record: training_pb2.JobRecord) -> int:
        return slots.needed(record.job.spec.train, self._places.devices)

    def _free(self) -> int:
        return len(self._places.devices) - sum(self._following.values())

    def _forecast(
        self,
        queue: list[jobs.Waiting],
        live: list[training_pb2.JobRecord],
        ended: list[training_pb2.JobRecord],
        now: float,
    ) -> list[float | None]:
        under_way = [r for r in live if r.job.name.removeprefix("jobs/") in self._following]
        running = [slots.Claim(self._wanted(r), slots.seconds_left(r, ended)) for r in under_way]
        claims = [
            slots.Claim(self._wanted(w.record), slots.usual_seconds(w.record, ended), w.not_before) for w in queue
        ]
        return slots.starts(len(self._places.devices), running, claims, now)

    def _take(self, record: training_pb2.JobRecord) -> list[devices.Lease] | trainer_pb2.QueuePlace:
        """All the devices that a job needs, or what stands against it."""
        free = min(shutil.disk_usage(folder).free for folder in (self._places.jobs, self._shelf.root))
        if free < self._places.min_free_bytes:
            return trainer_pb2.QueuePlace(reason=trainer_pb2.QUEUE_REASON_DISK_FULL)
        leases: list[devices.Lease] = []
        busy = trainer_pb2.QueuePlace(reason=trainer_pb2.QUEUE_REASON_DEVICE_BUSY)
        for device in self._places.devices:
            got = devices.try_acquire(self._places.leases, device, record.job.name)
            if isinstance(got, devices.Lease):
                leases.append(got)
            elif not got[0].startswith("jobs/") or not busy.owner:
                busy.owner, busy.owner_bytes = got
            if len(leases) == self._wanted(record):
                return leases
        for lease in leases:
            lease.release()
        return busy

    async def _launch(self, record: training_pb2.JobRecord, leases: list[devices.Lease]) -> None:
        job = record.job.name.removeprefix("jobs/")
        number = record.job.attempt + 1
        folder = self._places.attempt(job, number)
        child: subprocess.Popen[bytes] | None = None
        try:
            await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
            begun = await self._book.turn(lambda page: self._begin(page, job, number, leases))
            if begun is None:
                return
            self.attempts_begun += 1
            try:
                child = await asyncio.to_thread(self._exec, begun, folder, leases)
                await self._book.turn(lambda page: _note_pid(page, job, number, child))
            except (OSError, Fault) as e:
                log.error("attempt %d of %s stumbled at its start: %s", number, job, e)
        finally:
            for lease in leases:
                lease.release()
        self._follow(begun, number, child)

    def _begin(self, page: Page, job: str, number: int, leases: list[devices.Lease]) -> training_pb2.JobRecord | None:
        record = page.read(job)
        if record is None or record.job.state != trainer_pb2.JOB_STATE_QUEUED:
            return None  # cancelled or paused meanwhile
        preparing = jobs.moved(record, trainer_pb2.JOB_STATE_PREPARING)
        preparing.attempt = number
        started = trainer_pb2.Event(attempt=number)
        started.attempt_started.attempt = number
        started.attempt_started.from_step = jobs.resume_from(record).step
        started.attempt_started.device = ",".join(lease.device for lease in leases)
        page.begin_attempt(job, number)
        return page.append(job, [preparing, started])

    def _exec(
        self, begun: training_pb2.JobRecord, folder: pathlib.Path, leases: list[devices.Lease]
    ) -> subprocess.Popen[bytes]:
        order = launch.order_of(
            begun, str(self._shelf.root), [e.device for e in leases], self._places.heartbeat_seconds, time.time()
        )
        for lease in leases:
            lease.describe(f"jobs/{order.job}", self._weight_bytes(order.spec))
        write_durable(folder / launch.ORDER, order.SerializeToString())
        lock = os.open(folder / launch.LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = (lock, *(lease.fd for lease in leases), *self._pins.fds(order))
            return process.start_detached(
                launch.module_of(order.spec),
                ["--attempt", str(folder), "--hold", ",".join(map(str, held))],
                folder / launch.LOG,
                held,
                launch.environ_of(order.spec, self._places.extensions, order.device),
            )
        finally:
            os.close(lock)

    def _weight_bytes(self, spec: trainer_pb2.TrainSpec) -> int:
        """About what the base takes, for those who wait for the device; 0 if it is gone, which the worker will tell."""
        try:
            sealed = self._shelf.open("models", spec.model.removeprefix("models/"))
            return launch.weight_bytes(facts.from_manifest(facts.ModelFacts, sealed.manifest), spec)
        except Fault:
            return 0

    async def tell_stop(self, job: str, attempt: int) -> None:
        """Lays the wish to stop where the worker looks."""

        def lay() -> None:
            folder = self._places.attempt(job, attempt)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / launch.STOP).touch()
            fsync_path(folder)

        await asyncio.to_thread(lay)

    # one attempt

    def _follow(self, record: training_pb2.JobRecord, number: int, child: subprocess.Popen[bytes] | None) -> None:
        job = record.job.name.removeprefix("jobs/")
        self._following[job] = self._wanted(record)
        self._own(self._followed(job, number, child), f"follow {job}/{number}")

    async def _followed(self, job: str, number: int, child: subprocess.Popen[bytes] | None) -> None:
        """Follows an attempt to its end, whatever gets in the way."""
        try:
            with telemetry.context(job=job, attempt=str(number)):
                while True:
                    if await self._follower.follow(job, number, child):
                        return
                    await asyncio.sleep(TRY_AGAIN_SECONDS)
        finally:
            self._following.pop(job, None)
            self.wake()


def _note_pid(page: Page, job: str, number: int, child: subprocess.Popen[bytes] | None) -> None:
    if child is not None:
        page.copied(dataclasses.replace(page.attempt(job, number), pid=child.pid))


def _replace(page: Page, moved: list[tuple[training_pb2.JobRecord, trainer_pb2.QueuePlace]]) -> None:
    for record, place in moved:
        job = record.job.name.removeprefix("jobs/")
        now = page.read(job)
        if now is not None and now.job.state == trainer_pb2.JOB_STATE_QUEUED:
            page.append(job, [trainer_pb2.Event(attempt=now.job.attempt, queue=place)])
