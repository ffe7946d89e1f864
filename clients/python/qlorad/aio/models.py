"""Models on the shelf: make a starter, import a folder, list, delete."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from qlorad._connection import new_request_id
from qlorad._wire_core import DEFAULT_PATIENCE_SECONDS, Progress, enum_value, full_name, silent
from qlorad.aio._wire import Wire, in_thread
from qlorad.v1 import registry_pb2 as pb
from qlorad.v1.registry_pb2_grpc import ModelServiceStub

if TYPE_CHECKING:
    from qlorad.v1.registry_pb2_grpc import ModelServiceAsyncStub


class Models:
    """ModelService."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    @property
    def _stub(self) -> ModelServiceAsyncStub:
        return ModelServiceStub(self._wire.channel)

    async def make_starter(
        self,
        size: str | int = "test",
        *,
        name: str = "",
        progress: Progress = silent,
        request_id: str = "",
        patience_seconds: float = DEFAULT_PATIENCE_SECONDS,
    ) -> pb.Model:
        """Makes a starter model ("test" or "demo"), or finds it ready."""
        request = pb.MakeStarterModelRequest(
            request_id=request_id or new_request_id(),
            size=enum_value(pb.StarterSize, "STARTER_SIZE_", "size", size),
            model_id=name.removeprefix("models/"),
        )
        last = await self._wire.work(lambda: self._stub.MakeStarterModel, request, progress, patience_seconds)
        return last.model

    async def import_folder(
        self,
        path: str | os.PathLike[str],
        name: str,
        *,
        progress: Progress = silent,
        request_id: str = "",
        patience_seconds: float = DEFAULT_PATIENCE_SECONDS,
    ) -> pb.Model:
        """Seals a Hugging Face folder that lies on the registry's host."""
        request = pb.ImportModelRequest(
            request_id=request_id or new_request_id(),
            path=await in_thread(lambda: os.path.abspath(os.path.expanduser(path))),
            model_id=name.removeprefix("models/"),
        )
        last = await self._wire.work(lambda: self._stub.ImportModel, request, progress, patience_seconds)
        return last.model

    async def get(self, model: str) -> pb.Model:
        """One model by alias or digest."""
        return (await self._wire.call(self._stub.GetModel, pb.GetModelRequest(name=full_name("models", model)))).model

    async def list(self) -> AsyncIterator[pb.Model]:
        """All models, newest first, those under way included, page by page."""
        token = ""
        while True:
            page = await self._wire.call(self._stub.ListModels, pb.ListModelsRequest(page_token=token))
            for model in page.models:
                yield model
            token = page.next_page_token
            if not token:
                return

    async def delete(self, model: str, *, request_id: str = "") -> int:
        """Removes an alias, and the files once nothing holds them; returns the bytes freed."""
        request = pb.DeleteModelRequest(request_id=request_id or new_request_id(), name=full_name("models", model))
        return (await self._wire.call(self._stub.DeleteModel, request)).freed_bytes
