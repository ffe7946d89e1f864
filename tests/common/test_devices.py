"""A device has one user, known by name, and is free when that process is dead."""

from __future__ import annotations

import pathlib
import subprocess
import threading

import pytest

from qlorad.v1 import errors_pb2
from services.common import devices
from services.common.errors import Fault
from tests.common.child import child

HOLD = """
import pathlib, sys
from services.common import devices
lease = devices.acquire(pathlib.Path(sys.argv[1]), "cpu", "jobs/7", 123)
"""


def test_a_busy_device_names_its_user(tmp_path: pathlib.Path) -> None:
    lease = devices.acquire(tmp_path, "cuda:0", "jobs/1", 42)
    with pytest.raises(Fault) as caught:
        devices.acquire(tmp_path, "cuda:0", "jobs/2")
    assert caught.value.reason == errors_pb2.REASON_DEVICE_BUSY
    assert dict(caught.value.metadata) == {"owner": "jobs/1", "owner_bytes": "42"}
    assert caught.value.retry_seconds > 0
    assert devices.holder(tmp_path, "cuda:0") == ("jobs/1", 42)
    assert devices.try_acquire(tmp_path, "cuda:0", "jobs/2") == ("jobs/1", 42)
    lease.describe("jobs/1", 43)
    assert devices.holder(tmp_path, "cuda:0") == ("jobs/1", 43)
    other = devices.acquire(tmp_path, "cpu", "jobs/2")
    other.release()
    lease.release()
    assert devices.holder(tmp_path, "cuda:0") is None and devices.holder(tmp_path, "cuda:1") is None


def test_kill_9_frees_the_device(tmp_path: pathlib.Path) -> None:
    with child(HOLD, str(tmp_path), "keep") as user:
        assert devices.holder(tmp_path, "cpu") == ("jobs/7", 123)
        user.kill()
        user.wait(30)
        devices.acquire(tmp_path, "cpu", "jobs/8").release()


def test_the_lease_lives_with_the_worker_and_not_with_the_daemon(tmp_path: pathlib.Path) -> None:
    lease = devices.acquire(tmp_path, "cpu", "jobs/7", 1)
    worker = subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=[lease.fd])
    lease.release()
    assert devices.holder(tmp_path, "cpu") == ("jobs/7", 1)
    worker.kill()
    worker.communicate()
    assert devices.holder(tmp_path, "cpu") is None


def test_looking_never_stands_in_the_way(tmp_path: pathlib.Path) -> None:
    devices.acquire(tmp_path, "cpu", "first").release()
    ending = threading.Event()

    def look() -> None:
        while not ending.is_set():
            devices.holder(tmp_path, "cpu")

    lookers = [threading.Thread(target=look) for _ in range(3)]
    for looker in lookers:
        looker.start()
    try:
        for number in range(300):
            devices.acquire(tmp_path, "cpu", f"jobs/{number}").release()
    finally:
        ending.set()
        for looker in lookers:
            looker.join()


def test_devices_here_end_with_the_cpu() -> None:
    assert devices.devices_here()[-1] == "cpu"


def test_a_share_and_the_whole_exclude_one_another(tmp_path: pathlib.Path) -> None:
    first = devices.acquire(tmp_path, "cpu:0", "jobs/a")
    second = devices.acquire(tmp_path, "cpu:1", "jobs/b")
    assert devices.try_acquire(tmp_path, "cpu", "inference/engine") == ("jobs/a", 0)
    first.release()
    assert devices.try_acquire(tmp_path, "cpu", "inference/engine") == ("jobs/b", 0)
    second.release()
    whole = devices.acquire(tmp_path, "cpu", "inference/engine", 7)
    assert devices.try_acquire(tmp_path, "cpu:0", "jobs/a") == ("inference/engine", 7)
    whole.release()
    other = devices.acquire(tmp_path, "cuda:1", "jobs/a")
    for free in ("cpu:0", "cuda:0"):
        devices.acquire(tmp_path, free, "jobs/b").release()
    other.release()
