"""The bootstrap that all daemons share: from a built application to exit 0.

Law of this room: bind, then SERVING, then tell the bound addresses in
`state/run/NAME.json`; on SIGTERM NOT_SERVING, drain, exit 0. Without TLS and
authentication only loopback is bound.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import ipaddress
import json
import logging
import os
import pathlib
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import grpc
import grpc.aio
from grpc_health.v1 import _async, health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry

from services.common import config, telemetry
from services.common.config import ConfigError, setting
from services.common.interceptors import LARGEST_ANSWER, Door, Tokens
from services.common.shelf import write_durable

log = logging.getLogger("qlorad.server")
T = TypeVar("T")

MAX_MESSAGE_BYTES = 16 << 20
HEALTH = "grpc.health.v1.Health"


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """What every daemon is told."""

    home: pathlib.Path = setting(pathlib.Path("~/.qlorad"), "where store, state and logs live")
    config: str = setting("", "a YAML file of settings")
    listen: str = setting("", "HOST:PORT for gRPC; port 0 = any free one")
    metrics_listen: str = setting("", "HOST:PORT for /metrics; port 0 = any free one")
    tls_cert: str = setting("", "PEM certificate chain; reread when it changes")
    tls_key: str = setting("", "PEM private key; reread when it changes")
    tls_client_ca: str = setting("", "PEM CA; clients must show a certificate of it (mutual TLS)")
    tokens_file: str = setting("", "lines '<sha256 of a token in hex> <name>'; callers must show one of them")
    log_level: str = setting(
        "INFO", "DEBUG, INFO, WARNING or ERROR", lambda v: v in ("DEBUG", "INFO", "WARNING", "ERROR"),
        "DEBUG, INFO, WARNING, ERROR",
    )  # fmt: skip
    drain_seconds: float = setting(
        10.0, "how long calls in flight may take after SIGTERM", lambda v: 0 <= v <= 3600, "0 to 3600"
    )
    max_message_bytes: int = setting(
        MAX_MESSAGE_BYTES, "largest message taken", lambda v: 1 << 20 <= v <= 1 << 30, "1048576 to 1073741824"
    )

    def __post_init__(self) -> None:
        faults = []
        if bool(self.tls_cert) != bool(self.tls_key):
            faults.append("--tls-cert and --tls-key: accepted: both or neither")
        if self.tls_client_ca and not self.tls_cert:
            faults.append("--tls-client-ca: accepted: only with --tls-cert and --tls-key")
        for flag, value in (
            ("--tls-cert", self.tls_cert),
            ("--tls-key", self.tls_key),
            ("--tls-client-ca", self.tls_client_ca),
            ("--tokens-file", self.tokens_file),
        ):
            if value and not os.access(value, os.R_OK):
                faults.append(f"{flag}: got {value!r}, which cannot be read; accepted: a readable file")
        for flag, value in (("--listen", self.listen), ("--metrics-listen", self.metrics_listen)):
            if not value:
                continue
            try:
                host, _ = split_address(value)
            except ValueError as e:
                faults.append(f"{flag}: got {value!r}; accepted: {e}")
                continue
            secured = bool(self.tls_cert) and bool(self.tokens_file or self.tls_client_ca)
            if not is_loopback(host) and not secured:
                faults.append(
                    f"{flag}: got {value!r}; accepted: a loopback address, or any address together with "
                    "--tls-cert, --tls-key and one of --tokens-file or --tls-client-ca"
                )
        if faults:
            raise ConfigError(faults)

    @property
    def state(self) -> pathlib.Path:
        return self.home / "state"

    @property
    def logs(self) -> pathlib.Path:
        return self.home / "logs"


def split_address(address: str) -> tuple[str, int]:
    """HOST:PORT or [V6]:PORT as its parts."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise ValueError("HOST:PORT with a port from 0 to 65535")
    return host.strip("[]"), int(port)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the host."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(slots=True)
