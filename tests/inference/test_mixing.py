"""Outputs never mix adapters, and memory stays flat, whatever order things come in."""

from __future__ import annotations

import pathlib
import random
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import psutil
import pytest

from qlorad.v1 import inference_pb2
from services.common import facts
from services.common.shelf import Shelf
from tests.house import House
from tests.inference import kit

Houses = Callable[[pathlib.Path], House]

ADAPTERS = ("ada", "bob", "cy", "dee")
ALIASES = ("best", "next")
CALLERS = 4


@dataclass
class Names:
    """What each name meant, and when: an answer must be of something that its name meant while it was asked."""

    shelf: Shelf
    digests: dict[str, str]
    """Adapter -> digest; "base" -> empty."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    moves: dict[str, list[tuple[float, float, str]]] = field(default_factory=dict)
    """Name -> when a move began, when it was over, and to what."""

    def move(self, alias: str, adapter: str) -> None:
        with self.lock:
            moves = self.moves.setdefault(alias, [])
            begun, digest = time.monotonic(), self.digests[adapter]
            moves.append((begun, float("inf"), digest))
            self.shelf.set_alias("adapters", alias, digest)
            moves[-1] = (begun, time.monotonic(), digest)

    def meant(self, name: str, begun: float, ended: float) -> set[str]:
        """Every digest that a name may have meant between two moments: from its move until the next one was over."""
        if name in self.digests:
            return {self.digests[name]}
        moves = list(self.moves[name])
        until = [*(over for _, over, _ in moves[1:]), float("inf")]
        return {d for (since, _, d), end in zip(moves, until, strict=True) if since <= ended and end >= begun}


@dataclass
class Storm:
    """Callers that load, unload, move, switch and ask, all at once."""

    stub: kit.Stub
    names: Names
    oracle: dict[str, list[dict[str, Any]]]
    steps: int
    seed: int
    asked: int = 0
    wrong: list[str] = field(default_factory=list)
    defaults: list[tuple[float, float, str]] = field(default_factory=lambda: [(0.0, 0.0, "base")])
    """Switches: begun, ended, to what name."""

    def __post_init__(self) -> None:
        self.by_digest = {self.names.digests[name]: self.oracle[name] for name in ("base", *ADAPTERS)}
        self.left = iter(range(self.steps))
        self.lock = threading.Lock()

    def run(self) -> None:
        callers = [threading.Thread(target=self.call, args=(self.seed + n,)) for n in range(CALLERS)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()

    def call(self, seed: int) -> None:
        draw = random.Random(seed)
        while True:
            with self.lock:
                if next(self.left, None) is None or self.wrong:
                    return
            try:
                self.step(draw)
            except Exception as e:
                self.wrong.append(repr(e)[:500])

    def step(self, draw: random.Random) -> None:
        name = draw.choice([*ADAPTERS, *ALIASES])
        roll = draw.random()
        if roll < 0.62:
            self.ask(draw.choice([*ADAPTERS, *ALIASES, "base", ""]), draw)
        elif roll < 0.70:
            self.stub.LoadAdapter(inference_pb2.LoadAdapterRequest(adapter=f"adapters/{name}"), timeout=60)
        elif roll < 0.82:
            self.may_be_gone(lambda: kit.unload_adapter(self.stub, f"adapters/{name}"))
        elif roll < 0.92:
            self.names.move(draw.choice(ALIASES), draw.choice(ADAPTERS))
        else:
            name = draw.choice([name, "base"])
            begun = time.monotonic()
            self.defaults.append((begun, float("inf"), name))
            at = len(self.defaults) - 1
            self.may_be_gone(lambda: kit.switch(self.stub, name if name == "base" else f"adapters/{name}"))
            self.defaults[at] = (begun, time.monotonic(), name)

    def may_be_gone(self, call: Callable[[], Any]) -> None:
        """Another caller may have unloaded what is named."""
        try:
            call()
        except Exception as e:
            if kit.refusal(e).reason != "NOT_FOUND":  # type: ignore[arg-type]
                raise

    def ask(self, name: str, draw: random.Random) -> None:
        tokens, which = draw.randint(1, 40), draw.randrange(3)
        prompt = self.oracle["base"][which]["prompt"]
        named = name if name in ("", "base") else f"adapters/{name}"
        begun = time.monotonic()
        answer = kit.generate(self.stub, prompt, named, max_tokens=tokens)
        ended = time.monotonic()
        digest = answer.started.adapter_digest
        # Whoever is the default was set by a switch of before or of meanwhile; or its unloading made the base it.
        meant = {d for n in self.default_names(ended) for d in self.names.meant(n, 0.0, ended)} if not name else (
            self.names.meant(name, begun, ended)
        )  # fmt: skip
        self.asked += 1
        if digest not in meant:
            self.wrong.append(f"{name!r} was answered by {digest}")
        if answer.ids != self.by_digest[digest][which]["ids"][:tokens]:
            self.wrong.append(f"{name!r}: {answer.ids} is not what {digest} says alone")

    def default_names(self, ended: float) -> set[str]:
        return {"base", *(name for begun, _, name in list(self.defaults) if begun <= ended)}


def storm(house: House, oracle: dict[str, list[dict[str, Any]]], steps: int, seed: int) -> Storm:
    """A daemon whose adapters' budget holds about half of them, and callers on it."""
    shelf = Shelf(house.home / "store")
    manifests = [shelf.open("adapters", name).manifest for name in ADAPTERS]
    sizes = [4 * facts.from_manifest(facts.AdapterFacts, manifest).parameters for manifest in manifests]
    size = max(max(sizes), sum(sizes) * 6 // 10)
    daemon, stub = kit.start(house, "--adapter-bytes", str(size))
    kit.load(stub)
    names = Names(shelf, {"base": "", **{name: shelf.resolve("adapters", name) for name in ADAPTERS}})
    for alias in ALIASES:
        names.move(alias, "ada")
    made = Storm(stub, names, oracle, steps, seed)
    made.run()
    assert not made.wrong, made.wrong
    assert made.asked > steps // 3
    assert kit.metric(daemon, "qlorad_inference_memory_bytes", 'kind="adapters"') <= size
    if steps > 500:
        assert kit.metric(daemon, "qlorad_inference_evictions_total", 'kind="adapter"') > 10
    listed = kit.adapters(stub).values()
    assert not any(a.in_flight for a in listed)
    return made


def test_p24_what_loads_moves_and_leaves_never_colours_an_answer(
    serving_home: pathlib.Path, house_factory: Houses, oracle: dict[str, list[dict[str, Any]]]
) -> None:
    storm(house_factory(serving_home), oracle, 60, 1)


@pytest.mark.slow
def test_p24_a_thousand_interleavings(
    serving_home: pathlib.Path, house_factory: Houses, oracle: dict[str, list[dict[str, Any]]]
) -> None:
    storm(house_factory(serving_home), oracle, 1_700, 2)


def cycles(house: House, count: int) -> None:
    """Loads and unloads, and asks now and then; what was freed is what was held, and memory stays where it was."""
    daemon, stub = kit.start(house)
    kit.load(stub)
    watched = {"daemon": psutil.Process(daemon.pid), "engine": kit.engine_of(daemon)}
    seen: dict[str, list[tuple[int, float]]] = {name: [] for name in watched}
    for number in range(count):
        name = ADAPTERS[number % len(ADAPTERS)]
        if number % 10 == 0:
            kit.generate(stub, "x", f"adapters/{name}", max_tokens=2)
        loaded = stub.LoadAdapter(inference_pb2.LoadAdapterRequest(adapter=f"adapters/{name}"), timeout=60).adapter
        freed = kit.unload_adapter(stub, f"adapters/{name}")
        assert abs(freed - loaded.memory_bytes) <= 0.05 * loaded.memory_bytes
        if number >= count // 4 and number % 10 == 0:
            for name, process in watched.items():
                seen[name].append((number, process.memory_info().rss))
    assert not kit.adapters(stub)
    assert kit.metric(daemon, "qlorad_inference_memory_bytes", 'kind="adapters"') == 0
    for name, points in seen.items():
        slope = statistics.linear_regression(*zip(*points, strict=True)).slope
        print([round(rss / 2**20, 2) for _, rss in points[:: max(1, len(points) // 12)]])
        grown = slope * (points[-1][0] - points[0][0])
        held = points[0][1]
        print(f"{name}: {held / 2**20:.1f} MiB, {slope:.1f} bytes a cycle, {grown / 2**20:+.2f} MiB in all")
        assert abs(grown) < 0.02 * held + (2 << 20), f"{name} grew by {grown / 2**20:.1f} MiB"


@pytest.mark.slow
def test_p25_load_and_unload_leave_memory_flat(serving_home: pathlib.Path, house_factory: Houses) -> None:
    cycles(house_factory(serving_home), 2_000)


@pytest.mark.storm
def test_p25_storm(serving_home: pathlib.Path, house_factory: Houses) -> None:
    cycles(house_factory(serving_home), 10_000)
