"""Watchers of adapters: everything first, then each change.

Law of this room: a watcher costs the daemon one place for each adapter, however
slowly it reads: it finds the newest state of each, in the order of the changes.
Requests that come and go are no change; the numbers of them are of the moment
when something else was told.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from qlorad.v1 import inference_pb2
from services.inference.adapters import ABSENT, Entry, Table

Said = inference_pb2.WatchAdaptersResponse
_BEHIND = 1000
"""News that wait for a reader, beyond which it does not hear of those that came and went meanwhile."""


class _Watcher:
    """What one reader has not heard yet, by digest."""

    def __init__(self, there: list[inference_pb2.LoadedAdapter]) -> None:
        self.news: dict[str, inference_pb2.LoadedAdapter] = {}
        self.told = {adapter.digest for adapter in there}
        """Those that were last told of, or will be first, as something else than absent."""
        self.stir = asyncio.Event()

    def tell(self, adapter: inference_pb2.LoadedAdapter) -> None:
        self.news.pop(adapter.digest, None)
        if adapter.state == ABSENT and adapter.digest not in self.told and len(self.news) >= _BEHIND:
            return  # it came and went while this one did not read
        self.news[adapter.digest] = adapter
        self.stir.set()

    def given(self, adapter: inference_pb2.LoadedAdapter) -> inference_pb2.LoadedAdapter:
        """Notes that the reader was told."""
        (self.told.discard if adapter.state == ABSENT else self.told.add)(adapter.digest)
        return adapter


class Watching:
    """Everybody who watches."""

    def __init__(self) -> None:
        self._watchers: set[_Watcher] = set()
        self._ended = False

    def end(self) -> None:
        """Ends every watch, well; those that come later see what is there and end."""
        self._ended = True
        for watcher in self._watchers:
            watcher.stir.set()

    def changed(self, before: Table, after: Table, default_before: str, default: str) -> None:
        """Tells all what is not as it was."""
        if not self._watchers:
            return
        moved = {default_before, default} if default_before != default else set()
        for digest, entry in after.entries.items():
            old = before.get(digest)
            if (digest in moved and entry.state != ABSENT) or (old is not entry and _seen(old) != _seen(entry)):
                self._tell(entry.told(digest == default))
        for digest, entry in before.entries.items():
            if digest not in after.entries and entry.state != ABSENT:
                gone = entry.told(False)
                gone.state, gone.memory_bytes, gone.in_flight, gone.pinned = ABSENT, 0, 0, False
                gone.state_reason = ""
                self._tell(gone)

    def _tell(self, adapter: inference_pb2.LoadedAdapter) -> None:
        for watcher in self._watchers:
            watcher.tell(adapter)

    async def watch(self, there: list[inference_pb2.LoadedAdapter]) -> AsyncGenerator[Said, None]:
        """`there` first, then changes, until the daemon drains. Nothing may be awaited between the look and this."""
        watcher = _Watcher(there)
        self._watchers.add(watcher)
        sequence = 0
        try:
            while there or not sequence:
                sequence += 1
                adapter = there.pop(0) if there else None
                yield Said(adapter=adapter, sequence=sequence, snapshot_end=not there)
            while True:
                while watcher.news:
                    sequence += 1
                    newest = watcher.given(watcher.news.pop(next(iter(watcher.news))))
                    yield Said(adapter=newest, sequence=sequence)
                if self._ended:
                    return
                watcher.stir.clear()
                await watcher.stir.wait()
        finally:
            self._watchers.discard(watcher)


def _seen(entry: Entry | None) -> tuple[object, ...]:
    """What of an entry is worth telling."""
    if entry is None or entry.state == ABSENT:
        return (ABSENT,)
    return (entry.state, entry.reason, entry.name, entry.memory_bytes, entry.pinned, entry.rank)
