"""The parts of the serving benchmark that compare ours with itself: latency, growth, a shared service.

Law of this room: the same requests at the same moments, with and without what is asked about.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

from benchmarks import serve_home, serve_load, talk
from benchmarks.serve_home import MOST, SEED, Prompt, name_of
from benchmarks.serve_house import Served, serving
from benchmarks.serve_load import BASE, Crowd, Seen
from benchmarks.serve_parts import Bench
from services.common import facts
from services.inference.app import Config

SHORT_PROMPT, SHORT_NEW, LONG_PROMPT = 32, 16, 4000
BETWEEN_LONG = 50
"""Short requests from one long one to the next."""
LOAD = 0.4
"""Part of what the service can do that short requests ask of it."""
USERS = 32


class Shapes:
    """Measures into the results of a bench."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._results = bench.results

    def latency(self) -> None:
        """Short requests, with and without prompts of 4,000 tokens arriving among them."""
        blocks = 2 if self._bench.quick else 4
        count = 40 if self._bench.quick else 100
        found: dict[bool, list[Seen]] = {False: [], True: []}
        with serving(self._bench.home) as served:
            rate = LOAD * self._capacity(served)
            for number in range(blocks):
                for crowded in (False, True):
                    found[crowded] += self._block(served, count, rate, number, crowded)
        told: dict[str, Any] = {"requests": blocks * count, "arrivals_per_second": round(rate, 2)}
        for crowded, seen in found.items():
            told["with_long" if crowded else "without"] = {
                "first_token_ms": serve_load.spread([s.first_token for s in seen]),
                "between_tokens_ms": serve_load.spread([g for s in seen for g in s.gaps]),
            }
        for key, what in (("ttft", "first_token_ms"), ("itl", "between_tokens_ms")):
            ratio = told["with_long"][what]["p99"] / told["without"][what]["p99"]
            self._results[f"serve.{key}_p99_ratio"] = round(ratio, 3)
        self._results["latency"] = told
        print("latency", told, flush=True)

    def _capacity(self, served: Served) -> float:
        """Short requests a second, eight at a time; also warms."""
        took = []
        for _ in range(4):
            prompts = self._bench.prompts.take(8, SHORT_PROMPT)
            took.append(served.run(serve_load.burst(served.stub, prompts, SHORT_NEW, [BASE] * 8)).seconds)
        return 8 / statistics.median(took)

    def _block(self, served: Served, count: int, rate: float, number: int, crowded: bool) -> list[Seen]:
        short = self._bench.prompts.take(count, SHORT_PROMPT)
        long = self._bench.prompts.take(count // BETWEEN_LONG + 1, LONG_PROMPT) if crowded else []

        async def block() -> list[Seen]:
            reading: list[asyncio.Task[Seen]] = []

            def start(n: int) -> Any:
                if long and n % BETWEEN_LONG == BETWEEN_LONG // 4:
                    reading.append(asyncio.create_task(serve_load.ask(served.stub, long.pop(), 1)))
                return serve_load.ask(served.stub, short[n], SHORT_NEW)

            seen = await serve_load.open_loop(count, rate, SEED + number, start)
            serve_load.sound(serve_load.Burst(list(await asyncio.gather(*reading)), 1.0))
            return seen

        seen = served.run(block())
        return serve_load.sound(serve_load.Burst(seen, 1.0)).seen

    def growth(self) -> None:
        """What adapters, rows and context cost: the exponent from the least to the most, the worst of the three."""
        quick = self._bench.quick
        serve_home.add_adapters(self._bench.home, 8 if quick else MOST)
        names = [name_of(n) for n in range(8 if quick else MOST)]
        with serving(self._bench.home, names, flags=["--max-rows", "32", "--max-waiting", "256"]) as served:
            requests = 64 if quick else MOST
            tables = {
                "adapters": {
                    n: self._time(served, requests, 32, 16, [names[k % n] for k in range(requests)])
                    for n in (1, 8, 32, 128) if n <= len(names)
                },
                "rows": {n: self._time(served, n, 64, 32, [BASE] * n) for n in (1, 2, 4, 8, 16, 32)},
                "context": {
                    n: self._time(served, 1, n, 16, [BASE]) for n in (64, 128, 256, 512, 1024, 2048, 4096)
                    if not quick or n <= 1024
                },
            }  # fmt: skip
        told = {what: {"seconds": {k: round(v, 4) for k, v in t.items()}, **slopes(t)} for what, t in tables.items()}
        self._results["growth"] = told
        self._results["serve.growth"] = max(t["exponent"] for t in told.values())
        for what, table in told.items():
            print("growth", what, table, flush=True)

    def _time(self, served: Served, count: int, prompt: int, new: int, adapters: Sequence[str]) -> float:
        took = []
        for number in range(3):
            prompts = self._bench.prompts.take(count, prompt)
            seconds = served.run(serve_load.burst(served.stub, prompts, new, adapters)).seconds
            took += [seconds] if number else []  # the first warms
        return statistics.median(took)

    def load(self) -> None:
        """32 users, 32 adapters of unequal popularity, half of them in memory when it begins."""
        bench = self._bench
        serve_home.add_adapters(bench.home, USERS)
        names = [name_of(n) for n in range(USERS)]
        crowd = Crowd(USERS, USERS, 20.0 if bench.quick else 120.0, SEED)
        # Made before the clock runs; more only if these are used up.
        pool = {n: bench.prompts.take(2 if bench.quick else 8, n) for n in range(16, 257)}

        def prompt(tokens: int) -> Prompt:
            return pool[tokens].pop() if pool[tokens] else bench.prompts.take(1, tokens)[0]

        with serving(bench.home, names[1::2], flags=self._room_for_half()) as served:
            looks = Looks()

            async def both() -> list[Seen]:
                looking = asyncio.create_task(looks.look(served))
                try:
                    return await crowd.run(served.stub, prompt, names)
                finally:
                    looking.cancel()

            begun = time.perf_counter()
            seen = served.run(both())
            seconds = time.perf_counter() - begun
        good = [s for s in seen if not s.error]
        errors: dict[str, int] = {}
        for s in seen:
            if s.error:
                errors[s.error.partition(":")[0]] = errors.get(s.error.partition(":")[0], 0) + 1
        told = {
            "requests": len(seen), "errors": errors, "example": next((s.error for s in seen if s.error), ""),
            "requests_per_second": round(len(good) / seconds, 2),
            "tokens_per_second": round(sum(len(s.ids) for s in good) / seconds, 1),
            "first_token_ms": serve_load.spread([s.first_token for s in good]) if good else {},
            "between_tokens_ms": serve_load.spread([g for s in good for g in s.gaps]) if good else {},
            "hit_rate": round(statistics.fmean(looks.was_there(s) for s in seen), 3),
            "top_fifth_share": round(sum(crowd.popularity()[: USERS // 5]), 3),
            "rss_mb": round(looks.rss[-1][1] / 1e6), "rss_slope_mb_a_minute": round(looks.slope(), 2),
        }  # fmt: skip
        self._results["load"] = told
        self._results["serve.load_errors"] = sum(errors.values())
        print("load", told, flush=True)

    def _room_for_half(self) -> list[str]:
        """A bound under which half of the adapters fit into memory; where there is none, all that were asked for."""
        if "adapter_bytes" not in {f.name for f in dataclasses.fields(Config)}:
            return []
        told = facts.from_manifest(facts.AdapterFacts, self._bench.shelf.open("adapters", name_of(0)).manifest)
        return ["--adapter-bytes", str((USERS // 2) * told.parameters * 2 + 1_000_000)]


class Looks:
    """What was seen from outside while users were at work."""

    def __init__(self) -> None:
        self.rss: list[tuple[float, int]] = []
        self._there: list[tuple[float, set[str]]] = []

    async def look(self, served: Served) -> None:
        """Looks four times a second until it is cancelled."""
        while True:
            self._there.append((time.perf_counter(), await served.resident()))
            size = talk.resident_bytes(served.pid) + talk.resident_bytes(served.engine().pid)
            self.rss.append((time.perf_counter(), size))
            await asyncio.sleep(0.25)

    def was_there(self, seen: Seen) -> bool:
        """Whether a request's adapter was in memory when it was sent, as of the last look before."""
        before = [names for at, names in self._there if at <= seen.sent] or [self._there[0][1]]
        return seen.adapter in before[-1]

    def slope(self) -> float:
        """Megabytes a minute over the second half, by least squares."""
        half = self.rss[len(self.rss) // 2 :]
        if len(half) < 2:
            return 0.0
        times, sizes = [at / 60 for at, _ in half], [size / 1e6 for _, size in half]
        return statistics.linear_regression(times, sizes).slope


def slopes(table: dict[int, float]) -> dict[str, float]:
    """The exponent from the least to the most, and the steepest from one to the next."""

    def exponent(a: int, b: int) -> float:
        return round(math.log(table[b] / table[a]) / math.log(b / a), 3)

    at = sorted(table)
    return {
        "exponent": exponent(at[0], at[-1]),
        "steepest": max(exponent(a, b) for a, b in itertools.pairwise(at)),
    }
