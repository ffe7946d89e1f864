"""Room for adapters: who comes in turn, who leaves for them, and who must not keep them waiting for ever.

Law of this room: who comes and does not fit waits in line. What nobody uses leaves
at once. What is in use leaves when its requests have ended; after `YIELD` seconds of
waiting as many as are needed take no new requests, so that they do end.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable

from services.inference import budget
from services.inference.board import Board

YIELD = 2.0
"""Seconds that one who comes waits before others are closed to new requests for it."""


class Room:
    """The bytes of all adapters under one limit; `send_away` sees to it that one is freed once nobody uses it."""

    def __init__(self, board: Board, limit: int, send_away: Callable[[str], asyncio.Task[None]]) -> None:
        self._board = board
        self._limit = limit
        self._send_away = send_away
        self._line = asyncio.Lock()
        self._overdue: dict[str, int] = {}
        """Bytes of those who have waited for `YIELD`."""
        self._leaving: dict[str, asyncio.Task[None]] = {}

    async def make(self, digest: str, name: str, need: int, patience: float) -> None:
        """Counts so many bytes for an adapter that comes, once who left for it is gone; TOO_LARGE if it cannot be.

        `patience` is how long it waits for others to end their use; without any, nobody is closed for it.
        """
        end = time.monotonic() + patience
        loop = asyncio.get_running_loop()
        timer = loop.call_later(YIELD, self._close_for, digest, need) if patience > 0 else None
        try:
            async with self._line:
                while not (verdict := self.reserve(digest, need)).fits:
                    left = end - time.monotonic()
                    if not verdict.may_fit_later or left <= 0:
                        raise budget.too_large(name, need, self._limit, "adapter_bytes", verdict)
                    self._close()
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._board.news(), left)
        finally:
            if timer is not None:
                timer.cancel()
            self._overdue.pop(digest, None)
        await self.emptied()

    def reserve(self, digest: str, need: int) -> budget.Verdict:
        """Makes the bytes its own if there is room; who must leave takes no new requests from now on."""
        verdict = self._decide(digest, need)
        if verdict.fits:
            self._board.become(self._board.table.reserved(digest, need))
            for victim in verdict.leave:
                self._begin_leaving(victim)
        return verdict

    async def emptied(self) -> None:
        """Returns when the bytes of all who leave and are used no more are free: they are another's by now."""
        entries = self._board.table.entries
        unused = [task for digest, task in self._leaving.items() if digest not in entries or not entries[digest].holds]
        if unused:
            await asyncio.wait(unused)

    def _decide(self, digest: str, need: int) -> budget.Verdict:
        return budget.decide([i for i in self._board.table.items() if i.key != digest], need, self._limit)

    def _close_for(self, digest: str, need: int) -> None:
        verdict = self._decide(digest, need)
        if verdict.fits or verdict.may_fit_later:  # else nobody's leaving would help
            self._overdue[digest] = need
            self._close()

    def _close(self) -> None:
        """Sees to it that those who have waited long enough will have room."""
        others = [i for i in self._board.table.items() if i.key not in self._overdue]
        for digest in budget.close(others, sum(self._overdue.values()), self._limit):
            self._begin_leaving(digest)

    def _begin_leaving(self, digest: str) -> None:
        self._board.become(self._board.table.leaving(digest))
        task = self._leaving[digest] = self._send_away(digest)
        task.add_done_callback(lambda _: self._leaving.pop(digest) if self._leaving.get(digest) is task else None)

    async def end(self) -> None:
        """Lets those who leave go with the daemon."""
        tasks = list(self._leaving.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
