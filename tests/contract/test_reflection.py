"""A stock client that knows none of our stubs lists, describes and calls every daemon."""

from __future__ import annotations

import pathlib
import subprocess
import sys
import textwrap
import urllib.request
from collections.abc import Iterator

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.house import ROOT, House, house

SERVES = {
    "datasets": ("qlorad.v1.DatasetService",),
    "registry": ("qlorad.v1.ModelService", "qlorad.v1.AdapterService"),
    "trainer": ("qlorad.v1.TrainerService",),
    "inference": ("qlorad.v1.InferenceService",),
}
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
                list(call(iter([b""]), timeout=10))
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
def test_metrics_pass_promtool_and_are_documented(four: House, service: str) -> None:
    with urllib.request.urlopen(f"http://{four.daemons[service].told['metrics']}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stdout + done.stderr
    documented = (ROOT / "docs" / "metrics.md").read_text()
    families = [line.split()[2] for line in text.splitlines() if line.startswith("# HELP ")]
    assert len(families) > 8
    assert [f for f in families if f"`{f}`" not in documented and not f.endswith("_created")] == []


@pytest.mark.parametrize("service", SERVES)
def test_a_daemon_at_rest_is_small(four: House, service: str) -> None:
    process = psutil.Process(four.daemons[service].pid)
    assert process.memory_info().rss < 100 << 20
    maps = {pathlib.Path(m.path).name for m in process.memory_maps()}
    assert not [m for m in maps if "torch" in m or "numpy" in m or "_multiarray" in m]
