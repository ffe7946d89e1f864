"""A collection of Chroma's persistent client as rows.

Law of this room: the folder is only read. Chroma writes where it opens (it
migrates, and it makes folders), so it opens a copy of the one file that holds
texts; vectors are not read, and nothing of the collection is run. Documents
pass through memory some hundred at a time, in order of their ids.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from qlorad.v1 import errors_pb2
from services.common.errors import Fault, disk_full, rejected, show, too_large
from services.common.frames.v1 import ingest_pb2
from services.datasets.worker.card import unusable

FILE = "chroma.sqlite3"
_IDS = 10_000
_PAGE = 500
DOCUMENT = "document"
_EXTRA = "pip install 'qlorad-services[chroma]' where the daemon runs"


def fetch(order: ingest_pb2.FetchOrder, tell: Callable[[int, int], None]) -> ingest_pb2.FetchDone:
    """The collection as one file of JSON lines. Its folder is resolved and allowed."""
    asked, into = order.chroma, pathlib.Path(order.into)
    client = opened(copied(pathlib.Path(asked.path), into / "copy", order.max_bytes))
    collection = _collection(client, asked.collection, asked.path)
    path = into / "rows"
    digest, size, written = hashlib.sha256(), 0, 0
    total = collection.count()
    with path.open("wb") as out:
        for row in rows(collection, into / "ids.sqlite"):
            line = json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
            out.write(line)
            digest.update(line)
            written, size = written + 1, size + len(line)
            if size > order.max_bytes:
                raise too_large(f"chroma.collection: {asked.collection}", size, order.max_bytes, "bytes")
            tell(written, total)
    if not written:
        raise unusable("chroma.collection", f"{show(asked.collection)}, which is empty", "a collection with documents")
    done = ingest_pb2.FetchDone(source=f"chroma:{asked.path}#{asked.collection}")
    name = "".join(c if c.isprintable() and c not in "/\\" else "-" for c in asked.collection)[:200]
    done.sources.add(path=str(path), filename=f"{name}.jsonl", sha256=digest.hexdigest(), text_column=DOCUMENT)
    return done


def copied(folder: pathlib.Path, into: pathlib.Path, max_bytes: int, patience: float = 30.0) -> pathlib.Path:
    """A folder with a copy of the file that holds the texts: whole and of one moment, whoever writes to it.

    UPSTREAM where somebody holds it for as long as the patience.
    """
    given = folder / FILE
    real = given.resolve()
    if not real.is_file() or not real.is_relative_to(folder):
        there = "a link out of it" if given.is_symlink() else "not there"
        raise unusable("chroma.path", f"{folder}, whose {FILE} is {there}", "a folder of Chroma's persistent client")
    size = real.stat().st_size
    if size > max_bytes:
        raise too_large(f"chroma.path: {real}", size, max_bytes, "bytes")
    into.mkdir()
    if size > (free := shutil.disk_usage(into).free):
        raise disk_full(f"copying {size} bytes of {real} ({free} are free)")
    end = time.monotonic() + patience

    def wait(status: int, *_: int) -> None:
        if status in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED) and time.monotonic() > end:
            told = f"chroma.path: {real} is held by who writes to it; call again later"
            raise Fault(errors_pb2.REASON_UPSTREAM, told, resource=str(folder), retry_seconds=30.0)

    try:
        with (
            contextlib.closing(sqlite3.connect(f"{real.as_uri()}?mode=ro", uri=True, timeout=0)) as source,
            contextlib.closing(sqlite3.connect(into / FILE)) as copy,
        ):
            source.backup(copy, progress=wait, sleep=0.1)
    except sqlite3.Error as e:
        raise unusable("chroma.path", f"{real}, which cannot be read ({e})", "a whole file of Chroma's") from None
    return into


def opened(folder: pathlib.Path) -> Any:
    """Chroma's client over a folder of ours. Told nothing by whoever started the daemon, and telling nobody."""
    for name in [n for n in os.environ if n.upper().startswith(("CHROMA", "ANONYMIZED_TELEMETRY", "OTEL_"))]:
        del os.environ[name]
    os.environ["TOKIO_WORKER_THREADS"] = "2"  # one for each core takes more address space than a worker has
    try:
        import chromadb
        from chromadb.config import Settings
    except ImportError as e:
        if e.name is not None and e.name.partition(".")[0] != "chromadb":
            raise
        raise rejected("chroma", f"chromadb is not installed beside this daemon; accepted: {_EXTRA}") from None
    settings = Settings(_env_file=None, anonymized_telemetry=False, allow_reset=False)
    try:
        return chromadb.PersistentClient(str(folder), settings=settings)
    except Exception as e:
        raise _odd("cannot be opened by Chroma", e) from None


