"""What can be known of the four daemons from outside: run file, lock, health.

Law of this room: reads only. Whoever holds `state/NAME.lock` is a daemon that
lives; a run file alone proves nothing.
"""

from __future__ import annotations

import fcntl
import os
import pathlib
from dataclasses import dataclass
from typing import Any

from qlorad._connection import SERVICES, Connection, connection, read_run_file

NAMES = tuple(SERVICES)


@dataclass(frozen=True, slots=True)
class Seen:
    """A daemon as it looks from outside."""

    service: str
    address: str
    health: str
    """SERVING, NOT_SERVING, UNREACHABLE (an answer was hoped for) or DOWN (nobody is there)."""
    pid: int
    metrics: str
    tls: bool
    token: bool
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        told: dict[str, Any] = {
            "service": self.service,
            "address": self.address,
            "health": self.health,
            "pid": self.pid,
            "metrics": self.metrics,
            "tls": self.tls,
            "token": self.token,
        }
        return {**told, "note": self.note} if self.note else told


def locked(path: pathlib.Path) -> bool:
    """Whether a process holds the lock on a file."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def lives(home: pathlib.Path, service: str) -> bool:
    """Whether a daemon of this name runs in the home on this machine."""
    return locked(home / "state" / f"{service}.lock")


def look(home: pathlib.Path, seconds: float = 2.0) -> list[Seen]:
    """All four as they are now."""
    return [_look(connection(home, {}, "", "", "", None, None), service, seconds) for service in NAMES]


def serving(home: pathlib.Path, service: str, pid: int, seconds: float = 1.0) -> bool:
    """Whether the daemon with this pid is SERVING."""
    told = read_run_file(home, service)
    if told is None or told.get("pid") != pid:
        return False
    return health(connection(home, {}, "", "", "", None, None), service, seconds)[0] == "SERVING"


def health(way: Connection, service: str, seconds: float) -> tuple[str, str]:
    """The standard health of a daemon as a whole, and a word where there is no answer."""
    import grpc

    from qlorad._connection import channel_options, failure
    from qlorad.errors import QloradError

    target = way.target(service)
    options = channel_options(service)
    try:
        channel = (
            grpc.secure_channel(target.address, way.credentials(), options)
            if target.tls
            else grpc.insecure_channel(target.address, options)
        )
        with channel:
            # The standard request of an empty service name is an empty message, and
            # the answer's one field is the status: no stubs are needed for that.
            check: Any = channel.unary_unary("/grpc.health.v1.Health/Check")
            answer = check(b"", timeout=seconds, metadata=way.metadata(target))
    except grpc.RpcError as e:
        return "UNREACHABLE", failure(e, target).message
    except QloradError as e:
        return "UNREACHABLE", e.message
    return ("SERVING" if answer == b"\x08\x01" else "NOT_SERVING"), ""


def _look(way: Connection, service: str, seconds: float) -> Seen:
    target = way.target(service)
    told = read_run_file(way.home, service) or {}
    here = lives(way.home, service)
    if not here and target.source in ("run file", "default"):
        return Seen(service, "", "DOWN", 0, "", False, False)
    status, note = health(way, service, seconds)
    if target.source not in ("run file", "default"):
        return Seen(service, target.address, status, 0, "", target.tls, bool(way.token), note)
    return Seen(
        service,
        target.address,
        status,
        int(str(told.get("pid", 0))),
        str(told.get("metrics", "")),
        bool(told.get("tls")),
        bool(told.get("token")),
        note,
    )
