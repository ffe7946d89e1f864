"""Files on their way in: `state/uploads/ID.part`, and what of them is safe.

Law of this room: bytes are appended, fsynced, and only then counted in the
database, so committed_bytes is never more than what a power cut leaves. What
lies in the file behind committed_bytes is cut off before the next append.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
import pathlib
import secrets
import shutil
import sqlite3
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from qlorad.v1 import datasets_pb2, errors_pb2
from services.common import idempotency
from services.common.artifacts import sha256_file
from services.common.errors import Fault, corrupt, disk_full, invalid_field, not_found, too_large
from services.common.shelf import fsync_path
from services.common.store import Store
from services.datasets.checks import PIECE_BYTES, upload_id
from services.datasets.metrics import Metrics

T = TypeVar("T")

MIGRATION = """
CREATE TABLE uploads (
  id TEXT PRIMARY KEY,
  filename TEXT NOT NULL,
  size_bytes INTEGER NOT NULL,
  sha256 TEXT NOT NULL,
  committed_bytes INTEGER NOT NULL DEFAULT 0,
  complete INTEGER NOT NULL DEFAULT 0,
  touched REAL NOT NULL DEFAULT ((julianday('now') - 2440587.5) * 86400.0)
) WITHOUT ROWID
"""
_NOW = "(julianday('now') - 2440587.5) * 86400.0"
KEEP_SECONDS = 7 * 86400.0
_FIRST_SYNC_BYTES = 8 << 20
_SYNC_BYTES = 64 << 20
"""Bytes are made safe when as many came as are safe already, between these bounds, or after these seconds."""
_SYNC_SECONDS = 2.0
_MAX_UNSAFE_BYTES = 2 * _SYNC_BYTES
_METHOD = "StartUpload"


@dataclass(slots=True)
class _Open:
    """A file being appended to. All streams of an upload share it."""

    fd: int
    end: int
    """Bytes in the file."""
    safe: int
    """Bytes that are durable and counted."""
    synced_at: float
    streams: int = 0
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Of who writes."""
    safe_turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Of who makes what was written safe; others may write meanwhile."""
    syncing: asyncio.Task[None] | None = None
    digest: Any = None
    """sha256 of all bytes so far, where all of them went by here."""


class Uploads:
    """Every upload of this daemon."""

    def __init__(self, store: Store, folder: pathlib.Path, max_bytes: int, metrics: Metrics) -> None:
        self._store = store
        self._folder = folder
        self._max_bytes = max_bytes
        self._metrics = metrics
        self._open: dict[str, _Open] = {}
        self._opening = asyncio.Lock()

    def path(self, ident: str) -> pathlib.Path:
        """Where an upload's bytes lie."""
        return self._folder / f"{ident}.part"

    async def sweep(self) -> None:
        """Forgets uploads that nobody touched for a week, and files that nobody knows."""

        def forget(db: sqlite3.Connection) -> set[str]:
            db.execute(f"DELETE FROM uploads WHERE touched < {_NOW} - ?", (KEEP_SECONDS,))
            idempotency.prune(db)
            return {str(row["id"]) for row in db.execute("SELECT id FROM uploads")}

        known = await self._store.run(forget)

        def clear() -> None:
            self._folder.mkdir(parents=True, exist_ok=True)
            for path in self._folder.glob("*.part"):
                if path.stem not in known:
                    path.unlink()

        await asyncio.to_thread(clear)

    async def start(self, request: datasets_pb2.StartUploadRequest) -> datasets_pb2.Upload:
        """Opens an upload, or finds that of this request_id again. The request is well formed."""
        if request.size_bytes > self._max_bytes:
            raise too_large("size_bytes", request.size_bytes, self._max_bytes, "bytes")
        free = (await asyncio.to_thread(shutil.disk_usage, self._folder)).free
        body = idempotency.body_of(request)

        def begin(db: sqlite3.Connection) -> tuple[sqlite3.Row, bool]:
            noted = idempotency.recall(db, _METHOD, request.request_id, body)
            ident = noted.decode() if noted is not None else secrets.token_hex(16)
            found = db.execute("SELECT * FROM uploads WHERE id = ?", (ident,)).fetchone()
            if found is not None:
                return found, False
            if request.size_bytes > free:
                raise disk_full(f"opening an upload of {request.size_bytes} bytes ({free} are free)")
            row = (ident, request.filename, request.size_bytes, request.sha256)
            db.execute("INSERT INTO uploads (id, filename, size_bytes, sha256) VALUES (?, ?, ?, ?)", row)
            if noted is None:
                idempotency.note(db, _METHOD, request.request_id, body, ident.encode())
            return db.execute("SELECT * FROM uploads WHERE id = ?", (ident,)).fetchone(), True

        row, is_new = await self._store.run(begin)
        if is_new:
            self._metrics.uploads.labels("started").inc()
        return _proto(row)

    async def get(self, ident: str) -> datasets_pb2.Upload:
        """An upload, or NOT_FOUND."""
        return _proto(await self._row(ident))

    async def _row(self, ident: str) -> sqlite3.Row:
        row: sqlite3.Row | None = await self._store.run(
            lambda db: db.execute("SELECT * FROM uploads WHERE id = ?", (ident,)).fetchone()
        )
        if row is None:
            raise not_found(f"uploads/{ident}")
        return row

    async def write(self, requests: AsyncIterator[datasets_pb2.WriteUploadRequest]) -> datasets_pb2.Upload:
        """Appends a stream of pieces. What was received counts, however the stream ends."""
        first = await anext(requests, None)
        if first is None:
            raise invalid_field("upload", "", "a first message with upload and offset")
        ident = upload_id("upload", first.upload)
        async with self._stream(ident) as (file, row):
            if file is None:
                if first.offset != row["size_bytes"] or first.data:
                    raise _wrong_offset(ident, first.offset, row["size_bytes"])
                return _proto(row)
            if file.safe != first.offset:
                raise _wrong_offset(ident, first.offset, file.safe)
            at = await self._append(ident, row, file, first.offset, first.data)
            async for piece in requests:
                if piece.upload not in ("", first.upload) or piece.offset not in (0, at):
                    raise invalid_field("offset", piece.offset, f"none, or {at}, after the first message")
                at = await self._append(ident, row, file, at, piece.data)
            await self._sync(ident, file)
            if file.end == row["size_bytes"]:
                row = await _unbroken(self._finish(ident, file, row))
            return _proto(await self._row(ident))

    @contextlib.asynccontextmanager
    async def _stream(self, ident: str) -> AsyncIterator[tuple[_Open | None, sqlite3.Row]]:
        """The open file and what was noted of it; no file if the upload is complete."""
        async with self._opening:
            file = self._open.get(ident)
            if file is not None:
                file.streams += 1
            row = await self._row(ident)
            if file is None and row["complete"]:
                yield None, row
                return
            if file is None:
                # Nobody has it open, so the row is the last word.
                file = await asyncio.to_thread(_open_at, self.path(ident), row["committed_bytes"])
                file.streams += 1
                self._open[ident] = file
        try:
            await self._sync(ident, file)  # what a stream that broke just now has left
            yield file, row
        finally:
            await _unbroken(self._leave(ident, file))

    async def _leave(self, ident: str, file: _Open) -> None:
        try:
            await self._sync(ident, file)
        finally:
            file.streams -= 1
            if not file.streams:
                self._open.pop(ident, None)
                os.close(file.fd)

    async def _append(self, ident: str, row: sqlite3.Row, file: _Open, at: int, data: bytes) -> int:
        if len(data) > PIECE_BYTES:
            raise invalid_field("data", f"{len(data)} bytes", f"at most {PIECE_BYTES} bytes a message")
        if at + len(data) > row["size_bytes"]:
            raise invalid_field("data", f"{at + len(data)} bytes in all", f"{row['size_bytes']}, as announced")
        if data:
            await _unbroken(self._put(ident, file, at, data))
        self._metrics.upload_bytes.inc(len(data))
        await self._sync_now_and_then(ident, file)
        return at + len(data)

    async def _sync_now_and_then(self, ident: str, file: _Open) -> None:
        """Has bytes made safe while others arrive; waits only where too many are not."""
        due = min(_SYNC_BYTES, max(_FIRST_SYNC_BYTES, file.safe))
        if file.end - file.safe < due and time.monotonic() - file.synced_at < _SYNC_SECONDS:
            return
        if file.syncing is not None and file.syncing.done():
            await self._synced(file)
        if file.syncing is None:
            file.syncing = asyncio.create_task(self._make_safe(ident, file))
        if file.end - file.safe >= _MAX_UNSAFE_BYTES:
            await asyncio.shield(file.syncing)

    async def _put(self, ident: str, file: _Open, at: int, data: bytes) -> None:
        async with file.turn:
            if file.end != at:  # another stream writes to the same upload
                raise _wrong_offset(ident, at, file.end)
            with _space():
                await asyncio.to_thread(_write_all, file.fd, data, file.digest)
            file.end += len(data)

    async def _synced(self, file: _Open) -> None:
        """The end of what is being made safe beside; raises what it met."""
        task, file.syncing = file.syncing, None
        if task is not None:
            await _unbroken(task)

    async def _sync(self, ident: str, file: _Open) -> None:
        await self._synced(file)
        if file.end != file.safe:
            await _unbroken(self._make_safe(ident, file))

    async def _make_safe(self, ident: str, file: _Open) -> None:
        async with file.safe_turn:
            end = file.end
            if end != file.safe:
                with _space():
                    await asyncio.to_thread(os.fsync, file.fd)
                await self._count(ident, end, complete=False)
                file.safe = end
            file.synced_at = time.monotonic()

    async def _count(self, ident: str, end: int, complete: bool) -> None:
        await self._store.run(
            lambda db: db.execute(
                f"UPDATE uploads SET committed_bytes = ?, complete = ?, touched = {_NOW} WHERE id = ?",
                (end, int(complete), ident),
            )
        )

    async def _finish(self, ident: str, file: _Open, row: sqlite3.Row) -> sqlite3.Row:
        async with file.turn:
            if file.digest is not None:
                found = str(file.digest.hexdigest())
            else:
                found = await asyncio.to_thread(sha256_file, self.path(ident))
            if found == row["sha256"]:
                await self._count(ident, file.end, complete=True)
                self._metrics.uploads.labels("completed").inc()
                return await self._row(ident)
            await self._count(ident, 0, complete=False)
            await asyncio.to_thread(os.ftruncate, file.fd, 0)
            file.end = file.safe = 0
            file.digest = hashlib.sha256()
        self._metrics.uploads.labels("corrupt").inc()
        raise corrupt(f"uploads/{ident}", f"sha256 is {found}, announced was {row['sha256']}; start again at 0")


