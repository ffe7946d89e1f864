"""Bases and adapters that come and go, with engines that are real processes and hold no model."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import pathlib
import signal
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
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
from services.inference.answering import Answering
from services.inference.bases import Place
from services.inference.leases import SharedLease
from services.inference.messages import generate_ask
from services.inference.metrics import Metrics
from services.inference.recovery import SERVICE
from services.inference.residency import Residency

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
        try:
            yield Core(self, r, Answering(r, metrics, 64), health, registry)
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


class Core:
    """What the tests ask of a daemon's core."""

    def __init__(self, house: House, r: Residency, answering: Answering, health: Told, registry: Any) -> None:
        self.house, self.r, self.answering, self.health, self.registry = house, r, answering, health, registry

    async def ask(self, adapter: str = "base", model: str = "", tokens: int = 3, begun: Any = None) -> tuple[str, str]:
        """The digests of base and adapter that answered; every token is of them."""
        options = inference_pb2.GenerationOptions(max_tokens=tokens)
        request = inference_pb2.GenerateRequest(prompt="x", adapter=adapter, model=model, options=options)
        events = [e async for e in self.events(request, begun)]
        started, finish = events[0], events[-1]
        assert isinstance(started, inference_pb2.Started) and isinstance(finish, inference_pb2.Finish)
        ids = [i for e in events[1:-1] for i in e.ids]
        assert ids == [int((started.adapter_digest or started.model_digest)[7:9], 16)] * tokens
        return started.model_digest, started.adapter_digest

    async def events(self, request: inference_pb2.GenerateRequest, begun: asyncio.Event | None) -> Any:
        async for event in self.answering.answer(generate_ask(request, 0, 1, "id")):
            if begun is not None and isinstance(event, inference_pb2.Delta):
                begun.set()
            yield event

    async def begin(self, adapter: str = "base", model: str = "", tokens: int = 400) -> asyncio.Task[tuple[str, str]]:
        """A long answer that has begun."""
        begun = asyncio.Event()
        task = asyncio.create_task(self.ask(adapter, model, tokens, begun))
        await asyncio.wait([task, asyncio.ensure_future(begun.wait())], return_when=asyncio.FIRST_COMPLETED)
        return task

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


@pytest.fixture
def house(tmp_path: pathlib.Path) -> House:
    return House(tmp_path)


async def test_each_request_finds_its_base(house: House) -> None:
    one, two, three = (house.bases[n] for n in ("one", "two", "three"))
    async with house.live() as core:
        await refused(core.ask(), errors_pb2.REASON_NOT_FOUND, "no model is loaded")
        await core.r.load_model("models/one", ANY, False)
        assert await core.ask() == (one, "")
        assert await core.ask("adapters/eve") == (two, house.digests["eve"]), "an adapter's base comes on demand"
        assert await core.ask("adapters/ada") == (one, house.digests["ada"])
        wrong = await refused(core.ask(), errors_pb2.REASON_INVALID_REQUEST, "models/one, models/two")
        assert [v.field for v in wrong.violations] == ["model"]
        assert await core.ask(model="models/two") == (two, "")
        await refused(core.ask(model="models/three"), errors_pb2.REASON_NOT_FOUND, "'models/three' is not loaded")
        await core.r.load_model("models/three", ANY, False)
        assert await core.ask(model=f"models/{three}") == (three, "")
        await core.r.switch("adapters/eve")
        assert await core.ask("") == (two, house.digests["eve"])
        assert await core.ask("base") == (two, ""), "of several bases, the default's"
        clash = await refused(
            core.ask("", "models/one"), errors_pb2.REASON_REJECTED, "check 'base'", "'base' names none"
        )
        assert clash.resource == "adapters/eve"
        assert await core.ask("base", "models/one") == (one, "")
        assert core.held() == ("inference engines: models/one, models/two, models/three", 6_000)
        await refused(core.r.unload_model(""), errors_pb2.REASON_INVALID_REQUEST, "models/three")
        await core.r.unload_model("models/two")
        assert core.held() == ("inference engines: models/one, models/three", 4_000)
        assert core.r.memory.now.default == wanted.Default(), "the default went with its base"
        await refused(core.r.load_adapter("adapters/eve", False), errors_pb2.REASON_WRONG_STATE, "models/two")
        homeless = house.adapter("homeless", "sha256:" + "ab" * 32)
        await refused(core.ask("adapters/homeless"), errors_pb2.REASON_REJECTED, "check 'base'", "not in the store")
        listed = (await core.states())["adapters/homeless"]
        assert (listed.digest, listed.state) == (homeless, inference_pb2.ADAPTER_STATE_REJECTED)


