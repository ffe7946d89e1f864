"""SQLite: what a daemon must remember about itself.

Law of this room: one file, one thread, one writer. Every statement runs on the
database's own thread; a call that returned has been committed and synced (WAL,
synchronous=FULL). Migrations are numbered, run once each, in order.
"""

from __future__ import annotations

import asyncio
import contextlib
import pathlib
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from services.common.config import ConfigError
from services.common.errors import disk_full

T = TypeVar("T")


@contextlib.contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """All or nothing; takes the write lock at once."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield db
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:  # on a full disk SQLite has rolled back by itself
            db.execute("ROLLBACK")
        raise


class Store:
    """A database on its own thread."""

    def __init__(self, db: sqlite3.Connection, thread: ThreadPoolExecutor) -> None:
        self._db = db
        self._thread = thread

    @classmethod
    def open(cls, path: pathlib.Path, migrations: Sequence[str]) -> Store:
        """Opens or makes the file and brings it up to date.

        A migration is statements divided by ";", none of which holds one inside.
        ConfigError if the file is of a newer qlorad or no database.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"sqlite-{path.stem}")

        def begin() -> sqlite3.Connection:
            db = sqlite3.connect(path, isolation_level=None, timeout=30.0)
            try:
                prepare(db)
            except BaseException:
                db.close()
                raise
            return db

        def prepare(db: sqlite3.Connection) -> None:
            db.row_factory = sqlite3.Row
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=FULL")
            db.execute("PRAGMA foreign_keys=ON")
            done = int(db.execute("PRAGMA user_version").fetchone()[0])
            if done > len(migrations):
                raise ConfigError([f"{path} is of a newer qlorad: format {done}; accepted: up to {len(migrations)}"])
            for number, script in enumerate(migrations[done:], start=done + 1):
                with transaction(db):
                    for statement in filter(str.strip, script.split(";")):
                        db.execute(statement)
                    db.execute(f"PRAGMA user_version={number}")

        try:
            return cls(thread.submit(begin).result(), thread)
        except BaseException as e:
            thread.shutdown()
            if isinstance(e, sqlite3.DatabaseError):
                why = f"{path} cannot be opened: {e}; accepted: a database of qlorad, or no file"
                raise ConfigError([why]) from None
            raise

    async def run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Runs `work` in one transaction on the database's thread.

        Shielded: a caller who gives up does not tear a transaction.
        """

        def go() -> T:
            try:
                with transaction(self._db):
                    return work(self._db)
            except sqlite3.OperationalError as e:
                if "full" in str(e):
                    raise disk_full("writing to the database") from None
                raise

        return await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._thread, go))

    async def close(self) -> None:
        """Finishes what is queued and closes the file."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._db.close)
        self._thread.shutdown()