async def _unbroken(work: Coroutine[Any, Any, T] | asyncio.Task[T]) -> T:
    """Does the work to its end, even if the caller is cancelled meanwhile."""
    return await asyncio.shield(asyncio.ensure_future(work))


def _open_at(path: pathlib.Path, safe: int) -> _Open:
    """Opens the file and cuts off what was never counted."""
    is_new = not path.exists()
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, safe)
        os.fsync(fd)
        if is_new:
            fsync_path(path.parent)
    except BaseException:
        os.close(fd)
        raise
    return _Open(fd, safe, safe, time.monotonic(), digest=None if safe else hashlib.sha256())


def _write_all(fd: int, data: bytes, digest: Any) -> None:
    """All of it or nothing: a torn piece is cut off again. The digest hears of what was written."""
    begun = os.fstat(fd).st_size
    view = memoryview(data)
    try:
        while view:
            view = view[os.write(fd, view) :]
    except OSError:
        os.ftruncate(fd, begun)
        raise
    if digest is not None:
        digest.update(data)


@contextlib.contextmanager
def _space() -> Iterator[None]:
    try:
        yield
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_full("receiving an upload; go on from committed_bytes") from None
        raise


def _wrong_offset(ident: str, given: int, committed: int) -> Fault:
    return Fault(
        errors_pb2.REASON_WRONG_OFFSET,
        f"offset: got {given}; accepted: {committed}, where 'uploads/{ident}' ends",
        resource=f"uploads/{ident}",
        metadata={"committed_bytes": str(committed)},
    )


def _proto(row: sqlite3.Row) -> datasets_pb2.Upload:
    return datasets_pb2.Upload(
        name=f"uploads/{row['id']}",
        filename=row["filename"],
        size_bytes=row["size_bytes"],
        committed_bytes=row["committed_bytes"],
        complete=bool(row["complete"]),
        sha256=row["sha256"] if row["complete"] else "",
    )
