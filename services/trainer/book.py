"""What the trainer remembers: jobs, their numbered events, their attempts.

Law of this room: events are appended in one transaction with the job that they
fold into and the offset they were read at; numbers begin at 1 and have no gap.
What was written is told to the hub once it is on disk. No policy here.
"""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

from qlorad.v1 import trainer_pb2
from services.common import idempotency
from services.common.frames.v1 import training_pb2
from services.common.store import Store
from services.trainer import jobs
from services.trainer.notify import Hub

T = TypeVar("T")

_TABLES: Final = """
CREATE TABLE jobs (
  number INTEGER PRIMARY KEY AUTOINCREMENT,
  id TEXT NOT NULL UNIQUE,
  state INTEGER NOT NULL,
  experiment TEXT NOT NULL,
  not_before REAL NOT NULL DEFAULT 0,
  record BLOB NOT NULL
);
CREATE INDEX jobs_by_state ON jobs (state);
CREATE TABLE events (
  job TEXT NOT NULL,
  sequence INTEGER NOT NULL,
  event BLOB NOT NULL,
  PRIMARY KEY (job, sequence)
) WITHOUT ROWID;
CREATE TABLE attempts (
  job TEXT NOT NULL,
  attempt INTEGER NOT NULL,
  offset INTEGER NOT NULL DEFAULT 0,
  pid INTEGER NOT NULL DEFAULT 0,
  outcome BLOB,
  PRIMARY KEY (job, attempt)
) WITHOUT ROWID;
CREATE TABLE checkpoints (
  job TEXT NOT NULL,
  digest TEXT NOT NULL,
  PRIMARY KEY (job, digest)
) WITHOUT ROWID
"""
MIGRATIONS: Final = (_TABLES, idempotency.MIGRATION)


@dataclass(frozen=True, slots=True)
class Attempt:
    """How far an attempt's facts have been copied."""

    job: str
    number: int
    offset: int
    pid: int
    outcome: training_pb2.Fact | None


@dataclass(slots=True)
class Written:
    """What one transaction did, for those who follow."""

    events: list[tuple[str, trainer_pb2.Event]] = dataclasses.field(default_factory=list)
    records: dict[str, training_pb2.JobRecord] = dataclasses.field(default_factory=dict)
    moves: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    """Pairs of states that a job left and took; 0 = none."""


