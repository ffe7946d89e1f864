"""What plug-ins of one sort are installed, as a worker that loads them tells it.

Law of this room: a daemon loads no plug-in; it asks once for each set of
installed packages and keeps the answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from importlib import metadata
from typing import Generic, TypeAlias, TypeVar

T = TypeVar("T")
Brought: TypeAlias = frozenset[tuple[str, str, str, str]]
"""Name, place, package and version of everything that plug-ins bring."""


def brought(group: str) -> Brought:
    """What is installed now; nothing is loaded."""
    return frozenset(
        (point.name, point.value, point.dist.name if point.dist else "", point.dist.version if point.dist else "")
        for point in metadata.entry_points(group=group)
    )


class Listing(Generic[T]):
    """What there is of one sort; `ask` has a worker tell it, or raises a Fault that names what cannot be loaded."""

    def __init__(self, group: str, ask: Callable[[], Awaitable[list[T]]]) -> None:
        self._group = group
        self._ask = ask
        self._turn = asyncio.Lock()
        self._known: tuple[Brought, list[T]] | None = None

    async def list(self) -> list[T]:
        """Everything, by name."""
        async with self._turn:
            now = await asyncio.to_thread(brought, self._group)
            if self._known is None or self._known[0] != now:
                self._known = now, await self._ask()
            return self._known[1]
