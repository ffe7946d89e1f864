"""Sealed datasets: found, listed, removed, read out.

Law of this room: the shelf is the truth and is read anew each time; everything
that blocks runs on a thread.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import pathlib
import sqlite3
from collections.abc import AsyncGenerator

from google.protobuf import json_format

from qlorad.v1 import artifacts_pb2, datasets_pb2
from services.common import facts, idempotency, names
from services.common.errors import Fault, Violation, invalid, not_found, show
from services.common.shards import splits_in
from services.common.shelf import Sealed, Shelf
from services.common.store import Store
from services.datasets.export import Export

log = logging.getLogger("qlorad.datasets")

DATASETS = "datasets"
MIGRATION = """
CREATE TABLE deletions (
  request_id TEXT PRIMARY KEY,
  body BLOB NOT NULL,
  digest TEXT NOT NULL,
  freed_bytes INTEGER NOT NULL
) WITHOUT ROWID
"""
_FINDINGS = 200
_DELETE = "DeleteDataset"


class Catalog:
    """The datasets of one store."""

    def __init__(self, shelf: Shelf, store: Store) -> None:
        self._shelf = shelf
        self._store = store

    def open(self, name: str, field: str = "name", verify: bool = False) -> Sealed:
        """The sealed dataset of a name, or NOT_FOUND; `verify` reads every byte. Blocking."""
        ident = names.parse(field, name, DATASETS)
        sealed = self._shelf.open(DATASETS, ident, verify, field)
        if sealed.manifest.kind != artifacts_pb2.ARTIFACT_KIND_DATASET:
            raise not_found(name)
        return sealed

    async def get(self, name: str) -> datasets_pb2.Dataset:
        """One dataset. Its name is the alias it was asked by, else an alias of it, else its digest."""

        def look() -> datasets_pb2.Dataset:
            sealed = self.open(name)
            alias = self._shelf.alias(DATASETS, name.removeprefix(f"{DATASETS}/"))
            known = [alias.name] if alias is not None else self._aliases().get(sealed.digest, [])
            return proto(sealed, known[0] if known else f"{DATASETS}/{sealed.digest}")

        return await asyncio.to_thread(look)

    def _aliases(self) -> dict[str, list[str]]:
        """Names by digest."""
        known: dict[str, list[str]] = {}
        for alias in self._shelf.aliases(DATASETS):
            known.setdefault(alias.digest, []).append(alias.name)
        return known

    async def page(self, page_size: int, page_token: str) -> tuple[list[datasets_pb2.Dataset], str]:
        """A page, newest first, and the token of the next: one entry an alias, and one for each without."""
        size, position = names.page_size(page_size), names.page_position(page_token)
        after = _position(page_token, position) if position else None

        def look() -> tuple[list[datasets_pb2.Dataset], str]:
            known = self._aliases()
            every = self._shelf.every(artifacts_pb2.ARTIFACT_KIND_DATASET)
            keyed = (
                ((-sealed.manifest.create_time.ToNanoseconds(), name), sealed)
                for sealed in every
                for name in known.get(sealed.digest, [f"{DATASETS}/{sealed.digest}"])
            )
            rest = sorted((k for k in keyed if after is None or k[0] > after), key=lambda k: k[0])
            page = rest[:size]
            more = len(rest) > size
            token = names.page_token(f"{page[-1][0][0]}:{page[-1][0][1]}") if more else ""
            return [_entry(sealed, name) for (_, name), sealed in page], token

        return await asyncio.to_thread(look)

    async def delete(self, request: datasets_pb2.DeleteDatasetRequest) -> datasets_pb2.DeleteDatasetResponse:
        """Removes once, however often it is asked with this request_id, also across a kill."""
        body, ident = idempotency.body_of(request), names.parse("name", request.name, DATASETS)

        def recall(db: sqlite3.Connection) -> tuple[bytes | None, sqlite3.Row | None]:
            begun = db.execute("SELECT * FROM deletions WHERE request_id = ?", (request.request_id,)).fetchone()
            return idempotency.recall(db, _DELETE, request.request_id, body), begun

        answer, begun = await self._store.run(recall)
        if answer is not None:
            return datasets_pb2.DeleteDatasetResponse.FromString(answer)
        try:
            sealed = await asyncio.to_thread(self.open, request.name)
            if begun is None or begun["digest"] != sealed.digest:
                await self._store.run(lambda db: _intend(db, request.request_id, body, sealed))
            freed = await asyncio.to_thread(self._remove, ident, sealed)
        except Fault:
            if begun is None or begun["body"] != body or await asyncio.to_thread(self._is_there, request.name):
                raise
            freed = int(begun["freed_bytes"])  # the run that was killed had removed it
        done = datasets_pb2.DeleteDatasetResponse(freed_bytes=freed)

        def note(db: sqlite3.Connection) -> None:
            db.execute("DELETE FROM deletions WHERE request_id = ?", (request.request_id,))
            idempotency.note(db, _DELETE, request.request_id, body, done.SerializeToString())

        await self._store.run(note)
        return done

    def _is_there(self, name: str) -> bool:
        try:
            self.open(name)
        except Fault:
            return False
        return True

    def _remove(self, ident: str, sealed: Sealed) -> int:
        """Removes an alias; with the last one the files, and the ledgers that were made of them."""
        freed = self._shelf.remove(DATASETS, ident)
        if not freed:
            return 0
        for ledger in self._shelf.every(artifacts_pb2.ARTIFACT_KIND_LEDGER):
            told = facts.from_manifest(facts.LedgerFacts, ledger.manifest)
            if told.dataset_digest == sealed.digest and not self._shelf.holders(ledger.digest):
                freed += self._shelf.remove(DATASETS, ledger.digest)
        return freed

    async def export(
        self, request: datasets_pb2.ExportDatasetRequest
    ) -> AsyncGenerator[datasets_pb2.ExportDatasetResponse, None]:
        """Rows as JSONL in the form asked for, in pieces, and at the end what was written and lost."""
        sealed = await asyncio.to_thread(self.open, request.name)
        there = splits_in(sealed.payload)
        if request.split and request.split not in there:
            raise invalid([Violation("split", show(request.split), f"{', '.join(there)}, or empty for all")])
        pin = await asyncio.to_thread(self._shelf.pin, sealed.digest, "export")
        try:
            splits = [request.split] if request.split else there
            resource = f"{DATASETS}/{sealed.digest}"
            rows = Export(resource, sealed.payload, splits, request.format, request.on_loss, request.max_rows)
            while piece := await asyncio.to_thread(rows.piece):
                yield datasets_pb2.ExportDatasetResponse(data=piece)
            yield datasets_pb2.ExportDatasetResponse(summary=rows.summary)
        finally:
            pin.release()

    async def findings(
        self, name: str, least: datasets_pb2.Severity.ValueType
    ) -> AsyncGenerator[list[datasets_pb2.Finding], None]:
        """Findings of a severity or worse, some at a time."""
        sealed = await asyncio.to_thread(self.open, name)
        async for some in read_findings(sealed.payload / "findings.jsonl", least):
            yield some


async def read_findings(
    path: pathlib.Path, least: datasets_pb2.Severity.ValueType
) -> AsyncGenerator[list[datasets_pb2.Finding], None]:
    """Findings of a file, of a severity or worse, some at a time."""
    with path.open("rb") as f:
        found = (json_format.Parse(line, datasets_pb2.Finding()) for line in f)
        wanted = (finding for finding in found if finding.severity >= least)
        while some := await asyncio.to_thread(lambda: list(itertools.islice(wanted, _FINDINGS))):
            yield some


def _intend(db: sqlite3.Connection, request_id: str, body: bytes, sealed: Sealed) -> None:
    db.execute(
        "INSERT OR REPLACE INTO deletions (request_id, body, digest, freed_bytes) VALUES (?, ?, ?, ?)",
        (request_id, body, sealed.digest, sealed.size_bytes),
    )


def _position(token: str, position: str) -> tuple[int, str]:
    at, colon, name = position.partition(":")
    if not colon or not at.removeprefix("-").isdigit():
        raise invalid([Violation("page_token", show(token), "the next_page_token of the page before")])
    return int(at), name


def _entry(sealed: Sealed, name: str) -> datasets_pb2.Dataset:
    """A dataset in a list: one that does not tell its facts is listed with what is known of it."""
    try:
        return proto(sealed, name)
    except Fault as e:
        log.warning("%s: %s", name, e.message)
        return datasets_pb2.Dataset(
            name=name, digest=sealed.digest, size_bytes=sealed.size_bytes, create_time=sealed.manifest.create_time
        )


def proto(sealed: Sealed, name: str) -> datasets_pb2.Dataset:
    """A dataset as callers see it."""
    told = facts.from_manifest(facts.DatasetFacts, sealed.manifest)
    made = datasets_pb2.Dataset(
        name=name,
        digest=sealed.digest,
        format=datasets_pb2.RowFormat.Value(told.format),
        size_bytes=sealed.size_bytes,
        create_time=sealed.manifest.create_time,
        source_sha256=told.source_sha256,
    )
    json_format.Parse(json.dumps(dict(told.stats)), made.stats)
    json_format.Parse(json.dumps(dict(told.split)), made.split)
    json_format.Parse(json.dumps(dict(told.lineage)), made.lineage)
    return made
