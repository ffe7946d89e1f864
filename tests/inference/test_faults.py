"""Engines that die, devices that are held, queues that are full, daemons that are killed."""

from __future__ import annotations

import concurrent.futures
import pathlib
from collections.abc import Callable, Iterator

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from qlorad.v1 import inference_pb2
from services.common import devices
from services.common.errors import Fault
from tests.house import House, eventually
from tests.inference import kit

Houses = Callable[[pathlib.Path], House]
SERVICE = "qlorad.v1.InferenceService"


def long_request(adapter: str = "base", tokens: int = 900) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(
        prompt="import os\n\n\nclass Store:\n",
        adapter=adapter,
        options=inference_pb2.GenerationOptions(max_tokens=tokens),
    )


def test_p6_one_engine_of_two_is_killed_and_comes_back_with_its_adapters(
    serving_home: pathlib.Path, house_factory: Houses, oracle: dict
) -> None:
    """Its streams end with UNAVAILABLE and a hint; those of the other base, and the lease, do not notice."""
    house = house_factory(serving_home)
    daemon, stub = kit.start(house)
    kit.load(stub, "ada", "bob")
    other = kit.load_model(stub, "models/other")
    assert kit.held(serving_home) == (
        "inference engines: models/starter-test, models/other", 2 * other.memory_bytes,
    )  # fmt: skip
    kit.switch(stub, "adapters/ada")
    watch = health_pb2_grpc.HealthStub(house.channel("inference")).Watch(
        health_pb2.HealthCheckRequest(service=SERVICE), timeout=120
    )
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    asks = [long_request(a) for a in ("base", "adapters/ada", "adapters/bob", "adapters/eve")]
    asks[0].model = kit.MODEL
    asks[3].prompt = next(a["prompt"] for a in oracle["eve"] if len(a["ids"]) == 40)  # one that does not end early
    streams = [stub.Generate(ask, timeout=120) for ask in asks]
    for stream in streams:
        assert next(stream).HasField("started")
        assert next(stream).HasField("delta")
    kit.engines_of(daemon)[0].kill()
    for stream in streams[:3]:
        with pytest.raises(grpc.RpcError) as caught:
            list(stream)
        lost = kit.refusal(caught.value)
        assert (lost.code, lost.reason) == (grpc.StatusCode.UNAVAILABLE, "WORKER_LOST")
        assert lost.retry_seconds > 0 and "SIGKILL" in lost.message
    assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
    held = kit.held(serving_home)
    assert held is not None and "models/other" in held[0] and held[1] >= other.memory_bytes
    try:
        kit.read(stub.Generate(asks[1], timeout=60))  # where the engine is back before this is asked
    except grpc.RpcError as error:
        meanwhile = kit.refusal(error)
        assert meanwhile.reason == "WORKER_LOST" and meanwhile.retry_seconds > 0
    eve = oracle["eve"][0]
    assert kit.generate(stub, eve["prompt"], "adapters/eve", max_tokens=40).ids == eve["ids"]
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    watch.cancel()
    back = [a.adapter for a in kit.adapters(stub).values() if a.base_digest != other.digest]
    assert back == ["adapters/ada", "adapters/bob"]
    for adapter, model in (("base", kit.MODEL), ("adapters/ada", ""), ("adapters/bob", ""), ("", "")):
        expected = oracle[(adapter or "adapters/ada").removeprefix("adapters/")][0]
        options = inference_pb2.GenerationOptions(max_tokens=len(expected["ids"]))
        retry = inference_pb2.GenerateRequest(prompt=expected["prompt"], adapter=adapter, model=model, options=options)
        assert kit.read(stub.Generate(retry, timeout=60)).ids == expected["ids"]
    assert kit.read_rest(streams[3]).completion_tokens > 40, "the other base's stream went on"
    assert kit.metric(daemon, "qlorad_inference_engine_losses_total") == 1
    assert kit.metric(daemon, "qlorad_inference_engine_restarts_total") == 1


