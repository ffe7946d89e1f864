"""qlorad-datasets put together.

Law of this room: the only place that chooses concrete things and reads settings.
"""

from __future__ import annotations

import asyncio
import os
import pathlib
import re
import urllib.parse
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry

from qlorad.v1 import datasets_pb2_grpc
from services.common import idempotency
from services.common.config import ConfigError, setting
from services.common.server import App, Health, ServerSettings, is_loopback
from services.common.shelf import Shelf
from services.common.store import Store
from services.datasets import catalog, ingest, uploads, web_rules
from services.datasets.catalog import Catalog
from services.datasets.fetches import Fetches, Origins
from services.datasets.ingest import Ingests
from services.datasets.inputs import Inputs
from services.datasets.ledgers import Ledgers
from services.datasets.metrics import Metrics
from services.datasets.servicer import DatasetServicer
from services.datasets.steps import steps_of
from services.datasets.uploads import Uploads
from services.datasets.workers import Workers

MIGRATIONS = (idempotency.MIGRATION, uploads.MIGRATION, catalog.MIGRATION, ingest.MIGRATION)


@dataclass(frozen=True, slots=True)
class Config:
    """What qlorad-datasets is told."""

    server: ServerSettings = field(default_factory=ServerSettings)
    max_upload_bytes: int = setting(64 << 30, "largest file taken", lambda v: 1 <= v <= 1 << 44, "1 to 17592186044416")
    max_workers: int = setting(2, "workers that run at once; more wait", lambda v: 1 <= v <= 64, "1 to 64")
    worker_memory_bytes: int = setting(
        2 << 30, "address space of a worker", lambda v: 128 << 20 <= v <= 1 << 40, "134217728 to 1099511627776"
    )
    worker_cpu_seconds: int = setting(4 * 3600, "CPU time of a worker", lambda v: 1 <= v <= 30 * 86400, "1 to 2592000")
    max_unpacked_bytes: int = setting(
        256 << 30, "what a packed file may unpack to", lambda v: 1 <= v <= 1 << 44, "1 to 17592186044416"
    )
    max_fetch_bytes: int = setting(
        64 << 30, "what one dataset may fetch from a hub or read in a folder",
        lambda v: 1 <= v <= 1 << 44, "1 to 17592186044416",
    )  # fmt: skip
    hub_endpoint: str = setting(
        "https://huggingface.co", "the hub that datasets come from",
        lambda v: bool(re.fullmatch(r"https?://[^/\s?#@]+", v)), "https://HOST or http://HOST:PORT",
    )  # fmt: skip
    hub_token_file: str = setting(
        "", "a file with a token of the hub, reread at every use",
        lambda v: not v or os.access(v, os.R_OK), "a readable file",
    )  # fmt: skip
    web_hosts: tuple[str, ...] = setting(
        (), "hosts whose pages may be fetched by URL, separated by commas; none = no page is",
        lambda v: all(web_rules.is_host(word) for word in v), web_rules.HOST_RULE,
    )  # fmt: skip
    max_page_bytes: int = setting(
        64 << 20, "what one page by URL may be, unpacked", lambda v: 1 <= v <= 1 << 40, "1 to 1099511627776"
    )
    page_seconds: float = setting(
        120.0, "how long one page may take, redirects and all", lambda v: 0.1 <= v <= 86400, "0.1 to 86400"
    )
    import_roots: tuple[pathlib.Path, ...] = setting(
        (pathlib.Path("/"),), "folders that datasets may be read from, separated by commas"
    )

    def __post_init__(self) -> None:
        hub = urllib.parse.urlsplit(self.hub_endpoint)
        if self.hub_token_file and hub.scheme == "http" and not is_loopback(hub.hostname or ""):
            raise ConfigError(["--hub-token-file: accepted: only with a hub over https, or on loopback"])


def build(config: Config) -> App:
    """The daemon, ready to be served."""
    settings = config.server
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    shelf = Shelf(settings.home / "store")
    store = Store.open(settings.state / "datasets.sqlite", MIGRATIONS)
    turn = asyncio.Semaphore(config.max_workers)
    workers = Workers(settings.logs, config.worker_memory_bytes, config.worker_cpu_seconds, metrics)
    files = Uploads(store, settings.state / "uploads", config.max_upload_bytes, metrics)
    sealed = Catalog(shelf, store)
    origins = Origins(
        config.hub_endpoint,
        config.hub_token_file,
        config.import_roots,
        config.max_fetch_bytes,
        config.web_hosts,
        config.max_page_bytes,
        config.page_seconds,
    )
    fetches = Fetches(workers, settings.state / "hub", origins)
    inputs = Inputs(files, sealed, shelf, fetches)
    validations = settings.state / "validations"
    ingests = Ingests(shelf, store, inputs, workers, turn, metrics, validations, config.max_unpacked_bytes)
    ledgers = Ledgers(shelf, sealed, workers, turn)
    servicer = DatasetServicer(files, sealed, ingests, ledgers, steps_of(workers))

    async def start(health: Health) -> None:
        await files.sweep()
        await fetches.start()
        await ingests.sweep()

    def drain() -> None:
        ingests.runs.drain()
        ingests.checks.drain()
        ledgers.runs.drain()

    async def stop() -> None:
        await ingests.runs.ended()
        await ingests.checks.ended()
        await ledgers.runs.ended()
        await store.close()

    return App(
        name="datasets",
        settings=settings,
        default_ports=(50051, 9101),
        services=[
            (
                "qlorad.v1.DatasetService",
                lambda server: datasets_pb2_grpc.add_DatasetServiceServicer_to_server(servicer, server),
            )
        ],
        registry=registry,
        start=start,
        stop=stop,
        drain=drain,
    )