async def test_bases_make_room_for_one_another(house: House) -> None:
    async with house.live(memory_bytes=4_000) as core:
        await core.r.load_model("models/one", ANY, False)
        await core.r.load_model("models/two", ANY, False)
        await core.ask(model="models/one")
        await core.r.load_model("models/three", ANY, False)
        assert core.awake() == ["models/one", "models/three"], "two was used longest ago"
        assert core.count("evictions", kind="base") == 1
        assert await core.ask(model="models/two") == (house.bases["two"], ""), "it is still wanted, and wakes"
        assert core.awake() == ["models/three", "models/two"]
        assert core.held() == ("inference engines: models/three, models/two", 4_000)

        await core.r.load_model("models/three", ANY, True)
        busy = await core.begin(model="models/two")
        no = await refused(
            core.ask("adapters/ada"), errors_pb2.REASON_TOO_LARGE, "memory_bytes", "models/three (2000 bytes; pinned)",
            "models/two (2000 bytes; 1 request)",
        )  # fmt: skip
        assert no.retry_seconds > 0
        await busy
        assert await core.ask("adapters/ada") == (house.bases["one"], house.digests["ada"])
        assert core.awake() == ["models/three", "models/one"], "the pinned one stays, though it was used longest ago"
        model = await core.r.load_model("models/two", ANY, False)
        assert model.precision == BF16
        whole = await refused(core.r.load_model("models/one", FP32, False), errors_pb2.REASON_TOO_LARGE, "4000 bytes")
        assert whole.retry_seconds == 0, "beside what is pinned it never fits"
    async with house.live(memory_bytes=2_500) as core:
        await core.r.load_model("models/three", ANY, False)
        assert core.r.models()[0].pinned, "also after a restart"
        small = await core.r.load_model("models/three", ANY, False)
        assert small.digest == house.bases["three"]
        await refused(core.r.load_model("models/three", FP32, False), errors_pb2.REASON_WRONG_STATE)


async def test_what_was_wanted_comes_back_when_it_is_needed(house: House) -> None:
    async with house.live() as core:
        for name in ("one", "two"):
            await core.r.load_model(f"models/{name}", ANY, False)
        await core.r.load_adapter("adapters/bob", True)
        await core.ask("adapters/ada")
        await core.ask("adapters/eve")
        await core.r.switch("adapters/ada")
    async with house.live() as core:
        assert not core.awake() and core.held() is None
        assert await core.ask("") == (house.bases["one"], house.digests["ada"])
        assert core.awake() == ["models/one"], "the other base sleeps on"
        await core.r.load_model("models/one", ANY, False)
        states = await core.states()
        assert list(states) == ["adapters/bob", "adapters/ada"]
        assert states["adapters/bob"].pinned and states["adapters/ada"].is_default
        await core.r.unload_model("models/one")
        assert await core.r.unload_adapter("adapters/eve") == 0, "what sleeps is let go without waking"
        assert not core.awake()
        assert await core.ask("") == (house.bases["two"], ""), "the only one that is wanted"
        assert not await core.states()


async def test_each_base_sleeps_for_itself_and_the_device_goes_with_the_last(house: House) -> None:
    async with house.live() as core:
        await core.r.load_model("models/one", ANY, False)
        await core.r.load_model("models/two", ANY, False)
        busy = await core.begin(model="models/two")
        await core.r.bases.sleep_idle(0.0)
        assert core.awake() == ["models/two"] and core.held() == ("inference engine: models/two", 2_000)
        await busy
        await core.r.bases.sleep_idle(0.0)
        assert not core.awake() and core.held() is None
        job = devices.acquire(house.root / "devices", "cpu", "jobs/nightly", 7)
        for asked in (
            core.ask(model="models/one"),
            core.ask("adapters/eve"),
            core.r.load_model("models/one", ANY, False),
        ):
            busy_device = await refused(asked, errors_pb2.REASON_DEVICE_BUSY, "jobs/nightly")
            assert busy_device.retry_seconds > 0
        job.release()
        assert await core.ask(model="models/one") == (house.bases["one"], "")


