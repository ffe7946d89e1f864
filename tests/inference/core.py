"""The daemon's core on a small store, with scripted engines: what the tests of residency share."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import pathlib
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from qlorad.v1 import artifacts_pb2, errors_pb2, inference_pb2
from services.common import devices, facts, idempotency
from services.common.errors import Fault
from services.common.facts import AdapterFacts, ModelFacts
from services.common.frames.v1 import engine_pb2
from services.common.server import Health
from services.common.shelf import Shelf
from services.common.store import Store
from services.inference import wanted
from services.inference.admission import Admission
from services.inference.answering import Answering
from services.inference.generation_cache import GenerationCache
from services.inference.leases import SharedLease
from services.inference.limits import Limits, Meter
from services.inference.messages import generate_ask
from services.inference.metrics import Metrics
from services.inference.places import Places
from services.inference.reach import Reach
from services.inference.recovery import SERVICE
from services.inference.residency import Residency
from services.inference.starting import Place

BF16, FP32 = inference_pb2.PRECISION_BF16, inference_pb2.PRECISION_FP32
ANY = inference_pb2.PRECISION_UNSPECIFIED
MODEL = ModelFacts(
    "LlamaForCausalLM", "llama", 1_000, 600, 512, 100, ("q_proj",), "sha256:t", "sha256:c", True, "2026-01-01", (1,)
)
ADAPTER = AdapterFacts(4, 8.0, ("q_proj",), 100, ())


class House:
    """A store with three bases of 2,000 bytes and adapters of 200, and a daemon's core on it."""

    def __init__(self, root: pathlib.Path) -> None:
        self.root = root
        self.shelf = Shelf(root / "store")
        self.bases = {name: self.seal("models", name, facts.to_facts(MODEL)) for name in ("one", "two", "three")}
        self.digests: dict[str, str] = {}
        for name in ("ada", "bob", "cy", "dee"):
            self.adapter(name, "one")
        self.adapter("eve", "two")

    def seal(
        self, collection: str, name: str, told: dict[str, Any], files: tuple[str, ...] = (), base: str = ""
    ) -> str:
        staged = self.shelf.stage()
        (staged.payload / "name.json").write_text(json.dumps(name))
        for file in files:
            (staged.payload / file).write_text("")
        kind = artifacts_pb2.ARTIFACT_KIND_MODEL if collection == "models" else artifacts_pb2.ARTIFACT_KIND_ADAPTER
        lineage = artifacts_pb2.Lineage(base_digest=base, tokenizer_digest="sha256:t", template_digest="sha256:c")
        sealed = self.shelf.seal(staged, kind, told, lineage)
        self.shelf.set_alias(collection, name, sealed.digest)
        return sealed.digest

    def adapter(self, name: str, base: str, *files: str, parameters: int = 100) -> str:
        told = facts.to_facts(dataclasses.replace(ADAPTER, parameters=parameters))
        self.digests[name] = self.seal("adapters", name, told, files, self.bases.get(base, base))
        return self.digests[name]

    @asynccontextmanager
    async def live(self, memory_bytes: int = 0, adapter_bytes: int = 0) -> AsyncGenerator[Core, None]:
        """The daemon's core, begun; ended well at the end."""
        migrations = (idempotency.MIGRATION, wanted.MIGRATION, wanted.SEVERAL)
        store = Store.open(self.root / "inference.sqlite", migrations)
        registry = CollectorRegistry()
        metrics = Metrics(registry)
        place = Place(
            engine_pb2.EngineLoad(device="cpu", max_rows=8), memory_bytes, lambda: 1 << 30, self.root / "engine.log",
            "tests.inference.scripted_engine",
        )  # fmt: skip
        lease = SharedLease(self.root / "devices", "cpu")
        r = Residency(self.shelf, place, lease, wanted.Memory(store), adapter_bytes, metrics)
        health = Told()
        await r.begin(health)
        admission = Admission(Places(64), Meter(Limits()), 8)
        answering = Answering(Reach(r), admission, GenerationCache(0), metrics)
        try:
            yield Core(self, r, answering, health, registry)
        finally:
            await r.end()
            await store.close()
        assert devices.holder(self.root / "devices", "cpu") is None
        assert not self.shelf.holders(self.bases["one"]) and not self.shelf.holders(self.digests["ada"])


class Told(Health):
    """Health that remembers what was told."""

    def __init__(self) -> None:
        super().__init__([SERVICE])
        self.said: list[bool] = []

    async def set(self, serving: bool, services: Any = ()) -> None:
        assert list(services) == [SERVICE]
        self.said.append(serving)


@dataclasses.dataclass
class Long:
    """An answer that waits for its gate."""

    task: asyncio.Task[tuple[str, str]]
    gate: pathlib.Path

    async def end(self) -> tuple[str, str]:
        self.gate.unlink()
        return await self.task


class Core:
    """What the tests ask of a daemon's core."""

    def __init__(self, house: House, r: Residency, answering: Answering, health: Told, registry: Any) -> None:
        self.house, self.r, self.answering, self.health, self.registry = house, r, answering, health, registry
        self.gates = itertools.count()

    async def ask(
        self, adapter: str = "base", model: str = "", prompt: str = "x", begun: asyncio.Event | None = None
    ) -> tuple[str, str]:
        """The digests of base and adapter that answered; every token is of them."""
        options = inference_pb2.GenerationOptions(max_tokens=3)
        request = inference_pb2.GenerateRequest(prompt=prompt, adapter=adapter, model=model, options=options)
        events = [e async for e in self.events(request, begun)]
        started, finish = events[0], events[-1]
        assert isinstance(started, inference_pb2.Started) and isinstance(finish, inference_pb2.Finish)
        ids = [i for e in events[1:-1] for i in e.ids]
        assert ids == [int((started.adapter_digest or started.model_digest)[7:9], 16)] * 3
        return started.model_digest, started.adapter_digest

    async def events(self, request: inference_pb2.GenerateRequest, begun: asyncio.Event | None) -> Any:
        async for event in self.answering.answer(generate_ask(request, 0, "id")):
            if begun is not None and isinstance(event, inference_pb2.Delta):
                begun.set()
            yield event

    async def begin(self, adapter: str = "base", model: str = "") -> Long:
        """An answer that has begun, and goes on until it may end."""
        gate = self.house.root / f"gate-{next(self.gates)}"
        gate.touch()
        begun = asyncio.Event()
        task = asyncio.create_task(self.ask(adapter, model, str(gate), begun))
        first = asyncio.create_task(begun.wait())
        await asyncio.wait([task, first], return_when=asyncio.FIRST_COMPLETED)
        assert begun.is_set()
        return Long(task, gate)

    def awake(self) -> list[str]:
        return [m.model for m in self.r.models()]

    async def states(self) -> dict[str, inference_pb2.LoadedAdapter]:
        return {a.adapter: a for a in await self.r.adapters()}

    def held(self) -> tuple[str, int] | None:
        return devices.holder(self.house.root / "devices", "cpu")

    def count(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(f"qlorad_inference_{name}_total", labels or None) or 0.0

    def pid(self, name: str) -> int:
        engine: Any = self.r.bases.awake[self.house.bases[name]].engine
        return int(engine.pid)


async def until(look: Callable[[], Any], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not look():
        assert time.monotonic() < end
        await asyncio.sleep(0.005)


async def refused(call: Any, reason: errors_pb2.Reason.ValueType, *words: str) -> Fault:
    with pytest.raises(Fault) as caught:
        await call
    assert caught.value.reason == reason, caught.value
    for word in words:
        assert word in caught.value.message, caught.value
    return caught.value
