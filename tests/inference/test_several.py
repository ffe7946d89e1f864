"""Several prompts as one call, with engines that are real processes and hold no model."""

from __future__ import annotations

import asyncio
import os
import pathlib
import signal
from collections import Counter
from contextlib import aclosing
from typing import Any

import pytest

from qlorad.v1 import errors_pb2
from qlorad.v1 import inference_pb2 as pb
from services.common.errors import Fault
from services.inference.admission import Admission
from services.inference.answering import Answering, Told
from services.inference.generation_cache import GenerationCache
from services.inference.limits import Limit, Limits, Meter
from services.inference.looking import Looking
from services.inference.messages import Ask, batch_asks
from services.inference.metrics import Metrics
from services.inference.places import Places
from services.inference.reach import Reach
from tests.inference.core import ANY, Core, House, until


@pytest.fixture
def house(tmp_path: pathlib.Path) -> House:
    return House(tmp_path)


def room(core: Core, places: int, widest: int, limits: Limits | None = None) -> tuple[Answering, Admission, Meter]:
    """Answering with few places, on the core's bases."""
    meter = Meter(limits or Limits())
    admission = Admission(Places(places), meter, widest)
    metrics: Metrics = core.answering._metrics
    return Answering(Reach(core.r), admission, GenerationCache(0), metrics), admission, meter


def asks(*adapters: str, prompt: str = "x") -> list[Ask]:
    options = pb.GenerationOptions(max_tokens=3)
    items = [pb.BatchItem(adapter=a, prompt=prompt, options=options) for a in adapters]
    return batch_asks(pb.GenerateBatchRequest(items=items), 0, "id")


async def ends_of(answering: Answering, asked: list[Ask]) -> dict[int, Any]:
    """How each of several ended; each ends once, and says nothing after."""
    ends: dict[int, Any] = {}
    async for index, event in answering.several(asked):
        assert index not in ends
        if isinstance(event, pb.Finish | pb.Failure):
            ends[index] = event
    return ends


def nothing_is_left(core: Core, admission: Admission) -> None:
    assert admission.places.taken == 0
    assert all(m.in_flight == 0 for m in core.r.models())


async def test_a_batch_is_larger_than_all_places_and_completes_while_others_are_refused(house: House) -> None:
    async with house.live() as core:
        await core.r.load_model("models/one", ANY, False)
        answering, admission, _ = room(core, places=3, widest=2)
        batches = [asyncio.create_task(ends_of(answering, asks(*["base", "adapters/ada"] * 10))) for _ in range(3)]
        await until(lambda: admission.places.taken == 3)
        with pytest.raises(Fault) as full:
            async for _ in answering.answer(asks("base")[0]):
                raise AssertionError("let in")
        assert full.value.reason == errors_pb2.REASON_QUEUE_FULL
        for ends in await asyncio.gather(*batches):
            assert len(ends) == 20 and all(isinstance(e, pb.Finish) for e in ends.values())
        nothing_is_left(core, admission)


async def test_one_that_fails_fails_alone_and_is_counted(house: House) -> None:
    house.adapter("bad", "one", "bad")
    async with house.live() as core:
        await core.r.load_model("models/one", ANY, False)
        answering, admission, _ = room(core, places=9, widest=4)
        refusals = core.count("refusals", reason="REJECTED")
        ends = await ends_of(answering, asks("base", "adapters/bad", "adapters/none", "adapters/ada", "base"))
        failed = {n: e.reason for n, e in ends.items() if isinstance(e, pb.Failure)}
        assert failed == {1: errors_pb2.REASON_REJECTED, 2: errors_pb2.REASON_NOT_FOUND}
        assert "check 'effect'" in ends[1].message and ends[1].retry_seconds == 0
        assert core.count("refusals", reason="REJECTED") == refusals + 1
        nothing_is_left(core, admission)


