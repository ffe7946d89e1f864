"""Uploads: what is counted is safe, a cut costs nothing but the rest, and nothing is taken that was not announced."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator

from qlorad.v1 import datasets_pb2
from tests.datasets.kit import Door, jsonl, numbered, pieces, refusal
from tests.house import eventually

DATA = random.Random(5).randbytes(3 << 20)


def test_what_a_broken_stream_brought_counts(door: Door) -> None:
    data = DATA[: 1 << 20]
    name = door.start(data, "broken.jsonl").name
    hold = threading.Event()

    def stream() -> Iterator[datasets_pb2.WriteUploadRequest]:
        yield from pieces(name, data[:500_000])
        hold.wait(30)

    part = door.home / "state" / "uploads" / f"{name.removeprefix('uploads/')}.part"
    call = door.stub.WriteUpload.future(stream(), timeout=60)
    eventually(lambda: part.exists() and part.stat().st_size == 500_000, what="the bytes on their way")
    call.cancel()
    hold.set()
    assert eventually(lambda: door.look(name).committed_bytes, what="the count") == 500_000
    assert door.write(name, data[500_000:], 500_000).complete


def test_of_two_streams_one_goes_on(door: Door) -> None:
    data = DATA[: 1 << 20]
    name = door.start(data, "two.jsonl").name
    first_in, hold = threading.Event(), threading.Event()

    def slow() -> Iterator[datasets_pb2.WriteUploadRequest]:
        yield datasets_pb2.WriteUploadRequest(upload=name, offset=0, data=data[:1000])
        first_in.set()
        hold.wait(30)
        yield datasets_pb2.WriteUploadRequest(data=b"late")

    call = door.stub.WriteUpload.future(slow(), timeout=60)
    assert first_in.wait(30)
    eventually(lambda: refusal(lambda: door.write(name, b"x", 7)).metadata["committed_bytes"] == "1000", what="a count")
    assert door.write(name, data[1000:], 1000).complete
    hold.set()
    assert refusal(call.result).reason in ("WRONG_OFFSET", "INVALID_REQUEST")
    assert door.look(name).complete


def test_a_wrong_offset_is_told_the_right_one(door: Door) -> None:
    data = b"0123456789" * 10
    name = door.start(data, "offset.jsonl").name
    door.write(name, data[:40])
    wrong = refusal(lambda: door.write(name, data[50:], 50))
    assert (wrong.code, wrong.reason, wrong.metadata["committed_bytes"]) == ("ABORTED", "WRONG_OFFSET", "40")
    inner = [
        datasets_pb2.WriteUploadRequest(upload=name, offset=40, data=data[40:50]),
        datasets_pb2.WriteUploadRequest(offset=60, data=data[60:70]),
    ]
    assert refusal(lambda: door.stub.WriteUpload(iter(inner), timeout=20)).fields == ["offset"]
    assert door.look(name).committed_bytes == 50
    assert door.write(name, data[50:], 50).complete


def test_other_bytes_than_announced_are_refused_and_the_upload_emptied(door: Door) -> None:
    name = door.start(b"right bytes", "digest.jsonl").name
    wrong = refusal(lambda: door.write(name, b"wrong bytes"))
    assert (wrong.code, wrong.reason) == ("DATA_LOSS", "CORRUPT")
    assert door.look(name).committed_bytes == 0
    longer = refusal(lambda: door.write(name, b"right bytes and more"))
    assert longer.code == "INVALID_ARGUMENT" and "11, as announced" in longer.message
    assert door.write(name, b"right bytes").complete


def test_an_id_means_one_request(door: Door) -> None:
    first = door.start(b"one", "one.jsonl", request_id="same")
    assert door.start(b"one", "one.jsonl", request_id="same") == first
    other = refusal(lambda: door.start(b"two", "one.jsonl", request_id="same"))
    assert (other.code, other.reason) == ("ALREADY_EXISTS", "REQUEST_ID_REUSED")


def test_all_that_is_wrong_is_told_at_once(door: Door) -> None:
    wrong = refusal(lambda: door.start(b"", "../evil.pkl", request_id="no blanks", sha256="abc"))
    assert wrong.code == "INVALID_ARGUMENT"
    assert wrong.fields == ["request_id", "filename", "size_bytes", "sha256"]
    for name in ("model.pkl", "weights.safetensors", "rows", "", "a" * 300 + ".csv", "a\x00.csv"):
        assert refusal(lambda name=name: door.start(b"x", name, request_id="n")).fields == ["filename"]


def test_unknown_uploads_and_giant_pieces_are_refused(door: Door) -> None:
    nobody = "uploads/" + "0" * 32
    assert refusal(lambda: door.look(nobody)).reason == "NOT_FOUND"
    assert refusal(lambda: door.write(nobody, b"x")).reason == "NOT_FOUND"
    assert refusal(lambda: door.look("uploads/../../etc/passwd")).fields == ["name"]
    assert refusal(lambda: door.stub.WriteUpload(iter([]), timeout=20)).fields == ["upload"]
    name = door.start(DATA, "giant.jsonl").name
    giant = [datasets_pb2.WriteUploadRequest(upload=name, data=DATA[: (1 << 20) + 1])]
    assert refusal(lambda: door.stub.WriteUpload(iter(giant), timeout=20)).fields == ["data"]


def test_the_bound_on_a_file_is_a_setting(own_door: Callable[..., Door]) -> None:
    door = own_door("--max-upload-bytes", "100")
    too_large = refusal(lambda: door.start(b"x" * 101))
    assert (too_large.code, too_large.reason) == ("RESOURCE_EXHAUSTED", "TOO_LARGE")
    assert door.start(b"x" * 100).size_bytes == 100


def test_uploads_that_nobody_touches_are_swept_away(own_door: Callable[..., Door]) -> None:
    import sqlite3

    door = own_door()
    old, fresh = door.send(jsonl(numbered(2))), door.send(jsonl(numbered(3)))
    door.house.daemons["datasets"].stop()
    with sqlite3.connect(door.home / "state" / "datasets.sqlite") as db:
        db.execute("UPDATE uploads SET touched = touched - 8 * 86400 WHERE id = ?", (old.removeprefix("uploads/"),))
    db.close()
    (door.home / "state" / "uploads" / "stray.part").write_bytes(b"x")
    door.again()
    assert refusal(lambda: door.look(old)).reason == "NOT_FOUND"
    assert door.look(fresh).complete
    assert len(list((door.home / "state" / "uploads").iterdir())) == 1
    assert door.start(jsonl(numbered(2))).committed_bytes == 0  # the same request opens it anew
