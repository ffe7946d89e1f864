"""Puts the inference daemon together: the one place that chooses concrete things.

Law of this room: reads settings, makes objects, hands them to one another.
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, field

import grpc.aio
import psutil
from prometheus_client import CollectorRegistry

from qlorad.v1 import inference_pb2_grpc
from services.common import devices, idempotency
from services.common.config import setting
from services.common.frames.v1 import engine_pb2
from services.common.server import App, Health, ServerSettings
from services.common.shelf import Shelf
from services.common.store import Store
from services.inference import wanted
from services.inference.answering import Answering
from services.inference.changes import Changes
from services.inference.gauges import gauges
from services.inference.leases import SharedLease
from services.inference.metrics import Metrics
from services.inference.recovery import SERVICE
from services.inference.residency import Residency
from services.inference.servicer import InferenceServicer
from services.inference.starting import Place

PORTS = (50054, 9104)
_DEVICES = ("cpu", "cuda", "mps")


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of qlorad-inference."""

    server: ServerSettings = field(default_factory=ServerSettings)
    device: str = setting(
        "", "where models run; empty = the best of this host", lambda v: v == "" or v.split(":")[0] in _DEVICES,
        "cpu, cuda:N or mps",
    )  # fmt: skip
    max_rows: int = setting(16, "requests answered at the same time", lambda v: 1 <= v <= 256, "1 to 256")
    max_waiting: int = setting(64, "requests that may wait for their turn", lambda v: 0 <= v <= 10_000, "0 to 10000")
    memory_bytes: int = setting(
        0, "bytes that the weights of all bases may take together; 0 = what the device has free",
        lambda v: 0 <= v <= 1 << 50, "0 to 1125899906842624",
    )  # fmt: skip
    adapter_bytes: int = setting(
        0, "bytes of adapters in memory, of all bases together; 0 = no bound",
        lambda v: 0 <= v <= 1 << 50, "0 to 1125899906842624",
    )  # fmt: skip
    device_adapter_bytes: int = setting(
        0, "bytes of adapters on the device, for each base; the others wait in the host's memory; 0 = no bound",
        lambda v: 0 <= v <= 1 << 50, "0 to 1125899906842624",
    )  # fmt: skip
    idle_unload_seconds: float = setting(
        300.0, "let a base go after so long without a request, the device with the last; 0 = never",
        lambda v: math.isfinite(v) and 0 <= v <= 31_536_000, "0 to 31536000",
    )  # fmt: skip


def build(config: Config) -> App:
    """The daemon, put together and not yet begun."""
    s = config.server
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    shelf = Shelf(s.home / "store")
    store = Store.open(s.state / "inference.sqlite", (idempotency.MIGRATION, wanted.MIGRATION, wanted.SEVERAL))
    device = config.device or devices.devices_here()[0]
    order = engine_pb2.EngineLoad(
        device=device, max_rows=config.max_rows, device_adapter_bytes=config.device_adapter_bytes
    )
    place = Place(order, config.memory_bytes, lambda: _free_bytes(device), s.logs / "inference-engine.log")
    lease = SharedLease(s.state / "devices", device)
    residency = Residency(shelf, place, lease, wanted.Memory(store), config.adapter_bytes, metrics)
    changes = Changes(store, residency)
    answering = Answering(residency, metrics, config.max_rows + config.max_waiting)
    registry.register(gauges(residency))
    tasks: set[asyncio.Task[None]] = set()

    async def sleep_when_idle() -> None:
        while True:
            left = await residency.bases.sleep_idle(config.idle_unload_seconds)
            await asyncio.sleep(min(left, 60.0))

    async def start(health: Health) -> None:
        await store.run(idempotency.prune)
        await residency.begin(health)
        if config.idle_unload_seconds:
            tasks.add(asyncio.create_task(sleep_when_idle(), name="idle unload"))

    async def stop() -> None:
        for task in tasks:
            task.cancel()
        await changes.settle()
        await residency.end()
        await store.close()

    def drain() -> None:
        residency.watching.end()
        # A little before the server cuts them off, streams end with a reason.
        asyncio.get_running_loop().call_later(max(0.0, s.drain_seconds - 0.5), answering.end_all)

    def add(server: grpc.aio.Server) -> None:
        servicer = InferenceServicer(residency, changes, answering, metrics)
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, server)

    return App(
        name="inference",
        settings=s,
        default_ports=PORTS,
        services=[(SERVICE, add)],
        registry=registry,
        start=start,
        stop=stop,
        drain=drain,
    )


def _free_bytes(device: str) -> int:
    """What a device has free; 0 where only its engine can tell."""
    if device.split(":")[0] != "cpu":
        return 0
    return int(psutil.virtual_memory().available)  # type: ignore[no-untyped-call]
