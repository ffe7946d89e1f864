"""Folders written aside, remembered until they are sealed or dropped.

Law of this room: what this daemon staged and did not seal is gone after its
next start, however it ended.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from services.common.shelf import Shelf, Staged
from services.common.store import Store

MIGRATION = "CREATE TABLE staged (name TEXT PRIMARY KEY) WITHOUT ROWID"


class Staging:
    """The staged folders of this daemon."""

    def __init__(self, shelf: Shelf, store: Store) -> None:
        self._shelf = shelf
        self._store = store

    async def sweep(self) -> None:
        """Drops what the daemon left behind when it last ended."""
        left = await self._store.run(lambda db: [str(r["name"]) for r in db.execute("SELECT name FROM staged")])
        for name in left:
            await self._drop(Staged(self._shelf.root / "staging" / name))

    @contextlib.asynccontextmanager
    async def aside(self) -> AsyncIterator[Staged]:
        """A fresh folder; what is not sealed by the end is dropped."""
        staged = await asyncio.to_thread(self._shelf.stage)
        try:
            values = (staged.folder.name,)
            await self._store.run(lambda db: db.execute("INSERT INTO staged VALUES (?)", values))
            yield staged
        finally:
            await self._drop(staged)

    async def _drop(self, staged: Staged) -> None:
        await asyncio.to_thread(self._shelf.drop, staged)
        values = (staged.folder.name,)
        await self._store.run(lambda db: db.execute("DELETE FROM staged WHERE name = ?", values))
