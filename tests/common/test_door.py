"""What every call passes through: codes, details, metrics, cancel, deadline, drain. On a real daemon."""

from __future__ import annotations

import json
import pathlib
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from qlorad.v1 import datasets_pb2, datasets_pb2_grpc, errors_pb2
from services.common import errors
from tests import promtool
from tests.common.test_errors import REASONS
from tests.house import ROOT, Daemon, eventually

TINY = "tests.common.tiny"
SERVICE = "qlorad.v1.DatasetService"


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    daemon = Daemon("datasets", tmp_path_factory.mktemp("tiny"), module=TINY).start()
    yield daemon
    assert daemon.stop() == 0


@pytest.fixture(scope="module")
def channel(daemon: Daemon) -> Iterator[grpc.Channel]:
    with daemon.channel() as channel:
        yield channel


@pytest.fixture
def stub(channel: grpc.Channel) -> datasets_pb2_grpc.DatasetServiceStub:
    return datasets_pb2_grpc.DatasetServiceStub(channel)


def get(name: str) -> datasets_pb2.GetUploadRequest:
    return datasets_pb2.GetUploadRequest(name=name)


def metrics(daemon: Daemon) -> dict[str, float]:
    with urllib.request.urlopen(f"http://{daemon.told['metrics']}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return {k: float(v) for k, v in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def handled(daemon: Daemon, method: str, code: str, kind: str = "unary", service: str = SERVICE) -> float:
    labels = f'grpc_code="{code}",grpc_method="{method}",grpc_service="{service}",grpc_type="{kind}"'
    return metrics(daemon).get(f"grpc_server_handled_total{{{labels}}}", 0.0)


def details(error: grpc.RpcError) -> status_pb2.Status:
    packed = dict(error.trailing_metadata())["grpc-status-details-bin"]
    return status_pb2.Status.FromString(packed)


@pytest.mark.parametrize("reason", REASONS, ids=lambda r: errors_pb2.Reason.Name(r))
def test_each_reason_has_its_code_on_the_wire(stub: datasets_pb2_grpc.DatasetServiceStub, reason: int) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        stub.GetUpload(get(f"fault:{errors_pb2.Reason.Name(reason)}"), timeout=10)
    assert caught.value.code().value[0] == errors._CODES[reason]
    status = details(caught.value)
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info) and "REASON_" + info.reason == errors_pb2.Reason.Name(reason)
    assert status.code == errors._CODES[reason] and status.message == caught.value.details()


@pytest.mark.parametrize("kind", ["unary", "client_stream", "server_stream"])
def test_the_three_kinds_of_call_fail_alike(
    daemon: Daemon, stub: datasets_pb2_grpc.DatasetServiceStub, kind: str
) -> None:
    method = {"unary": "GetUpload", "client_stream": "WriteUpload", "server_stream": "ExportDataset"}[kind]
    before = handled(daemon, method, "ABORTED", kind)
    with pytest.raises(grpc.RpcError) as caught:
        if kind == "unary":
            stub.GetUpload(get("fault:REASON_WRONG_OFFSET"), timeout=10)
        elif kind == "client_stream":
            stub.WriteUpload(iter([datasets_pb2.WriteUploadRequest(upload="fault:REASON_WRONG_OFFSET")]), timeout=10)
        else:
            request = datasets_pb2.ExportDatasetRequest(max_rows=3, split="fault:REASON_WRONG_OFFSET")
            got = []
            for answer in stub.ExportDataset(request, timeout=10):
                got.append(answer.data)  # what came before the error counts
            assert len(got) == 3
    assert caught.value.code() == grpc.StatusCode.ABORTED
    assert handled(daemon, method, "ABORTED", kind) == before + 1


def test_the_fourth_kind_of_call(daemon: Daemon, channel: grpc.Channel) -> None:
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    answers = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=10)
    assert SERVICE in [s.name for s in next(answers).list_services_response.service]
    assert list(answers) == []
    service = "grpc.reflection.v1alpha.ServerReflection"
    assert handled(daemon, "ServerReflectionInfo", "OK", "bidi_stream", service) == 1