async def test_adapters_come_on_demand_once_and_make_room(house: House) -> None:
    async with house.live(adapter_bytes=500) as core:
        await core.r.load_model("models/one", ANY, False)
        assert {await core.ask("adapters/ada") for _ in range(3)} == {(house.bases["one"], house.digests["ada"])}
        await asyncio.gather(*(core.ask("adapters/bob") for _ in range(5)))
        assert core.count("loads", kind="adapter", result="loaded") == 2
        await core.ask("adapters/ada")
        await core.ask("adapters/cy")
        assert list(await core.states()) == ["adapters/ada", "adapters/cy"], "bob was used longest ago"
        assert core.count("evictions", kind="adapter") == 1
        assert [a.digest for a in core.r.memory.now.adapters] == [house.digests["ada"], house.digests["cy"]]

        await core.r.load_adapter("adapters/ada", True)
        busy = await core.begin("adapters/cy", tokens=100)
        states = await core.states()
        assert states["adapters/cy"].in_flight == 1 and states["adapters/ada"].pinned
        assert await core.ask("adapters/dee"), "it waited until cy was free"
        assert busy.done()
        assert list(await core.states()) == ["adapters/ada", "adapters/dee"]
        house.adapter("large", "one", parameters=200)
        large = await refused(
            core.ask("adapters/large"), errors_pb2.REASON_TOO_LARGE, "adapter_bytes", "adapters/ada (200 bytes; pinned)"
        )
        assert large.retry_seconds == 0
        assert await core.r.unload_adapter("adapters/ada") == 200
        assert await core.ask("adapters/large")
        assert list(await core.states()) == ["adapters/large"]
        assert sum(i.bytes for i in core.r.roster.table.items()) == 400


async def test_a_slow_load_stalls_nobody_and_a_refused_one_is_listed_and_tried_again(house: House) -> None:
    house.adapter("slow", "one", "slow")
    bad = house.adapter("bad", "one", "bad")
    async with house.live() as core:
        await core.r.load_model("models/one", ANY, False)
        await core.ask("adapters/ada")
        slow = asyncio.create_task(core.ask("adapters/slow"))
        await until(lambda: core.r.roster.table.state(house.digests["slow"]) == inference_pb2.ADAPTER_STATE_VERIFYING)
        for _ in range(5):
            await core.ask("adapters/ada")
            await core.ask("adapters/bob")
        assert not slow.done(), "requests whose adapter is there, and other loads, did not wait"
        gone = asyncio.create_task(core.ask("adapters/slow"))
        await asyncio.sleep(0)
        gone.cancel()
        assert await slow == (house.bases["one"], house.digests["slow"])
        for times in (1, 2):
            await refused(core.ask("adapters/bad"), errors_pb2.REASON_REJECTED, "check 'effect'")
            assert core.count("loads", kind="adapter", result="rejected") == times
        listed = (await core.states())["adapters/bad"]
        assert listed.state == inference_pb2.ADAPTER_STATE_REJECTED and "check 'effect'" in listed.state_reason
        await refused(core.r.unload_adapter("adapters/bad"), errors_pb2.REASON_NOT_FOUND, "not loaded")
        await refused(core.r.switch("adapters/bad"), errors_pb2.REASON_NOT_FOUND, "not loaded")
        (house.shelf.root / "adapters" / bad[7:] / "payload" / "name.json").write_text("other")
        await refused(core.ask("adapters/bad"), errors_pb2.REASON_CORRUPT, "name.json")
        assert not house.shelf.holders(bad), "what was refused is not held"
        assert house.shelf.holders(house.digests["ada"]) == ["inference/engine"]
        assert not any(a.in_flight for a in (await core.states()).values())


async def test_unloading_waits_for_requests_and_those_that_come_meanwhile_load_anew(house: House) -> None:
    async with house.live() as core:
        await core.r.load_model("models/one", ANY, False)
        busy = await core.begin("adapters/ada", tokens=150)
        await core.r.switch("adapters/ada")
        unloading = asyncio.create_task(core.r.unload_adapter("adapters/ada"))
        await until(lambda: core.r.roster.table.state(house.digests["ada"]) == inference_pb2.ADAPTER_STATE_DRAINING)
        late = asyncio.create_task(core.ask("adapters/ada"))
        assert await unloading == 200 and busy.done()
        assert await late == (house.bases["one"], house.digests["ada"])
        assert core.count("loads", kind="adapter", result="loaded") == 2
        assert await core.ask("") == (house.bases["one"], ""), "unloading the default made the base it"
        busy = await core.begin("adapters/ada", tokens=150)
        unloading_base = asyncio.create_task(core.r.unload_model("models/one"))
        await until(lambda: core.r.bases.awake[house.bases["one"]].leaving)
        late_base, late = (asyncio.create_task(core.ask(n)) for n in ("base", "adapters/ada"))
        assert await unloading_base > 0 and busy.done()
        assert await late == (house.bases["one"], house.digests["ada"]), "an adapter's base comes on demand"
        await asyncio.wait([late_base])
        assert not core.r.roster.table.items() or core.awake() == ["models/one"]


