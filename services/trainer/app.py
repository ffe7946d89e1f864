"""The trainer put together: settings, rooms, and how they begin and end."""

from __future__ import annotations

import os
import pathlib
import sys
from dataclasses import dataclass, field

import yaml
from prometheus_client import CollectorRegistry

from qlorad.v1 import trainer_pb2, trainer_pb2_grpc
from services.common import devices, server
from services.common.config import ConfigError, setting
from services.common.extensions import extensions_folder
from services.common.server import ServerSettings
from services.common.shelf import Shelf
from services.common.store import Store
from services.trainer import slots, spec
from services.trainer.book import MIGRATIONS, Book
from services.trainer.core import Rules, Trainer
from services.trainer.desk import Desk
from services.trainer.metrics import Meters, add_metrics
from services.trainer.notify import Hub
from services.trainer.objectives import objectives_of
from services.trainer.places import Places
from services.trainer.runner import Runner
from services.trainer.servicer import TrainerServicer

NAME = "qlorad.v1.TrainerService"
TEMPLATES = pathlib.Path(__file__).parent / "templates"


@dataclass(frozen=True, slots=True)
class Config:
    """What the trainer is told."""

    server: ServerSettings = field(default_factory=ServerSettings)
    devices: tuple[str, ...] = setting(
        (),
        "where jobs run, one at a time on each, as in 'cuda:0,cuda:1'; 'cpu:0,cpu:1' are two shares of the processor; "
        "empty = the best of this host",
    )
    max_queue: int = setting(100, "most jobs that wait", lambda v: 1 <= v <= 10_000, "1 to 10000")
    heartbeat_seconds: float = setting(
        10.0, "a quiet watch hears of us so often", lambda v: 0.1 <= v <= 600, "0.1 to 600"
    )
    watch_ring_events: int = setting(
        2048, "newest events of a job kept in memory; a reader further behind is cut off",
        lambda v: 16 <= v <= 1_000_000, "16 to 1000000",
    )  # fmt: skip
    retry_backoff_seconds: float = setting(
        1.0, "wait after a first lost attempt; doubles up to a minute", lambda v: 0 <= v <= 60, "0 to 60"
    )
    history_events: int = setting(
        200_000, "events kept of a job; a watch of older ones is refused with the oldest number",
        lambda v: 100 <= v <= 100_000_000, "100 to 100000000",
    )  # fmt: skip
    worker_heartbeat_seconds: float = setting(
        30.0, "a worker without a sign of life for twice as long is ended, and its job goes on",
        lambda v: 0.2 <= v <= 3600, "0.2 to 3600",
    )  # fmt: skip
    stuck_seconds: float = setting(
        1800.0, "likewise one that lives but makes no progress for so long: a step, a row, a line told",
        lambda v: 1 <= v <= 604_800, "1 to 604800",
    )  # fmt: skip
    min_free_bytes: int = setting(
        128 << 20, "with less space on the disk no job is started", lambda v: 0 <= v <= 1 << 50, "0 to 2^50"
    )
    exit_grace_seconds: float = setting(
        30.0, "a worker that is done may take so long to end", lambda v: 0.1 <= v <= 600, "0.1 to 600"
    )
    torch_extensions: str = setting(
        "",
        "folder of DeepSpeed's compiled parts; empty = QLORAD_TORCH_EXTENSIONS, else one for this Python environment "
        "in ~/.cache/qlorad/torch_extensions",
    )

    def __post_init__(self) -> None:
        wrong = slots.faults(self.devices, devices.devices_here())
        if wrong:
            raise ConfigError([f"--devices: {why}" for why in wrong])


def read_templates(folder: pathlib.Path) -> dict[str, trainer_pb2.JobTemplate]:
    """The shipped templates, by name."""
    return spec.read_templates({p.stem: yaml.safe_load(p.read_text()) for p in sorted(folder.glob("*.yaml"))})


def build(config: Config) -> server.App:
    """Puts the trainer together; starts nothing."""
    home, state = config.server.home, config.server.state
    extensions = config.torch_extensions or os.environ.get("QLORAD_TORCH_EXTENSIONS", "")
    places_to_run = config.devices or (devices.devices_here()[0],)
    shelf = Shelf(home / "store")
    registry = CollectorRegistry()
    meters = Meters(registry)
    hub = Hub(config.watch_ring_events, meters.take)
    store = Store.open(state / "trainer.sqlite", MIGRATIONS)
    book = Book(store, hub, config.history_events)
    places = Places(
        jobs=state / "jobs",
        leases=state / "devices",
        devices=places_to_run,
        extensions=str(extensions_folder(extensions, sys.prefix)),
        backoff_seconds=config.retry_backoff_seconds,
        exit_grace_seconds=config.exit_grace_seconds,
        heartbeat_seconds=config.worker_heartbeat_seconds,
        stuck_seconds=config.stuck_seconds,
        min_free_bytes=config.min_free_bytes,
    )
    runner = Runner(book, shelf, places)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shares = sum(d.startswith("cpu") for d in places_to_run) or 1
    host = spec.Host(slots.torch_name(places_to_run[0]), max(1, cores // shares))
    rules = Rules(host, config.max_queue, config.heartbeat_seconds, places)
    desk = Desk(shelf, read_templates(TEMPLATES), objectives_of(config.server.logs), host, places.devices)
    trainer = Trainer(book, hub, runner, shelf, desk, rules)
    add_metrics(registry, hub, runner)
    servicer = TrainerServicer(trainer)

    async def start(_: server.Health) -> None:
        hub.counts.update(await book.turn(lambda page: page.counts()))
        await runner.start()

    async def stop() -> None:
        await runner.stop()
        await book.close()

    return server.App(
        name="trainer",
        settings=config.server,
        default_ports=(50053, 9103),
        services=[(NAME, lambda s: trainer_pb2_grpc.add_TrainerServiceServicer_to_server(servicer, s))],
        registry=registry,
        start=start,
        stop=stop,
        drain=hub.drain,
    )
