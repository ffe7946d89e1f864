"""P22 and P23: who may come in, certificates that change under load, and secrets that never come out."""

from __future__ import annotations

import contextlib
import hashlib
import pathlib
import shutil
import ssl
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from qlorad.v1 import datasets_pb2, datasets_pb2_grpc
from tests.common.certificates import Authority, Pair
from tests.house import ROOT, Daemon, eventually

TINY = "tests.common.tiny"
TOKEN = "qlt_c4n4ry-right-0123456789"
WRONG = "qlt_c4n4ry-wrong-0123456789"
ODD = "odd.c4n4ry/without=any+form"


@dataclass(frozen=True, slots=True)
class Secured:
    """A daemon with mutual TLS and tokens, and what a caller needs."""

    daemon: Daemon
    ours: Authority
    foreign: Authority
    server: Pair
    client: Pair

    @contextlib.contextmanager
    def channel(self, pair: Pair | None, roots: pathlib.Path | None = None, name: str = "") -> Iterator[grpc.Channel]:
        credentials = grpc.ssl_channel_credentials(
            (roots or self.ours.cert).read_bytes(),
            pair.key.read_bytes() if pair else None,
            pair.cert.read_bytes() if pair else None,
        )
        options = [("grpc.ssl_target_name_override", name or "localhost"), ("grpc.use_local_subchannel_pool", 1)]
        with grpc.secure_channel(self.daemon.told["address"], credentials, options) as channel:
            yield channel


def call(channel: grpc.Channel, token: str | None = TOKEN, scheme: str = "Bearer", name: str = "x") -> str:
    """OK, or the code."""
    metadata = [("authorization", f"{scheme} {token}".strip())] if token is not None else []
    stub = datasets_pb2_grpc.DatasetServiceStub(channel)
    try:
        stub.GetUpload(datasets_pb2.GetUploadRequest(name=name), metadata=metadata, timeout=20)
        return "OK"
    except grpc.RpcError as e:
        return str(e.code().name)


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    folder = tmp_path_factory.mktemp("tls")
    ours, foreign = Authority(folder / "ours"), Authority(folder / "foreign")
    server, client = ours.sign("server"), ours.sign("client")
    tokens = folder / "tokens"
    lines = (f"{hashlib.sha256(t.encode()).hexdigest()} {n}\n" for t, n in ((TOKEN, "ann"), (ODD, "bob")))
    tokens.write_text("# who may come in\n\n" + "".join(lines))
    flags = ("--tls-cert", str(server.cert), "--tls-key", str(server.key), "--tls-client-ca", str(ours.cert))
    daemon = Daemon("datasets", folder / "home", (*flags, "--tokens-file", str(tokens)), module=TINY).start()
    yield Secured(daemon, ours, foreign, server, client)
    assert daemon.stop() == 0


def test_the_right_certificate_and_token_come_in(secured: Secured) -> None:
    assert (secured.daemon.told["tls"], secured.daemon.told["token"]) == (True, True)
    with secured.channel(secured.client) as channel:
        assert [call(channel), call(channel, ODD), call(channel, scheme="bearer")] == ["OK"] * 3


@pytest.mark.parametrize(
    ("token", "scheme"),
    [
        (None, ""),
        ("", "Bearer"),
        ("", ""),
        (WRONG, "Bearer"),
        (TOKEN, "Basic"),
        (TOKEN, ""),
        (TOKEN.upper(), "Bearer"),
        (TOKEN[:-1], "Bearer"),
        (TOKEN + "0", "Bearer"),
        (TOKEN, "Bearer "),
        (hashlib.sha256(TOKEN.encode()).hexdigest(), "Bearer"),
    ],
)
def test_any_other_token_is_refused(secured: Secured, token: str | None, scheme: str) -> None:
    with secured.channel(secured.client) as channel:
        assert call(channel, token, scheme) == "UNAUTHENTICATED"


def test_a_stream_and_reflection_need_the_token_too_and_health_does_not(secured: Secured) -> None:
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    with secured.channel(secured.client) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            next(datasets_pb2_grpc.DatasetServiceStub(channel).ExportDataset(datasets_pb2.ExportDatasetRequest()))
        assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
        ask = reflection_pb2.ServerReflectionRequest(list_services="")
        with pytest.raises(grpc.RpcError) as caught:
            next(reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([ask])))
        assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
        assert health.status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize("kind", ["none", "foreign", "expired", "self-made authority's, expired"])
def test_any_other_client_certificate_is_refused(secured: Secured, kind: str) -> None:
    pair = {
        "none": lambda: None,
        "foreign": lambda: secured.foreign.sign("stranger"),
        "expired": lambda: secured.ours.sign("late", days=-1),
        "self-made authority's, expired": lambda: secured.foreign.sign("late", days=-1),
    }[kind]()
    with secured.channel(pair) as channel:
        assert call(channel) == "UNAVAILABLE"


def test_plain_text_is_refused(secured: Secured) -> None:
    with grpc.insecure_channel(secured.daemon.told["address"]) as channel:
        assert call(channel) == "UNAVAILABLE"


def test_a_client_refuses_a_server_that_it_does_not_know(secured: Secured) -> None:
    with secured.channel(secured.client, roots=secured.foreign.cert) as channel:
        assert call(channel) == "UNAVAILABLE"
    with secured.channel(secured.client, name="example.org") as channel:
        assert call(channel) == "UNAVAILABLE"


