"""The set of bases: who is awake, who makes room, who comes back.

Law of this room: one engine process for each base, all under one lease of the
device. One base is brought in at a time, for whoever asked, and to its end even
if they leave; requests of those that are awake do not wait for that. What is
wanted outlives an engine: one that died is restarted at once; one that slept, made
room, or ended with the daemon comes back with the first request that needs it.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from qlorad.v1 import inference_pb2
from services.common import artifacts, facts
from services.common.errors import Fault, rejected, worker_lost
from services.common.facts import ModelFacts
from services.common.frames.v1 import engine_pb2
from services.common.server import Health
from services.common.shelf import Sealed, Shelf
from services.inference import budget
from services.inference.adapters import Moment
from services.inference.choosing import no_model
from services.inference.fitting import fit
from services.inference.leases import SharedLease
from services.inference.life import Awake
from services.inference.metrics import Metrics
from services.inference.pins import Pins
from services.inference.recovery import Recovery
from services.inference.starting import Hooks, Place, Starter
from services.inference.wanted import Memory

log = logging.getLogger("qlorad.inference")

Precision: TypeAlias = inference_pb2.Precision.ValueType


@dataclass(frozen=True, slots=True)
class Comers:
    """Whom bases take along: their adapters."""

    restore: Callable[[Awake], Coroutine[Any, Any, None]]
    """A base has come; its adapters should."""
    lost: Callable[[str], None]
    """A base has gone, and its adapters with it."""
    on_device: Callable[[str, Sequence[str]], None]
    """Which of its adapters an engine has on its device."""


def now() -> Moment:
    """This moment."""
    return Moment(time.monotonic(), time.time())


class Bases:
    """Bases that are awake, and those that are on their way."""

    def __init__(
        self, shelf: Shelf, place: Place, lease: SharedLease, pins: Pins, memory: Memory, metrics: Metrics,
        comers: Comers,
    ) -> None:  # fmt: skip
        self._shelf = shelf
        self._place = place
        hooks = Hooks(self._settle, self._on_lost, self._on_gauges)
        self._starter = Starter(place, lease, pins, hooks)
        self._lease = lease
        self._pins = pins
        self._memory = memory
        self._metrics = metrics
        self._comers = comers
        self._recovery = Recovery(self.bring, metrics)
        self.awake: dict[str, Awake] = {}
        self.waits: collections.Counter[str] = collections.Counter()
        """Requests that wait for a base, by digest."""
        self._coming: dict[str, asyncio.Task[Awake]] = {}
        self._room = asyncio.Lock()
        self._ending = False

    def begin(self, health: Health) -> None:
        """From here on, losses are told to `health`."""
        self._recovery.begin(health)

    async def end(self) -> None:
        """Ends every engine with the daemon; what is wanted stays noted."""
        self._ending = True
        await self._recovery.end()
        for task in self._coming.values():
            task.cancel()
        await asyncio.gather(*self._coming.values(), return_exceptions=True)
        for awake in list(self.awake.values()):
            await self._close(awake)

    # for requests

    async def hold(self, digest: str, name: str, on_demand: bool) -> Awake:
        """A base that is awake, held until it is released; wakes or loads it.

        WORKER_LOST while its engine restarts; NOT_FOUND if it is not wanted and
        may not be loaded on demand.
        """
        self.waits[digest] += 1
        try:
            while True:
                awake = self.awake.get(digest)
                if awake is not None and not awake.leaving:
                    awake.grant(now())
                    return awake
                if awake is not None:
                    await awake.gone.wait()
                elif digest in self._recovery:
                    raise worker_lost("the engine", "it is being restarted", retry_seconds=2.0)
                elif on_demand or self._memory.now.base(digest) is not None:
                    await self.bring(digest, name)
                else:
                    raise no_model(name, [n for _, n in self._memory.now.named_bases()])
        finally:
            self.waits[digest] -= 1
            if not self.waits[digest]:
                del self.waits[digest]

    async def bring(
        self, digest: str, name: str, precision: Precision = inference_pb2.PRECISION_UNSPECIFIED, pin: bool = False
    ) -> Awake:
        """Brings a base in, as it was last wanted if nothing else is said; one load for all who ask."""
        awake = self.awake.get(digest)
        if awake is not None and not awake.leaving:
            return awake
        task = self._coming.get(digest)
        if task is None:
            task = asyncio.create_task(self._bring(digest, name, precision, pin), name=f"loading {name}")
            self._coming[digest] = task
            task.add_done_callback(lambda done: self._came(digest, done))
        return await asyncio.shield(task)

    def _came(self, digest: str, task: asyncio.Task[Awake]) -> None:
        self._coming.pop(digest, None)
        if not task.cancelled() and task.exception() is not None:
            self._metrics.loads.labels("base", "failed").inc()
            log.warning("%s: %s", task.get_name(), task.exception())

    # coming

    async def _bring(self, digest: str, name: str, precision: Precision, pin: bool) -> Awake:
        while (before := self.awake.get(digest)) is not None:
            await before.gone.wait()
        begun = time.monotonic()
        wanted = self._memory.now.base(digest)
        sealed = await asyncio.to_thread(self._shelf.open, "models", digest, field="model")
        told = facts.from_manifest(ModelFacts, sealed.manifest)
        if told.architecture.endswith("ForMaskedLM"):
            raise rejected(name, f"is a {told.architecture}, which fills gaps and generates nothing")
        if wanted is not None:
            name, precision, pin = name or wanted.model, precision or wanted.precision, pin or wanted.pinned
        async with self._room, _whole(sealed, wanted is None) as whole:
            chosen = fit(name, precision, told, self._lease.device, self._items(), *self._limit())
            if chosen.leave:
                await whole  # nobody makes room for one that is damaged
                chosen = fit(name, precision, told, self._lease.device, self._items(), *self._limit())
            await self._send_away(chosen.leave)
            awake = await self._starter.start(name, sealed, told, chosen, pin, begun, whole)
            self.awake[digest] = awake
        self._metrics.loads.labels("base", "loaded").inc()
        self._metrics.load_seconds.labels("base").observe(awake.model.load_seconds)
        self._memory.become(self._memory.now.with_base(awake.told(0)))
        awake.restoring = asyncio.create_task(self._comers.restore(awake), name=f"adapters of {name}")
        held = inference_pb2.Precision.Name(awake.model.precision)
        log.info("%s is loaded on %s as %s", name, self._lease.device, held)
        return awake

    async def _settle(self, name: str, memory_bytes: int) -> None:
        """What it really takes may be more than was guessed."""
        if self._place.memory_bytes:
            limit, setting = self._limit()
            verdict = budget.decide(self._items(), memory_bytes, limit)
            if not verdict.fits:
                raise budget.too_large(name, memory_bytes, limit, setting, verdict)
            await self._send_away(verdict.leave)

    def _items(self) -> list[budget.Item]:
        return [a.item(self.waits[a.digest]) for a in self.awake.values()]

    def _limit(self) -> tuple[int, str]:
        """Bytes that all weights may take, and what says so; 0 = no bound known here."""
        if self._place.memory_bytes:
            return self._place.memory_bytes, "memory_bytes"
        free = self._place.free_bytes()
        held = sum(a.model.memory_bytes for a in self.awake.values())
        return free + held if free else 0, f"the memory of {self._lease.device}"

    async def _send_away(self, digests: Sequence[str]) -> None:
        leaving = [self.awake[digest] for digest in digests]
        for awake in leaving:
            awake.leaving = True
        for awake in leaving:
            await self._close(awake)
            self._metrics.evictions.labels("base").inc()
            log.info("%s makes room", awake.model.model)

    # going

    async def unload(self, digest: str) -> int:
        """Ends a base's engine once its last request ended; bytes given back, 0 if it was not awake."""
        await self._recovery.give_up(digest)
        coming = self._coming.get(digest)
        if coming is not None:
            await asyncio.wait([coming])
        awake = self.awake.get(digest)
        if awake is None:
            return 0
        # Gone for new requests first: they wait for the end and then find out.
        awake.leaving = True
        if awake.restoring is not None:
            awake.restoring.cancel()
        await awake.quiet()
        return await self._close(awake)

    async def sleep_idle(self, idle_seconds: float) -> float:
        """Gives back what nobody needed for so long; seconds until it is worth asking again."""
        wait = idle_seconds
        for awake in list(self.awake.values()):
            left = awake.touched + idle_seconds - time.monotonic()
            if awake.holds or awake.leaving or self.waits[awake.digest]:
                wait = min(wait, max(left, 1.0))
            elif left > 0:
                wait = min(wait, left)
            else:
                await self._close(awake)
                log.info("%s sleeps after %.0f s without a request", awake.model.model, idle_seconds)
        return wait

    async def _close(self, awake: Awake) -> int:
        """Ends an engine that nobody holds; its last bytes are on their way out when this returns."""
        awake.leaving = True
        if awake.restoring is not None:
            awake.restoring.cancel()
        freed = await awake.engine.close()
        if self.awake.get(awake.digest) is awake:
            self._forget(awake)
            awake.end()
        return freed

    def _forget(self, awake: Awake) -> None:
        del self.awake[awake.digest]
        self._lease.give(awake.digest)
        self._pins.let_go([awake.digest])
        self._comers.lost(awake.digest)

    # what engines tell

    def _on_gauges(self, digest: str, before: engine_pb2.EngineGauges, gauges: engine_pb2.EngineGauges) -> None:
        self._metrics.step(before, gauges)
        if list(before.on_device) != list(gauges.on_device):
            self._comers.on_device(digest, gauges.on_device)

    def _on_lost(self, digest: str, fault: Fault) -> None:
        log.error("%s", fault)
        self._metrics.losses.inc()
        awake = self.awake.get(digest)
        if awake is None:
            return  # it died while it was loading; whoever loads it hears so
        was_leaving = awake.leaving
        self._forget(awake)
        awake.end(fault)
        if not was_leaving:
            self._recovery.start(digest, awake.model.model)


@contextlib.asynccontextmanager
async def _whole(sealed: Sealed, look: bool) -> AsyncGenerator[asyncio.Future[None], None]:
    """Holds a base's bytes against their digests meanwhile, if `look`; the future is what came of it."""
    found: asyncio.Future[None]
    if look:
        found = asyncio.ensure_future(asyncio.to_thread(artifacts.verify_payload, sealed.manifest, sealed.payload))
        found.add_done_callback(lambda done: done.cancelled() or done.exception())  # others may have failed first
    else:
        found = asyncio.get_running_loop().create_future()
        found.set_result(None)
    try:
        yield found
    finally:
        found.cancel()
