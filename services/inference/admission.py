"""Who may come in: a place in the daemon, and what the key may take.

Law of this room: holds no policy; what `enter` gave is given back however the
call ends. A call that is refused has taken nothing.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from services.common import caller
from services.inference.limits import Meter
from services.inference.places import Places


@dataclass(frozen=True, slots=True)
class Entry:
    """A call that was let in."""

    who: str
    """The name of its key; empty where there are no keys."""
    width: int
    """So many of its requests may run at a time."""
    took: Callable[[int], None]
    """Notes tokens of a prompt or an answer."""


class Admission:
    """The one way in for requests that an engine answers."""

    def __init__(self, places: Places, meter: Meter, widest: int) -> None:
        self.places = places
        self._meter = meter
        self._widest = widest

    def highest_priority(self) -> int:
        """The highest priority that who calls may ask for."""
        return self._meter.highest(caller.name())

    @contextlib.contextmanager
    def enter(self, requests: int = 1) -> Iterator[Entry]:
        """Lets a call in with one place, which it may free and wait for again; QUEUE_FULL or RATE_LIMITED."""
        who = caller.name()
        self.places.take(who)
        try:
            width = self._meter.begin(who, requests, min(requests, self._widest), time.monotonic())
        except BaseException:
            self.places.free(who)
            raise
        try:
            yield Entry(who, width, lambda tokens: self._meter.took(who, tokens, time.monotonic()))
        finally:
            self._meter.end(who, width)
            self.places.free(who)