async def test_who_leaves_takes_the_waiting_the_running_and_the_unread_along(
    house: House, tmp_path: pathlib.Path
) -> None:
    gate = tmp_path / "gate"
    async with house.live() as core:
        await core.r.load_model("models/one", ANY, False)
        answering, admission, meter = room(core, places=4, widest=3)
        gate.touch()
        async with aclosing(answering.several(asks(*["base"] * 12, prompt=str(gate)))) as told:
            seen = Counter([type((await anext(told))[1]).__name__ for _ in range(4)])
            assert seen["Started"] >= 2 and admission.places.taken == 3
            assert sum(m.in_flight for m in core.r.models()) == 3 == meter.in_flight("")
        nothing_is_left(core, admission)
        assert meter.in_flight("") == 0
        engine: Any = core.r.bases.awake[house.bases["one"]].engine
        await until(lambda: engine.running == engine.waiting == 0)


async def test_a_lost_engine_fails_each_with_a_hint_and_the_call_ends_well(
    house: House, tmp_path: pathlib.Path
) -> None:
    gate = tmp_path / "gate"
    async with house.live() as core:
        await core.r.load_model("models/one", ANY, False)
        answering, admission, _ = room(core, places=8, widest=8)
        gate.touch()
        told: list[Told] = []

        async def read() -> None:
            async for news in answering.several(asks(*["base"] * 5, prompt=str(gate))):
                told.append(news)

        reading = asyncio.create_task(read())
        await until(lambda: sum(isinstance(e, pb.Delta) for _, e in told) == 5)
        os.kill(core.pid("one"), signal.SIGKILL)
        await reading
        failed = [e for _, e in told if isinstance(e, pb.Failure)]
        assert [f.reason for f in failed] == [errors_pb2.REASON_WORKER_LOST] * 5
        assert all(f.retry_seconds > 0 for f in failed)
        await until(lambda: core.awake() == ["models/one"])
        nothing_is_left(core, admission)


async def test_a_key_s_batch_runs_no_wider_than_it_may(house: House, tmp_path: pathlib.Path) -> None:
    gate = tmp_path / "gate"
    async with house.live() as core:
        await core.r.load_model("models/one", ANY, False)
        answering, admission, meter = room(core, 16, 8, Limits({"*": Limit(max_in_flight=2)}))
        gate.touch()
        reading = asyncio.create_task(ends_of(answering, asks(*["base"] * 6, prompt=str(gate))))
        await until(lambda: admission.places.taken == 2)
        with pytest.raises(Fault) as limited:
            async for _ in answering.answer(asks("base")[0]):
                raise AssertionError("let in")
        assert limited.value.metadata == {"limit": "max_in_flight"} and meter.in_flight("") == 2
        gate.unlink()
        assert len(await reading) == 6
        nothing_is_left(core, admission)


async def test_who_leaves_a_score_has_taken_its_tokens(house: House) -> None:
    async with house.live() as core:
        await core.r.load_model("models/one", ANY, False)
        _, admission, meter = room(core, 8, 2, Limits({"*": Limit(tokens_per_minute=50)}))
        looking = Looking(Reach(core.r), admission, core.answering._metrics)
        counted = core.count("prompt_tokens")
        asked = Ask("base", prompt="x y")
        scoring = asyncio.create_task(looking.score(asked, 0))
        await until(lambda: core.count("prompt_tokens") == counted + 100)
        scoring.cancel()
        await asyncio.gather(scoring, return_exceptions=True)
        with pytest.raises(Fault) as limited:
            await looking.score(asked, 0)
        assert limited.value.metadata == {"limit": "tokens_per_minute"} and meter.in_flight("") == 0
        nothing_is_left(core, admission)


async def test_what_is_open_when_the_daemon_must_go_is_told_and_nothing_begins(
    house: House, tmp_path: pathlib.Path
) -> None:
    gate = tmp_path / "gate"
    async with house.live() as core:
        await core.r.load_model("models/one", ANY, False)
        answering, admission, _ = room(core, places=8, widest=2)
        gate.touch()
        reading = asyncio.create_task(ends_of(answering, asks(*["base"] * 5, prompt=str(gate))))
        await until(lambda: admission.places.taken == 2)
        await until(lambda: sum(m.in_flight for m in core.r.models()) == 2)
        answering.end_all()
        ends = await reading
        assert {e.reason for e in ends.values()} == {errors_pb2.REASON_SHUTTING_DOWN} and len(ends) == 5
        with pytest.raises(Fault, match="shutting down"):
            async for _ in answering.answer(asks("base")[0]):
                raise AssertionError("let in")
        nothing_is_left(core, admission)
