"""A stock client that knows none of our stubs lists, describes and calls every daemon."""

from __future__ import annotations

import pathlib
import subprocess
import sys
import textwrap
from collections.abc import Iterator

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests import promtool
from tests.contract import reference
from tests.house import ROOT, House, house

SERVES = {
    "datasets": ("qlorad.v1.DatasetService",),
    "registry": ("qlorad.v1.ModelService", "qlorad.v1.AdapterService"),
    "trainer": ("qlorad.v1.TrainerService",),
    "inference": ("qlorad.v1.InferenceService",),
}
ENDLESS = ("WatchAdapters",)
"""Streams that end with the daemon; their first message is answer enough."""
EMPTY_CALLS = {
    "datasets": "DatasetService/ListDatasets",
    "registry": "ModelService/ListModels",
    "trainer": "TrainerService/ListTemplates",
    "inference": "InferenceService/ListAdapters",
}


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with house(tmp_path_factory.mktemp("four")) as h:
        for service in SERVES:
            h.start(service)
        yield h
        assert [d.stop() for d in h.daemons.values()] == [0, 0, 0, 0]


@pytest.mark.parametrize("service", SERVES)
def test_health_of_each_service_and_overall(four: House, service: str) -> None:
    stub = health_pb2_grpc.HealthStub(four.channel(service))
    for name in ("", *SERVES[service]):
        answer = stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=10)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


STOCK = """
import sys
import grpc
from google.protobuf import descriptor_pool, message_factory
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

address, call = sys.argv[1:]
with grpc.insecure_channel(address) as channel:
    database = ProtoReflectionDescriptorDatabase(channel)
    pool = descriptor_pool.DescriptorPool(database)
    for name in database.get_services():
        service = pool.FindServiceByName(name)
        for method in service.methods:
            assert method.input_type.fields is not None and method.output_type.fields is not None
        print(name, len(service.methods))
    service, name = call.split("/")
    method = pool.FindServiceByName("qlorad.v1." + service).methods_by_name[name]
    answer = message_factory.GetMessageClass(method.output_type)
    request = message_factory.GetMessageClass(method.input_type)()
    send = channel.unary_unary(f"/qlorad.v1.{call}", lambda m: m.SerializeToString(), answer.FromString)
    sent = send(request, timeout=10)
    print("answered", type(sent).DESCRIPTOR.full_name)
assert not [m for m in sys.modules if m.startswith("qlorad")]
"""


@pytest.mark.parametrize("service", SERVES)
def test_a_stock_client_lists_and_calls(four: House, service: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(STOCK), four.daemons[service].told["address"], EMPTY_CALLS[service]],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    listed = dict(line.rsplit(" ", 1) for line in done.stdout.splitlines())
    assert {*SERVES[service], "grpc.health.v1.Health"} <= set(listed)
    assert all(int(listed[name]) >= 5 for name in SERVES[service])
    assert listed["answered"].endswith("Response")


@pytest.mark.parametrize("service", SERVES)
def test_every_call_of_the_contract_is_served(four: House, service: str) -> None:
    """Empty and foreign requests are answered by the daemon itself: never UNIMPLEMENTED, INTERNAL or UNKNOWN."""
    from qlorad.v1 import datasets_pb2, inference_pb2, registry_pb2, trainer_pb2

    module = {"datasets": datasets_pb2, "registry": registry_pb2, "trainer": trainer_pb2, "inference": inference_pb2}
    called = 0
    for name in SERVES[service]:
        for method in module[service].DESCRIPTOR.services_by_name[name.rpartition(".")[2]].methods:
            call = four.channel(service).stream_stream(f"/{name}/{method.name}")
            try:
                answers = call(iter([b""]), timeout=10)
                next(answers) if method.name in ENDLESS else list(answers)
                answers.cancel()
                code = grpc.StatusCode.OK
            except grpc.RpcError as e:
                code = e.code()
            called += 1
            assert code in (
                grpc.StatusCode.OK,
                grpc.StatusCode.INVALID_ARGUMENT,
                grpc.StatusCode.NOT_FOUND,
                grpc.StatusCode.FAILED_PRECONDITION,
            ), f"{name}/{method.name} answered {code}"
    assert called >= 7


@pytest.mark.parametrize("service", SERVES)
def test_metrics_pass_promtool(four: House, service: str) -> None:
    promtool.check(reference.scrape(four, service))


AGAIN = "run: python -m tests.contract.reference"


def test_every_metric_is_documented(four: House) -> None:
    told = {s: reference.scrape(four, s) for s in SERVES}
    assert (ROOT / "docs" / "metrics.md").read_text() == reference.metrics(told), AGAIN
    for text in told.values():
        assert len(list(reference.families(text))) >= 12
        assert all(help for _, _, help in reference.families(text))


def test_every_setting_is_documented() -> None:
    text = reference.settings()
    assert (ROOT / "docs" / "settings.md").read_text() == text, AGAIN
    rows = [line for line in text.splitlines() if line.startswith("| `--")]
    assert len(rows) >= 25 and not [r for r in rows if r.split("|")[2].strip() == ""]


def test_every_verb_is_documented() -> None:
    text = reference.cli()
    assert (ROOT / "docs" / "cli.md").read_text() == text, AGAIN
    blocks = text.split("\n## ")[1].split("\n### ") + [b for g in text.split("\n### ")[1:] for b in g.split("\n#### ")]
    assert len(blocks) >= 30
    assert [b.splitlines()[0] for b in blocks if len(b.splitlines()) < 3 or not b.splitlines()[2].strip()] == []


@pytest.mark.parametrize("service", SERVES)
def test_a_daemon_at_rest_is_small(four: House, service: str) -> None:
    process = psutil.Process(four.daemons[service].pid)
    assert process.memory_info().rss < 100 << 20
    maps = {pathlib.Path(m.path).name for m in process.memory_maps()}
    assert not [m for m in maps if "torch" in m or "numpy" in m or "_multiarray" in m]
