"""Puts the inference daemon together: the one place that chooses concrete things.

Law of this room: reads settings, makes objects, hands them to one another.
"""

from __future__ import annotations

import asyncio
import math
import os
import pathlib
from dataclasses import dataclass, field

import grpc.aio
import yaml
from prometheus_client import CollectorRegistry

from qlorad.v1 import inference_pb2, inference_pb2_grpc
from services.common import idempotency, telemetry
from services.common.config import ConfigError, setting
from services.common.interceptors import Tokens
from services.common.server import App, Health, ServerSettings
from services.common.shelf import Shelf
from services.common.store import Store
from services.inference import limits, preset, preset_book, wanted
from services.inference.admission import Admission
from services.inference.answering import Answering
from services.inference.changes import Changes
from services.inference.generation_cache import GenerationCache
from services.inference.limits import Limits, Meter
from services.inference.looking import Looking
from services.inference.metrics import Metrics
from services.inference.places import Places
from services.inference.preset_book import PresetBook
from services.inference.reach import Reach
from services.inference.residency import SERVICE, Place, Residency
from services.inference.servicer import InferenceServicer

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
    idle_unload_seconds: float = setting(
        300.0, "give the device back after so long without a request; 0 = never",
        lambda v: math.isfinite(v) and 0 <= v <= 31_536_000, "0 to 31536000",
    )  # fmt: skip
    generation_cache_bytes: int = setting(
        0, "keep whole answers to greedy requests, at most so many bytes; 0 = none",
        lambda v: 0 <= v <= 1 << 40, "0 to 1099511627776",
    )  # fmt: skip
    limits_file: str = setting("", "a YAML file of what each token, by its name, may take; see docs/serving.md")

    def __post_init__(self) -> None:
        read_limits(self)


def read_limits(config: Config) -> Limits:
    """What the limits file says; ConfigError with all that is wrong with it."""
    if not config.limits_file:
        return Limits()
    where = f"--limits-file: {config.limits_file}"
    try:
        tree = yaml.safe_load(pathlib.Path(config.limits_file).read_text())
    except OSError as e:
        raise ConfigError([f"{where} cannot be read: {e.strerror}; accepted: a readable file"]) from None
    except (UnicodeDecodeError, yaml.YAMLError) as e:
        raise ConfigError([f"{where} is not YAML: {e}"]) from None
    found, faults = limits.read(tree, _keys(config.server))
    if faults:
        raise ConfigError([f"{where}: {fault}" for fault in faults])
    return found


def _keys(server: ServerSettings) -> list[str]:
    """Names of the tokens that are taken; a file that cannot be read is told of by those who need it."""
    if not server.tokens_file or not os.access(server.tokens_file, os.R_OK):
        return []
    try:
        return Tokens.parse(pathlib.Path(server.tokens_file).read_text()).names()
    except ValueError as e:
        raise ConfigError([f"--tokens-file: {server.tokens_file}: {e}"]) from None


def shipped_presets() -> dict[str, inference_pb2.Preset]:
    """The presets that come with qlorad, by full name."""
    folder = pathlib.Path(__file__).parent / "presets"
    return preset.read_shipped({p.stem: yaml.safe_load(p.read_text()) for p in folder.glob("*.yaml")})


def build(config: Config) -> App:
    """The daemon, put together and not yet begun."""
    s = config.server
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    shelf = Shelf(s.home / "store")
    store = Store.open(s.state / "inference.sqlite", (idempotency.MIGRATION, wanted.MIGRATION, preset_book.MIGRATION))
    place = Place(config.device, config.max_rows, s.state / "devices", s.logs / "inference-engine.log")
    residency = Residency(shelf, place, metrics)
    changes = Changes(shelf, store, residency)
    presets = PresetBook(store, shipped_presets())
    places = Places(config.max_rows + config.max_waiting)
    admission = Admission(places, Meter(read_limits(config)), config.max_rows)
    cache = GenerationCache(config.generation_cache_bytes)
    reach = Reach(shelf, residency)
    answering = Answering(reach, admission, cache, metrics)
    looking = Looking(reach, admission, metrics)
    registry.register(_gauges(residency))
    registry.register(_calls(places, cache))
    tasks: set[asyncio.Task[None]] = set()

    async def sleep_when_idle() -> None:
        while True:
            left = await residency.sleep_if_idle(config.idle_unload_seconds, lambda: answering.in_use)
            await asyncio.sleep(min(left, 60.0))

    async def start(health: Health) -> None:
        await store.run(idempotency.prune)
        await presets.begin()
        residency.begin(health, await store.run(wanted.read))
        if config.idle_unload_seconds:
            tasks.add(asyncio.create_task(sleep_when_idle(), name="idle unload"))

    async def stop() -> None:
        for task in tasks:
            task.cancel()
        await changes.settle()
        await presets.settle()
        await residency.end()
        await store.close()

    def drain() -> None:
        # A little before the server cuts them off, streams end with a reason.
        asyncio.get_running_loop().call_later(max(0.0, s.drain_seconds - 0.5), answering.end_all)

    def add(server: grpc.aio.Server) -> None:
        servicer = InferenceServicer(residency, changes, answering, looking, presets, metrics)
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


def _calls(places: Places, cache: GenerationCache) -> telemetry.Live:
    """What calls hold now."""
    live = telemetry.Live()
    live.add(
        "qlorad_inference_places_taken", "Requests between the door and their finish.", (),
        lambda: [((), places.taken)],
    )  # fmt: skip
    live.add(
        "qlorad_inference_generation_cache_bytes", "Bytes of whole answers that are kept.", (),
        lambda: [((), cache.bytes)],
    )  # fmt: skip
    return live


def _gauges(residency: Residency) -> telemetry.Live:
    """What is there now, read when someone asks."""

    def one(number: float) -> list[tuple[tuple[str, ...], float]]:
        return [((), number)]

    live = telemetry.Live()
    live.add(
        "qlorad_inference_requests_running", "Requests being answered.", (),
        lambda: one(residency.engine.running if residency.engine else 0),
    )  # fmt: skip
    live.add(
        "qlorad_inference_requests_waiting", "Requests that wait for their turn.", (),
        lambda: one(residency.engine.waiting if residency.engine else 0),
    )  # fmt: skip
    live.add(
        "qlorad_inference_adapters_resident", "Adapters in memory.", (),
        lambda: one(len(residency.table.adapters)),
    )  # fmt: skip
    live.add(
        "qlorad_inference_model_resident_bytes", "Bytes of the weights in memory.", (),
        lambda: one(residency.table.model.memory_bytes if residency.table.model else 0),
    )  # fmt: skip
    return live
