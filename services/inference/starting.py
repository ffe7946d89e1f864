"""An engine begins: under the shared lease, told what it is to hold, or gone again without a trace.

Law of this room: starts, measures, tells; who makes room is decided elsewhere.
"""

from __future__ import annotations

import functools
import pathlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from qlorad.v1 import inference_pb2
from services.common.devices import Lease
from services.common.errors import Fault
from services.common.facts import ModelFacts
from services.common.frames.v1 import engine_pb2
from services.common.shelf import Sealed
from services.inference.adapters import Moment
from services.inference.engine import WORKER, EngineProcess
from services.inference.fitting import Fit
from services.inference.leases import SharedLease
from services.inference.life import Awake
from services.inference.pins import Pins


@dataclass(frozen=True, slots=True)
class Place:
    """Where engines run and how much they take on."""

    order: engine_pb2.EngineLoad
    """What every engine is told: device, rows, bytes."""
    memory_bytes: int
    """Bound of all weights; 0 = what the device has free."""
    free_bytes: Callable[[], int]
    """What the device has free; 0 = not known here, so that only loading tells."""
    log: pathlib.Path
    module: str = WORKER
    """The engine; another one must speak its frames."""


@dataclass(frozen=True, slots=True)
class Hooks:
    """Who is asked and told, with names and digests of bases."""

    settle: Callable[[str, int], Awaitable[None]]
    """Room for what a base really takes, or a Fault."""
    lost: Callable[[str, Fault], None]
    gauges: Callable[[str, engine_pb2.EngineGauges, engine_pb2.EngineGauges], None]


class Starter:
    """Starts engines. Calls of `start` must not overlap."""

    def __init__(self, place: Place, lease: SharedLease, pins: Pins, hooks: Hooks) -> None:
        self._place = place
        self._lease = lease
        self._pins = pins
        self._hooks = hooks

    async def start(
        self,
        name: str,
        sealed: Sealed,
        told: ModelFacts,
        chosen: Fit,
        pin: bool,
        begun: float,
        whole: Awaitable[None],
    ) -> Awake:
        """A base with its engine; on any failure nothing is left of it.

        The engine's process begins while `whole` finds out whether the base's bytes are what they should be.
        """
        digest = sealed.digest
        lease = await self._lease.take(digest, name, chosen.need)
        try:
            engine = await self._engine(name, sealed, chosen, lease, whole)
        except BaseException:
            self._lease.give(digest)
            self._pins.let_go([digest])
            raise
        self._lease.tell(digest, name, engine.loaded.memory_bytes)
        model = inference_pb2.LoadedModel(
            model=name,
            digest=digest,
            precision=engine.loaded.precision,
            device=self._lease.device,
            memory_bytes=engine.loaded.memory_bytes,
            load_seconds=time.monotonic() - begun,
            context_tokens=engine.loaded.context_tokens,
            precision_reason=chosen.why or engine.loaded.reason,
            pinned=pin,
            from_prepared=engine.loaded.from_prepared,
        )
        tick = time.monotonic()
        return Awake(sealed, told, engine, model, Moment(tick, 0.0), tick)

    async def _engine(
        self, name: str, sealed: Sealed, chosen: Fit, lease: Lease, whole: Awaitable[None]
    ) -> EngineProcess:
        order = engine_pb2.EngineLoad()
        order.CopyFrom(self._place.order)
        order.name, order.payload, order.precision = name, str(sealed.payload), chosen.precision
        order.manifest.CopyFrom(sealed.manifest)
        engine = await EngineProcess.start(
            lease,
            self._place.log,
            functools.partial(self._hooks.lost, sealed.digest),
            functools.partial(self._hooks.gauges, sealed.digest),
            self._place.module,
        )
        try:
            await whole
            await engine.load(order)
            await self._hooks.settle(name, engine.loaded.memory_bytes)
            await self._pins.take(sealed.digest)
            if engine.fault is not None:  # it died meanwhile
                raise engine.fault
        except BaseException:
            await engine.close()
            raise
        return engine