async def test_the_default_is_a_name_that_is_followed(house: House) -> None:
    ada, bob = house.digests["ada"], house.digests["bob"]
    house.shelf.set_alias("adapters", "best", ada)
    async with house.live() as core, AsyncExitStack() as closing:
        await core.r.load_model("models/one", ANY, False)
        await refused(core.r.switch("adapters/best"), errors_pb2.REASON_NOT_FOUND, "not loaded")
        await core.ask("adapters/best")
        told = await core.r.switch("adapters/best")
        assert (told.digest, told.previous_digest) == (ada, "")
        watch = core.r.watching.watch(await core.r.adapters())
        closing.push_async_callback(watch.aclose)
        first = await anext(watch)
        assert first.adapter.is_default and first.snapshot_end
        house.shelf.set_alias("adapters", "best", bob)
        assert await core.ask("") == (house.bases["one"], bob)
        told = await core.r.switch("adapters/ada")
        assert (told.digest, told.previous_digest) == (ada, bob)
        await core.r.switch("adapters/best")
        seen = {}
        while not (seen.get(bob, (0, False))[1] and not seen.get(ada, (0, True))[1]):
            message = await anext(watch)
            seen[message.adapter.digest] = (message.adapter.state, message.adapter.is_default)
        house.shelf.remove("adapters", "best")
        gone = await refused(core.ask(""), errors_pb2.REASON_NOT_FOUND, "adapters/best", "it is the default")
        assert gone.resource == "adapters/best"
        assert await core.ask() == (house.bases["one"], "")


async def test_p6_a_lost_engine_comes_back_alone(house: House) -> None:
    async with house.live() as core:
        for name in ("one", "two"):
            await core.r.load_model(f"models/{name}", ANY, False)
        await core.r.load_adapter("adapters/ada", True)
        await core.ask("adapters/bob")
        mine = await core.begin("adapters/ada")
        others = await core.begin(model="models/two", tokens=300)
        waiting = asyncio.create_task(core.ask("adapters/cy"))
        os.kill(core.pid("one"), signal.SIGKILL)
        lost = await refused(mine, errors_pb2.REASON_WORKER_LOST, "SIGKILL")
        assert lost.retry_seconds > 0
        assert core.held() == ("inference engine: models/two", 2_000)
        await refused(core.ask("adapters/ada"), errors_pb2.REASON_WORKER_LOST, "restarted")
        await asyncio.gather(waiting, return_exceptions=True)
        await until(lambda: core.health.said == [False, True])
        states = await core.states()
        assert [n for n in states if n != "adapters/cy"] == ["adapters/ada", "adapters/bob"]
        assert states["adapters/ada"].pinned and not any(a.in_flight for a in states.values())
        assert await core.ask("adapters/ada") == (house.bases["one"], house.digests["ada"])
        assert await others == (house.bases["two"], ""), "its stream went on"
        assert (core.count("engine_losses"), core.count("engine_restarts")) == (1, 1)
        for _ in range(2):  # lost again while it comes back
            os.kill(core.pid("one"), signal.SIGKILL)
            await until(lambda: house.bases["one"] not in core.r.bases.awake)
            await until(lambda: house.bases["one"] in core.r.bases.awake)
        await until(lambda: core.health.said[-1])
        assert list(await core.states())[:2] == ["adapters/ada", "adapters/bob"]
        os.kill(core.pid("two"), signal.SIGKILL)
        await until(lambda: house.bases["two"] not in core.r.bases.awake)
        await core.r.unload_model("models/two")
        assert core.awake() == ["models/one"], "what is unloaded meanwhile does not come back"


async def test_the_tiers_that_an_engine_tells_are_listed(house: House) -> None:
    async with house.live() as core:
        await core.r.load_model("models/one", ANY, False)
        await core.ask("adapters/ada")
        assert (await core.states())["adapters/ada"].state == inference_pb2.ADAPTER_STATE_DEVICE
        core.r.roster.on_device(house.bases["one"], [])
        assert (await core.states())["adapters/ada"].state == inference_pb2.ADAPTER_STATE_HOST
        assert await core.r.unload_adapter("adapters/ada") == 200
