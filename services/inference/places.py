"""Places for requests: so many at a time, and no more.

Law of this room: who comes alone gets a place at once or is refused at once. A
batch that was let in waits for the places of its other prompts, in order; so
what was accepted completes.
"""

from __future__ import annotations

import asyncio
import collections

from qlorad.v1 import errors_pb2
from services.common.errors import Fault

_RETRY_SECONDS = 1.0


class Places:
    """So many places. One event loop; never blocks it."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._waiting: collections.deque[asyncio.Future[None]] = collections.deque()
        self.taken = 0

    def take(self) -> None:
        """A place now, or QUEUE_FULL."""
        if self.taken >= self._limit:
            raise Fault(
                errors_pb2.REASON_QUEUE_FULL,
                f"{self.taken} requests are in flight or wait; accepted: at most {self._limit}",
                retry_seconds=_RETRY_SECONDS,
            )
        self.taken += 1

    async def wait(self) -> None:
        """A place as soon as one is free."""
        if self.taken < self._limit and not self._waiting:
            self.taken += 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.free()  # it was handed over in the very moment that the caller left
            else:
                self._waiting.remove(turn)
            raise

    def free(self) -> None:
        """Gives a place back: to the first who waits, if any does."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self.taken -= 1