class App:
    """A daemon put together: what it serves and how it begins and ends."""

    name: str
    settings: ServerSettings
    default_ports: tuple[int, int]
    services: Sequence[tuple[str, Callable[[grpc.aio.Server], None]]]
    """Full service name and the call that adds its servicer."""
    registry: CollectorRegistry
    start: Callable[[Health], Awaitable[None]]
    """Begins the daemon's own work; may keep `Health` to report on it."""
    stop: Callable[[], Awaitable[None]]
    """Ends the daemon's own work; called once calls in flight have ended."""
    drain: Callable[[], None] = field(default=lambda: None)
    """Told at SIGTERM, before calls in flight are waited for: long streams should end."""


class Health:
    """Standard health, per service and overall."""

    def __init__(self, services: Sequence[str]) -> None:
        self.servicer = _async.HealthServicer()
        self._services = services

    async def set(self, serving: bool, services: Sequence[str] = ()) -> None:
        """Reports services (all of them, and the whole, if none is named)."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in services or (*self._services, ""):
            await self.servicer.set(name, status)


def _credentials(s: ServerSettings) -> grpc.ServerCredentials:
    """TLS that rereads its files when they change; a torn change keeps the old ones."""
    paths = [pathlib.Path(p) for p in (s.tls_key, s.tls_cert, s.tls_client_ca) if p]
    seen: list[tuple[int, int, int]] = []

    def read() -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration(
            [(pathlib.Path(s.tls_key).read_bytes(), pathlib.Path(s.tls_cert).read_bytes())],
            pathlib.Path(s.tls_client_ca).read_bytes() if s.tls_client_ca else None,
        )

    def stamp() -> list[tuple[int, int, int]]:
        return [(st.st_mtime_ns, st.st_size, st.st_ino) for st in (p.stat() for p in paths)]

    seen = stamp()

    def fetch() -> Any:  # None = unchanged, which the stubs do not know
        nonlocal seen
        try:
            now = stamp()
            if now == seen:
                return None
            fresh = read()
        except (OSError, ValueError) as e:
            log.warning("certificates cannot be reread, the old ones stay: %s", e)
            return None
        seen = now
        log.info("certificates were reread")
        return fresh

    return grpc.dynamic_ssl_server_credentials(read(), fetch, require_client_authentication=bool(s.tls_client_ca))


@contextlib.contextmanager
def _only_one(s: ServerSettings, name: str) -> Iterator[None]:
    """One daemon of a name in a home."""
    try:
        s.state.mkdir(parents=True, exist_ok=True)
        fd = os.open(s.state / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as e:
        why = f"--home: {s.home} cannot be used: {e.strerror}; accepted: a folder that can be written"
        raise ConfigError([why]) from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise ConfigError(
            [f"--home: {s.home} is served by another qlorad-{name} already; accepted: another home"]
        ) from None
    try:
        yield
    finally:
        os.close(fd)


def _tell(app: App, host: str, port: int, metrics: str) -> pathlib.Path:
    path = app.settings.state / "run" / f"{app.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    shown = f"[{host}]" if ":" in host else host
    told = {
        "pid": os.getpid(),
        "address": f"{shown}:{port}",
        "metrics": metrics,
        "tls": bool(app.settings.tls_cert),
        "token": bool(app.settings.tokens_file),
    }
    write_durable(path, json.dumps(told).encode())
    return path


def _tokens(s: ServerSettings) -> Tokens | None:
    if not s.tokens_file:
        return None
    try:
        return Tokens.parse(pathlib.Path(s.tokens_file).read_text())
    except ValueError as e:
        raise ConfigError([f"--tokens-file: {s.tokens_file}: {e}"]) from None


async def serve(app: App) -> None:
    """Serves until SIGTERM or SIGINT, then drains."""
    s = app.settings
    listen = s.listen or f"127.0.0.1:{app.default_ports[0]}"
    host, _ = split_address(listen)
    metrics_host, metrics_port = split_address(s.metrics_listen or f"127.0.0.1:{app.default_ports[1]}")
    ending = asyncio.Event()
    loop = asyncio.get_running_loop()
    for sig in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(sig, ending.set)
    tokens = _tokens(s)
    door = Door(app.registry, tokens, ending.is_set, min(s.max_message_bytes, LARGEST_ANSWER))
    server = grpc.aio.server(
        interceptors=[door],
        options=[
            ("grpc.max_receive_message_length", s.max_message_bytes),
            ("grpc.max_send_message_length", s.max_message_bytes),
            ("grpc.so_reuseport", 0),
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
            ("grpc.keepalive_permit_without_calls", 1),
        ],
    )
    names = [name for name, _ in app.services]
    state = Health(names)
    health_pb2_grpc.add_HealthServicer_to_server(state.servicer, server)  # type: ignore[no-untyped-call]
    for _, add in app.services:
        add(server)
    _reflect(server, names)
    bound = _bind(server, s, listen)
    try:
        metrics_bound = telemetry.serve_metrics(app.registry, metrics_host, metrics_port)
    except OSError as e:
        raise ConfigError([f"--metrics-listen: {metrics_host}:{metrics_port} cannot be bound: {e.strerror}"]) from None
    async with contextlib.AsyncExitStack() as closing:
        await state.set(False)
        await server.start()
        closing.push_async_callback(server.stop, 0)
        await app.start(state)
        await state.set(True)
        told = _tell(app, host, bound, f"{metrics_host}:{metrics_bound}")
        log.info("qlorad-%s serves on %s:%d, metrics on %s:%d", app.name, host, bound, metrics_host, metrics_bound)
        await ending.wait()
        log.info("draining for at most %.0f s", s.drain_seconds)
        await state.set(False)
        app.drain()
        stopping = asyncio.create_task(server.stop(s.drain_seconds))
        await asyncio.sleep(0)  # lets health watchers hear of it before their streams end
        door.end_standing()
        await stopping
        await app.stop()
        told.unlink(missing_ok=True)
    log.info("qlorad-%s ended", app.name)


def _bind(server: grpc.aio.Server, s: ServerSettings, listen: str) -> int:
    """The bound port, or a ConfigError that names the flag."""
    if s.tls_cert:
        try:
            credentials = _credentials(s)
            _prove(s)
        except (OSError, ValueError) as e:
            raise ConfigError([f"--tls-cert, --tls-key, --tls-client-ca: {e}; accepted: matching PEM files"]) from None
    try:
        return server.add_secure_port(listen, credentials) if s.tls_cert else server.add_insecure_port(listen)
    except RuntimeError:
        raise ConfigError([f"--listen: {listen} cannot be bound; accepted: a free address of this host"]) from None


def _prove(s: ServerSettings) -> None:
    """Loads the files as OpenSSL would, since grpc says only that binding failed."""
    import ssl

    trial = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trial.load_cert_chain(s.tls_cert, s.tls_key)
    if s.tls_client_ca:
        trial.load_verify_locations(s.tls_client_ca)


def _reflect(server: grpc.aio.Server, names: Sequence[str]) -> None:
    from grpc_reflection.v1alpha import reflection

    reflection.enable_server_reflection((*names, HEALTH, reflection.SERVICE_NAME), server)  # type: ignore[no-untyped-call]


def main(service: str, kind: type[T], build: Callable[[T], App]) -> None:
    """The whole of a daemon's `__main__`: configuration, logging, serving, exit code."""
    if "--help" in sys.argv[1:]:
        print(config.usage(kind, service))
        raise SystemExit(0)
    try:
        loaded = config.load(kind, service, sys.argv[1:])
        server: ServerSettings = loaded.server  # type: ignore[attr-defined]
        telemetry.start_logging(server.log_level)
        with _only_one(server, service):
            asyncio.run(serve(build(loaded)))
    except ConfigError as e:
        print(f"qlorad-{service} cannot start:", *e.faults, sep="\n  ", file=sys.stderr)
        raise SystemExit(2) from None
