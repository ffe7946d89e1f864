"""Who is next: requests that wait, in turns.

Law of this room: pure. Higher priority goes first. Among equals each share (an adapter and a key) has its
turn by the tokens it was served: the one with the fewest goes first, and within a share the oldest. A share
that comes, or comes back, begins where the least served of those that wait stands: it cannot save up turns.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar


class Waiter(Protocol):
    """What can wait."""

    priority: int
    share: str


W = TypeVar("W", bound=Waiter)


@dataclass(slots=True)
class Turns(Generic[W]):
    """A queue of requests. Does not bound itself: the door does."""

    _lines: dict[tuple[int, str], deque[W]] = field(default_factory=dict)
    _served: dict[str, float] = field(default_factory=dict)
    """Tokens of each share that waits or is charged; forgotten when nobody waits and all is even."""

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def __iter__(self) -> Iterator[W]:
        for line in self._lines.values():
            yield from line

    def put(self, waiter: W) -> None:
        """Adds a request at the end of its share's line."""
        waiting = {share for _, share in self._lines}
        if waiter.share not in waiting:
            least = min((self._served[share] for share in waiting), default=0.0)
            self._served[waiter.share] = max(self._served.get(waiter.share, 0.0), least)
        self._lines.setdefault((waiter.priority, waiter.share), deque()).append(waiter)

    def next(self) -> W | None:
        """Who is next; stays in the queue until it is taken."""
        if not self._lines:
            return None
        return self._lines[self._first()][0]

    def take(self, waiter: W) -> bool:
        """Takes a request out; whether it was there."""
        key = (waiter.priority, waiter.share)
        line = self._lines.get(key)
        if line is None or waiter not in line:
            return False
        line.remove(waiter)
        if not line:
            del self._lines[key]
        return True

    def charge(self, share: str, tokens: int) -> None:
        """Counts tokens that a share was served."""
        self._served[share] = self._served.get(share, 0.0) + tokens

    def forget(self, running: set[str]) -> None:
        """Drops the accounts of shares that neither wait nor run; keeps the rest near zero."""
        kept = {share for _, share in self._lines} | running
        low = min((self._served.get(share, 0.0) for share in kept), default=0.0)
        self._served = {share: self._served.get(share, 0.0) - low for share in kept}

    def _first(self) -> tuple[int, str]:
        return min(self._lines, key=lambda key: (-key[0], self._served.get(key[1], 0.0)))
