"""Bases and adapters that come and go, with engines that are real processes and hold no model."""

from __future__ import annotations

import asyncio
import os
import pathlib
import random
import signal
from contextlib import AsyncExitStack

import psutil
import pytest
from prometheus_client import CollectorRegistry

from qlorad.v1 import errors_pb2, inference_pb2
from services.common import devices
from services.inference import room, wanted
from services.inference.gauges import gauges
from tests.inference.core import ANY, BF16, FP32, House, refused, until


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
        await busy.end()
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


async def test_a_damaged_base_sends_nobody_away_and_leaves_nothing(house: House) -> None:
    (house.shelf.root / "models" / house.bases["three"][7:] / "payload" / "name.json").write_text("other")
    async with house.live(memory_bytes=4_000) as core:
        for awake in (["models/one"], ["models/one", "models/two"]):
            await core.r.load_model(awake[-1], ANY, False)
            await refused(core.r.load_model("models/three", ANY, False), errors_pb2.REASON_CORRUPT, "name.json")
            assert core.awake() == awake and (core.held() or ("", 0))[1] == 2_000 * len(awake)
            assert len(psutil.Process().children()) == len(awake)
        assert core.count("evictions", kind="base") == 0


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


async def test_a_request_that_joins_what_comes_back_by_itself_has_the_patience_of_requests(house: House) -> None:
    async with house.live() as core:
        for name in ("ada", "bob", "cy"):
            await core.ask(f"adapters/{name}")
    async with house.live(adapter_bytes=200) as core:
        busy = await core.begin("adapters/ada")
        joined = asyncio.create_task(core.ask("adapters/cy"))
        await until(lambda: core.r.roster.table.state(house.digests["cy"]) == inference_pb2.ADAPTER_STATE_FETCHING)
        await busy.end()
        assert await joined == (house.bases["one"], house.digests["cy"])
        assert [a.digest for a in core.r.memory.now.adapters] == [house.digests["cy"]]


async def test_each_base_sleeps_for_itself_and_the_device_goes_with_the_last(house: House) -> None:
    async with house.live() as core:
        await core.r.load_model("models/one", ANY, False)
        await core.r.load_model("models/two", ANY, False)
        busy = await core.begin(model="models/two")
        await core.r.bases.sleep_idle(0.0)
        assert core.awake() == ["models/two"] and core.held() == ("inference engine: models/two", 2_000)
        await busy.end()
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
        busy = await core.begin("adapters/cy")
        states = await core.states()
        assert states["adapters/cy"].in_flight == 1 and states["adapters/ada"].pinned
        waiting = asyncio.create_task(core.ask("adapters/dee"))
        await until(lambda: core.r.roster.table.state(house.digests["dee"]) == inference_pb2.ADAPTER_STATE_FETCHING)
        await core.ask("adapters/ada")
        assert not waiting.done(), "it waits until cy is free; others do not"
        await busy.end()
        assert await waiting == (house.bases["one"], house.digests["dee"])
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


async def test_many_users_of_many_adapters_wait_their_turn_where_half_has_room(house: House) -> None:
    names = [f"a{n}" for n in range(24)]
    digests = {name: house.adapter(name, "one") for name in names}
    async with house.live(adapter_bytes=12 * 200) as core:
        await core.r.load_model("models/one", ANY, False)

        async def user(number: int) -> None:
            draw = random.Random(number)
            for name in draw.choices(names, [1 / (n + 1) for n in range(24)], k=4):
                assert await core.ask(f"adapters/{name}") == (house.bases["one"], digests[name])

        await asyncio.gather(*(user(n) for n in range(32)))
        assert core.count("evictions", kind="adapter") > 0
        assert sum(i.bytes for i in core.r.roster.table.items()) <= 12 * 200


async def test_who_waits_long_is_let_in_though_others_are_never_idle(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "YIELD", 0.05)
    digests, table = house.digests, lambda: core.r.roster.table
    async with house.live(adapter_bytes=600) as core:
        await core.r.load_model("models/one", ANY, False)
        await core.r.load_adapter("adapters/dee", True)
        many = [await core.begin("adapters/ada") for _ in range(2)]
        few = await core.begin("adapters/bob")
        pinned = await core.begin("adapters/dee")
        comes = asyncio.create_task(core.ask("adapters/cy"))
        await until(lambda: table().state(digests["bob"]) == inference_pb2.ADAPTER_STATE_DRAINING)
        assert table().entries[digests["ada"]].is_in_memory, "who has the fewest requests makes room"
        assert table().entries[digests["dee"]].is_in_memory, "what is pinned stays"
        late = asyncio.create_task(core.ask("adapters/bob"))
        await until(lambda: table().entries[digests["bob"]].waits == 1)
        await core.ask("adapters/ada")
        assert not comes.done() and not late.done(), "what has begun goes to its end first"
        await few.end()
        assert await comes == (house.bases["one"], digests["cy"])
        assert await late == (house.bases["one"], digests["bob"])
        many.append(await core.begin("adapters/ada"))
        house.adapter("large", "one", parameters=200)
        large = asyncio.create_task(core.ask("adapters/large"))
        await until(lambda: table().state(digests["ada"]) == inference_pb2.ADAPTER_STATE_DRAINING)
        for long in many:
            await long.end()
        await large
        await pinned.end()
        assert list(await core.states()) == ["adapters/dee", "adapters/large"]


