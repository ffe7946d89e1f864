"""What should be resident: remembered, so that it comes back.

Law of this room: says what is wanted, not what is in memory: engines that died,
slept, made room or ended with the daemon are brought back from here. Written in
the transaction that notes an answer; what came by itself (an adapter on demand,
one that made room) is written soon after.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass

from qlorad.v1 import inference_pb2
from services.common.errors import Fault
from services.common.store import Store

log = logging.getLogger("qlorad.inference")

MIGRATION = """
CREATE TABLE wanted_model (
  one INTEGER PRIMARY KEY CHECK (one = 1),
  loaded BLOB NOT NULL,
  default_digest TEXT NOT NULL
);
CREATE TABLE wanted_adapters (
  digest TEXT PRIMARY KEY,
  name TEXT NOT NULL,
  place INTEGER NOT NULL
) WITHOUT ROWID
"""
SEVERAL = """
CREATE TABLE wanted_bases (place INTEGER PRIMARY KEY, loaded BLOB NOT NULL);
CREATE TABLE wanted_default (
  one INTEGER PRIMARY KEY CHECK (one = 1),
  name TEXT NOT NULL,
  digest TEXT NOT NULL,
  base_digest TEXT NOT NULL
);
ALTER TABLE wanted_adapters ADD COLUMN base_digest TEXT NOT NULL DEFAULT '';
ALTER TABLE wanted_adapters ADD COLUMN pinned INTEGER NOT NULL DEFAULT 0;
INSERT INTO wanted_bases (place, loaded) SELECT 0, loaded FROM wanted_model;
INSERT INTO wanted_default (one, name, digest, base_digest)
  SELECT 1, 'adapters/' || default_digest, default_digest, '' FROM wanted_model WHERE default_digest <> '';
DROP TABLE wanted_model
"""
"""From one base to several. Where a base's digest is empty, it is that of the one base there was."""


@dataclass(frozen=True, slots=True)
class WantedAdapter:
    """An adapter that should be in memory."""

    digest: str
    name: str
    base_digest: str
    pinned: bool = False


@dataclass(frozen=True, slots=True)
class Default:
    """Who answers where a request names nobody: a name, followed wherever it points."""

    name: str = ""
    """"adapters/…"; empty = the base."""
    digest: str = ""
    """What the name was when it was last looked up."""
    base_digest: str = ""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Bases and adapters as they should be, oldest first."""

    bases: tuple[inference_pb2.LoadedModel, ...] = ()
    """As they were told when they were last loaded; their precision is the resolved one."""
    adapters: tuple[WantedAdapter, ...] = ()
    default: Default = Default()

    def base(self, digest: str) -> inference_pb2.LoadedModel | None:
        """A wanted base, or None."""
        return next((b for b in self.bases if b.digest == digest), None)

    def named_bases(self) -> list[tuple[str, str]]:
        """Digest and name of each base."""
        return [(b.digest, b.model) for b in self.bases]

    def adapter(self, digest: str) -> WantedAdapter | None:
        """A wanted adapter, or None."""
        return next((a for a in self.adapters if a.digest == digest), None)

    def of_base(self, base_digest: str) -> list[WantedAdapter]:
        """The adapters of one base."""
        return [a for a in self.adapters if a.base_digest == base_digest]

    def with_base(self, model: inference_pb2.LoadedModel) -> Wanted:
        """After loading; the same digest keeps its place."""
        if self.base(model.digest) is None:
            return dataclasses.replace(self, bases=(*self.bases, model))
        bases = tuple(model if b.digest == model.digest else b for b in self.bases)
        return dataclasses.replace(self, bases=bases)

    def without_base(self, digest: str) -> Wanted:
        """After unloading; its adapters go along, and the default if it was one of them."""
        return Wanted(
            tuple(b for b in self.bases if b.digest != digest),
            tuple(a for a in self.adapters if a.base_digest != digest),
            Default() if self.default.base_digest == digest else self.default,
        )

    def with_adapter(self, adapter: WantedAdapter) -> Wanted:
        """After loading; the same digest keeps its place."""
        if self.adapter(adapter.digest) is None:
            return dataclasses.replace(self, adapters=(*self.adapters, adapter))
        adapters = tuple(adapter if a.digest == adapter.digest else a for a in self.adapters)
        return dataclasses.replace(self, adapters=adapters)

    def made_room(self, digest: str) -> Wanted:
        """An adapter left by itself: it comes back when it is asked for; if it is the default, it stays that."""
        return dataclasses.replace(self, adapters=tuple(a for a in self.adapters if a.digest != digest))

    def without_adapter(self, digest: str) -> Wanted:
        """After unloading; if it was the default, the base is now."""
        default = Default() if self.default.digest == digest else self.default
        return dataclasses.replace(self.made_room(digest), default=default)

    def switched(self, default: Default) -> Wanted:
        """After switching, or after the default's name moved."""
        return dataclasses.replace(self, default=default)


