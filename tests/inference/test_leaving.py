"""Callers that leave, and callers that are too many: P15 and P16."""

from __future__ import annotations

import concurrent.futures
import pathlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

from qlorad.v1 import inference_pb2 as pb
from qlorad.v1 import messages_pb2
from tests.house import Daemon, House, eventually
from tests.inference import kit

Houses = Callable[[pathlib.Path], House]


def busy(daemon: Daemon) -> float:
    """Requests anywhere between the door and their finish."""
    names = ("requests_running", "requests_waiting", "places_taken")
    return sum(kit.metric(daemon, f"qlorad_inference_{name}") for name in names)


class Alone:
    """A call with one answer, read like a stream."""

    def __init__(self, future: Any) -> None:
        self.cancel = future.cancel
        self._future = future

    def __iter__(self) -> Iterator[Any]:
        yield self._future.result()


def leaving(stub: kit.Stub, rng: random.Random) -> Callable[[float], Any]:
    """A call of some kind that would go on for long."""
    how = pb.GenerationOptions(max_tokens=600, ignore_end=True, temperature=1.0)
    talk = messages_pb2.Conversation(messages=[kit.turn(messages_pb2.ROLE_USER, "write a store")])
    adapter = rng.choice(["base", "adapters/ada", "adapters/bob"])
    kind = rng.choice(["generate", "chat", "batch", "compare", "score"])
    if kind == "generate":
        request = pb.GenerateRequest(prompt="import os\n", adapter=adapter, options=how)
        return lambda timeout: stub.Generate(request, timeout=timeout)
    if kind == "chat":
        chat = pb.ChatRequest(conversation=talk, adapter=adapter, options=how)
        return lambda timeout: stub.Chat(chat, timeout=timeout)
    if kind == "batch":
        items = [pb.BatchItem(prompt="class A:\n", adapter=adapter, options=how)] * rng.randint(1, 12)
        return lambda timeout: stub.GenerateBatch(pb.GenerateBatchRequest(items=items), timeout=timeout)
    if kind == "compare":
        voices = ["base", "adapters/ada", "adapters/bob"]
        compare = pb.CompareRequest(adapters=voices, conversation=talk, options=how)
        return lambda timeout: stub.Compare(compare, timeout=timeout)
    score = pb.ScoreRequest(adapter=adapter, prompt="x = 1\n" * 60)
    return lambda timeout: Alone(stub.Score.future(score, timeout=timeout))


def leave(daemon: Daemon, stub: kit.Stub, rounds: int, seed: int) -> None:
    """Many callers that leave at any moment, by cancel or by deadline; after each round nothing is left of them."""
    rng = random.Random(seed)
    for _ in range(rounds):
        calls = []
        for _ in range(rng.randint(1, 8)):
            by_deadline = rng.random() < 0.5
            call = leaving(stub, rng)(rng.uniform(0.0, 0.4) if by_deadline else 60.0)
            calls.append(call)
            if not by_deadline:
                # Somewhere between before the door and after some tokens.
                for _ in range(0 if isinstance(call, Alone) else rng.choice([0, 0, 1, 3])):
                    next(call)
                call.cancel()
        for call in calls:
            try:
                list(call)
            except grpc.RpcError as e:
                assert e.code() in (grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED), e
            except grpc.FutureCancelledError:
                continue
        eventually(lambda: busy(daemon) == 0, seconds=10, what="no request anywhere")
        made = kit.metric(daemon, "qlorad_inference_generated_tokens_total")
        probe = kit.generate(stub, "def f():", max_tokens=4, temperature=0.5)
        now = kit.metric(daemon, "qlorad_inference_generated_tokens_total")
        assert now == made + len(probe.ids), "a token was made for nobody"


@pytest.mark.slow
def test_p15_whoever_leaves_takes_the_work_along(serving_home: pathlib.Path, house_factory: Houses) -> None:
    daemon, stub = kit.start(house_factory(serving_home), "--max-rows", "4")
    kit.load(stub, "ada", "bob")
    leave(daemon, stub, rounds=12, seed=15)


@pytest.mark.storm
@pytest.mark.timeout(1800)
def test_p15_storm(serving_home: pathlib.Path, house_factory: Houses) -> None:
    daemon, stub = kit.start(house_factory(serving_home), "--max-rows", "8")
    kit.load(stub, "ada", "bob")
    leave(daemon, stub, rounds=200, seed=1515)


def overload(stub: kit.Stub, callers: int, places: int, seed: int) -> tuple[list[float], int]:
    """Everybody at once: seconds until each refusal, and how many were accepted; what was accepted is whole."""
    rng = random.Random(seed)
    asks = [(rng.choice(["base", "adapters/ada", "adapters/bob"]), rng.randint(150, 250)) for _ in range(callers)]
    together = threading.Barrier(callers)

    def one(ask: tuple[str, int]) -> tuple[bool, float, float]:
        adapter, tokens = ask
        how = pb.GenerationOptions(max_tokens=tokens, ignore_end=True)
        request = pb.GenerateRequest(prompt="import os\n", adapter=adapter, options=how)
        together.wait(60)
        begun = time.monotonic()
        try:
            answer = kit.read(stub.Generate(request, timeout=120))
        except grpc.RpcError as e:
            told = kit.refusal(e)
            assert (told.code, told.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
            assert told.retry_seconds > 0
            return False, begun, time.monotonic()
        assert len(answer.ids) == tokens and answer.finish.reason == pb.FINISH_REASON_LENGTH
        return True, begun, time.monotonic()

    with concurrent.futures.ThreadPoolExecutor(callers) as pool:
        told = list(pool.map(one, asks))
    accepted = [end for good, _, end in told if good]
    refused = [(begun, end) for good, begun, end in told if not good]
    assert len(accepted) >= places, "every place was used"
    assert len(refused) >= callers // 2, "most were too many"
    return [end - begun for begun, end in refused], len(accepted)


@pytest.mark.slow
def test_p16_overload_is_refused_quickly_and_what_was_accepted_completes(
    serving_home: pathlib.Path, house_factory: Houses
) -> None:
    daemon, stub = kit.start(house_factory(serving_home), "--max-rows", "2", "--max-waiting", "4")
    kit.load(stub, "ada", "bob")
    seconds, accepted = overload(stub, callers=60, places=6, seed=16)
    print(f"P16: {accepted} accepted, {len(seconds)} refused, slowest refusal {max(seconds):.3f} s")
    assert busy(daemon) == 0
    assert kit.generate(stub, "x", max_tokens=2).ids, "and it serves on"
    items = [pb.BatchItem(prompt="x", adapter="base", options=pb.GenerationOptions(max_tokens=4))] * 40
    ends = [m for m in stub.GenerateBatch(pb.GenerateBatchRequest(items=items), timeout=120) if m.HasField("finish")]
    assert len(ends) == 40, "a batch that was let in completes, though it is larger than all places"


@pytest.mark.storm
@pytest.mark.timeout(1800)
def test_p16_storm(serving_home: pathlib.Path, house_factory: Houses) -> None:
    daemon, stub = kit.start(house_factory(serving_home), "--max-rows", "8", "--max-waiting", "12")
    kit.load(stub, "ada", "bob")
    seconds: list[float] = []
    for n in range(10):
        seconds += overload(stub, callers=200, places=20, seed=160 + n)[0]
        eventually(lambda: busy(daemon) == 0, what="quiet")
    seconds.sort()
    p50, p99 = seconds[len(seconds) // 2], seconds[-1 - len(seconds) // 100]
    print(f"P16: {len(seconds)} refusals, p50 {p50:.3f} s, p99 {p99:.3f} s")
