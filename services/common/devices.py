"""Device leases: one user of a device at a time, known by name.

Law of this room: a lease is a flock on `state/devices/ID.lock` held through an
inherited file descriptor by the process that uses the device, so it ends with
that process, however it ends. The file tells owner and bytes for those who wait.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pathlib
import platform
from collections.abc import Mapping
from dataclasses import dataclass

from services.common.errors import Fault, device_busy


@dataclass(frozen=True, slots=True)
class Lease:
    """A held device. Pass `fd` to the worker, then `release` the own copy."""

    device: str
    path: pathlib.Path
    fd: int

    def describe(self, owner: str, owner_bytes: int) -> None:
        """Tells those who wait who holds the device and what it takes."""
        data = json.dumps({"owner": owner, "bytes": owner_bytes}).encode()
        os.pwrite(self.fd, data.ljust(512), 0)

    def release(self) -> None:
        """Closes this process's copy; the lease lives on while the worker has one."""
        with contextlib.suppress(OSError):
            os.close(self.fd)


def devices_here() -> list[str]:
    """Devices of this host, best first; found without torch."""
    cuda = sorted(p.name.removeprefix("nvidia") for p in pathlib.Path("/dev").glob("nvidia[0-9]*"))
    found = [f"cuda:{n}" for n in cuda if n.isdigit()]
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        found.append("mps")
    return [*found, "cpu"]


def _path(folder: pathlib.Path, device: str) -> pathlib.Path:
    return folder / f"{device.replace(':', '-')}.lock"


def holder(folder: pathlib.Path, device: str) -> tuple[str, int] | None:
    """Who holds a device and how many bytes, or None if it is free."""
    path = _path(folder, device)
    if not path.exists():
        return None
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        return _read(fd)
    finally:
        os.close(fd)


def _read(fd: int) -> tuple[str, int]:
    try:
        told: Mapping[str, object] = json.loads(os.pread(fd, 512, 0))
        return str(told["owner"]), int(str(told["bytes"]))
    except (ValueError, KeyError, TypeError):
        return "a process that has not said its name yet", 0


def _kin(folder: pathlib.Path, device: str) -> list[str]:
    """Devices that are another cut of the same: "cpu" is all of "cpu:0", "cpu:1", ..."""
    whole, part, _ = device.partition(":")
    if part:
        return [whole]
    return [p.stem.replace("-", ":") for p in sorted(folder.glob(f"{whole}-[0-9]*.lock"))]


def acquire(folder: pathlib.Path, device: str, owner: str, owner_bytes: int = 0) -> Lease:
    """Takes a device at once, or raises DEVICE_BUSY naming the holder. Does not wait.

    A part of a device ("cpu:1") and the whole ("cpu") exclude one another: each takes
    its own lock and then looks for the other's, so of two at once none or one gets it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = _path(folder, device)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    if not _lock(fd):
        told = _read(fd)
        os.close(fd)
        raise device_busy(device, *told)
    for other in _kin(folder, device):
        taken = holder(folder, other)
        if taken is not None:
            os.close(fd)
            raise device_busy(other, *taken)
    lease = Lease(device, path, fd)
    lease.describe(owner, owner_bytes)
    return lease


def _lock(fd: int) -> bool:
    """Locks, unless a user of the device holds it. Those who only look (`holder`) share it for a moment."""
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            pass
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)  # only a user of the device stands against this
            fcntl.flock(fd, fcntl.LOCK_UN)
        except BlockingIOError:
            return False


def try_acquire(folder: pathlib.Path, device: str, owner: str, owner_bytes: int = 0) -> Lease | tuple[str, int]:
    """Takes a device, or tells who holds it."""
    try:
        return acquire(folder, device, owner, owner_bytes)
    except Fault:
        held = (holder(folder, d) for d in (device, *_kin(folder, device)))
        return next(filter(None, held), ("a process that is just ending", 0))