def test_unloading_gives_memory_and_device_back(serving_home: pathlib.Path, house_factory: Houses) -> None:
    house = house_factory(serving_home)
    daemon, stub = kit.start(house)
    kit.load(stub, "ada")
    engine = kit.engine_of(daemon)
    (model,) = stub.ListLoadedModels(inference_pb2.ListLoadedModelsRequest()).models
    assert kit.held(serving_home) == ("inference engine: models/starter-test", model.memory_bytes)
    resident = engine.memory_info().rss
    stream = stub.Generate(long_request(tokens=200), timeout=60)
    assert next(stream).HasField("started")
    freed = stub.UnloadModel(inference_pb2.UnloadModelRequest(model=kit.MODEL), timeout=60).freed_bytes
    assert kit.read_rest(stream).completion_tokens == 200, "requests in flight finish first"
    assert abs(freed - resident) < 0.2 * resident
    assert not engine.is_running()
    assert kit.held(serving_home) is None
    assert not stub.ListLoadedModels(inference_pb2.ListLoadedModelsRequest()).models
    for call in (
        lambda: stub.Generate(long_request(), timeout=10),
        lambda: stub.UnloadModel(inference_pb2.UnloadModelRequest()),
        lambda: stub.SwitchAdapter(inference_pb2.SwitchAdapterRequest(adapter="adapters/ada")),
    ):
        assert kit.refused(call).reason == "NOT_FOUND"
    homeless = kit.refused(lambda: stub.LoadAdapter(inference_pb2.LoadAdapterRequest(adapter="adapters/ada")))
    assert homeless.reason == "WRONG_STATE"
    assert psutil.Process(daemon.pid).memory_info().rss < 100 << 20


def test_a_held_device_is_named_with_its_holder(serving_home: pathlib.Path, house_factory: Houses) -> None:
    house = house_factory(serving_home)
    _, stub = kit.start(house)
    lease = devices.acquire(kit.leases(serving_home), "cpu", "jobs/nightly", 12345)
    try:
        load = inference_pb2.LoadModelRequest(model=kit.MODEL)
        busy = kit.refused(lambda: stub.LoadModel(load, timeout=30))
    finally:
        lease.release()
    assert (busy.code, busy.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "DEVICE_BUSY")
    assert (busy.info.metadata["owner"], busy.info.metadata["owner_bytes"]) == ("jobs/nightly", "12345")
    assert busy.retry_seconds > 0
    loaded = stub.LoadModel(load, timeout=60).model
    assert loaded.precision == inference_pb2.PRECISION_BF16, "left to the daemon, a small model is held in bf16"


@pytest.fixture
def small(serving_home: pathlib.Path, house_factory: Houses) -> Iterator[tuple[House, kit.Stub]]:
    """One row, one place to wait, sleeps after a second."""
    house = house_factory(serving_home)
    _, stub = kit.start(house, "--max-rows", "1", "--max-waiting", "1", "--idle-unload-seconds", "1")
    kit.load(stub, "ada")
    yield house, stub


