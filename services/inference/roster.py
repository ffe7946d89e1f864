"""The adapters of all bases: loaded on demand, proven, leaving when there is no room.

Law of this room: decides nothing that `adapters` and `budget` could. One load for
all who ask for a digest, to its end even if they leave. No lock is held while bytes
are read or an engine works, so requests whose adapter is there never wait here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence

from qlorad.v1 import artifacts_pb2, errors_pb2
from services.common import facts
from services.common.errors import Fault, rejected
from services.common.facts import ModelFacts
from services.common.frames.v1 import engine_pb2
from services.common.prompt import formats
from services.common.shelf import Shelf
from services.inference import budget
from services.inference.adapters import DRAINING, IN_MEMORY, LOADING, Entry, Moment, Table
from services.inference.board import Board
from services.inference.choosing import check_lineage, not_loaded
from services.inference.life import Awake
from services.inference.metrics import Metrics
from services.inference.pins import Pins
from services.inference.precision import adapter_bytes
from services.inference.room import Room
from services.inference.wanted import Memory, WantedAdapter

log = logging.getLogger("qlorad.inference")

_PATIENCE = 30.0
"""Seconds that a load waits for others to end their use, where that would make room."""
_READERS = 2
"""Adapters whose bytes are read at a time: threads must be left for requests' names."""
_REFUSED = (errors_pb2.REASON_REJECTED, errors_pb2.REASON_CORRUPT)


