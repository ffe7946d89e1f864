"""Callers that send nonsense: P17."""

from __future__ import annotations

import pathlib
import random
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import psutil
import pytest
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from qlorad.v1 import inference_pb2 as pb
from tests.house import Daemon, House, eventually, house
from tests.inference import kit
from tests.inference.strategies import anything
from tests.inference.test_leaving import busy

Houses = Callable[[pathlib.Path], House]
SERVICE = pb.DESCRIPTOR.services_by_name["InferenceService"]
ALLOWED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
}
ENDLESS = ("WatchAdapters",)
CHANGING = ("LoadModel", "UnloadModel", "LoadAdapter", "UnloadAdapter", "SwitchAdapter")


def tame(request: Message) -> Message:
    """An answer that is wanted after all is kept short."""
    for field, value in list(request.ListFields()):
        if field.name == "options" and value.max_tokens > 4 and value.max_tokens <= 100_000:
            value.max_tokens = 4
        elif field.name == "items":
            for item in value:
                tame(item)
    return request


def send(channel: grpc.Channel, method: Any, body: bytes) -> grpc.StatusCode:
    """One call with these bytes; the code that it ended with."""
    timeout = 0.2 if method.name in ENDLESS else 20.0
    call = channel.unary_stream(f"/{SERVICE.full_name}/{method.name}")
    try:
        list(call(body, timeout=timeout))
    except grpc.RpcError as e:
        return e.code()
    return grpc.StatusCode.OK


def nonsense(channel: grpc.Channel, methods: list[Any], examples: int) -> Counter[str]:
    """Random requests to every method, as messages and as bytes that are none; the codes that came."""
    seen: Counter[str] = Counter()
    for method in methods:
        _ask_oddly(channel, method, 3 if method.name in ENDLESS else examples, seen)
    return seen


def _ask_oddly(channel: grpc.Channel, method: Any, examples: int, seen: Counter[str]) -> None:
    @given(anything(method.input_type).map(tame), st.binary(max_size=60), st.booleans())
    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def ask(request: Message, garbage: bytes, torn: bool) -> None:
        body = request.SerializeToString()
        for sent in (body, body[: len(body) // 2] + garbage if torn else garbage):
            code = send(channel, method, sent)
            seen[code.name] += 1
            assert code in ALLOWED, f"{method.name} answered {code} to {sent!r}"

    ask()


def raw_garbage(address: str, rounds: int, seed: int) -> None:
    """What is no HTTP/2, or HTTP/2 that makes no sense, over a plain socket."""
    rng = random.Random(seed)
    host, _, port = address.rpartition(":")
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    for n in range(rounds):
        kind, ident = rng.randrange(12), rng.randrange(1 << 31)
        payload = rng.randbytes(rng.randrange(200))
        length = rng.choice([len(payload), len(payload), rng.randrange(1 << 24)])
        frame = length.to_bytes(3, "big") + bytes([kind, rng.randrange(256)]) + ident.to_bytes(4, "big") + payload
        words = rng.choice([
            rng.randbytes(300), b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", preface + rng.randbytes(200), preface[: n % 24],
            preface + bytes(9) + frame, preface + bytes(9) + frame * 50, b"\x16\x03\x01\x02\x00\x01" + payload,
        ])  # fmt: skip
        with socket.create_connection((host, int(port)), timeout=10) as line:
            line.settimeout(0.05)
            try:
                line.sendall(words)
                while line.recv(4096):
                    pass  # until the daemon hangs up, or waits for more
            except (TimeoutError, ConnectionError):
                continue


def unhurt(daemon: Daemon, channel: grpc.Channel, pids: list[int]) -> None:
    """The daemon and its engines are the same processes, healthy, and met nothing that they did not expect."""
    health = health_pb2_grpc.HealthStub(channel).Check(
        health_pb2.HealthCheckRequest(service=SERVICE.full_name), timeout=10
    )
    assert health.status == health_pb2.HealthCheckResponse.SERVING
    alive = [daemon.pid, *(p.pid for p in psutil.Process(daemon.pid).children(recursive=True))]
    assert set(pids) <= set(alive)
    log = daemon.log.read_text()
    assert "unexpected error" not in log and "Traceback" not in log, log[-3000:]


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Daemon, grpc.Channel]]:
    """A daemon with nothing on its shelf."""
    with house(tmp_path_factory.mktemp("empty") / "home") as h:
        daemon = h.start("inference", "--device", "cpu")
        yield daemon, h.channel("inference")


def test_p17_malformed_requests_get_allowed_codes_only(empty: tuple[Daemon, grpc.Channel]) -> None:
    daemon, channel = empty
    seen = nonsense(channel, list(SERVICE.methods), examples=12)
    assert seen["INVALID_ARGUMENT"] > 100 and seen["NOT_FOUND"] > 0 and sum(seen.values()) >= 300, seen
    raw_garbage(daemon.told["address"], rounds=20, seed=17)
    unhurt(daemon, channel, [daemon.pid])


def loaded_nonsense(home: pathlib.Path, make: Houses, examples: int, rounds: int) -> Counter[str]:
    """The same against an engine, which must outlive it and answer as before."""
    h = make(home)
    daemon, stub = kit.start(h, "--max-rows", "4")
    kit.load(stub, "ada", "bob")
    channel = h.channel("inference")
    engine = kit.engine_of(daemon).pid
    before = kit.generate(stub, "def add(a, b):\n", "adapters/ada", max_tokens=12)
    methods = [m for m in SERVICE.methods if m.name not in (*CHANGING, *ENDLESS)]
    seen = nonsense(channel, methods, examples)
    raw_garbage(daemon.told["address"], rounds, seed=71)
    unhurt(daemon, channel, [daemon.pid, engine])
    eventually(lambda: busy(daemon) == 0, what="nothing left of all that")
    assert kit.generate(stub, "def add(a, b):\n", "adapters/ada", max_tokens=12).ids == before.ids
    changing = [m for m in SERVICE.methods if m.name in CHANGING]
    seen += nonsense(channel, changing, examples // 4)
    unhurt(daemon, channel, [daemon.pid])
    return seen


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_p17_an_engine_outlives_malformed_requests(serving_home: pathlib.Path, house_factory: Houses) -> None:
    seen = loaded_nonsense(serving_home, house_factory, examples=80, rounds=100)
    assert seen["INVALID_ARGUMENT"] > 800 and seen["OK"] > 20, seen
    print(f"P17: {sum(seen.values())} requests: {dict(seen)}")


@pytest.mark.storm
@pytest.mark.timeout(3600)
def test_p17_storm(serving_home: pathlib.Path, house_factory: Houses) -> None:
    seen = loaded_nonsense(serving_home, house_factory, examples=500, rounds=1000)
    assert sum(seen.values()) >= 10_000, seen
    print(f"P17: {sum(seen.values())} requests: {dict(seen)}")
