"""Small data for tests: deterministic rows, and the upload of them."""

from __future__ import annotations

import hashlib
import json

from qlorad.v1 import datasets_pb2, datasets_pb2_grpc

VERBS = ("add", "multiply", "subtract", "join", "compare", "swap", "print", "count")
THINGS = ("numbers", "words", "lists", "points", "lines", "files")


def sample_rows(count: int) -> bytes:
    """JSONL of instruction rows, all different, short enough for every model."""
    rows = []
    for number in range(count):
        verb, thing = VERBS[number % len(VERBS)], THINGS[(number // len(VERBS)) % len(THINGS)]
        name = f"{verb}_{thing}_{number}"
        rows.append(
            {
                "instruction": f"write a function that can {verb} {thing}",
                "input": "",
                "output": f"def {name}(a, b):\n    # {verb} {thing}\n    return {verb}(a, b)\n",
            }
        )
    return "".join(json.dumps(r) + "\n" for r in rows).encode()


def upload(stub: datasets_pb2_grpc.DatasetServiceStub, filename: str, data: bytes) -> str:
    """Uploads bytes whole; returns the upload's name."""
    digest = hashlib.sha256(data).hexdigest()
    request = datasets_pb2.StartUploadRequest(
        request_id=f"up-{digest[:16]}", filename=filename, size_bytes=len(data), sha256=digest
    )
    opened = stub.StartUpload(request, timeout=10).upload
    pieces = (
        datasets_pb2.WriteUploadRequest(upload=opened.name, offset=at, data=data[at : at + (1 << 18)])
        for at in range(opened.committed_bytes, len(data), 1 << 18)
    )
    done = stub.WriteUpload(pieces, timeout=30).upload
    assert done.complete
    return done.name
