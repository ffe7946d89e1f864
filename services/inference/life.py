"""One base that is awake: its engine, and the requests that hold it.

Law of this room: knows one base and no policy. It ends once: put to sleep by the
daemon when nobody holds it, or lost with its process.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from qlorad.v1 import inference_pb2
from services.common.errors import Fault
from services.common.facts import ModelFacts
from services.common.shelf import Sealed
from services.inference.adapters import Moment
from services.inference.budget import Item
from services.inference.engine import Engine


@dataclass(slots=True)
class Awake:
    """A base with its engine."""

    sealed: Sealed
    facts: ModelFacts
    engine: Engine
    model: inference_pb2.LoadedModel
    """As it was told when it was loaded; only `pinned` changes."""
    used: Moment
    touched: float
    """When somebody last asked for anything of it; decides when it sleeps."""
    holds: int = 0
    leaving: bool = False
    """Takes nobody new."""
    lost: Fault | None = None
    restoring: asyncio.Task[None] | None = None
    """Brings its adapters back."""
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    _quiet: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def digest(self) -> str:
        return self.sealed.digest

    def grant(self, now: Moment) -> None:
        """One more holds it."""
        self.holds += 1
        self._quiet.clear()
        self.touched = now.tick

    def release(self, now: Moment, used: bool = False) -> None:
        """One fewer; `used` if that was a request."""
        self.holds -= 1
        self.touched = now.tick
        if used:
            self.used = now
        if not self.holds:
            self._quiet.set()

    def check(self) -> None:
        """Raises why the engine is gone, if it is."""
        if self.lost is not None:
            raise self.lost

    def end(self, fault: Fault | None = None) -> None:
        """It is not awake any more; a fault if it was lost."""
        self.lost = fault or self.lost
        self.leaving = True
        self.gone.set()
        self._quiet.set()

    async def quiet(self) -> None:
        """Waits until nobody holds it."""
        while self.holds and not self.gone.is_set():
            self._quiet.clear()
            await self._quiet.wait()

    def item(self, waits: int) -> Item:
        """As the budget sees it."""
        count = self.holds + waits
        busy = "leaving" if self.leaving else f"{count} request{'s' if count > 1 else ''}" if count else ""
        return Item(self.digest, self.model.model, self.model.memory_bytes, self.used.tick, self.model.pinned, busy)

    def told(self, waits: int) -> inference_pb2.LoadedModel:
        """As callers see it now."""
        seen = inference_pb2.LoadedModel()
        seen.CopyFrom(self.model)
        seen.in_flight = self.holds + waits
        if self.used.wall:
            seen.last_used_time.FromNanoseconds(int(self.used.wall * 1e9))
        return seen
