"""Where the daemons are and how to speak to them: addresses, TLS, token, retries.

Law of this room: nothing is opened here; both transports (asyncio and plain)
ask it what to open. A token is never shown and never sent in clear text to
another machine.
"""

from __future__ import annotations

import ipaddress
import json
import os
import pathlib
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import grpc

from qlorad import errors

PORTS = {"datasets": 50051, "registry": 50052, "trainer": 50053, "inference": 50054}
SERVICES = {
    "datasets": ("qlorad.v1.DatasetService",),
    "registry": ("qlorad.v1.ModelService", "qlorad.v1.AdapterService"),
    "trainer": ("qlorad.v1.TrainerService",),
    "inference": ("qlorad.v1.InferenceService",),
}
# Calls that a repetition cannot change: they read, or carry a request_id that
# makes the second call answer as the first. Streams that do work repeat in the
# transport (they may have begun to answer).
_REPEATABLE = {
    "datasets": ("StartUpload", "GetUpload", "GetDataset", "ListDatasets", "DeleteDataset"),
    "registry": (
        "GetModel", "ListModels", "DeleteModel", "GetAdapter", "ListAdapters", "SetAdapterAlias", "DeleteAdapter",
    ),
    "trainer": ("CreateJob", "GetJob", "ListJobs", "CancelJob", "PauseJob", "ResumeJob", "DeleteJob", "ListTemplates"),
    "inference": ("ListLoadedModels", "ListAdapters", "SwitchAdapter"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Target:
    """Where a daemon is."""

    service: str
    address: str
    tls: bool
    source: str
    """Who says so: "argument", "environment", "run file" or "default"."""

    def __str__(self) -> str:
        return f"qlorad-{self.service} at {self.address}"


@dataclass(frozen=True, slots=True)
class Connection:
    """What a caller said about the way to the daemons."""

    home: pathlib.Path
    addresses: Mapping[str, str]
    environ: Mapping[str, str] = field(repr=False)
    ca: str = ""
    cert: str = ""
    key: str = ""
    tls: bool | None = None
    token: str = field(default="", repr=False)
    is_named: bool = False
    """Whether somebody named the home, and so means the daemons of that home and no others."""

    def target(self, service: str) -> Target:
        """Argument, else environment, else the daemon's run file, else the default port.

        Reads the run file anew each time: a daemon that came back may have moved.
        """
        variable = f"QLORAD_{service.upper()}_ADDRESS"
        secure = self.tls if self.tls is not None else bool(self.ca or self.cert)
        if self.addresses.get(service):
            return Target(service, self.addresses[service], secure, "argument")
        if self.environ.get(variable):
            return Target(service, self.environ[variable], secure, "environment")
        told = read_run_file(self.home, service)
        if told is not None and isinstance(told.get("address"), str):
            wanted = self.tls if self.tls is not None else bool(told.get("tls"))
            return Target(service, str(told["address"]), wanted or secure, "run file")
        return Target(service, f"127.0.0.1:{PORTS[service]}", secure, "default")

    def credentials(self) -> grpc.ChannelCredentials:
        """TLS with the CA given (else the system's) and, for mutual TLS, our certificate."""
        return grpc.ssl_channel_credentials(_pem("ca", self.ca), _pem("key", self.key), _pem("cert", self.cert))

    def metadata(self, target: Target) -> tuple[tuple[str, str], ...]:
        """What goes with every call.

        Refuses to send a token in clear text to another machine, and to call
        whoever has the default port where the daemon of a named home is meant.
        """
        if self.is_named and target.source == "default":
            raise errors.Unavailable(
                f"no qlorad-{target.service} runs in the home {self.home}: type `qlorad up`, or name an address"
            )
        if not self.token:
            return ()
        if not target.tls and not is_loopback(target.address):
            raise errors.invalid(
                "token", f"a token for {target.address} without TLS", "TLS (ca), or a loopback address"
            )
        return (("authorization", f"Bearer {self.token}"),)


def connection(
    home: str | os.PathLike[str] | None,
    addresses: Mapping[str, str],
    ca: str,
    cert: str,
    key: str,
    tls: bool | None,
    token: str | None,
    environ: Mapping[str, str] | None = None,
) -> Connection:
    """Arguments over environment: QLORAD_HOME, QLORAD_TLS_CA, QLORAD_TLS_CERT, QLORAD_TLS_KEY, QLORAD_TOKEN."""
    environ = os.environ if environ is None else environ
    cert, key = cert or environ.get("QLORAD_TLS_CERT", ""), key or environ.get("QLORAD_TLS_KEY", "")
    if bool(cert) != bool(key):
        raise errors.invalid("cert and key", "one of them", "both or neither")
    return Connection(
        home=home_of(home, environ),
        addresses={name: address for name, address in addresses.items() if address},
        environ=environ,
        ca=ca or environ.get("QLORAD_TLS_CA", ""),
        cert=cert,
        key=key,
        tls=tls,
        token=environ.get("QLORAD_TOKEN", "") if token is None else token,
        is_named=bool(home or environ.get("QLORAD_HOME")),
    )


def home_of(given: str | os.PathLike[str] | None, environ: Mapping[str, str]) -> pathlib.Path:
    """The home given, else $QLORAD_HOME, else ~/.qlorad."""
    return pathlib.Path(given or environ.get("QLORAD_HOME") or "~/.qlorad").expanduser().absolute()


def read_run_file(home: pathlib.Path, service: str) -> dict[str, object] | None:
    """What a daemon told of itself; None if it told nothing that can be read."""
    try:
        told = json.loads((home / "state" / "run" / f"{service}.json").read_text())
    except (OSError, ValueError):
        return None
    return told if isinstance(told, dict) else None


def is_loopback(address: str) -> bool:
    """Whether HOST:PORT (or a unix socket) is this machine."""
    if address.startswith(("unix:", "unix-abstract:")):
        return True
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def channel_options(service: str) -> list[tuple[str, str | int]]:
    """Message limits, keepalive, and repetition of what may be repeated."""
    names = [{"service": full, "method": m} for full in SERVICES[service] for m in _REPEATABLE[service]]
    policy = {
        "maxAttempts": 4,
        "initialBackoff": "0.1s",
        "maxBackoff": "1s",
        "backoffMultiplier": 2,
        "retryableStatusCodes": ["UNAVAILABLE"],
    }
    return [
        ("grpc.service_config", json.dumps({"methodConfig": [{"name": names, "retryPolicy": policy}]})),
        ("grpc.max_receive_message_length", 16 << 20),
        ("grpc.max_send_message_length", 16 << 20),
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        ("grpc.enable_http_proxy", 0),
    ]


def new_request_id() -> str:
    """A request_id that nobody else has."""
    return uuid.uuid4().hex


def _pem(name: str, path: str) -> bytes | None:
    if not path:
        return None
    try:
        return pathlib.Path(path).read_bytes()
    except OSError as e:
        raise errors.invalid(name, path, f"a readable PEM file ({e.strerror})") from None


_BROKEN_OFF = "Internal error from Core"
"""What grpc says to asyncio where the other side dies in the middle of a stream of requests; no server says it."""


def failure(error: grpc.RpcError, target: Target) -> errors.QloradError:
    """A gRPC failure as a typed error."""
    call: Any = error  # both kinds of RpcError are calls too
    details = b""
    for key, value in call.trailing_metadata() or ():
        if key == errors.DETAILS_KEY:
            details = value
    code, told = call.code().name, call.details() or ""
    if code == "INTERNAL" and told == _BROKEN_OFF and not details:
        code, told = "UNAVAILABLE", "the connection broke while a request was being sent"
    return errors.build(code, told, details, str(target))