def _collection(client: Any, name: str, path: str) -> Any:
    """The collection; without the function that made its vectors, which may be anybody's."""
    try:
        known = [c.name for c in client.list_collections(limit=1000)]
        found = client.get_collection(name, embedding_function=None)
    except Exception as e:
        if type(e).__name__ == "NotFoundError":
            there = ", ".join(map(show, sorted(known)[:20])) or "none"
            told = f"chroma.collection: {path} has no {show(name)}; there is: {there}"
            raise Fault(errors_pb2.REASON_NOT_FOUND, told, resource=name) from None
        raise _odd(f"has a collection {show(name)} that cannot be opened", e) from None
    return found


def rows(collection: Any, ids: pathlib.Path) -> Iterator[dict[str, Any]]:
    """Every record as a row, in order of ids. The ids are sorted on disk, beside the copy."""
    with contextlib.closing(sqlite3.connect(ids, isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode=OFF")
        db.execute("CREATE TABLE ids (id TEXT PRIMARY KEY) WITHOUT ROWID")
        at = 0
        while some := _get(collection, limit=_IDS, offset=at, include=[])["ids"]:
            db.execute("BEGIN")
            db.executemany("INSERT INTO ids VALUES (?)", ((i,) for i in some))
            db.execute("COMMIT")
            at += len(some)
        sorted_ids = db.execute("SELECT id FROM ids ORDER BY id")
        while page := [i for (i,) in sorted_ids.fetchmany(_PAGE)]:
            found = _get(collection, ids=page, include=["documents", "metadatas"])
            told = zip(found["ids"], found["documents"], found["metadatas"], strict=True)
            by_id = {i: (document, metadata) for i, document, metadata in told}
            for i in page:
                yield row_of(i, *by_id[i])


def _get(collection: Any, **asked: Any) -> dict[str, Any]:
    try:
        return collection.get(**asked)
    except Exception as e:
        raise _odd(f"has a collection {show(collection.name)} that cannot be read", e) from None


def row_of(ident: str, document: str | None, metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    """A record as a row: its id, its document, and its metadata as columns, in order of their names.

    A column of metadata that has the name of one of the first two gets "metadata." in front.
    """
    row: dict[str, Any] = {"id": ident}
    if document is not None:
        row[DOCUMENT] = document
    for key, value in sorted((metadata or {}).items()):
        name = key
        while name in ("id", DOCUMENT) or name in row:
            name = f"metadata.{name}"
        if value is not None:
            row[name] = _plain(ident, key, value)
    return row


def _plain(ident: str, key: str, value: Any) -> Any:
    if isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, list):
        return [_plain(ident, key, v) for v in value]
    given = f"the record {show(ident)}, whose metadata {show(key)} is {show(type(value).__name__)}"
    raise unusable("chroma.collection", given, "texts, numbers, booleans, and lists of them")


def _odd(what: str, error: Exception) -> Fault:
    if isinstance(error, MemoryError):
        raise error
    why = f"{type(error).__name__}: {show(str(error), 200)}"
    return unusable("chroma.path", f"a folder that {what} ({why})", "a folder of Chroma's persistent client")