def read(db: sqlite3.Connection) -> Wanted:
    """What is wanted."""
    bases = tuple(
        inference_pb2.LoadedModel.FromString(row["loaded"])
        for row in db.execute("SELECT loaded FROM wanted_bases ORDER BY place")
    )
    only = bases[0].digest if bases else ""
    adapters = tuple(
        WantedAdapter(row["digest"], row["name"], row["base_digest"] or only, bool(row["pinned"]))
        for row in db.execute("SELECT digest, name, base_digest, pinned FROM wanted_adapters ORDER BY place")
    )
    row = db.execute("SELECT name, digest, base_digest FROM wanted_default").fetchone()
    default = Default() if row is None else Default(row["name"], row["digest"], row["base_digest"] or only)
    return Wanted(bases, adapters, default)


def write(db: sqlite3.Connection, wanted: Wanted) -> None:
    """Takes the place of what was wanted."""
    for table in ("wanted_bases", "wanted_adapters", "wanted_default"):
        db.execute(f"DELETE FROM {table}")
    db.executemany(
        "INSERT INTO wanted_bases (place, loaded) VALUES (?, ?)",
        [(place, base.SerializeToString()) for place, base in enumerate(wanted.bases)],
    )
    db.executemany(
        "INSERT INTO wanted_adapters (digest, name, place, base_digest, pinned) VALUES (?, ?, ?, ?, ?)",
        [(a.digest, a.name, place, a.base_digest, a.pinned) for place, a in enumerate(wanted.adapters)],
    )
    if wanted.default.name:
        d = wanted.default
        db.execute(
            "INSERT INTO wanted_default (one, name, digest, base_digest) VALUES (1, ?, ?, ?)",
            (d.name, d.digest, d.base_digest),
        )


class Memory:
    """What is wanted now, and its way to the disk."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._now = Wanted()
        self._written = Wanted()
        self._writing: asyncio.Task[None] | None = None

    @property
    def now(self) -> Wanted:
        return self._now

    async def begin(self) -> None:
        """Takes up what the last daemon left."""
        self._now = self._written = await self._store.run(read)

    def become(self, wanted: Wanted) -> None:
        """Changes what is wanted; on the disk soon."""
        self._now = wanted
        if self._writing is None and wanted != self._written:
            self._writing = asyncio.create_task(self._write(), name="what is wanted")

    async def save(self, also: Callable[[sqlite3.Connection], None]) -> None:
        """Writes what is wanted now, and more, in one transaction."""
        now, before = self._now, self._written
        self._written = now  # so that nobody writes it a second time

        def both(db: sqlite3.Connection) -> None:
            write(db, now)
            also(db)

        try:
            await self._store.run(both)
        except BaseException:
            self._written = before
            raise

    async def end(self) -> None:
        """Waits until all is written."""
        while self._writing is not None:
            await self._writing

    async def _write(self) -> None:
        try:
            while self._now != self._written:
                await self.save(lambda db: None)
        except Fault as fault:
            log.error("what is wanted could not be written; the next change tries again: %s", fault)
        finally:
            self._writing = None
