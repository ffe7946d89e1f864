"""The trainer put together: settings, rooms, and how they begin and end."""

from __future__ import annotations

import os
import pathlib
from dataclasses import dataclass, field

import yaml
from prometheus_client import CollectorRegistry

from qlorad.v1 import trainer_pb2, trainer_pb2_grpc
from services.common import devices, server
from services.common.config import ConfigError, setting
from services.common.server import ServerSettings
from services.common.shelf import Shelf
from services.common.store import Store
from services.trainer import spec
from services.trainer.book import MIGRATIONS, Book
from services.trainer.core import Rules, Trainer
from services.trainer.metrics import add_metrics
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
    device: str = setting("", "where jobs run, as in 'cpu' or 'cuda:0'; empty = the best of this host")
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
    exit_grace_seconds: float = setting(
        30.0, "a worker that is done may take so long to end", lambda v: 0.1 <= v <= 600, "0.1 to 600"
    )
    torch_extensions: str = setting(
        "",
        "folder of DeepSpeed's compiled parts; empty = QLORAD_TORCH_EXTENSIONS, else ~/.cache/qlorad/torch_extensions",
    )

    def __post_init__(self) -> None:
        here = devices.devices_here()
        if self.device and self.device not in here:
            raise ConfigError([f"--device: got {self.device!r}; accepted: {', '.join(here)}"])


def read_templates(folder: pathlib.Path) -> dict[str, trainer_pb2.JobTemplate]:
    """The shipped templates, by name."""
    return spec.read_templates({p.stem: yaml.safe_load(p.read_text()) for p in sorted(folder.glob("*.yaml"))})


def build(config: Config) -> server.App:
    """Puts the trainer together; starts nothing."""
    home, state = config.server.home, config.server.state
    extensions = config.torch_extensions or os.environ.get("QLORAD_TORCH_EXTENSIONS", "")
    device = config.device or devices.devices_here()[0]
    shelf = Shelf(home / "store")
    hub = Hub(config.watch_ring_events)
    store = Store.open(state / "trainer.sqlite", MIGRATIONS)
    book = Book(store, hub)
    places = Places(
        jobs=state / "jobs",
        leases=state / "devices",
        device=device,
        extensions=str(pathlib.Path(extensions or "~/.cache/qlorad/torch_extensions").expanduser().absolute()),
        backoff_seconds=config.retry_backoff_seconds,
        exit_grace_seconds=config.exit_grace_seconds,
    )
    runner = Runner(book, shelf, places)
    host = spec.Host(device, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    rules = Rules(host, config.max_queue, config.heartbeat_seconds, places.jobs)
    trainer = Trainer(book, hub, runner, shelf, read_templates(TEMPLATES), objectives_of(config.server.logs), rules)
    registry = CollectorRegistry()
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
