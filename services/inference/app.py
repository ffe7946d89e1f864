"""Puts the inference daemon together: the one place that chooses concrete things.

Law of this room: reads settings, makes objects, hands them to one another.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import pathlib
from dataclasses import dataclass, field

import grpc.aio
import psutil
import yaml
from prometheus_client import CollectorRegistry

from qlorad.v1 import artifacts_pb2, inference_pb2, inference_pb2_grpc
from services.common import devices, idempotency, names, telemetry
from services.common.config import ConfigError, read_yaml, setting
from services.common.frames.v1 import engine_pb2
from services.common.interceptors import Tokens
from services.common.server import App, Health, ServerSettings
from services.common.shelf import Shelf
from services.common.store import Store
from services.inference import kept, limits, preset, preset_book, wanted
from services.inference.admission import Admission
from services.inference.answering import Answering
from services.inference.changes import Changes
from services.inference.gauges import gauges
from services.inference.generation_cache import GenerationCache
from services.inference.leases import SharedLease
from services.inference.limits import Limits, Meter
from services.inference.looking import Looking
from services.inference.metrics import Metrics
from services.inference.places import Places
from services.inference.preset_book import PresetBook
from services.inference.reach import Reach
from services.inference.recovery import SERVICE
from services.inference.residency import Residency
from services.inference.servicer import InferenceServicer
from services.inference.starting import Place

log = logging.getLogger("qlorad.inference")

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
    max_rows: int = setting(32, "requests answered at the same time", lambda v: 1 <= v <= 256, "1 to 256")
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
    cache_bytes: int = setting(
        0, "bytes for keys and values of requests in flight, for each base; 0 = half of what is free when it is loaded",
        lambda v: 0 <= v <= 1 << 50, "0 to 1125899906842624",
    )  # fmt: skip
    prefix_bytes: int = setting(
        256 << 20, "bytes for keys and values of prompts seen before, for each base; 0 = none are kept",
        lambda v: 0 <= v <= 1 << 50, "0 to 1125899906842624",
    )  # fmt: skip
    prepared_bytes: int = setting(
        0, "bytes of quantised weights kept on disk for later loads; those used longest ago go first; 0 = no bound",
        lambda v: 0 <= v <= 1 << 50, "0 to 1125899906842624",
    )  # fmt: skip
    threads: int = setting(0, "threads of each engine; 0 = the engine chooses", lambda v: 0 <= v <= 1024, "0 to 1024")
    idle_unload_seconds: float = setting(
        300.0, "let a base go after so long without a request, the device with the last; 0 = never",
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
        tree = read_yaml(pathlib.Path(config.limits_file).read_text())
    except OSError as e:
        raise ConfigError([f"{where} cannot be read: {e.strerror}; accepted: a readable file"]) from None
    except ValueError as e:
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
    store = Store.open(
        s.state / "inference.sqlite", (idempotency.MIGRATION, wanted.MIGRATION, wanted.SEVERAL, preset_book.MIGRATION)
    )
    device = config.device or devices.devices_here()[0]
    order = engine_pb2.EngineLoad(
        device=device, max_rows=config.max_rows, device_adapter_bytes=config.device_adapter_bytes,
        cache_bytes=config.cache_bytes, prefix_bytes=config.prefix_bytes, threads=config.threads,
        prepared=str(s.state / kept.FOLDER), prepared_bytes=config.prepared_bytes,
    )  # fmt: skip
    place = Place(order, config.memory_bytes, lambda: _free_bytes(device), s.logs / "inference-engine.log")
    lease = SharedLease(s.state / "devices", device)
    residency = Residency(shelf, place, lease, wanted.Memory(store), config.adapter_bytes, metrics)
    changes = Changes(store, residency)
    presets = PresetBook(store, shipped_presets())
    places = Places(config.max_rows + config.max_waiting)
    admission = Admission(places, Meter(read_limits(config)), config.max_rows)
    cache = GenerationCache(config.generation_cache_bytes)
    reach = Reach(residency)
    answering = Answering(reach, admission, cache, metrics)
    looking = Looking(reach, admission, metrics)
    registry.register(gauges(residency))
    registry.register(_kept_here(places, cache, s.state / kept.FOLDER))
    tasks: set[asyncio.Task[None]] = set()

    async def sleep_when_idle() -> None:
        while True:
            left = 60.0
            try:
                left = await residency.bases.sleep_idle(config.idle_unload_seconds)
            except Exception:  # of one base; without this none would ever sleep again, and nobody would know
                log.exception("a base could not be put to sleep; tried again")
            await asyncio.sleep(min(left, 60.0))

    async def start(health: Health) -> None:
        await store.run(idempotency.prune)
        await presets.begin()
        models = await asyncio.to_thread(
            lambda: {sealed.digest for sealed in shelf.every(artifacts_pb2.ARTIFACT_KIND_MODEL)}
        )
        there = {names.hex_of(digest) for digest in models}
        for gone in await asyncio.to_thread(kept.sweep, s.state / kept.FOLDER, there, config.prepared_bytes):
            log.info("kept weights %s are removed, %d bytes: %s", gone.name, gone.size, gone.why)
        await residency.begin(health)
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
        residency.watching.end()
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


def _kept_here(places: Places, cache: GenerationCache, prepared: pathlib.Path) -> telemetry.Live:
    """What calls hold now, and what is kept for later ones."""
    live = telemetry.Live()
    live.add(
        "qlorad_inference_places_taken", "Requests between the door and their finish.", (),
        lambda: [((), places.taken)],
    )  # fmt: skip
    live.add(
        "qlorad_inference_generation_cache_bytes", "Bytes of whole answers that are kept.", (),
        lambda: [((), cache.bytes)],
    )  # fmt: skip
    live.add(
        "qlorad_inference_prepared_bytes", "Bytes on disk of quantised weights that are kept for later loads.", (),
        lambda: [((), kept.total(prepared))],
    )  # fmt: skip
    return live


def _free_bytes(device: str) -> int:
    """What a device has free; 0 where only its engine can tell."""
    if device.split(":")[0] != "cpu":
        return 0
    return int(psutil.virtual_memory().available)  # type: ignore[no-untyped-call]
