"""What these tests share: the door of a running qlorad-datasets, and short ways through it."""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2

from qlorad.v1 import datasets_pb2, datasets_pb2_grpc
from services.common.shelf import Shelf
from tests.house import House

PIECE = 1 << 16


@dataclass(frozen=True, slots=True)
class Refusal:
    """How a call failed."""

    code: str
    reason: str
    message: str
    violations: tuple[tuple[str, str], ...]
    metadata: dict[str, str]
    blockers: tuple[str, ...]

    @property
    def fields(self) -> list[str]:
        return [f for f, _ in self.violations]


def refusal(call: Callable[[], Any]) -> Refusal:
    """The refusal of a call that must fail."""
    try:
        answer = call()
    except grpc.RpcError as error:
        return refusal_of(error)
    raise AssertionError(f"answered: {answer}")


def refusal_of(error: Any) -> Refusal:
    """The details of a failed call."""
    status = status_pb2.Status.FromString(dict(error.trailing_metadata())["grpc-status-details-bin"])
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    held = error_details_pb2.PreconditionFailure()
    for detail in status.details:
        assert detail.Unpack(info) or detail.Unpack(bad) or detail.Unpack(held) or detail.type_url
    return Refusal(
        error.code().name,
        info.reason,
        status.message,
        tuple((v.field, v.description) for v in bad.field_violations),
        dict(info.metadata),
        tuple(v.subject for v in held.violations),
    )


@dataclass(slots=True)
class Door:
    """A running daemon and its stub."""

    house: House
    stub: datasets_pb2_grpc.DatasetServiceStub
    flags: tuple[str, ...] = ()

    @property
    def home(self) -> pathlib.Path:
        return self.house.home

    @property
    def shelf(self) -> Shelf:
        return Shelf(self.home / "store")

    def again(self) -> None:
        """Starts the daemon anew and connects."""
        self.house.start("datasets", *self.flags)
        self.stub = datasets_pb2_grpc.DatasetServiceStub(self.house.channel("datasets"))

    def kill(self) -> None:
        self.house.daemons["datasets"].kill()

    def start(
        self, data: bytes, filename: str = "rows.jsonl", request_id: str = "", **fields: Any
    ) -> datasets_pb2.Upload:
        digest = hashlib.sha256(data).hexdigest()
        told = {"size_bytes": len(data), "sha256": digest, **fields}
        request = datasets_pb2.StartUploadRequest(
            request_id=request_id or f"{filename.replace('/', '-')}-{digest[:16]}", filename=filename, **told
        )
        return self.stub.StartUpload(request, timeout=20).upload

    def write(self, name: str, data: bytes, offset: int = 0) -> datasets_pb2.Upload:
        return self.stub.WriteUpload(pieces(name, data, offset), timeout=60).upload

    def look(self, name: str) -> datasets_pb2.Upload:
        return self.stub.GetUpload(datasets_pb2.GetUploadRequest(name=name), timeout=20).upload

    def send(self, data: bytes, filename: str = "rows.jsonl") -> str:
        """Uploads bytes whole."""
        opened = self.start(data, filename)
        if not opened.complete:
            assert self.write(opened.name, data[opened.committed_bytes :], opened.committed_bytes).complete
        return opened.name

    def make(
        self, dataset_id: str, *sent: bytes | str, filename: str = "rows.jsonl", **fields: Any
    ) -> datasets_pb2.Dataset:
        """A dataset of bytes, or of uploads."""
        return self.updates(self.request(dataset_id, *sent, filename=filename, **fields))[-1].dataset

    def request(
        self, dataset_id: str, *sent: bytes | str, filename: str = "rows.jsonl", **fields: Any
    ) -> datasets_pb2.CreateDatasetRequest:
        uploads = [s if isinstance(s, str) else self.send(s, filename) for s in sent]
        request_id = fields.pop("request_id", f"make-{dataset_id}")
        return datasets_pb2.CreateDatasetRequest(
            request_id=request_id, dataset_id=dataset_id, uploads=uploads, **fields
        )

    def updates(self, request: datasets_pb2.CreateDatasetRequest) -> list[datasets_pb2.CreateDatasetResponse]:
        return list(self.stub.CreateDataset(request, timeout=120))

    def export(self, name: str, form: Any = 0, split: str = "", max_rows: int = 0) -> list[dict[str, Any]]:
        request = datasets_pb2.ExportDatasetRequest(name=name, format=form, split=split, max_rows=max_rows)
        data = b"".join(m.data for m in self.stub.ExportDataset(request, timeout=60))
        return [json.loads(line) for line in data.splitlines()]

    def findings(self, name: str, least: Any = 0) -> list[datasets_pb2.Finding]:
        request = datasets_pb2.ListFindingsRequest(name=name, min_severity=least)
        return [f for m in self.stub.ListFindings(request, timeout=60) for f in m.findings]

    def listed(self) -> list[str]:
        page = self.stub.ListDatasets(datasets_pb2.ListDatasetsRequest(), timeout=20)
        return [d.name for d in page.datasets]

    def leftovers(self) -> list[str]:
        """What lies in the staging folder."""
        return sorted(p.name for p in (self.home / "store" / "staging").iterdir())


def open_door(house: House, *flags: str) -> Door:
    """Starts the daemon and connects."""
    house.start("datasets", *flags)
    return Door(house, datasets_pb2_grpc.DatasetServiceStub(house.channel("datasets")), flags)


def pieces(name: str, data: bytes, offset: int = 0, size: int = PIECE) -> Iterator[datasets_pb2.WriteUploadRequest]:
    """Bytes as the stream of their upload."""
    yield datasets_pb2.WriteUploadRequest(upload=name, offset=offset, data=data[:size])
    for at in range(size, len(data), size):
        yield datasets_pb2.WriteUploadRequest(data=data[at : at + size])


def jsonl(rows: Iterable[Any]) -> bytes:
    """Rows as lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def numbered(count: int, first: int = 0) -> list[dict[str, Any]]:
    """Instruction rows, all different."""
    return [
        {"instruction": f"Say {i}.", "input": "", "output": f"It is {i}.", "id": i} for i in range(first, first + count)
    ]
