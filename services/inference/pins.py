"""What an engine holds must stay on the shelf.

Law of this room: one pin for each digest while it is in memory, whoever asked.
Never blocks the event loop, and lets go without making anybody wait.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from services.common.shelf import Pin, Shelf

HOLDER = "inference/engine"


class Pins:
    """The shelf's pins of what is in memory."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self._held: dict[str, Pin] = {}
        self._letting_go: set[asyncio.Future[None]] = set()

    async def take(self, digest: str) -> None:
        """Holds an artifact; NOT_FOUND if it is gone."""
        if digest not in self._held:
            self._held[digest] = await asyncio.to_thread(self._shelf.pin, digest, HOLDER)

    def let_go(self, digests: Iterable[str]) -> None:
        """Lets artifacts go, soon; nothing for those that are not held."""
        pins = [pin for digest in digests if (pin := self._held.pop(digest, None)) is not None]
        if pins:
            going = asyncio.get_running_loop().run_in_executor(None, _release, pins)
            self._letting_go.add(going)
            going.add_done_callback(self._letting_go.discard)

    async def settle(self) -> None:
        """Waits until all that was let go is free."""
        while self._letting_go:
            await asyncio.wait(self._letting_go)


def _release(pins: list[Pin]) -> None:
    for pin in pins:
        pin.release()
