"""The registry's doors: translate, call, translate back.

Law of this room: no decision is made here and nothing is touched but messages.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from qlorad.v1 import datasets_pb2, registry_pb2, registry_pb2_grpc
from services.common import names
from services.common.errors import invalid
from services.common.frames.v1 import shelf_pb2
from services.common.idempotency import body_of
from services.registry import models
from services.registry.catalogue import Catalogue, Making
from services.registry.requests import Requests


class ModelServicer(registry_pb2_grpc.ModelServiceServicer):
    """qlorad.v1.ModelService."""

    def __init__(self, catalogue: Catalogue, requests: Requests) -> None:
        self._catalogue = catalogue
        self._requests = requests

    async def MakeStarterModel(  # type: ignore[override]
        self, request: registry_pb2.MakeStarterModelRequest, context: Any
    ) -> AsyncIterator[registry_pb2.MakeStarterModelResponse]:
        source, alias = models.check_starter(request)
        begun = await self._requests.begin("MakeStarterModel", request.request_id, body_of(request))
        if begun.answer:
            yield registry_pb2.MakeStarterModelResponse(model=registry_pb2.Model.FromString(begun.answer))
            return
        making = await self._catalogue.starter(source, alias, request.size)
        async for progress, model in self._told(making, "MakeStarterModel", request.request_id):
            yield registry_pb2.MakeStarterModelResponse(progress=progress, model=model)

    async def ImportModel(  # type: ignore[override]
        self, request: registry_pb2.ImportModelRequest, context: Any
    ) -> AsyncIterator[registry_pb2.ImportModelResponse]:
        path, alias = models.check_import(request)
        begun = await self._requests.begin("ImportModel", request.request_id, body_of(request))
        if begun.answer:
            yield registry_pb2.ImportModelResponse(model=registry_pb2.Model.FromString(begun.answer))
            return
        making = await self._catalogue.bring(path, alias)
        async for progress, model in self._told(making, "ImportModel", request.request_id):
            yield registry_pb2.ImportModelResponse(progress=progress, model=model)

    async def _told(
        self, making: Making, method: str, request_id: str
    ) -> AsyncIterator[tuple[datasets_pb2.StageProgress | None, registry_pb2.Model | None]]:
        async for news in making.follow():
            if isinstance(news, shelf_pb2.ShelfProgress):
                yield datasets_pb2.StageProgress(stage=news.stage, done=news.done, total=news.total), None
            else:
                await self._requests.finish(method, request_id, news.SerializeToString())
                yield None, news

    async def GetModel(  # type: ignore[override]
        self, request: registry_pb2.GetModelRequest, context: Any
    ) -> registry_pb2.GetModelResponse:
        return registry_pb2.GetModelResponse(model=await self._catalogue.get(request.name))

    async def ListModels(  # type: ignore[override]
        self, request: registry_pb2.ListModelsRequest, context: Any
    ) -> registry_pb2.ListModelsResponse:
        told, following = await self._catalogue.list(request.page_size, request.page_token)
        return registry_pb2.ListModelsResponse(models=told, next_page_token=following)

    async def DeleteModel(  # type: ignore[override]
        self, request: registry_pb2.DeleteModelRequest, context: Any
    ) -> registry_pb2.DeleteModelResponse:
        wrong = names.check_request_id(request.request_id) + names.check_name("name", request.name, "models")
        if wrong:
            raise invalid(wrong)
        begun = await self._requests.begin("DeleteModel", request.request_id, body_of(request))
        if begun.answer:
            return registry_pb2.DeleteModelResponse.FromString(begun.answer)
        freed = await self._catalogue.delete(request.name)
        answer = registry_pb2.DeleteModelResponse(freed_bytes=freed)
        await self._requests.finish("DeleteModel", request.request_id, answer.SerializeToString())
        return answer
