"""What the tests of inference share: asking, and reading errors."""

from __future__ import annotations

import pathlib
import re
import urllib.request
from dataclasses import dataclass, field
from typing import Any

import grpc
import psutil
from google.rpc import error_details_pb2, status_pb2

from qlorad.v1 import inference_pb2, inference_pb2_grpc, messages_pb2
from services.common import devices
from tests.house import Daemon, House

Stub = inference_pb2_grpc.InferenceServiceStub
MODEL = "models/starter-test"


@dataclass
class Answer:
    """A stream that came to its finish."""

    started: inference_pb2.Started
    finish: inference_pb2.Finish
    text: str
    ids: list[int]
    pieces: list[str] = field(default_factory=list)


@dataclass
class Refusal:
    """A call that failed, with every detail unpacked."""

    code: grpc.StatusCode
    message: str
    info: error_details_pb2.ErrorInfo
    fields: list[str]
    retry_seconds: float

    @property
    def reason(self) -> str:
        return self.info.reason


def read(stream: Any) -> Answer:
    """Reads a stream to its end and checks its grammar."""
    events = [getattr(m, m.WhichOneof("event")) for m in stream]
    started, deltas, finish = events[0], events[1:-1], events[-1]
    assert isinstance(started, inference_pb2.Started)
    assert isinstance(finish, inference_pb2.Finish)
    assert all(isinstance(d, inference_pb2.Delta) for d in deltas)
    ids = [i for d in deltas for i in d.ids]
    assert finish.completion_tokens == len(ids)
    assert finish.prompt_tokens == started.prompt_tokens
    pieces = [d.text for d in deltas]
    return Answer(started, finish, "".join(pieces), ids, pieces)


def generate(stub: Stub, prompt: str, adapter: str = "base", **options: Any) -> Answer:
    """One raw answer."""
    request = inference_pb2.GenerateRequest(
        prompt=prompt, adapter=adapter, options=inference_pb2.GenerationOptions(**options)
    )
    return read(stub.Generate(request, timeout=60))


def turn(role: messages_pb2.Role.ValueType, text: str) -> messages_pb2.Message:
    return messages_pb2.Message(role=role, parts=[messages_pb2.Part(text=text)])


def refusal(error: grpc.RpcError) -> Refusal:
    """A failed call as a Refusal."""
    status = status_pb2.Status()
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            status.ParseFromString(value)
    info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    for detail in status.details:
        for kind in (info, bad, retry):
            if detail.Is(kind.DESCRIPTOR):
                detail.Unpack(kind)
    assert info.domain == "qlorad", error
    return Refusal(
        error.code(),
        error.details() or "",
        info,
        [v.field for v in bad.field_violations],
        retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9,
    )


def refused(call: Any) -> Refusal:
    """The refusal of a call that must fail."""
    try:
        answer = call()
        if hasattr(answer, "__iter__"):
            list(answer)
    except grpc.RpcError as e:
        return refusal(e)
    raise AssertionError(f"the call was not refused: {answer}")


def load(
    stub: Stub, *adapters: str, precision: inference_pb2.Precision.ValueType = inference_pb2.PRECISION_FP32
) -> None:
    """Loads the starter and adapters."""
    stub.LoadModel(inference_pb2.LoadModelRequest(model=MODEL, precision=precision), timeout=120)
    for adapter in adapters:
        stub.LoadAdapter(inference_pb2.LoadAdapterRequest(adapter=f"adapters/{adapter}"), timeout=60)


def metric(daemon: Daemon, name: str, label: str = "") -> float:
    """The sum of a metric's series, or of those with a label as in 'state="host"'."""
    with urllib.request.urlopen(f"http://{daemon.told['metrics']}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    found = re.findall(rf"^{name}(?:{{[^}}]*{label}[^}}]*}}){'' if label else '?'} (\S+)$", text, re.MULTILINE)
    assert found, (name, label)
    return sum(map(float, found))


def engine_of(daemon: Daemon) -> psutil.Process:
    """The one engine process of a daemon."""
    (engine,) = engines_of(daemon)
    return engine


def engines_of(daemon: Daemon) -> list[psutil.Process]:
    """The engine processes of a daemon, oldest first."""
    found = [p for p in psutil.Process(daemon.pid).children() if "services.inference.worker.engine" in p.cmdline()]
    return sorted(found, key=lambda p: p.create_time())


def adapters(stub: Stub) -> dict[str, inference_pb2.LoadedAdapter]:
    """What ListAdapters tells, by name."""
    return {a.adapter: a for a in stub.ListAdapters(inference_pb2.ListAdaptersRequest(), timeout=10).adapters}


def models(stub: Stub) -> dict[str, inference_pb2.LoadedModel]:
    """What ListLoadedModels tells, by name."""
    return {m.model: m for m in stub.ListLoadedModels(inference_pb2.ListLoadedModelsRequest(), timeout=10).models}


def load_model(stub: Stub, model: str, **how: Any) -> inference_pb2.LoadedModel:
    """Loads a base in fp32, unless another precision is said."""
    how.setdefault("precision", inference_pb2.PRECISION_FP32)
    return stub.LoadModel(inference_pb2.LoadModelRequest(model=model, **how), timeout=120).model


def unload_adapter(stub: Stub, adapter: str) -> int:
    """Unloads an adapter; bytes freed."""
    return stub.UnloadAdapter(inference_pb2.UnloadAdapterRequest(adapter=adapter), timeout=60).freed_bytes


def switch(stub: Stub, adapter: str) -> inference_pb2.SwitchAdapterResponse:
    """Sets the default."""
    return stub.SwitchAdapter(inference_pb2.SwitchAdapterRequest(adapter=adapter), timeout=60)


def start(house: House, *flags: str) -> tuple[Daemon, Stub]:
    """The inference daemon and a stub."""
    daemon = house.start("inference", "--device", "cpu", *flags)
    return daemon, Stub(house.channel("inference"))


def leases(home: pathlib.Path) -> pathlib.Path:
    return home / "state" / "devices"


def held(home: pathlib.Path) -> tuple[str, int] | None:
    """Who holds the home's CPU."""
    return devices.holder(leases(home), "cpu")


def read_rest(stream: Any) -> inference_pb2.Finish:
    """The finish of a stream that was begun."""
    last = list(stream)[-1]
    assert last.HasField("finish")
    finish: inference_pb2.Finish = last.finish
    return finish