class Roster:
    """Who is in memory beside which base, and who comes."""

    def __init__(
        self,
        shelf: Shelf,
        limit: int,
        pins: Pins,
        memory: Memory,
        metrics: Metrics,
        awake: Callable[[str], Awake | None],
        changed: Callable[[Table, Table], None],
        now: Callable[[], Moment],
    ) -> None:
        self._shelf = shelf
        self._limit = limit
        self._pins = pins
        self._memory = memory
        self._metrics = metrics
        self._awake = awake
        self._now = now
        self._board = Board(changed)
        self._room = Room(self._board, limit, self._send_away)
        self._flights: dict[str, tuple[Awake, asyncio.Task[None]]] = {}
        self._hasty: set[str] = set()
        """Loads that wait for nobody, since no request asked for them."""
        self._reading = asyncio.Semaphore(_READERS)

    @property
    def table(self) -> Table:
        """Every adapter as it is now."""
        return self._board.table

    # for requests; the base is held by the caller

    async def hold(self, digest: str, name: str, awake: Awake) -> None:
        """An adapter in memory, held until it is released; loads it where it is not, with all its checks."""
        async with self._waiting(digest, name, awake):
            await self._come(digest, name, awake)
            self._board.become(self.table.granted(digest, self._now()))

    async def prove(self, digest: str, name: str, awake: Awake, pin: bool) -> Entry:
        """An adapter in memory, not held; as it is then."""
        async with self._waiting(digest, name, awake):
            await self._come(digest, name, awake)
            self._board.become(self.table.touched(digest, self._now()))
            if pin:
                self.pin(digest)
        return self.table.entries[digest]

    @contextlib.asynccontextmanager
    async def _waiting(self, digest: str, name: str, awake: Awake) -> AsyncGenerator[None, None]:
        self._board.become(self.table.asked(digest, name, awake.digest))
        try:
            yield
        finally:
            self._board.become(self.table.gave_up(digest))

    async def _come(self, digest: str, name: str, awake: Awake) -> None:
        while True:
            awake.check()
            state = self.table.state(digest)
            if state in IN_MEMORY:
                return
            if state == DRAINING:
                await self._board.until(lambda: self.table.state(digest) != DRAINING)
            else:
                hasty = digest in self._hasty
                try:
                    await self._load(digest, name, awake)
                except Fault as fault:
                    if not hasty or fault.reason != errors_pb2.REASON_TOO_LARGE:
                        raise  # else it was not this request's own load, which has more patience
                    # To wait for what has ended yields to nobody; who noted the load must hear of its end first.
                    await asyncio.sleep(0)

    def release(self, digest: str, awake: Awake) -> None:
        """A request has ended; what its engine took along is not counted any more."""
        if awake.lost is None:
            self._board.become(self.table.released(digest, self._now()))

    async def _load(self, digest: str, name: str, awake: Awake, patience: float = _PATIENCE) -> None:
        while (flight := self._flights.get(digest)) is not None and flight[0] is not awake:
            await asyncio.wait([flight[1]])  # of an engine that was lost; it is about to end
        if flight is None:
            task = asyncio.create_task(self._bring(digest, name, awake, patience), name=f"loading {name}")
            flight = self._flights[digest] = (awake, task)
            task.add_done_callback(lambda done: self._came(digest, done))
        await asyncio.shield(flight[1])

    def _came(self, digest: str, task: asyncio.Task[None]) -> None:
        self._flights.pop(digest, None)
        if not task.cancelled() and task.exception() is not None:
            log.warning("%s: %s", task.get_name(), task.exception())

    # coming

    async def restore(self, awake: Awake) -> None:
        """Brings back what is wanted beside a base; what cannot come is told and wanted no more."""
        awake.grant(self._now())
        left = self._memory.now.of_base(awake.digest)
        for wanted in left:  # all at once, so that they keep their order
            self._board.become(self.table.asked(wanted.digest, wanted.name, awake.digest))
        try:
            while left:
                await self._restore(left[0], awake)
                self._board.become(self.table.gave_up(left.pop(0).digest))
        except Fault as fault:
            log.warning("adapters of %s do not all come back: %s", awake.model.model, fault)
        finally:
            for wanted in left:
                self._board.become(self.table.gave_up(wanted.digest))
            awake.release(self._now())

    async def _restore(self, wanted: WantedAdapter, awake: Awake) -> None:
        try:
            if not self.table.entries[wanted.digest].is_in_memory:
                self._hasty.add(wanted.digest)
                await self._load(wanted.digest, wanted.name, awake, patience=0.0)
            if wanted.pinned:
                self.pin(wanted.digest)
        except Fault as fault:
            awake.check()
            log.warning("%s does not come back: %s", wanted.name, fault)
            self._memory.become(self._memory.now.made_room(wanted.digest))
        finally:
            self._hasty.discard(wanted.digest)

    def pin(self, digest: str) -> None:
        """Keeps an adapter that is in memory from making room."""
        self._board.become(self.table.pinned(digest))
        self._note(digest)

    def _note(self, digest: str) -> None:
        entry = self.table.entries[digest]
        wanted = WantedAdapter(digest, entry.name, entry.base_digest, entry.pinned)
        self._memory.become(self._memory.now.with_adapter(wanted))

    async def _bring(self, digest: str, name: str, awake: Awake, patience: float) -> None:
        begun = time.monotonic()
        self._board.become(self.table.fetching(digest))
        awake.grant(self._now())
        try:
            found = await self._prove(digest, name, awake, patience)
            awake.check()
            self._board.become(
                self.table.arrived(
                    digest, self._now(), rank=found.rank, memory_bytes=found.memory_bytes,
                    load_seconds=time.monotonic() - begun, probe_effect=found.probe_effect,
                )
            )  # fmt: skip
            self.on_device(awake.digest, awake.engine.gauges.on_device)
            self._note(digest)
            self._metrics.loads.labels("adapter", "loaded").inc()
            self._metrics.load_seconds.labels("adapter").observe(time.monotonic() - begun)
        except BaseException as error:
            self._failed(digest, awake, error)
            raise
        finally:
            awake.release(self._now())

    def _failed(self, digest: str, awake: Awake, error: BaseException) -> None:
        refused = isinstance(error, Fault) and error.reason in _REFUSED
        self._metrics.loads.labels("adapter", "rejected" if refused else "failed").inc()
        self._pins.let_go([digest])
        if awake.lost is None and self.table.state(digest) in LOADING:
            self._board.become(self.table.rejected(digest, str(error)) if refused else self.table.absent(digest))

    async def _prove(
        self, digest: str, name: str, awake: Awake, patience: float
    ) -> engine_pb2.EngineAdapterLoaded:  # fmt: skip
        """Room, bytes, lineage, and what the engine finds."""
        sealed = await asyncio.to_thread(self._shelf.open, "adapters", digest)
        guess = adapter_bytes(facts.from_manifest(facts.AdapterFacts, sealed.manifest), awake.model.precision)
        await self._room.make(digest, name, guess, patience)
        await self._pins.take(digest)
        async with self._reading:
            sealed = await asyncio.to_thread(self._shelf.open, "adapters", digest, True)
        awake.check()
        self._board.become(self.table.verifying(digest))
        template = await asyncio.to_thread(_template_digest, sealed.manifest, awake.facts)
        check_lineage(name, sealed.manifest, awake.digest, awake.facts, template)
        order = engine_pb2.EngineLoadAdapter(name=name, payload=str(sealed.payload), manifest=sealed.manifest)
        found = await awake.engine.load_adapter(order)
        awake.check()
        # Nobody is waited for here: those who wait for room may wait for this one.
        verdict = self._room.reserve(digest, found.memory_bytes)
        if not verdict.fits:
            await awake.engine.unload_adapter(digest)
            raise budget.too_large(name, found.memory_bytes, self._limit, "adapter_bytes", verdict)
        await self._room.emptied()
        return found

    # going

    def _send_away(self, digest: str) -> asyncio.Task[None]:
        entry = self.table.entries[digest]
        awake = self._awake(entry.base_digest)
        assert awake is not None, "what is in memory has an engine"
        awake.grant(self._now())  # at once: its base must not leave before it
        task = asyncio.create_task(self._make_way(digest, entry.name, awake), name=f"{entry.name} leaves")
        task.add_done_callback(lambda _: awake.release(self._now()))
        return task

    async def _make_way(self, digest: str, name: str, awake: Awake) -> None:
        try:
            await self._free(digest, awake)
        except Fault as fault:  # its engine died meanwhile, and whatever it is now is another's doing
            log.warning("%s made room: %s", name, fault)
            return
        self._metrics.evictions.labels("adapter").inc()
        self._memory.become(self._memory.now.made_room(digest))
        log.info("%s makes room", name)

    async def unload(self, digest: str, name: str) -> int:
        """Frees an adapter once its last request ended; bytes freed. NOT_FOUND if it is not in memory."""
        while (flight := self._flights.get(digest)) is not None:
            await asyncio.wait([flight[1]])
        entry = self.table.get(digest)
        awake = self._awake(entry.base_digest) if entry is not None else None
        if entry is None or awake is None or not entry.is_in_memory:
            raise not_loaded(name, self.names())
        self._board.become(self.table.leaving(digest))
        return await self._free(digest, awake)

    async def _free(self, digest: str, awake: Awake) -> int:
        """The end of one that is leaving: its last request, then its tensors."""
        awake.grant(self._now())
        try:
            await self._board.until(lambda: awake.lost is not None or not self.table.entries[digest].holds)
            awake.check()
            freed = await awake.engine.unload_adapter(digest)
            awake.check()
            self._board.become(self.table.absent(digest))
            self._pins.let_go([digest])
            return freed
        finally:
            awake.release(self._now())

    def lost(self, base_digest: str) -> None:
        """A base has gone, and what was beside it."""
        here = [e.digest for e in self.table.of_base(base_digest)]
        self._board.become(self.table.lost(base_digest))
        self._pins.let_go(here)

    # what is told

    def on_device(self, base_digest: str, digests: Sequence[str]) -> None:
        """What an engine tells of its tiers."""
        table = self.table.on_device(base_digest, digests)
        if table is not self.table:
            self._board.become(table)

    def names(self) -> list[str]:
        """What is in memory, as it was last asked for."""
        return [e.name for e in self.table.entries.values() if e.is_in_memory]

    def refuse(self, digest: str, name: str, base_digest: str, why: str) -> Fault:
        """Notes an adapter as refused before it came near a base; the refusal."""
        self._board.become(
            self.table.asked(digest, name, base_digest).fetching(digest).rejected(digest, f"{name}: {why}")
        )
        self._board.become(self.table.gave_up(digest))
        self._metrics.loads.labels("adapter", "rejected").inc()
        return rejected(name, why)

    async def end(self) -> None:
        """Lets loads end with the daemon."""
        tasks = [task for _, task in self._flights.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._room.end()


def _template_digest(manifest: artifacts_pb2.Manifest, base: ModelFacts) -> str:
    """The digest of the template that an adapter is served with. Reads a file; REJECTED for an unknown format."""
    told = facts.from_manifest(facts.AdapterFacts, manifest)
    return formats.template_digest(formats.by_name(told.prompt_format), base.template_digest)
