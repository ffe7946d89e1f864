"""What is resident: the engine's life, from lease to exit.

Law of this room: one change at a time, under `changing`. The engine holds the
device, so whoever wants the device back ends the engine. What is wanted outlives
the engine: one that died is restarted at once; one that slept, or ended with the
daemon, comes back with the first request that needs it.
"""

from __future__ import annotations

import asyncio
import datetime
import logging
import pathlib
import time
from collections.abc import Callable
from dataclasses import dataclass

from qlorad.v1 import artifacts_pb2, errors_pb2, inference_pb2
from services.common import devices, facts, names
from services.common.errors import Fault, rejected, worker_lost
from services.common.facts import ModelFacts
from services.common.frames.v1 import engine_pb2
from services.common.prompt import formats
from services.common.server import Health
from services.common.shelf import Pin, Sealed, Shelf
from services.inference import precision as precisions
from services.inference.adapters import Table, check_lineage, no_model
from services.inference.engine import EngineProcess
from services.inference.metrics import Metrics
from services.inference.wanted import Wanted

log = logging.getLogger("qlorad.inference")

SERVICE = "qlorad.v1.InferenceService"
HOLDER = "inference/engine"
_RESTARTS = (0.0, 1.0, 2.0, 4.0, 8.0)
"""Seconds before each attempt to restart a lost engine."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where an engine runs and how much it takes on."""

    device: str
    """Empty = the best of this host."""
    max_rows: int
    leases: pathlib.Path
    log: pathlib.Path