def test_a_full_queue_refuses_at_once_and_keeps_what_it_took(small: tuple[House, kit.Stub]) -> None:
    _, stub = small
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        running = stub.Generate(long_request(), timeout=60)
        assert next(running).HasField("started")
        assert next(running).HasField("delta")
        waiting = stub.Generate(long_request(tokens=5), timeout=60)
        assert next(waiting).HasField("started")
        full = kit.refused(lambda: stub.Generate(long_request(), timeout=60))
        assert (full.code, full.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
        assert full.retry_seconds > 0
        ends = list(pool.map(kit.read_rest, (running, waiting)))
    assert [end.completion_tokens for end in ends] == [900, 5]
    assert ends[1].queue_seconds > 0.05


@pytest.mark.slow
def test_an_idle_engine_sleeps_and_wakes_with_what_it_had(small: tuple[House, kit.Stub]) -> None:
    house, stub = small
    stub.SwitchAdapter(inference_pb2.SwitchAdapterRequest(adapter="adapters/ada"))
    before = kit.generate(stub, "x", "", max_tokens=8)
    assert before.started.adapter_digest
    eventually(lambda: kit.held(house.home) is None, seconds=20, what="sleep")
    assert not stub.ListLoadedModels(inference_pb2.ListLoadedModelsRequest()).models
    lease = devices.acquire(kit.leases(house.home), "cpu", "jobs/nightly", 1)
    assert kit.refused(lambda: stub.Generate(long_request(), timeout=30)).reason == "DEVICE_BUSY"
    lease.release()
    after = kit.generate(stub, "x", "", max_tokens=8)
    assert (after.ids, after.started.adapter_digest) == (before.ids, before.started.adapter_digest)
    eventually(lambda: kit.held(house.home) is None, seconds=20, what="sleep again")
    unload = inference_pb2.UnloadAdapterRequest(adapter="adapters/ada")
    assert stub.UnloadAdapter(unload).freed_bytes == 0, "what sleeps is let go without waking"
    assert kit.held(house.home) is None
    assert kit.generate(stub, "x", "", max_tokens=8).started.adapter_digest == ""
    assert not stub.ListAdapters(inference_pb2.ListAdaptersRequest()).adapters


@pytest.mark.slow
def test_a_base_is_served_in_nf4_beside_an_adapter(serving_home: pathlib.Path, house_factory: Houses) -> None:
    house = house_factory(serving_home)
    _, stub = kit.start(house)
    kit.load(stub, "bob", precision=inference_pb2.PRECISION_NF4)
    (model,) = stub.ListLoadedModels(inference_pb2.ListLoadedModelsRequest()).models
    assert model.precision == inference_pb2.PRECISION_NF4 and model.memory_bytes < 656_000 * 4
    base, bob = (kit.generate(stub, "def f():", name, max_tokens=12) for name in ("base", "adapters/bob"))
    assert base.ids != bob.ids
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        names = ["base", "adapters/bob"] * 2
        mixed = list(pool.map(lambda name: kit.generate(stub, "def f():", name, max_tokens=12), names))
    assert all(len(answer.ids) == 12 for answer in mixed)


@pytest.mark.slow
def test_a_draining_daemon_lets_answers_finish(serving_home: pathlib.Path, house_factory: Houses) -> None:
    house = house_factory(serving_home)
    daemon, stub = kit.start(house)
    kit.load(stub)
    engine = kit.engine_of(daemon)
    watch = stub.WatchAdapters(inference_pb2.WatchAdaptersRequest(), timeout=60)
    assert next(watch).snapshot_end
    stream = stub.Generate(long_request(tokens=300), timeout=60)
    assert next(stream).HasField("started")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        ending = pool.submit(daemon.stop)
        assert kit.read_rest(stream).completion_tokens == 300
        assert ending.result() == 0
    assert list(watch) == [], "a watch ends well"
    assert not engine.is_running()


@pytest.mark.slow
def test_bases_take_turns_under_a_budget_and_are_remembered_over_kill_9(
    serving_home: pathlib.Path, house_factory: Houses, oracle: dict
) -> None:
    house = house_factory(serving_home)
    flags = ("--memory-bytes", "3000000", "--adapter-bytes", "1000000", "--idle-unload-seconds", "0")
    daemon, stub = kit.start(house, *flags)
    kit.load(stub, "ada")
    (first,) = kit.models(stub).values()
    assert 2_000_000 < first.memory_bytes < 3_000_000, "two do not fit, also if one is half as large"
    eve, ada = oracle["eve"][0], oracle["ada"][0]
    for name, expected in (("eve", eve), ("ada", ada), ("eve", eve)):
        answer = kit.generate(stub, expected["prompt"], f"adapters/{name}", max_tokens=5)
        assert answer.ids == expected["ids"][:5] or name == "eve", "a base on demand is held as the daemon chooses"
        assert len(kit.models(stub)) == len(kit.engines_of(daemon)) == 1
    assert list(kit.models(stub)) == ["models/other"] and list(kit.adapters(stub)) == ["adapters/eve"]
    assert kit.metric(daemon, "qlorad_inference_evictions_total", 'kind="base"') == 3
    kit.load_model(stub, "models/other", precision=inference_pb2.PRECISION_UNSPECIFIED, pin=True)
    full = kit.refused(lambda: stub.Generate(long_request("adapters/ada"), timeout=60))
    assert (full.code, full.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_LARGE")
    assert "models/other" in full.message and "pinned" in full.message
    with pytest.raises(Fault) as caught:
        devices.acquire(kit.leases(serving_home), "cpu", "jobs/nightly")
    assert "inference engine: models/other" in caught.value.message

    engines = kit.engines_of(daemon)
    daemon.kill()
    eventually(lambda: kit.held(serving_home) is None, seconds=20, what="a free device")
    eventually(lambda: not any(engine.is_running() for engine in engines), seconds=20, what="the engines' end")
    daemon, stub = kit.start(house, "--idle-unload-seconds", "0")
    assert not kit.models(stub), "nothing is loaded by itself"
    assert kit.generate(stub, ada["prompt"], "adapters/ada", max_tokens=40).ids == ada["ids"]
    assert list(kit.models(stub)) == [kit.MODEL], "the other one sleeps on"
    assert kit.generate(stub, eve["prompt"], "adapters/eve", max_tokens=5).ids
    assert kit.models(stub)["models/other"].pinned
    several = kit.refused(lambda: stub.Generate(long_request(), timeout=60))
    assert several.fields == ["model"] and "models/other" in several.message