@pytest.mark.parametrize("harm", ["expired", "wrong host"])
def test_a_client_refuses_a_server_whose_certificate_is_not_right(
    tmp_path: pathlib.Path, secured: Secured, harm: str
) -> None:
    bad = secured.ours.sign("bad", days=-1) if harm == "expired" else secured.ours.sign("bad", host="example.org")
    flags = ("--tls-cert", str(bad.cert), "--tls-key", str(bad.key))
    daemon = Daemon("datasets", tmp_path, flags, module=TINY).start()
    try:
        with Secured(daemon, secured.ours, secured.foreign, bad, bad).channel(None) as channel:
            assert call(channel) == "UNAVAILABLE"
    finally:
        assert daemon.stop() == 0


def serial(secured: Secured) -> int:
    """Of the certificate that the daemon shows now."""
    context = ssl.create_default_context(cafile=str(secured.ours.cert))
    context.load_cert_chain(secured.client.cert, secured.client.key)
    import socket

    host, _, port = secured.daemon.told["address"].rpartition(":")
    with socket.create_connection((host, int(port)), timeout=10) as plain:
        with context.wrap_socket(plain, server_hostname="localhost") as tls:
            return int(tls.getpeercert()["serialNumber"], 16)


def test_certificates_change_under_load_without_a_dropped_call(secured: Secured) -> None:
    ending, codes, lock = threading.Event(), [], threading.Lock()

    def load(fresh: bool) -> None:
        while not ending.is_set():
            with secured.channel(secured.client) as channel:
                for _ in range(1 if fresh else 200):
                    code = call(channel)
                    with lock:
                        codes.append(code)
                    if ending.is_set():
                        break

    threads = [threading.Thread(target=load, args=(fresh,)) for fresh in (True, True, False)]
    for thread in threads:
        thread.start()
    seen = {serial(secured)}
    try:
        for number in range(6):
            new = secured.ours.sign(f"server-{number}")
            for source, target in ((new.key, secured.server.key), (new.cert, secured.server.cert)):
                aside = target.with_suffix(".aside")
                shutil.copy(source, aside)
                aside.replace(target)  # between the two, key and certificate do not belong together
                if target == secured.server.key:
                    assert serial(secured) in seen
            wanted = int(_serial_of(new.cert), 16)
            eventually(lambda wanted=wanted: serial(secured) == wanted, 10, "the new certificate")
            seen.add(wanted)
        secured.server.cert.write_text("torn")
        assert serial(secured) == wanted
        shutil.copy(new.cert, secured.server.cert)
    finally:
        ending.set()
        for thread in threads:
            thread.join()
    assert len(seen) == 7 and len(codes) > 100 and set(codes) == {"OK"}


def _serial_of(cert: pathlib.Path) -> str:
    told = subprocess.run(
        ["openssl", "x509", "-in", str(cert), "-noout", "-serial"], capture_output=True, text=True, check=True
    )
    return told.stdout.strip().removeprefix("serial=")


def test_secrets_come_out_nowhere(secured: Secured) -> None:
    """Right, wrong and formless canaries through every kind of ending; then everything is searched."""
    texts: list[str] = []
    with secured.channel(secured.client) as channel:
        stub = datasets_pb2_grpc.DatasetServiceStub(channel)
        for token in (TOKEN, WRONG, ODD, ODD + "-wrong"):
            for name in ("x", "bug:1", "fault:REASON_IN_USE", "violations:3"):
                metadata = [("authorization", f"Bearer {token}"), ("x-request-id", "r1")]
                try:
                    answer = stub.GetUpload(datasets_pb2.GetUploadRequest(name=name), metadata=metadata, timeout=20)
                    texts.append(str(answer))
                except grpc.RpcError as e:
                    texts += [str(e.details()), repr(e.trailing_metadata())]
            call(channel, token, "Basic")
    with urllib.request.urlopen(f"http://{secured.daemon.told['metrics']}/metrics", timeout=10) as answer:
        texts.append(answer.read().decode())
    texts.append(secured.daemon.log.read_text())
    assert "unexpected error" in texts[-1] and "UNAUTHENTICATED" in texts[-1] and '"caller": "ann"' in texts[-1]
    files = [p for p in secured.daemon.home.rglob("*") if p.is_file()]
    assert len(files) >= 3
    texts += [p.read_text(errors="replace") for p in files]
    hashes = [hashlib.sha256(t.encode()).hexdigest() for t in (TOKEN, ODD)]
    for text in texts:
        assert "c4n4ry" not in text
        assert not any(h in text for h in hashes)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "holds no token"),
        ("# none\n", "holds no token"),
        ("qlt_plain ann\n", "line 1"),
        ("\n" + "0" * 64 + "\n", "line 2"),
        ("0" * 63 + "g ann\n", "line 1"),
    ],
)
def test_a_tokens_file_holds_hashes(tmp_path: pathlib.Path, text: str, told: str) -> None:
    file = tmp_path / "tokens"
    file.write_text(text)
    done = start("--home", str(tmp_path / "h"), "--tokens-file", str(file), "--listen", "127.0.0.1:0")
    assert done.returncode == 2 and "--tokens-file" in done.stderr and told in done.stderr
    assert "qlt_plain" not in done.stderr and "Traceback" not in done.stderr


def test_files_that_do_not_belong_together_are_named(tmp_path: pathlib.Path, secured: Secured) -> None:
    a, b = secured.ours.sign("a"), secured.ours.sign("b")
    garbage = tmp_path / "garbage.pem"
    garbage.write_text("-----BEGIN NOTHING-----\n")
    for cert, key, ca in ((a.cert, b.key, None), (garbage, a.key, None), (a.cert, a.key, garbage)):
        flags = ["--tls-cert", str(cert), "--tls-key", str(key), *(["--tls-client-ca", str(ca)] if ca else [])]
        done = start(
            "--home", str(tmp_path / "h"), "--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0", *flags
        )
        assert done.returncode == 2 and "--tls-cert" in done.stderr and "Traceback" not in done.stderr


def start(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", TINY, *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=ROOT)
