"""A real daemon with nothing behind it: what the common server does, seen alone.

`python -m tests.common.tiny` serves DatasetService; the names it is asked for
tell it what to do, so that a test can see each way a call may end.
"""

from __future__ import annotations

import asyncio
import dataclasses
import pathlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry, Gauge

from qlorad.v1 import datasets_pb2, datasets_pb2_grpc, errors_pb2
from services.common import errors, server
from services.common.config import setting
from services.common.server import App, Health, ServerSettings


@dataclass(frozen=True, slots=True)
class Config:
    """The tiny daemon's settings."""

    server: ServerSettings = field(default_factory=ServerSettings)
    max_things: int = setting(3, "how many things", lambda v: 1 <= v <= 9, "1 to 9")


class Servicer(datasets_pb2_grpc.DatasetServiceServicer):
    """Does what the name says."""

    def __init__(self, settings: ServerSettings, open_streams: Gauge) -> None:
        self._settings = settings
        self._open = open_streams
        self.ended = asyncio.Event()

    async def GetUpload(self, request: datasets_pb2.GetUploadRequest, context: Any) -> datasets_pb2.GetUploadResponse:  # type: ignore[override]
        kind, _, argument = request.name.partition(":")
        if kind == "fault":
            raise errors.Fault(errors_pb2.Reason.Value(argument), f"as asked: {argument}", resource="uploads/x")
        if kind == "violations":
            raise errors.invalid(errors.Violation(f"field_{n}", "x" * 50, "y" * 50) for n in range(int(argument)))
        if kind == "bug":
            raise ValueError(f"inside story {argument}")
        if kind == "large":
            return datasets_pb2.GetUploadResponse(upload=datasets_pb2.Upload(name="x" * int(argument)))
        if kind == "slow":
            with self._open.track_inprogress():
                await asyncio.sleep(float(argument))
        return datasets_pb2.GetUploadResponse(upload=datasets_pb2.Upload(name=request.name))

    async def WriteUpload(self, requests: Any, context: Any) -> datasets_pb2.WriteUploadResponse:  # type: ignore[override]
        size = 0
        async for piece in requests:
            size += len(piece.data)
            if piece.upload.startswith("fault:"):
                raise errors.Fault(errors_pb2.Reason.Value(piece.upload.removeprefix("fault:")), "as asked")
        return datasets_pb2.WriteUploadResponse(upload=datasets_pb2.Upload(committed_bytes=size))

    async def ExportDataset(  # type: ignore[override]
        self, request: datasets_pb2.ExportDatasetRequest, context: Any
    ) -> AsyncIterator[datasets_pb2.ExportDatasetResponse]:
        with self._open.track_inprogress():
            for number in range(request.max_rows):
                yield datasets_pb2.ExportDatasetResponse(data=b"%d\n" % number)
            if request.split.startswith("fault:"):
                raise errors.Fault(errors_pb2.Reason.Value(request.split.removeprefix("fault:")), "as asked")
            if request.split.startswith("large:"):
                yield datasets_pb2.ExportDatasetResponse(data=bytes(int(request.split.removeprefix("large:"))))
            if request.split == "forever":
                await self.ended.wait()
            while request.split == "flood":
                yield datasets_pb2.ExportDatasetResponse(data=b"x" * 1000)


def build(config: Config) -> App:
    """The tiny daemon put together."""
    registry = CollectorRegistry()
    open_streams = Gauge("tiny_open", "Calls inside the servicer.", registry=registry)
    servicer = Servicer(config.server, open_streams)

    async def nothing(*_: Health) -> None:
        return None

    return App(
        name="datasets",
        settings=dataclasses.replace(config.server, home=pathlib.Path(config.server.home)),
        default_ports=(0, 0),
        services=[
            (
                "qlorad.v1.DatasetService",
                lambda s: datasets_pb2_grpc.add_DatasetServiceServicer_to_server(servicer, s),  # type: ignore[no-untyped-call]
            )
        ],
        registry=registry,
        start=nothing,
        stop=nothing,
        drain=servicer.ended.set,
    )


if __name__ == "__main__":
    server.main("datasets", Config, build)
