"""Places for requests: so many at a time, and no more.

Law of this room: who comes alone gets a place at once or is refused at once. A
batch that was let in waits for the places of its other prompts, in order; so
what was accepted completes. No key has so many that none is left for others.
"""

from __future__ import annotations

import asyncio
import collections

from qlorad.v1 import errors_pb2
from services.common.errors import Fault

_RETRY_SECONDS = 1.0
_FOR_EACH_FREE = 3
"""A key may have so many places for each that is free: three quarters of all if it is alone, and some stay free."""


class Places:
    """So many places. One event loop; never blocks it. `who` is a key; without one nobody is told apart."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._waiting: collections.deque[tuple[str, asyncio.Future[None]]] = collections.deque()
        """Of those none may have a place now."""
        self._held: collections.Counter[str] = collections.Counter()
        self.taken = 0

    def take(self, who: str = "") -> None:
        """A place now, or QUEUE_FULL."""
        if not self._may(who):
            told = f"{self.taken} requests are in flight or wait; accepted: at most {self._limit}"
            if self.taken < self._limit:
                told += (
                    f", and of one key {_FOR_EACH_FREE} for each place that is free; key {who!r} has {self._held[who]}"
                )
            raise Fault(errors_pb2.REASON_QUEUE_FULL, told, retry_seconds=_RETRY_SECONDS)
        self._give(who)

    async def wait(self, who: str = "") -> None:
        """A place as soon as one is free."""
        if self._may(who):
            self._give(who)
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((who, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.free(who)  # it was handed over in the very moment that the caller left
            else:
                self._waiting.remove((who, turn))
            raise

    def free(self, who: str = "") -> None:
        """Gives a place back: to the first who waits and may have it, if any does."""
        self.taken -= 1
        self._held[who] -= 1
        if not self._held[who]:
            del self._held[who]
        for one in list(self._waiting):
            if not one[1].done() and self._may(one[0]):
                self._waiting.remove(one)
                self._give(one[0])
                one[1].set_result(None)

    def _may(self, who: str) -> bool:
        free = self._limit - self.taken
        return free > 0 and (not who or self._held[who] < _FOR_EACH_FREE * free)

    def _give(self, who: str) -> None:
        self.taken += 1
        self._held[who] += 1
