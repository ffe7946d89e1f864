"""Puts the registry together: the one place that chooses concrete things.

Law of this room: reads settings, makes objects, hands them to one another.
"""

from __future__ import annotations

import pathlib
from dataclasses import dataclass, field

import grpc.aio
from prometheus_client import CollectorRegistry

from qlorad.v1 import registry_pb2_grpc
from services.common import idempotency
from services.common.config import setting
from services.common.process import Limits
from services.common.server import App, Health, ServerSettings
from services.common.shelf import Shelf
from services.common.store import Store
from services.registry import census, staging
from services.registry.adapter_shelf import AdapterShelf
from services.registry.catalogue import MIGRATION, Catalogue
from services.registry.requests import Requests
from services.registry.servicer import AdapterServicer, ModelServicer
from services.registry.workers import Workers

PORTS = (50052, 9102)
MODELS = "qlorad.v1.ModelService"
ADAPTERS = "qlorad.v1.AdapterService"


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of qlorad-registry."""

    server: ServerSettings = field(default_factory=ServerSettings)
    import_roots: tuple[pathlib.Path, ...] = setting(
        (pathlib.Path("/"),), "folders that ImportModel may read below, separated by commas"
    )
    # One by default: the matrices are so small that a second thread gains little on a quiet machine and loses
    # most of the time on a busy one, where threads wait for each other.
    starter_threads: int = setting(
        1, "threads that starters are computed with; part of what fixes their bytes",
        lambda v: 1 <= v <= 64, "1 to 64",
    )  # fmt: skip
    max_adapter_bytes: int = setting(
        2 << 30, "largest adapter_model.safetensors taken", lambda v: 1 <= v <= 1 << 40, "1 to 1099511627776"
    )
    worker_cpu_seconds: int = setting(
        3600, "CPU time of a worker that reads files from outside", lambda v: v >= 1, "1 or more"
    )
    worker_memory_bytes: int = setting(
        32 << 30, "address space of a worker that reads files from outside",
        lambda v: v >= 1 << 30, "1073741824 or more",
    )  # fmt: skip


def build(config: Config) -> App:
    """The daemon, put together and not yet begun."""
    s = config.server
    registry = CollectorRegistry()
    shelf = Shelf(s.home / "store")
    store = Store.open(s.state / "registry.sqlite", (idempotency.MIGRATION, MIGRATION, staging.MIGRATION))
    limits = Limits(memory_bytes=config.worker_memory_bytes, cpu_seconds=config.worker_cpu_seconds)
    workers = Workers(s.logs / "registry-worker.log", limits)
    requests = Requests(store)
    aside = staging.Staging(shelf, store)
    starters = census.Starters.make(registry)
    catalogue = Catalogue(shelf, store, aside, requests, workers, starters, config.import_roots, config.starter_threads)
    adapters = AdapterShelf(shelf, aside, requests, workers, config.max_adapter_bytes)
    registry.register(census.gauges(shelf.root, catalogue.under_way))

    async def start(health: Health) -> None:
        await store.run(idempotency.prune)
        await aside.sweep()
        await catalogue.start()

    async def stop() -> None:
        await catalogue.stop()
        await store.close()

    def add_models(server: grpc.aio.Server) -> None:
        registry_pb2_grpc.add_ModelServiceServicer_to_server(ModelServicer(catalogue, requests), server)

    def add_adapters(server: grpc.aio.Server) -> None:
        registry_pb2_grpc.add_AdapterServiceServicer_to_server(AdapterServicer(adapters), server)

    return App(
        name="registry",
        settings=s,
        default_ports=PORTS,
        services=((MODELS, add_models), (ADAPTERS, add_adapters)),
        registry=registry,
        start=start,
        stop=stop,
        drain=catalogue.drain,
    )