def test_a_bug_tells_a_log_id_and_no_story(daemon: Daemon, stub: datasets_pb2_grpc.DatasetServiceStub) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        stub.GetUpload(get("bug:4711"), timeout=10)
    assert caught.value.code() == grpc.StatusCode.INTERNAL
    assert "inside story" not in caught.value.details() + str(details(caught.value))
    info = error_details_pb2.ErrorInfo()
    details(caught.value).details[0].Unpack(info)
    lines = [json.loads(line) for line in daemon.log.read_text().splitlines()]
    (line,) = [x for x in lines if x.get("log_id") == info.metadata["log_id"]]
    assert "inside story 4711" in line["exception"] and line["rpc"] == f"/{SERVICE}/GetUpload"


@pytest.mark.parametrize("kind", ["unary", "server_stream"])
def test_an_answer_that_no_client_takes_is_said_by_name(
    daemon: Daemon, stub: datasets_pb2_grpc.DatasetServiceStub, kind: str
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        if kind == "unary":
            stub.GetUpload(get("large:16777216"), timeout=10)
        else:
            list(stub.ExportDataset(datasets_pb2.ExportDatasetRequest(split="large:16777216"), timeout=10))
    info = error_details_pb2.ErrorInfo()
    assert details(caught.value).details[0].Unpack(info) and info.reason == "TOO_LARGE"
    assert "answer would be 167772" in caught.value.details() and "at most 16777216" in caught.value.details()


def test_a_smaller_bound_of_messages_holds_for_answers(tmp_path: pathlib.Path) -> None:
    daemon = Daemon("datasets", tmp_path, ("--max-message-bytes", "1048576"), module=TINY).start()
    with daemon.channel() as channel, pytest.raises(grpc.RpcError) as caught:
        datasets_pb2_grpc.DatasetServiceStub(channel).GetUpload(get("large:1048577"), timeout=10)
    assert "at most 1048576" in caught.value.details()
    assert daemon.stop() == 0


def test_a_thousand_violations_still_arrive(stub: datasets_pb2_grpc.DatasetServiceStub) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        stub.GetUpload(get("violations:1000"), timeout=10)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    bad = error_details_pb2.BadRequest()
    assert details(caught.value).details[1].Unpack(bad) and len(bad.field_violations) > 15


def test_a_method_that_nobody_serves(daemon: Daemon, channel: grpc.Channel) -> None:
    before = handled(daemon, "unknown", "UNIMPLEMENTED", service="unknown")
    for method in ("/qlorad.v1.DatasetService/Nothing", "/foo.Bar/Baz"):
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(method)(b"", timeout=10)
        assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED and method in caught.value.details()
        assert details(caught.value).details
    assert handled(daemon, "unknown", "UNIMPLEMENTED", service="unknown") == before + 2
    assert not any("Baz" in series for series in metrics(daemon))


def test_a_deadline_stops_the_work(daemon: Daemon, stub: datasets_pb2_grpc.DatasetServiceStub) -> None:
    before = handled(daemon, "GetUpload", "DEADLINE_EXCEEDED")
    with pytest.raises(grpc.RpcError) as caught:
        stub.GetUpload(get("slow:30"), timeout=0.2)
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    eventually(lambda: handled(daemon, "GetUpload", "DEADLINE_EXCEEDED") == before + 1, 10, "the end of the call")
    assert metrics(daemon)["tiny_open"] == 0


@pytest.mark.parametrize("split", ["forever", "flood"])
def test_a_cancel_ends_the_servicer_at_once(
    daemon: Daemon, stub: datasets_pb2_grpc.DatasetServiceStub, split: str
) -> None:
    before = handled(daemon, "ExportDataset", "CANCELLED", "server_stream")
    stream = stub.ExportDataset(datasets_pb2.ExportDatasetRequest(max_rows=1, split=split))
    assert next(stream).data == b"0\n"
    assert metrics(daemon)["tiny_open"] == 1
    stream.cancel()
    eventually(lambda: metrics(daemon)["tiny_open"] == 0, 10, "the servicer's finally")
    eventually(lambda: handled(daemon, "ExportDataset", "CANCELLED", "server_stream") == before + 1, 10, "the count")


def test_messages_and_bytes_are_counted(daemon: Daemon, stub: datasets_pb2_grpc.DatasetServiceStub) -> None:
    labels = f'{{grpc_method="WriteUpload",grpc_service="{SERVICE}",grpc_type="client_stream"}}'
    names = [f"{n}_total{labels}" for n in ("grpc_server_msg_received", "qlorad_rpc_received_bytes")]
    before = [metrics(daemon).get(n, 0.0) for n in names]
    pieces = [datasets_pb2.WriteUploadRequest(data=b"x" * 1000) for _ in range(5)]
    assert stub.WriteUpload(iter(pieces), timeout=10).upload.committed_bytes == 5000
    after = [metrics(daemon)[n] for n in names]
    assert [a - b for a, b in zip(after, before, strict=True)] == [5, sum(p.ByteSize() for p in pieces)]


def test_metrics_pass_promtool(daemon: Daemon) -> None:
    with urllib.request.urlopen(f"http://{daemon.told['metrics']}/metrics", timeout=10) as answer:
        promtool.check(answer.read().decode())


def test_a_message_above_the_limit_is_refused(stub: datasets_pb2_grpc.DatasetServiceStub) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        stub.GetUpload(get("x" * (17 << 20)), timeout=30)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_the_log_knows_the_request(daemon: Daemon, stub: datasets_pb2_grpc.DatasetServiceStub) -> None:
    with pytest.raises(grpc.RpcError):
        stub.GetUpload(get("fault:REASON_IN_USE"), metadata=[("x-request-id", "find-me-17")], timeout=10)
    assert [x for x in map(json.loads, daemon.log.read_text().splitlines()) if x.get("request_id") == "find-me-17"]


def test_health_of_each_service_and_overall(channel: grpc.Channel) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    for service in ("", SERVICE):
        answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.RpcError) as caught:
        stub.Check(health_pb2.HealthCheckRequest(service="nobody"), timeout=10)
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_sigterm_drains(tmp_path_factory: pytest.TempPathFactory, sig: signal.Signals) -> None:
    """Short calls finish, streams are told, watchers hear NOT_SERVING or the end, exit 0, nothing left."""
    daemon = Daemon("datasets", tmp_path_factory.mktemp("drain"), module=TINY).start()
    with daemon.channel() as channel:
        stub = datasets_pb2_grpc.DatasetServiceStub(channel)
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        stream = stub.ExportDataset(datasets_pb2.ExportDatasetRequest(max_rows=1, split="forever"))
        next(stream)
        calls = [stub.GetUpload.future(get("slow:0.5"), timeout=30) for _ in range(8)]
        eventually(lambda: metrics(daemon)["tiny_open"] == 9, 10, "the calls in flight")
        daemon.process.send_signal(sig)
        assert [c.result(30).upload.name for c in calls] == ["slow:0.5"] * 8
        assert list(stream) == []
        with pytest.raises(grpc.RpcError) as caught:
            list(watch)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert daemon.process.wait(8) == 0  # the grace is 10 s: nothing waited for it
    assert not daemon.run_file.exists()
    assert "Traceback" not in daemon.tail()


