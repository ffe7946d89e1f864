"""The table of adapters as it is now, and its news.

Law of this room: there is one table; whoever waits for a change sees every one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from services.inference.adapters import Table


class Board:
    """One table after another; `changed` hears of each."""

    def __init__(self, changed: Callable[[Table, Table], None]) -> None:
        self._changed = changed
        self._news = asyncio.Event()
        self.table = Table()

    def become(self, table: Table) -> None:
        """Puts a table in the place of the one before."""
        before, self.table = self.table, table
        news, self._news = self._news, asyncio.Event()
        news.set()
        self._changed(before, table)

    async def news(self) -> None:
        """Returns with the next change."""
        await self._news.wait()

    async def until(self, look: Callable[[], bool]) -> None:
        """Returns once `look` finds what it looks for."""
        while not look():
            await self._news.wait()
