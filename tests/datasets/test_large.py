"""A file of a million rows: cut twenty times on its way, then sealed, with little memory."""

from __future__ import annotations

import hashlib
import json
import pathlib
import queue
import random
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

from benchmarks.datasets import Watch, make
from qlorad.v1 import datasets_pb2
from services.common.shards import ShardReader
from tests.datasets.kit import Door

ROWS, CUTS, PIECE = 1_000_000, 20, 1 << 20
MOST_MEMORY = 300_000_000


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_million_rows_with_twenty_cuts_in_little_memory(
    own_door: Callable[..., Door], tmp_path: pathlib.Path
) -> None:
    file = tmp_path / "rows.jsonl"
    make(file, ROWS)
    size, digest, different = file.stat().st_size, hashlib.sha256(), set()
    with file.open("rb") as f:
        for line in f:
            digest.update(line)
            different.add(hashlib.blake2b(line, digest_size=16).digest())
    assert size > 480_000_000 and len(different) < ROWS - 5_000
    door, draw = own_door(), random.Random(20)
    with Watch(door.house.daemons["datasets"].pid) as watch:
        opened = door.stub.StartUpload(
            datasets_pb2.StartUploadRequest(
                request_id="large", filename=file.name, size_bytes=size, sha256=digest.hexdigest()
            )
        ).upload
        for cut in sorted(draw.sample(range(size), CUTS)):
            upload_until(door, opened.name, file, cut)
        done = upload_until(door, opened.name, file, size)
        assert done is not None and done.complete and done.sha256 == digest.hexdigest()
        made = door.updates(door.request("large", opened.name))[-1].dataset
    assert made.stats.rows["train"] == len(different)
    assert made.stats.duplicate_rows == ROWS - len(different)
    assert made.stats.findings["exact_duplicate"] == ROWS - len(different)
    assert watch.peak < MOST_MEMORY, f"{watch.peak / 1e6:.0f} MB"
    # Two processes read it; what is sealed stands in the file's order and knows its lines.
    reader = ShardReader(door.shelf.open("datasets", "large").payload, "train")
    sample = [json.loads(reader[number]) for number in sorted(draw.sample(range(len(reader)), 2_000))]
    wanted = {int(told["origin"]["line"]): told for told in sample}
    assert list(wanted) == sorted(wanted) and len(wanted) == 2_000
    with file.open("rb") as f:
        for line, raw in enumerate(f, 1):
            if line in wanted:
                said = wanted[line]["chat"]["messages"]
                assert said[1]["parts"][0]["text"] == json.loads(raw)["output"]


def upload_until(door: Door, name: str, file: pathlib.Path, end: int) -> datasets_pb2.Upload | None:
    """Sends what is missing up to a place, then breaks the call off; the answer where it is the end."""
    while True:
        begin = door.look(name).committed_bytes
        calls: queue.SimpleQueue[grpc.Future] = queue.SimpleQueue()

        def pieces(begin: int = begin, calls: Any = calls) -> Iterator[datasets_pb2.WriteUploadRequest]:
            yield datasets_pb2.WriteUploadRequest(upload=name, offset=begin)
            with file.open("rb") as f:
                f.seek(begin)
                while f.tell() < end and (data := f.read(min(PIECE, end - f.tell()))):
                    yield datasets_pb2.WriteUploadRequest(data=data)
            if end < file.stat().st_size:
                calls.get().cancel()

        call = door.stub.WriteUpload.future(pieces(), timeout=120)
        calls.put(call)
        try:
            return call.result().upload
        except grpc.FutureCancelledError:
            return None
        except grpc.RpcError as e:
            # What the call before it left is still being counted: ask again where to go on.
            if e.code() != grpc.StatusCode.ABORTED:
                raise