def test_a_call_longer_than_the_grace_is_cut(tmp_path_factory: pytest.TempPathFactory) -> None:
    home = tmp_path_factory.mktemp("cut")
    daemon = Daemon("datasets", home, ("--drain-seconds", "0.2"), module=TINY).start()
    with daemon.channel() as channel:
        call = datasets_pb2_grpc.DatasetServiceStub(channel).GetUpload.future(get("slow:60"), timeout=30)
        eventually(lambda: metrics(daemon)["tiny_open"] == 1, 10, "the call in flight")
        assert daemon.stop() == 0
        assert call.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


def run(*flags: str, timeout: float = 30) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", TINY, *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=ROOT)


def test_faults_of_the_configuration_end_it_with_2(tmp_path_factory: pytest.TempPathFactory) -> None:
    home = str(tmp_path_factory.mktemp("faults"))
    done = run("--home", home, "--listen", "0.0.0.0:0", "--max-things", "10", "--max-thing", "1")
    assert done.returncode == 2 and done.stdout == ""
    for part in ("--listen: got '0.0.0.0:0'", "--max-things: got '10'; accepted: 1 to 9", "did you mean --max-things?"):
        assert part in done.stderr
    assert "Traceback" not in done.stderr


def test_an_address_that_is_taken_is_named(daemon: Daemon, tmp_path_factory: pytest.TempPathFactory) -> None:
    home = str(tmp_path_factory.mktemp("taken"))
    done = run("--home", home, "--listen", daemon.told["address"], "--metrics-listen", "127.0.0.1:0")
    assert done.returncode == 2 and f"--listen: {daemon.told['address']} cannot be bound" in done.stderr
    done = run("--home", home, "--listen", "127.0.0.1:0", "--metrics-listen", daemon.told["metrics"])
    assert done.returncode == 2 and f"--metrics-listen: {daemon.told['metrics']} cannot be bound" in done.stderr