async def test_a_slow_load_stalls_nobody_and_a_refused_one_is_listed_and_tried_again(house: House) -> None:
    gate = house.shelf.root / "adapters" / house.adapter("slow", "one")[7:] / "gate"
    gate.touch()
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
        await until(lambda: core.r.roster.table.entries[house.digests["slow"]].waits == 2)
        gone.cancel()
        await until(lambda: core.r.roster.table.entries[house.digests["slow"]].waits == 1)
        gate.unlink()
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
        await until(lambda: not house.shelf.holders(bad))  # what was refused is not held
        assert house.shelf.holders(house.digests["ada"]) == ["inference/engine"]
        assert not any(a.in_flight for a in (await core.states()).values())


async def test_unloading_waits_for_requests_and_those_that_come_meanwhile_load_anew(house: House) -> None:
    ada = house.digests["ada"]
    async with house.live() as core:
        await core.r.load_model("models/one", ANY, False)
        busy = await core.begin("adapters/ada")
        await core.r.switch("adapters/ada")
        unloading = asyncio.create_task(core.r.unload_adapter("adapters/ada"))
        await until(lambda: core.r.roster.table.state(ada) == inference_pb2.ADAPTER_STATE_DRAINING)
        late = asyncio.create_task(core.ask("adapters/ada"))
        await until(lambda: core.r.roster.table.entries[ada].waits == 1)
        assert not unloading.done()
        await busy.end()
        assert await unloading == 200
        assert await late == (house.bases["one"], ada)
        assert core.count("loads", kind="adapter", result="loaded") == 2
        assert await core.ask("") == (house.bases["one"], ""), "unloading the default made the base it"

        busy = await core.begin("adapters/ada")
        going = asyncio.create_task(core.r.unload_model("models/one"))
        await until(lambda: core.r.bases.awake[house.bases["one"]].leaving)
        late = asyncio.create_task(core.ask())
        await until(lambda: core.r.bases.waits[house.bases["one"]] == 1)
        assert not going.done()
        await busy.end()
        assert await going > 0
        await refused(late, errors_pb2.REASON_NOT_FOUND, "'models/one' is not loaded")
        assert await core.ask("adapters/ada") == (house.bases["one"], ada), "an adapter's base comes on demand"


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
        others = await core.begin(model="models/two")
        waiting = asyncio.create_task(core.ask("adapters/cy"))
        os.kill(core.pid("one"), signal.SIGKILL)
        lost = await refused(mine.task, errors_pb2.REASON_WORKER_LOST, "SIGKILL")
        assert lost.retry_seconds > 0
        assert core.held() == ("inference engine: models/two", 2_000)
        await refused(core.ask("adapters/ada"), errors_pb2.REASON_WORKER_LOST, "restarted")
        await asyncio.gather(waiting, return_exceptions=True)
        await until(lambda: core.health.said == [False, True])
        states = await core.states()
        assert [n for n in states if n != "adapters/cy"] == ["adapters/ada", "adapters/bob"]
        assert states["adapters/ada"].pinned and not any(a.in_flight for a in states.values())
        assert await core.ask("adapters/ada") == (house.bases["one"], house.digests["ada"])
        assert await others.end() == (house.bases["two"], ""), "its stream went on"
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


async def test_what_engines_tell_of_themselves_is_counted_over_their_lives(house: House) -> None:
    async with house.live() as core:
        live = CollectorRegistry()
        live.register(gauges(core.r))

        def read(name: str, **labels: str) -> float:
            return live.get_sample_value(f"qlorad_inference_{name}", labels) or 0.0

        await core.r.load_model("models/one", ANY, False)
        await core.r.load_model("models/two", ANY, False)
        await core.r.load_adapter("adapters/ada", False)
        long = await core.begin("adapters/ada")
        assert (read("models_resident"), read("batch_rows"), read("batch_waiting")) == (2, 1, 0)
        assert (read("requests_running"), read("requests_waiting")) == (1, 0)
        told = {kind: read("memory_bytes", kind=kind) for kind in ("weights", "adapters", "cache", "prefix")}
        assert told == {"weights": 4_000, "adapters": 200, "cache": 10, "prefix": 14}
        assert (read("adapters", state="device"), read("adapters", state="rejected")) == (1, 0)
        await long.end()
        hits, misses = core.count("prefix_hit_tokens"), core.count("prefix_miss_tokens")
        steps = core.registry.get_sample_value("qlorad_inference_step_seconds_count")
        assert hits == 2 * misses > 0 and steps == misses == core.count("step_tokens") == 3
        await core.r.unload_model("models/one")
        await core.ask("adapters/ada")
        assert core.count("prefix_hit_tokens") > hits, "a fresh engine counts from 0; the daemon goes on"
        assert core.count("prefix_hit_tokens") == 2 * core.count("prefix_miss_tokens")
        assert core.registry.get_sample_value("qlorad_inference_load_seconds_count", {"kind": "base"}) == 3
