"""Models: made, imported, found, removed.

Law of this room: one making an alias, however many callers watch it. What is
under way or failed stands in SQLite; what is READY stands on the shelf alone.
A making outlives its callers, never its daemon.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import os
import pathlib
import sqlite3
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace

from google.protobuf import json_format

from qlorad.v1 import artifacts_pb2, errors_pb2, registry_pb2
from services.common import names
from services.common.errors import Fault, already_exists, invalid, not_found, rejected
from services.common.frames.v1 import shelf_pb2
from services.common.idempotency import body_of
from services.common.shelf import Sealed, Shelf
from services.common.store import Store
from services.registry import folder, models, paging
from services.registry.census import Starters
from services.registry.models import Row, Source
from services.registry.removal import remove
from services.registry.requests import Requests
from services.registry.staging import Staging
from services.registry.workers import Workers

log = logging.getLogger("qlorad.registry.catalogue")

MIGRATION = """
CREATE TABLE models (
  alias TEXT PRIMARY KEY,
  source TEXT NOT NULL,
  state INTEGER NOT NULL,
  error TEXT NOT NULL,
  begun REAL NOT NULL
) WITHOUT ROWID
"""


@dataclass(slots=True)
class Making:
    """A model under way, and those who watch it."""

    row: Row
    progress: shelf_pb2.ShelfProgress = field(default_factory=lambda: shelf_pb2.ShelfProgress(stage="wait"))
    outcome: registry_pb2.Model | Exception | None = None
    task: asyncio.Task[None] | None = None
    _tick: asyncio.Event = field(default_factory=asyncio.Event)

    def move(self, progress: shelf_pb2.ShelfProgress) -> None:
        """Tells all who watch where it stands."""
        self.progress = progress
        self.row = replace(self.row, state=models.state_of(progress.stage))
        self._tell()

    def end(self, outcome: registry_pb2.Model | Exception) -> None:
        """Tells all who watch how it ended."""
        self.outcome = outcome
        self._tell()

    def _tell(self) -> None:
        tick, self._tick = self._tick, asyncio.Event()
        tick.set()

    async def follow(self) -> AsyncIterator[shelf_pb2.ShelfProgress | registry_pb2.Model]:
        """The newest progress whenever it moves, at last the model; raises if it failed."""
        while self.outcome is None:
            tick = self._tick
            yield self.progress
            await tick.wait()
        if isinstance(self.outcome, Exception):
            raise copy.copy(self.outcome)
        yield self.outcome


class Catalogue:
    """The models of one store."""

    def __init__(
        self,
        shelf: Shelf,
        store: Store,
        staging: Staging,
        requests: Requests,
        workers: Workers,
        starters: Starters,
        roots: tuple[pathlib.Path, ...],
        threads: int,
    ) -> None:
        self._shelf = shelf
        self._store = store
        self._staging = staging
        self._requests = requests
        self._workers = workers
        self._starters = starters
        self._roots = roots
        self._threads = threads
        self._rows: dict[str, Row] = {}
        self._makings: dict[str, Making] = {}
        self._one_at_a_time = asyncio.Semaphore(1)

    # life

    async def start(self) -> None:
        """Remembers; what was under way when the daemon ended has failed, unless it was named already."""

        def read(db: sqlite3.Connection) -> list[Row]:
            return [Row(*tuple(r)) for r in db.execute("SELECT alias, source, state, error, begun FROM models")]

        for row in await self._store.run(read):
            self._rows[row.alias] = row
            if await asyncio.to_thread(self._shelf.alias, "models", row.alias) is not None:
                await self._forget(row.alias)
            elif row.state != models.FAILED:
                await self._save(replace(row, state=models.FAILED, error=models.interrupted(row.alias)))

    def drain(self) -> None:
        """Ends what is under way: watchers are told to call again."""
        for making in self._makings.values():
            if making.task is not None and not making.task.cancelling():
                making.task.cancel()

    async def stop(self) -> None:
        """Waits until nothing is under way."""
        self.drain()
        tasks = [m.task for m in self._makings.values() if m.task is not None]
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _save(self, row: Row) -> None:
        self._rows[row.alias] = row
        values = (row.alias, row.source, int(row.state), row.error, row.begun_seconds)
        await self._store.run(lambda db: db.execute("INSERT OR REPLACE INTO models VALUES (?, ?, ?, ?, ?)", values))

    async def _forget(self, alias: str) -> None:
        await self._store.run(lambda db: db.execute("DELETE FROM models WHERE alias = ?", (alias,)))
        self._rows.pop(alias, None)

    # make

    async def starter(self, source: Source, alias: str, size: registry_pb2.StarterSize.ValueType) -> Making:
        """The making of a starter: found ready, joined, or begun."""
        work = shelf_pb2.StarterWork(size=size, threads=self._threads)
        return await self._obtain(source, alias, shelf_pb2.ShelfOrder(starter=work))

    async def bring(self, path: pathlib.Path, alias: str) -> Making:
        """The import of a folder: found ready, joined, or begun. Decides by names before a byte is copied."""
        source, files = await asyncio.to_thread(self._look, f"models/{alias}", path)
        today = time.strftime("%Y-%m-%d", time.gmtime())
        work = shelf_pb2.ModelWork(template_date=today, name=f"models/{alias}", files=files)
        return await self._obtain(source, alias, shelf_pb2.ShelfOrder(model=work))

    def _look(self, name: str, path: pathlib.Path) -> tuple[Source, list[shelf_pb2.ModelFile]]:
        """What the folder holds now; another content is another source."""
        try:
            resolved = path.resolve(strict=True)
            self._allowed(resolved)
            if not resolved.is_dir():
                raise not_found(str(path))
            files, stamps = [], []
            for taken in folder.choose(name, os.listdir(resolved)):
                real = (resolved / taken).resolve(strict=True)
                self._allowed(real)
                if not real.is_file():
                    raise rejected(name, f"{taken} is not a file")
                files.append(shelf_pb2.ModelFile(name=taken, source=str(real)))
                stamps.append((taken, real.stat().st_size, real.stat().st_mtime_ns))
        except FileNotFoundError:
            raise not_found(str(path)) from None
        except (PermissionError, RuntimeError, NotADirectoryError) as e:
            raise self._denied(path, str(e)) from None
        return models.import_source(resolved, stamps), files

    def _allowed(self, path: pathlib.Path) -> None:
        if not any(path.is_relative_to(root.resolve()) for root in self._roots):
            raise self._denied(path, "lies outside import_roots")

    def _denied(self, path: pathlib.Path, why: str) -> Fault:
        accepted = ", ".join(map(str, self._roots))
        return Fault(errors_pb2.REASON_PERMISSION_DENIED, f"{path}: {why}; accepted: readable folders below {accepted}")

    async def _obtain(self, source: Source, alias: str, order: shelf_pb2.ShelfOrder) -> Making:
        if alias not in self._makings:
            ready = await asyncio.to_thread(self._ready, source, alias)
            if ready is not None:
                return Making(Row(alias, source.text, models.READY, "", 0.0), outcome=ready)
        making = self._makings.get(alias)
        if making is not None:
            if making.row.source != source.text:
                raise already_exists(f"models/{alias}", f"it is being made from {making.row.source!r}")
            return making
        making = Making(Row(alias, source.text, models.PULLING, "", time.time()))
        self._makings[alias] = making
        making.task = asyncio.create_task(self._make(making, source, order), name=f"make {alias}")
        return making

    def _ready(self, source: Source, alias: str) -> registry_pb2.Model | None:
        pointed = self._shelf.alias("models", alias)
        if pointed is None:
            return None
        sealed = self._shelf.open("models", alias)
        models.same_or_taken(alias, source, self._shelf.provenance(sealed))
        return models.describe(sealed.manifest, alias)

    async def _make(self, making: Making, source: Source, order: shelf_pb2.ShelfOrder) -> None:
        alias = making.row.alias
        outcome: registry_pb2.Model | Exception
        try:
            await self._save(making.row)
            async with self._one_at_a_time:
                sealed = await self._make_aside(making, source, order)
            outcome = models.describe(sealed.manifest, alias)
            log.info("models/%s is ready: %s", alias, sealed.digest)
        except asyncio.CancelledError:
            outcome = Fault(errors_pb2.REASON_SHUTTING_DOWN, models.interrupted(alias), retry_seconds=2.0)
        except Exception as error:
            outcome = error
        try:
            if isinstance(outcome, Exception):
                why = models.why_failed(outcome)
                log.warning(
                    "models/%s failed: %s", alias, why, exc_info=None if isinstance(outcome, Fault) else outcome
                )
                await self._save(replace(making.row, state=models.FAILED, error=why))
            else:
                await self._forget(alias)
        finally:
            del self._makings[alias]
            making.end(outcome)

    async def _make_aside(self, making: Making, source: Source, order: shelf_pb2.ShelfOrder) -> Sealed:
        """Staged, worked on, sealed, named; nothing is left behind on failure."""
        alias, begun = making.row.alias, time.monotonic()

        def progress(told: shelf_pb2.ShelfProgress) -> None:
            if told.HasField("loss"):
                self._starters.loss.labels(source.size).set(told.loss)
            making.move(told)

        async with self._staging.aside() as staged:
            getattr(order, order.WhichOneof("work") or "").folder = str(staged.payload)
            done = await self._workers.run(order, f"models/{alias}", progress)
            progress(shelf_pb2.ShelfProgress(stage="seal", total=1))
            facts = json_format.MessageToDict(done.facts)
            story = models.story_of(source, json_format.MessageToDict(done.story))
            sealed = await asyncio.to_thread(
                self._shelf.seal, staged, artifacts_pb2.ARTIFACT_KIND_MODEL, facts, None, (source.maker, story)
            )
            await asyncio.to_thread(self._name, alias, sealed)
        if source.size:
            self._starters.seconds.labels(source.size).observe(time.monotonic() - begun)
        return sealed

    def _name(self, alias: str, sealed: Sealed) -> None:
        pointed = self._shelf.alias("models", alias)
        if pointed is None:
            self._shelf.set_alias("models", alias, sealed.digest, expected_generation=0)
        elif pointed.digest != sealed.digest:
            raise already_exists(f"models/{alias}", "it was named meanwhile; accepted: another model_id")

    # find

    async def get(self, name: str) -> registry_pb2.Model:
        """One model by alias or digest, READY or not."""
        ident = names.parse("name", name, "models")
        making = self._makings.get(ident)
        row = making.row if making else self._rows.get(ident)

        def look() -> registry_pb2.Model:
            try:
                sealed = self._shelf.open("models", ident)
            except Fault as fault:
                if fault.reason != errors_pb2.REASON_NOT_FOUND or row is None:
                    raise
                return row.model()
            if names.is_alias(ident):
                return models.describe(sealed.manifest, ident)
            pointing = [a.name for a in self._shelf.aliases("models") if a.digest == sealed.digest]
            return models.describe(sealed.manifest, pointing[0].removeprefix("models/") if pointing else "")

        return await asyncio.to_thread(look)

    async def page(self, size: int, token: str) -> tuple[list[registry_pb2.Model], str]:
        """A page of models, newest first; one entry an alias, one for each model without."""
        under_way = {**self._rows, **{m.row.alias: m.row for m in self._makings.values()}}

        def look() -> tuple[list[registry_pb2.Model], str]:
            found = [(int(r.begun_seconds * 1e9), r.model()) for r in under_way.values()]
            aliases = self._shelf.aliases("models")
            for sealed in self._shelf.every(artifacts_pb2.ARTIFACT_KIND_MODEL):
                when = sealed.manifest.create_time.ToNanoseconds()
                pointing = [a.name.removeprefix("models/") for a in aliases if a.digest == sealed.digest]
                found += [(when, models.describe(sealed.manifest, alias)) for alias in pointing or [""]]
            told, following = paging.page(found, lambda f: (f[0], f[1].name), size, token)
            return [model for _, model in told], following

        return await asyncio.to_thread(look)

    def under_way(self) -> dict[int, int]:
        """How many models are in each state but READY; may be called from any thread."""
        now = [m.row for m in list(self._makings.values())]
        rows = {r.alias: r for r in [*list(self._rows.values()), *now]}
        counts = {int(s): 0 for s in (models.PULLING, models.VERIFYING, models.FAILED)}
        for row in rows.values():
            counts[int(row.state)] += 1
        return counts

    # remove

    async def delete(self, request: registry_pb2.DeleteModelRequest) -> registry_pb2.DeleteModelResponse:
        """Removes an alias, or forgets a failed making; tells the bytes freed."""
        wrong = names.check_request_id(request.request_id) + names.check_name("name", request.name, "models")
        if wrong:
            raise invalid(wrong)
        ident = request.name.removeprefix("models/")

        async def work(again: bool) -> registry_pb2.DeleteModelResponse:
            if ident in self._makings:
                models.deletable(self._makings[ident].row)
            if ident in self._rows and await asyncio.to_thread(self._shelf.alias, "models", ident) is None:
                await self._forget(ident)
                return registry_pb2.DeleteModelResponse()
            freed = await asyncio.to_thread(remove, self._shelf, "models", ident, again)
            return registry_pb2.DeleteModelResponse(freed_bytes=freed)

        return await self._requests.once(
            "DeleteModel", request.request_id, body_of(request), work, registry_pb2.DeleteModelResponse
        )
