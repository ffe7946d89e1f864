"""Faults that a test orders: the next answers to a pattern of requests go wrong.

Law of this room: a fault strikes exactly as often as it was ordered.
"""

from __future__ import annotations

import re
import threading
from dataclasses import asdict, dataclass, field
from typing import Any

KINDS = ("throttle", "status", "drop", "cut", "slow", "wrong_bytes", "no_range", "body")


@dataclass(slots=True)
class Fault:
    """One order."""

    kind: str
    """throttle: 429 with Retry-After. status: `status`. drop: closes without an answer. cut: closes after `after`
    bytes of the body. slow: `seconds` before every piece of `after` bytes. wrong_bytes: one byte of the body differs.
    no_range: Range is not understood. body: answers `body`, as it is."""
    match: str
    """Regular expression on "METHOD /path"."""
    times: int = 1
    status: int = 500
    retry_after: str = ""
    after: int = 0
    seconds: float = 0.0
    body: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind: got {self.kind!r}; accepted: {', '.join(KINDS)}")
        re.compile(self.match)


@dataclass(slots=True)
class Orders:
    """What was ordered and what was asked, in order."""

    _faults: list[Fault] = field(default_factory=list)
    _log: list[dict[str, Any]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def order(self, told: dict[str, Any]) -> None:
        """Orders a fault."""
        with self._lock:
            self._faults.append(Fault(**told))

    def clear(self) -> None:
        """Forgets all orders and the log."""
        with self._lock:
            self._faults.clear()
            self._log.clear()

    def take(self, request: str) -> Fault | None:
        """The fault that strikes this request."""
        with self._lock:
            for fault in self._faults:
                if fault.times > 0 and re.search(fault.match, request):
                    fault.times -= 1
                    return fault
        return None

    def note(self, entry: dict[str, Any]) -> None:
        """Writes a request down."""
        with self._lock:
            self._log.append(entry)

    def told(self) -> dict[str, Any]:
        """Requests so far, and the orders that are left."""
        with self._lock:
            return {"log": list(self._log), "faults": [asdict(f) for f in self._faults if f.times > 0]}
