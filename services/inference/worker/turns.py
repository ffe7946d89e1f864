"""Who is next: requests that wait, in turns.

Law of this room: pure. Higher priority goes first. Among equals each key has its turn by the tokens it was served,
the one with the fewest first; among one key's requests each adapter likewise, and of one adapter the oldest. So a
key with many adapters has no more turns than one with few. Who comes, or comes back, begins where the least served
of those that wait stands: turns cannot be saved up.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

Share = tuple[str, str]
"""A key, or nothing where there are none, and an adapter."""


class Waiter(Protocol):
    """What can wait."""

    priority: int

    @property
    def share(self) -> Share:
        """Whose turn it takes."""
        ...


W = TypeVar("W", bound=Waiter)


@dataclass(slots=True)
class _Accounts:
    """Tokens that each was served who waits or runs."""

    served: dict[Share, float] = field(default_factory=dict)

    def come(self, who: Share, waiting: Iterable[Share]) -> None:
        """Somebody who did not wait begins to."""
        least = min((self.served.get(other, 0.0) for other in waiting), default=0.0)
        self.served[who] = max(self.served.get(who, 0.0), least)

    def charge(self, who: Share, tokens: int) -> None:
        self.served[who] = self.served.get(who, 0.0) + tokens

    def keep(self, who: set[Share]) -> None:
        """Forgets all others; keeps the rest near zero."""
        low = min((self.served.get(one, 0.0) for one in who), default=0.0)
        self.served = {one: self.served.get(one, 0.0) - low for one in who}


@dataclass(slots=True)
class Turns(Generic[W]):
    """A queue of requests. Does not bound itself: the door does."""

    _lines: dict[tuple[int, Share], deque[W]] = field(default_factory=dict)
    _keys: _Accounts = field(default_factory=_Accounts)
    _shares: _Accounts = field(default_factory=_Accounts)

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def __iter__(self) -> Iterator[W]:
        for line in self._lines.values():
            yield from line

    def put(self, waiter: W) -> None:
        """Adds a request at the end of its share's line."""
        waiting = {share for _, share in self._lines}
        key = waiter.share[0]
        if key not in {k for k, _ in waiting}:
            self._keys.come((key, ""), {(k, "") for k, _ in waiting})
        if waiter.share not in waiting:
            self._shares.come(waiter.share, {share for share in waiting if share[0] == key})
        self._lines.setdefault((waiter.priority, waiter.share), deque()).append(waiter)

    def next(self) -> W | None:
        """Who is next; stays in the queue until it is taken."""
        if not self._lines:
            return None
        return self._lines[self._first()][0]

    def take(self, waiter: W) -> bool:
        """Takes a request out; whether it was there."""
        at = (waiter.priority, waiter.share)
        line = self._lines.get(at)
        if line is None or waiter not in line:
            return False
        line.remove(waiter)
        if not line:
            del self._lines[at]
        return True

    def charge(self, share: Share, tokens: int) -> None:
        """Counts tokens that a share was served."""
        self._keys.charge((share[0], ""), tokens)
        self._shares.charge(share, tokens)

    def forget(self, running: set[Share]) -> None:
        """Drops the accounts of those that neither wait nor run."""
        kept = {share for _, share in self._lines} | running
        self._keys.keep({(key, "") for key, _ in kept})
        self._shares.keep(kept)

    def _first(self) -> tuple[int, Share]:
        def order(at: tuple[int, Share]) -> tuple[int, float, float]:
            priority, share = at
            return -priority, self._keys.served.get((share[0], ""), 0.0), self._shares.served.get(share, 0.0)

        return min(self._lines, key=order)
