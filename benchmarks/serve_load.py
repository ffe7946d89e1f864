"""Requests as users send them: asyncio, one gRPC channel, every token's arrival noted by the user's own clock.

Law of this room: tokens are counted as they arrive, never assumed; a call that fails is counted by its code.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from benchmarks.serve_home import Prompt

import grpc  # isort: skip  (serve_home sets what it reads)

from qlorad.v1 import inference_pb2, inference_pb2_grpc

Stub = inference_pb2_grpc.InferenceServiceStub
BASE = "base"


@dataclass(slots=True)
class Seen:
    """One request as its user saw it."""

    adapter: str
    sent: float
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    """When a message with tokens came, and with how many."""
    ids: list[int] = field(default_factory=list)
    ended: float = 0.0
    prompt_tokens: int = 0
    cached: int = 0
    """Tokens of the prompt that were at hand."""
    error: str = ""

    @property
    def first_token(self) -> float:
        return self.arrivals[0][0] - self.sent

    @property
    def gaps(self) -> list[float]:
        """Between messages; tokens that came together came at once."""
        times = [at for at, _ in self.arrivals]
        return [b - a for a, b in itertools.pairwise(times)]


@dataclass(frozen=True, slots=True)
class Burst:
    """Requests that were sent at once, and what came of them."""

    seen: list[Seen]
    seconds: float
    """From the first sending to the last end."""

    @property
    def tokens(self) -> int:
        return sum(len(s.ids) for s in self.seen)

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds

    @property
    def steps(self) -> list[float]:
        """See `steps_of`."""
        each = [[at for at, count in s.arrivals for _ in range(count)] for s in self.seen]
        return steps_of(each, min(s.sent for s in self.seen))


def steps_of(arrivals: list[list[float]], begun: float) -> list[float]:
    """Seconds from each row's n-th token to the next, of the row that was last to get it; the first from the
    sending. Together they are all the time until the last token."""
    ends = [max(times[n] for times in arrivals if len(times) > n) for n in range(max(map(len, arrivals)))]
    return [b - a for a, b in itertools.pairwise([begun, *ends])]


async def ask(stub: Stub, prompt: Prompt, new: int, adapter: str = BASE) -> Seen:
    """One greedy request that runs to its last token."""
    options = inference_pb2.GenerationOptions(max_tokens=new, temperature=0.0, ignore_end=True)
    name = adapter if adapter == BASE else f"adapters/{adapter}"
    request = inference_pb2.GenerateRequest(adapter=name, prompt=prompt.text, options=options)
    seen = Seen(adapter, time.perf_counter())
    try:
        async for message in stub.Generate(request, timeout=600):
            if message.HasField("delta") and message.delta.ids:
                seen.arrivals.append((time.perf_counter(), len(message.delta.ids)))
                seen.ids += message.delta.ids
            elif message.HasField("finish"):
                seen.prompt_tokens = message.finish.prompt_tokens
                seen.cached = message.finish.cached_prompt_tokens
    except grpc.aio.AioRpcError as error:
        seen.error = f"{error.code().name}: {error.details()}"
    seen.ended = time.perf_counter()
    return seen


async def burst(stub: Stub, prompts: Sequence[Prompt], new: int, adapters: Sequence[str]) -> Burst:
    """All at once; ends with all. A failed one ends the benchmark."""
    begun = time.perf_counter()
    asked = zip(prompts, adapters, strict=True)
    seen = await asyncio.gather(*(ask(stub, prompt, new, adapter) for prompt, adapter in asked))
    return sound(Burst(list(seen), time.perf_counter() - begun))


async def in_turn(stub: Stub, prompts: Sequence[Prompt], new: int) -> Burst:
    """One after another, the base alone."""
    begun = time.perf_counter()
    seen = [await ask(stub, prompt, new) for prompt in prompts]
    return sound(Burst(seen, time.perf_counter() - begun))


def sound(found: Burst) -> Burst:
    """The burst, if every request was answered and none from a cache; first words that are alike do not count."""
    wrong = [s.error for s in found.seen if s.error]
    if wrong:
        raise SystemExit(f"{len(wrong)} of {len(found.seen)} requests failed: {wrong[0]}")
    cached = sum(s.cached for s in found.seen)
    if cached > 0.02 * sum(s.prompt_tokens for s in found.seen):
        raise SystemExit(f"{cached} tokens of prompts came from a cache; the peer has none")
    return found


async def open_loop(count: int, per_second: float, seed: int, start: Callable[[int], Awaitable[Seen]]) -> list[Seen]:
    """Requests that arrive whether or not those before are answered: gaps are exponential."""
    draw, running = random.Random(seed), []
    for number in range(count):
        running.append(asyncio.ensure_future(start(number)))
        await asyncio.sleep(draw.expovariate(per_second))
    return list(await asyncio.gather(*running))


@dataclass(frozen=True, slots=True)
class Crowd:
    """Users of a shared service: think, ask, read to the end, think."""

    users: int
    adapters: int
    seconds: float
    seed: int
    think_seconds: float = 0.5
    skew: float = 1.2
    """Of the power law: with 32 adapters the best known fifth gets two thirds of the requests."""

    def popularity(self) -> list[float]:
        """Share of each adapter, best known first."""
        weights = [(n + 1) ** -self.skew for n in range(self.adapters)]
        return [w / sum(weights) for w in weights]

    async def run(self, stub: Stub, prompts: Callable[[int], Prompt], names: Sequence[str]) -> list[Seen]:
        """Every request that was begun before the time was up."""
        until, found = time.perf_counter() + self.seconds, list[Seen]()
        shares = self.popularity()

        async def user(number: int) -> None:
            draw = random.Random(self.seed * 1000 + number)
            shape = 1 / (1 + number % 4) ** 2  # gaps are gamma, with a coefficient of variation from 1 to 4
            while True:
                await asyncio.sleep(min(draw.gammavariate(shape, self.think_seconds / shape), 10.0))
                if time.perf_counter() >= until:
                    return
                (name,) = draw.choices(names, shares)
                found.append(await ask(stub, prompts(draw.randint(16, 256)), draw.randint(8, 64), name))

        await asyncio.gather(*(user(n) for n in range(self.users)))
        return found


def percentile(values: Sequence[float], share: float) -> float:
    """The value that such a share of all does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def spread(values: Sequence[float]) -> dict[str, float]:
    """p50, p95 and p99 in milliseconds."""
    return {f"p{n}": round(1000 * percentile(values, n / 100), 1) for n in (50, 95, 99)}