class Residency:
    """The one engine of a daemon, or its absence. Methods named `…_locked` need `changing`."""

    def __init__(self, shelf: Shelf, place: Place, metrics: Metrics) -> None:
        self._shelf = shelf
        self._place = place
        self._metrics = metrics
        self._health: Health | None = None
        self._pins: dict[str, Pin] = {}
        self._recovering: asyncio.Task[None] | None = None
        self._ending = False
        self.changing = asyncio.Lock()
        self.engine: EngineProcess | None = None
        self.table = Table()
        self.wanted: Wanted | None = None
        self.used_at = time.monotonic()

    def begin(self, health: Health, wanted: Wanted | None) -> None:
        """Takes up what the last daemon left; loads nothing yet."""
        self._health = health
        self.wanted = wanted

    def touch(self) -> None:
        """Notes that the engine is needed now."""
        self.used_at = time.monotonic()

    async def end(self) -> None:
        """Ends the engine with the daemon; what is wanted stays noted."""
        self._ending = True
        if self._recovering is not None:
            self._recovering.cancel()
        async with self.changing:
            await self._close_locked()

    # for requests

    async def ready(self) -> tuple[EngineProcess, Table]:
        """The engine and who is resident; wakes what sleeps.

        WORKER_LOST while the engine restarts, NOT_FOUND if nothing is wanted.
        """
        self.touch()
        if self.engine is None:
            if self._recovering is not None:
                raise worker_lost("the engine", "it is being restarted", retry_seconds=2.0)
            async with self.changing:
                await self.wake_locked()
        if self.engine is None:
            raise worker_lost("the engine", "it was lost while it woke", retry_seconds=2.0)
        return self.engine, self.table

    # changes

    async def wake_locked(self) -> None:
        """Brings back what is wanted, if it is not there."""
        if self.engine is not None:
            return
        if self.wanted is None:
            raise no_model("")
        wanted = self.wanted
        digest = names.hex_of(wanted.model.digest)
        sealed = await asyncio.to_thread(self._shelf.open, "models", f"sha256:{digest}")
        await self.bring_locked(wanted.model.model, sealed, wanted.model.precision)
        for adapter_digest, name in wanted.adapters:
            try:
                await self.add_adapter_locked(name, adapter_digest)
            except Fault as fault:
                if fault.reason == errors_pb2.REASON_WORKER_LOST:
                    raise
                log.warning("%s does not come back: %s", name, fault)
        self.table = self.table.switched(wanted.default)
        log.info("%s is back with %d adapters", wanted.model.model, len(self.table.adapters))

    async def bring_locked(
        self, name: str, sealed: Sealed, precision: inference_pb2.Precision.ValueType
    ) -> inference_pb2.LoadedModel:
        """Starts the engine with a base; DEVICE_BUSY if its device is held."""
        told = facts.from_manifest(ModelFacts, sealed.manifest)
        if told.architecture.endswith("ForMaskedLM"):
            raise rejected(name, f"is a {told.architecture}, which fills gaps and generates nothing")
        device = self._place.device or devices.devices_here()[0]
        owner = f"inference engine: {name}"
        guess = precisions.bytes_of(precision or inference_pb2.PRECISION_BF16, told)
        load = engine_pb2.EngineLoad(
            name=name,
            payload=str(sealed.payload),
            manifest=sealed.manifest,
            precision=precision,
            device=device,
            max_rows=self._place.max_rows,
        )
        begun = time.monotonic()
        lease = await asyncio.to_thread(devices.acquire, self._place.leases, device, owner, guess)
        try:
            engine = await EngineProcess.start(load, lease, self._place.log, self._on_lost)
            lease.describe(owner, engine.loaded.memory_bytes)
        finally:
            lease.release()
        self.engine = engine
        await self._pin(sealed.digest)
        model = inference_pb2.LoadedModel(
            model=name,
            digest=sealed.digest,
            precision=engine.loaded.precision,
            device=device,
            memory_bytes=engine.loaded.memory_bytes,
            load_seconds=time.monotonic() - begun,
            context_tokens=engine.loaded.context_tokens,
        )
        self.table = Table(model=model)
        self.touch()
        log.info("%s is loaded on %s as %s", name, device, inference_pb2.Precision.Name(model.precision))
        return model

    async def add_adapter_locked(self, name: str, digest: str) -> inference_pb2.LoadedAdapter:
        """Loads an adapter into the running engine; REJECTED names the check."""
        engine, model = self.engine, self.table.model
        if engine is None or model is None:
            raise no_model("")
        begun = time.monotonic()
        sealed = await asyncio.to_thread(self._shelf.open, "adapters", digest, True)
        base = await asyncio.to_thread(self._shelf.open, "models", model.digest)
        known = facts.from_manifest(ModelFacts, base.manifest)
        template = await asyncio.to_thread(_template_digest, sealed.manifest, known)
        check_lineage(name, sealed.manifest, model.digest, known, template)
        order = engine_pb2.EngineLoadAdapter(name=name, payload=str(sealed.payload), manifest=sealed.manifest)
        found = await engine.load_adapter(order)
        await self._pin(digest)
        adapter = inference_pb2.LoadedAdapter(
            adapter=name,
            digest=digest,
            base_digest=model.digest,
            rank=found.rank,
            memory_bytes=found.memory_bytes,
            load_seconds=time.monotonic() - begun,
            probe_effect=found.probe_effect,
        )
        adapter.load_time.FromDatetime(datetime.datetime.now(datetime.UTC))
        self.table = self.table.with_adapter(adapter)
        self.touch()
        return adapter

    async def drop_adapter_locked(self, digest: str) -> int:
        """Frees an adapter once its last request ended."""
        if self.engine is None:
            raise no_model("")
        self.table = self.table.taking_leave(digest)
        freed = await self.engine.unload_adapter(digest)
        self.table = self.table.without(digest)
        await self._unpin(digest)
        return freed

    async def drop_model_locked(self) -> int:
        """Ends the engine once its last request ended; the device is free after it."""
        engine, table = self.engine, self.table
        if engine is None:
            return 0
        # Gone for new requests first: they wait for `changing` and then find out.
        self.engine, self.table = None, Table()
        await engine.quiet()
        self.engine, self.table = engine, table
        return await self._close_locked()

    async def sleep_if_idle(self, idle_seconds: float, in_use: Callable[[], bool]) -> float:
        """Gives the device back if nobody needed it for so long; seconds until it is worth asking again."""
        left = self.used_at + idle_seconds - time.monotonic()
        if self.engine is None or in_use() or self.changing.locked():
            return max(left, 1.0)
        if left > 0:
            return left
        async with self.changing:
            if self.engine is not None and not in_use():
                name = self.table.model.model if self.table.model else ""
                await self._close_locked()
                log.info("%s sleeps after %.0f s without a request", name, idle_seconds)
        return idle_seconds

    def wanted_now(self) -> Wanted | None:
        """What is resident, as something to come back to."""
        if self.table.model is None:
            return self.wanted
        adapters = tuple((a.digest, a.adapter) for a in self.table.adapters)
        return Wanted(self.table.model, adapters, self.table.default)

    async def _close_locked(self) -> int:
        engine = self.engine
        self.engine, self.table = None, Table()
        freed = await engine.close() if engine is not None else 0
        for digest in list(self._pins):
            await self._unpin(digest)
        return freed

    async def _pin(self, digest: str) -> None:
        if digest not in self._pins:
            self._pins[digest] = await asyncio.to_thread(self._shelf.pin, digest, HOLDER)

    async def _unpin(self, digest: str) -> None:
        pin = self._pins.pop(digest, None)
        if pin is not None:
            await asyncio.to_thread(pin.release)

    # when the engine dies

    def _on_lost(self, fault: Fault) -> None:
        log.error("%s", fault)
        self.engine, self.table = None, Table()
        self._metrics.restarts.inc()
        if not self._ending and self._recovering is None:
            self._recovering = asyncio.create_task(self._recover(), name="engine recovery")

    async def _recover(self) -> None:
        """Restarts the engine with what it had; gives up after a while, or where waiting cannot help."""
        assert self._health is not None
        await self._health.set(False, [SERVICE])
        try:
            for pause in _RESTARTS:
                await asyncio.sleep(pause)
                try:
                    async with self.changing:
                        await self.wake_locked()
                    return
                except Fault as fault:
                    log.warning("the engine does not come back: %s", fault)
                    if fault.reason != errors_pb2.REASON_WORKER_LOST:
                        return
        finally:
            self._recovering = None
            await self._health.set(True, [SERVICE])


def _template_digest(manifest: artifacts_pb2.Manifest, base: ModelFacts) -> str:
    """The digest of the template that an adapter is served with. Reads a file; REJECTED for an unknown format."""
    told = facts.from_manifest(facts.AdapterFacts, manifest)
    return formats.template_digest(formats.by_name(told.prompt_format), base.template_digest)