class Page:
    """The book inside one transaction."""

    def __init__(self, db: sqlite3.Connection, now: datetime.datetime, history_events: int) -> None:
        self.db = db
        self._history = history_events
        self.now = now
        self.written = Written()

    def read(self, job: str) -> training_pb2.JobRecord | None:
        """A job, or None."""
        row = self.db.execute("SELECT record FROM jobs WHERE id = ?", (job,)).fetchone()
        return None if row is None else training_pb2.JobRecord.FromString(row["record"])

    def add(self, job: str, record: training_pb2.JobRecord) -> training_pb2.JobRecord:
        """A new job, queued."""
        self.db.execute(
            "INSERT INTO jobs (id, state, experiment, record) VALUES (?, 0, ?, ?)",
            (job, record.job.experiment, record.SerializeToString()),
        )
        return self.append(job, [jobs.moved(record, trainer_pb2.JOB_STATE_QUEUED)])

    def append(self, job: str, events: Iterable[trainer_pb2.Event]) -> training_pb2.JobRecord:
        """Numbers events, folds them into the job and keeps both."""
        record = self.read(job)
        if record is None:
            raise jobs.Unlawful(f"jobs/{job} is gone")
        before = record.job.state if record.job.last_sequence else trainer_pb2.JOB_STATE_UNSPECIFIED
        for event in events:
            event.sequence = record.job.last_sequence + 1
            if not event.HasField("time"):
                event.time.FromDatetime(self.now)
            record = jobs.fold(record, event)
            self.db.execute(
                "INSERT INTO events (job, sequence, event) VALUES (?, ?, ?)",
                (job, event.sequence, event.SerializeToString()),
            )
            if event.HasField("checkpoint_sealed"):
                sealed = (job, event.checkpoint_sealed.digest)
                self.db.execute("INSERT OR IGNORE INTO checkpoints (job, digest) VALUES (?, ?)", sealed)
            self.written.events.append((job, event))
        self.db.execute(
            "UPDATE jobs SET state = ?, record = ? WHERE id = ?", (record.job.state, record.SerializeToString(), job)
        )
        gone = record.job.last_sequence - self._history
        if gone > 0:
            self.db.execute("DELETE FROM events WHERE job = ? AND sequence <= ?", (job, gone))
        self.written.records[job] = record
        self.written.moves.append((before, record.job.state))
        return record

    def begin_attempt(self, job: str, attempt: int) -> None:
        """A fresh attempt with nothing copied."""
        self.db.execute("INSERT INTO attempts (job, attempt) VALUES (?, ?)", (job, attempt))

    def attempt(self, job: str, attempt: int) -> Attempt:
        """An attempt that was begun."""
        row = self.db.execute("SELECT * FROM attempts WHERE job = ? AND attempt = ?", (job, attempt)).fetchone()
        outcome = None if row["outcome"] is None else training_pb2.Fact.FromString(row["outcome"])
        return Attempt(job, attempt, row["offset"], row["pid"], outcome)

    def copied(self, attempt: Attempt) -> None:
        """Notes how far an attempt's facts have been copied."""
        outcome = None if attempt.outcome is None else attempt.outcome.SerializeToString()
        self.db.execute(
            "UPDATE attempts SET offset = ?, pid = ?, outcome = ? WHERE job = ? AND attempt = ?",
            (attempt.offset, attempt.pid, outcome, attempt.job, attempt.number),
        )

    def wait_until(self, job: str, seconds: float) -> None:
        """Keeps a queued job from starting before a time."""
        self.db.execute("UPDATE jobs SET not_before = ? WHERE id = ?", (seconds, job))

    def waiting(self) -> list[jobs.Waiting]:
        """The queue."""
        rows = self.db.execute(
            "SELECT record, not_before FROM jobs WHERE state = ?", (trainer_pb2.JOB_STATE_QUEUED,)
        ).fetchall()
        return jobs.in_order(
            jobs.Waiting(training_pb2.JobRecord.FromString(r["record"]), r["not_before"]) for r in rows
        )

    def live(self) -> list[training_pb2.JobRecord]:
        """Every job that has not ended."""
        marks = ",".join("?" * len(jobs.TERMINAL))
        rows = self.db.execute(f"SELECT record FROM jobs WHERE state NOT IN ({marks})", tuple(jobs.TERMINAL)).fetchall()
        return [training_pb2.JobRecord.FromString(r["record"]) for r in rows]

    def ids(self) -> set[str]:
        """Every job there is."""
        return {r["id"] for r in self.db.execute("SELECT id FROM jobs")}

    def events(self, job: str, after: int, limit: int) -> list[trainer_pb2.Event]:
        """Events after a number, in order."""
        rows = self.db.execute(
            "SELECT event FROM events WHERE job = ? AND sequence > ? ORDER BY sequence LIMIT ?", (job, after, limit)
        ).fetchall()
        return [trainer_pb2.Event.FromString(r["event"]) for r in rows]

    def oldest(self, job: str) -> int:
        """The number of the oldest event that is kept; 0 if there is none."""
        row = self.db.execute("SELECT min(sequence) AS n FROM events WHERE job = ?", (job,)).fetchone()
        return int(row["n"] or 0)

    def ended_well(self, limit: int) -> list[training_pb2.JobRecord]:
        """The newest jobs that SUCCEEDED."""
        rows = self.db.execute(
            "SELECT record FROM jobs WHERE state = ? ORDER BY number DESC LIMIT ?",
            (trainer_pb2.JOB_STATE_SUCCEEDED, limit),
        ).fetchall()
        return [training_pb2.JobRecord.FromString(r["record"]) for r in rows]

    def superseded(self, job: str) -> list[str]:
        """Digests of checkpoints that lie on the shelf though the job keeps them no longer."""
        record = self.read(job)
        kept = set() if record is None else {m.digest for m in record.marks}
        rows = self.db.execute("SELECT digest FROM checkpoints WHERE job = ?", (job,))
        return [r["digest"] for r in rows if r["digest"] not in kept]

    def checkpoints_gone(self, job: str, digests: Iterable[str]) -> None:
        """Notes that superseded checkpoints have been removed."""
        for digest in digests:
            self.db.execute("DELETE FROM checkpoints WHERE job = ? AND digest = ?", (job, digest))

    def counts(self) -> dict[int, int]:
        """Jobs by state."""
        return {r["state"]: r["n"] for r in self.db.execute("SELECT state, count(*) AS n FROM jobs GROUP BY state")}

    def listed(
        self, before: int, limit: int, states: Sequence[int], experiment: str
    ) -> list[tuple[int, training_pb2.JobRecord]]:
        """Jobs older than a number, newest first."""
        where, values = ["number < ?"], [before or 1 << 62]
        parameters: list[object] = [*values]
        if states:
            where.append(f"state IN ({','.join('?' * len(states))})")
            parameters += states
        if experiment:
            where.append("experiment = ?")
            parameters.append(experiment)
        rows = self.db.execute(
            f"SELECT number, record FROM jobs WHERE {' AND '.join(where)} ORDER BY number DESC LIMIT ?",
            (*parameters, limit),
        ).fetchall()
        return [(r["number"], training_pb2.JobRecord.FromString(r["record"])) for r in rows]

    def remove(self, job: str) -> None:
        """Forgets a job, its events and its attempts."""
        record = self.read(job)
        if record is not None:
            self.written.moves.append((record.job.state, trainer_pb2.JOB_STATE_UNSPECIFIED))
        self.db.execute("DELETE FROM jobs WHERE id = ?", (job,))
        self.db.execute("DELETE FROM events WHERE job = ?", (job,))
        self.db.execute("DELETE FROM attempts WHERE job = ?", (job,))
        self.db.execute("DELETE FROM checkpoints WHERE job = ?", (job,))


class Book:
    """The book and those who are told of what is written."""

    def __init__(self, store: Store, hub: Hub, history_events: int) -> None:
        self._store = store
        self._history = history_events
        self._hub = hub
        self._writing: set[asyncio.Task[object]] = set()

    async def turn(self, work: Callable[[Page], T]) -> T:
        """Does `work` in one transaction, then tells the hub.

        Goes through to the end even if the caller gives up.
        """

        async def whole() -> T:
            page: list[Page] = []

            def inside(db: sqlite3.Connection) -> T:
                page.append(Page(db, datetime.datetime.now(datetime.UTC), self._history))
                return work(page[0])

            answer = await self._store.run(inside)
            written = page[0].written
            self._hub.publish(written.events, written.records, written.moves)
            return answer

        task = asyncio.create_task(whole())
        self._writing.add(task)
        task.add_done_callback(self._writing.discard)
        return await asyncio.shield(task)

    async def close(self) -> None:
        """Finishes what is under way and closes the file."""
        if self._writing:
            await asyncio.wait(self._writing)
        await self._store.close()