def test_a_home_has_one_daemon_of_a_name(daemon: Daemon) -> None:
    done = run("--home", str(daemon.home), "--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0")
    assert done.returncode == 2 and "is served by another qlorad-datasets already" in done.stderr


def test_a_home_that_cannot_be_is_named(tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("odd") / "file"
    file.write_text("")
    done = run("--home", str(file))
    assert done.returncode == 2 and f"--home: {file} cannot be used" in done.stderr


def test_help_lists_the_settings() -> None:
    done = run("--help")
    assert done.returncode == 0 and "--max-things" in done.stdout and "--tls-client-ca" in done.stdout


def test_calls_while_many_clients_come_and_go(daemon: Daemon) -> None:
    """No count is lost and nothing stays open when clients leave in the middle."""
    failed: list[object] = []

    def client() -> None:
        for _ in range(10):
            with daemon.channel() as channel:
                stub = datasets_pb2_grpc.DatasetServiceStub(channel)
                stream = stub.ExportDataset(datasets_pb2.ExportDatasetRequest(max_rows=3, split="flood"))
                try:
                    next(stream)
                    stub.GetUpload(get("x"), timeout=30)
                except grpc.RpcError as e:
                    failed.append(e)

    threads = [threading.Thread(target=client) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    eventually(lambda: metrics(daemon)["tiny_open"] == 0, 20, "the end of every stream")
    series = metrics(daemon)
    started = sum(v for k, v in series.items() if k.startswith("grpc_server_started_total"))
    eventually(
        lambda: sum(v for k, v in metrics(daemon).items() if k.startswith("grpc_server_handled_total")) == started,
        10,
        "as many ends as beginnings",
    )


@pytest.mark.parametrize("shape", ["unary_unary/GetUpload", "stream_unary/WriteUpload", "unary_stream/ExportDataset"])
def test_bytes_that_are_no_message_are_refused_in_the_form_of_all_errors(channel: grpc.Channel, shape: str) -> None:
    kind, _, method = shape.partition("/")
    call = getattr(channel, kind)(f"/{SERVICE}/{method}")
    garbage = b"\x0a\xff\xff\xff\xff\x0f not a message"
    with pytest.raises(grpc.RpcError) as caught:
        answer = call(iter([garbage]) if kind == "stream_unary" else garbage, timeout=10)
        list(answer)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    info = error_details_pb2.ErrorInfo()
    assert details(caught.value).details[0].Unpack(info) and info.reason == "INVALID_REQUEST"
