"""One lease of the device for all engines.

Law of this room: a lease is a flock, which belongs to the open file and not to a
process: it lives as long as any process has that file open. Each engine inherits
the same open file. The daemon keeps its own copy only while an engine lives,
since only through it the next engine can come under the same lease.

So: a killed engine leaves the lease to its siblings; the last one that ends takes
it along, and the daemon lets go as soon as it sees that; a killed daemon lets go
at once, and its engines, whose socket closes with it, take the lease along.
"""

from __future__ import annotations

import asyncio
import pathlib

from services.common import devices
from services.common.devices import Lease

_NAMED = 3


class SharedLease:
    """The device, held once by as many engines as there are. Calls of `take` must not overlap."""

    def __init__(self, folder: pathlib.Path, device: str) -> None:
        self._folder = folder
        self.device = device
        self._lease: Lease | None = None
        self._users: dict[str, tuple[str, int]] = {}

    async def take(self, key: str, name: str, guess: int) -> Lease:
        """The lease for one more engine; DEVICE_BUSY if somebody else holds the device."""
        if self._lease is None:
            self._lease = await asyncio.to_thread(devices.acquire, self._folder, self.device, _owner([name]), guess)
        self.tell(key, name, guess)
        return self._lease

    def tell(self, key: str, name: str, memory_bytes: int) -> None:
        """Says what an engine takes, for those who wait."""
        self._users[key] = (name, memory_bytes)
        self._describe()

    def give(self, key: str) -> None:
        """An engine has ended; with the last one the device is free. Nothing for one that is not known."""
        if self._users.pop(key, None) is None:
            return
        if self._users:
            self._describe()
        elif self._lease is not None:
            self._lease.release()
            self._lease = None

    def _describe(self) -> None:
        if self._lease is not None:
            names = [name for name, _ in self._users.values()]
            self._lease.describe(_owner(names), sum(size for _, size in self._users.values()))


def _owner(names: list[str]) -> str:
    shown = ", ".join(names[:_NAMED])
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"inference engine{'s' if len(names) > 1 else ''}: {shown}{more}"
