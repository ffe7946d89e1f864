"""P5 and P12 of the datasets: cut anywhere, a full disk anywhere. Kills are at bytes, not by clock."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import random
import subprocess
import sys
from collections.abc import Callable, Iterator

import grpc
import pytest

from qlorad.v1 import datasets_pb2
from services.common.shelf import Shelf
from tests.datasets.kit import Door, jsonl, numbered, open_door, pieces, refusal, refusal_of
from tests.house import House, eventually

MIB = 1 << 20


@pytest.fixture
def own_door(tmp_path: pathlib.Path, house_factory: Callable[[pathlib.Path], House]) -> Callable[..., Door]:
    """Starts a daemon in a home of this test's own, with flags."""
    return lambda *flags: open_door(house_factory(tmp_path / "home"), *flags)


def cut_and_resume(door: Door, data: bytes, seed: int, cuts: int) -> None:
    """P5: kills the daemon at random bytes of an upload; what it counted is there, what is not whole is not visible."""
    draw = random.Random(seed)
    opened = door.start(data, request_id="cut")
    part = door.home / "state" / "uploads" / f"{opened.name.removeprefix('uploads/')}.part"
    committed = 0
    for _ in range(cuts):
        cut = draw.randint(committed, len(data) - 1)
        whole = draw.random() < 0.5  # a stream that ends by itself, or one that is still open at the kill

        def stream(
            begin: int = committed, end: int = cut, whole: bool = whole
        ) -> Iterator[datasets_pb2.WriteUploadRequest]:
            yield from pieces(opened.name, data[begin:end], begin, draw.randint(1000, MIB))
            if not whole:
                eventually(lambda: part.exists() and part.stat().st_size >= end, what="the bytes on their way")
                door.kill()

        try:
            answer = door.stub.WriteUpload(stream(), timeout=60)
            assert whole and answer.upload.committed_bytes == cut
            door.kill()
        except grpc.RpcError as e:
            assert e.code() == grpc.StatusCode.UNAVAILABLE
        door.again()
        assert door.start(data, request_id="cut").name == opened.name
        now = door.look(opened.name)
        assert committed <= now.committed_bytes <= cut and not now.complete
        if whole:
            assert now.committed_bytes == cut
        committed = now.committed_bytes
        with part.open("rb") as f:
            assert f.read(committed) == data[:committed]
        assert refusal(lambda: door.make("early", opened.name)).reason == "WRONG_STATE"
        assert door.listed() == []
    done = door.write(opened.name, data[committed:], committed)
    assert done.complete and done.sha256 == hashlib.sha256(data).hexdigest()
    assert part.read_bytes() == data
    door.kill()
    door.again()
    assert door.look(opened.name) == done
    assert door.start(data, request_id="cut") == done
    assert door.write(opened.name, b"", len(data)) == done


@pytest.mark.parametrize("seed", [1, 2])
def test_p5_an_upload_cut_anywhere_by_kill_9_resumes(own_door: Callable[..., Door], seed: int) -> None:
    cut_and_resume(own_door(), random.Random(5).randbytes(3 * MIB), seed, cuts=3)


@pytest.mark.storm
@pytest.mark.parametrize("seed", range(10))
def test_p5_storm(own_door: Callable[..., Door], seed: int) -> None:
    cut_and_resume(own_door(), random.Random(seed).randbytes(48 * MIB), seed, cuts=20)


class Disk:
    """A small disk that holds a home, and ballast on it."""

    def __init__(self, home: pathlib.Path) -> None:
        self.home = home
        self._ballast = home / "ballast"

    def fill(self, leave_bytes: int) -> None:
        """Takes all space but some."""
        with self._ballast.open("ab") as f, contextlib.suppress(OSError):
            while True:
                free = os.statvfs(self.home).f_bavail * os.statvfs(self.home).f_frsize - leave_bytes
                if free <= 0:
                    return
                f.write(b"\0" * min(free, MIB))
                f.flush()

    def empty(self) -> None:
        """Gives the space back."""
        self._ballast.unlink(missing_ok=True)


@contextlib.contextmanager
def small_disk(folder: pathlib.Path, size_mib: int) -> Iterator[Disk]:
    """A tmpfs of some MiB."""
    if os.geteuid() != 0 or sys.platform != "linux":
        pytest.skip("mounting a tmpfs needs root on Linux")
    folder.mkdir(parents=True)
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_mib}m", "none", str(folder)], capture_output=True)
    if made.returncode:
        pytest.skip(f"no tmpfs here: {made.stderr.decode().strip()}")
    try:
        yield Disk(folder)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def full_and_on(house: House, disk: Disk, rows: int, leave_bytes: int) -> None:
    """P12: every step of the way meets a full disk, says so, leaves nothing half, and goes on when there is space."""
    door = open_door(house)
    before = door.make("before", jsonl(numbered(100)))
    data = jsonl(numbered(rows))
    request_ids = iter(f"full-{n}" for n in range(100))

    disk.fill(leave_bytes)
    refused = refusal(lambda: door.start(data, "rows.jsonl", next(request_ids)))
    assert (refused.code, refused.reason) == ("RESOURCE_EXHAUSTED", "DISK_FULL")

    disk.empty()
    opened = door.start(data, "rows.jsonl", "upload")
    disk.fill(leave_bytes)
    with pytest.raises(grpc.RpcError) as e:
        door.write(opened.name, data)
    assert refusal_of(e.value).reason == "DISK_FULL"
    disk.empty()
    now = door.look(opened.name)
    assert now.committed_bytes < len(data) and not now.complete
    assert door.write(opened.name, data[now.committed_bytes :], now.committed_bytes).complete

    request = door.request("later", opened.name, request_id="later")
    disk.fill(leave_bytes)
    with pytest.raises(grpc.RpcError) as e:
        door.updates(request)
    told = refusal_of(e.value)
    assert (told.code, told.reason) == ("RESOURCE_EXHAUSTED", "DISK_FULL"), told
    assert door.listed() == [before.name] and door.leftovers() == []
    assert len(door.export(before.name)) == 100  # what was there serves on

    disk.empty()
    assert door.updates(request)[-1].dataset.stats.rows["train"] == rows
    for name in ("before", "later"):
        Shelf(door.home / "store").open("datasets", name, verify=True)
    assert house.daemons["datasets"].stop() == 0


def test_p12_a_full_disk_is_said_and_gone_on_from(
    tmp_path: pathlib.Path, house_factory: Callable[[pathlib.Path], House]
) -> None:
    with small_disk(tmp_path / "disk", 24) as disk:
        full_and_on(house_factory(disk.home), disk, rows=20_000, leave_bytes=200 << 10)


@pytest.mark.slow
@pytest.mark.parametrize("size_mib", [12, 20, 35, 50])
@pytest.mark.parametrize("leave_kib", [0, 70, 500])
def test_p12_on_disks_of_many_sizes(
    tmp_path: pathlib.Path, house_factory: Callable[[pathlib.Path], House], size_mib: int, leave_kib: int
) -> None:
    with small_disk(tmp_path / "disk", size_mib) as disk:
        full_and_on(house_factory(disk.home), disk, rows=size_mib * 800, leave_bytes=leave_kib << 10)
