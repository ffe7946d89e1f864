"""Any order of calls and deaths leaves residency consistent, and no answer belongs to another.

The engines are processes without a model that check what they are told: nothing is submitted that is not there,
nothing leaves that a row uses.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pathlib
import random
import signal
from collections.abc import Awaitable, Callable

import psutil
import pytest

from qlorad.v1 import errors_pb2
from services.common.errors import Fault
from services.inference import room
from tests.inference.core import ANY, Core, House, until

ALLOWED = {
    errors_pb2.REASON_WORKER_LOST, errors_pb2.REASON_TOO_LARGE, errors_pb2.REASON_NOT_FOUND,
    errors_pb2.REASON_INVALID_REQUEST, errors_pb2.REASON_WRONG_STATE, errors_pb2.REASON_REJECTED,
}  # fmt: skip
ADAPTERS = ("ada", "bob", "cy", "dee", "eve")


class Storm:
    """Callers that do what comes into their mind."""

    def __init__(self, core: Core, steps: int, seed: int, deaths: bool) -> None:
        self.core, self.draw, self.left, self.deaths = core, random.Random(seed), steps, deaths
        self.kills = self.answered = 0
        self.refused: dict[int, int] = {}

    async def caller(self) -> None:
        while self.left > 0:
            self.left -= 1
            try:
                await self.step()()
            except Fault as fault:
                assert fault.reason in ALLOWED, fault
                self.refused[fault.reason] = self.refused.get(fault.reason, 0) + 1

    def step(self) -> Callable[[], Awaitable[object]]:
        draw, r = self.draw, self.core.r
        adapter, base = f"adapters/{draw.choice([*ADAPTERS, 'best'])}", f"models/{draw.choice(['one', 'two', 'three'])}"
        roll = draw.random()
        if roll < 0.60:
            return lambda: self.ask(adapter)
        if roll < 0.70:
            return lambda: self.ask(draw.choice(["", "base"]), draw.choice(["", base]))
        if roll < 0.75:
            return lambda: r.load_adapter(adapter, False)
        if roll < 0.83:
            return lambda: r.unload_adapter(adapter)
        if roll < 0.86:
            return lambda: r.load_model(base, ANY, False)
        if roll < 0.88:
            return lambda: r.unload_model(base)
        if roll < 0.93:
            return lambda: r.switch(draw.choice([adapter, "base"]))
        if roll < 0.99 or not self.deaths:
            digest = self.core.house.digests[draw.choice(ADAPTERS)]
            return lambda: asyncio.to_thread(self.core.house.shelf.set_alias, "adapters", "best", digest)
        return self.kill

    async def ask(self, adapter: str, model: str = "") -> None:
        """Tokens are those of the digests that were told; a name that does not move is answered by what it means."""
        _, digest = await self.core.ask(adapter, model)
        name = adapter.removeprefix("adapters/")
        if name in self.core.house.digests:
            assert digest == self.core.house.digests[name]
        self.answered += 1

    async def kill(self) -> None:
        awake = list(self.core.r.bases.awake.values())
        if awake:
            engine = self.draw.choice(awake).engine
            if engine.fault is None:  # type: ignore[attr-defined]
                self.kills += 1
                with contextlib.suppress(ProcessLookupError):  # the daemon has let it go, and hears of its end soon
                    os.kill(engine.pid, signal.SIGKILL)  # type: ignore[attr-defined]
                await until(lambda: engine.fault is not None)  # type: ignore[attr-defined]


async def storm(house: House, steps: int, seed: int, deaths: bool) -> Storm:
    house.shelf.set_alias("adapters", "best", house.digests["ada"])
    house.adapter("bad", "one", "bad")
    me = psutil.Process()
    async with house.live(memory_bytes=4_000, adapter_bytes=500) as core:
        await core.r.load_model("models/one", ANY, False)
        made = Storm(core, steps, seed, deaths)
        await asyncio.gather(*(made.caller() for _ in range(6)))
        r = core.r
        await until(lambda: not core.health.said or core.health.said[-1], seconds=60)
        for awake in r.bases.awake.values():
            if awake.restoring is not None:
                await asyncio.wait([awake.restoring])
        assert "Traceback" not in (house.root / "engine.log").read_text(), "an engine was told what it could not do"
        assert core.count("engine_losses") <= made.kills
        assert not r.bases.waits and not any(a.holds for a in r.bases.awake.values())
        assert not any(a.in_flight for a in (await core.states()).values())
        assert sum(m.memory_bytes for m in r.models()) <= 4_000
        assert sum(i.bytes for i in r.roster.table.items()) <= 500
        assert {e.digest for e in r.roster.table.entries.values() if e.is_in_memory} == {
            a.digest for a in r.memory.now.adapters if a.base_digest in r.bases.awake
        }
        held = core.held()
        assert (held[1] if held else 0) == sum(m.memory_bytes for m in r.models())
        for base in list(r.memory.now.bases):
            await r.unload_model(base.model)
        assert core.held() is None and not r.memory.now.adapters
    assert not any(house.shelf.holders(digest) for digest in house.digests.values())
    assert not me.children(), "no engine is left"
    return made


@pytest.fixture(autouse=True)
def impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters are closed to newcomers while others come and go, not once in two seconds."""
    monkeypatch.setattr(room, "YIELD", 0.005)


async def test_p24_any_order_of_calls_leaves_residency_consistent(tmp_path: pathlib.Path) -> None:
    made = await storm(House(tmp_path), 250, 1, deaths=False)
    assert made.answered > 80, made.refused


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
async def test_p24_any_order_of_calls_and_deaths(tmp_path: pathlib.Path, seed: int) -> None:
    made = await storm(House(tmp_path), 600, seed, deaths=True)
    assert made.answered > 50 and made.kills, made.refused
