"""The registry's doors: translate, call, translate back.

Law of this room: no decision is made here and nothing is touched but messages.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from qlorad.v1 import datasets_pb2, registry_pb2, registry_pb2_grpc
from services.common.errors import invalid_field
from services.common.frames.v1 import shelf_pb2
from services.common.idempotency import body_of
from services.registry import models
from services.registry.adapter_shelf import AdapterShelf
from services.registry.catalogue import Catalogue, Making
from services.registry.requests import Requests


class ModelServicer(registry_pb2_grpc.ModelServiceServicer):
    """qlorad.v1.ModelService."""

    def __init__(self, catalogue: Catalogue, requests: Requests) -> None:
        self._catalogue = catalogue
        self._requests = requests

    async def MakeStarterModel(
        self, request: registry_pb2.MakeStarterModelRequest, context: Any
    ) -> AsyncIterator[registry_pb2.MakeStarterModelResponse]:
        source, alias = models.check_starter(request)
        begun = await self._requests.begin("MakeStarterModel", request.request_id, body_of(request))
        if begun.answer is not None:
            yield registry_pb2.MakeStarterModelResponse(model=registry_pb2.Model.FromString(begun.answer))
            return
        making = await self._catalogue.starter(source, alias, request.size)
        async for progress, model in self._told(making, "MakeStarterModel", request.request_id):
            yield registry_pb2.MakeStarterModelResponse(progress=progress, model=model)

    async def ImportModel(
        self, request: registry_pb2.ImportModelRequest, context: Any
    ) -> AsyncIterator[registry_pb2.ImportModelResponse]:
        path, alias = models.check_import(request)
        begun = await self._requests.begin("ImportModel", request.request_id, body_of(request))
        if begun.answer is not None:
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
                loss = news.loss if news.HasField("loss") else None
                yield datasets_pb2.StageProgress(stage=news.stage, done=news.done, total=news.total, loss=loss), None
            else:
                await self._requests.finish(method, request_id, news)
                yield None, news

    async def GetModel(self, request: registry_pb2.GetModelRequest, context: Any) -> registry_pb2.GetModelResponse:
        return registry_pb2.GetModelResponse(model=await self._catalogue.get(request.name))

    async def ListModels(
        self, request: registry_pb2.ListModelsRequest, context: Any
    ) -> registry_pb2.ListModelsResponse:
        told, following = await self._catalogue.page(request.page_size, request.page_token)
        return registry_pb2.ListModelsResponse(models=told, next_page_token=following)

    async def DeleteModel(
        self, request: registry_pb2.DeleteModelRequest, context: Any
    ) -> registry_pb2.DeleteModelResponse:
        return await self._catalogue.delete(request)


class AdapterServicer(registry_pb2_grpc.AdapterServiceServicer):
    """qlorad.v1.AdapterService."""

    def __init__(self, shelf: AdapterShelf) -> None:
        self._shelf = shelf

    async def ImportAdapter(
        self, request_iterator: AsyncIterator[registry_pb2.ImportAdapterRequest], context: Any
    ) -> registry_pb2.ImportAdapterResponse:
        first = await anext(request_iterator, registry_pb2.ImportAdapterRequest())
        if first.WhichOneof("piece") != "header":
            raise invalid_field("piece", first.WhichOneof("piece"), "a header first")
        adapter = await self._shelf.take(first.header, request_iterator)
        return registry_pb2.ImportAdapterResponse(adapter=adapter)

    async def DownloadAdapter(
        self, request: registry_pb2.DownloadAdapterRequest, context: Any
    ) -> AsyncIterator[registry_pb2.DownloadAdapterResponse]:
        async with contextlib.aclosing(self._shelf.send(request.name)) as pieces:
            async for piece in pieces:
                yield piece

    async def GetAdapter(
        self, request: registry_pb2.GetAdapterRequest, context: Any
    ) -> registry_pb2.GetAdapterResponse:
        return registry_pb2.GetAdapterResponse(adapter=await self._shelf.get(request.name))

    async def ListAdapters(
        self, request: registry_pb2.AdapterServiceListAdaptersRequest, context: Any
    ) -> registry_pb2.AdapterServiceListAdaptersResponse:
        told, following = await self._shelf.page(request.page_size, request.page_token, request.base_model)
        return registry_pb2.AdapterServiceListAdaptersResponse(adapters=told, next_page_token=following)

    async def SetAdapterAlias(
        self, request: registry_pb2.SetAdapterAliasRequest, context: Any
    ) -> registry_pb2.SetAdapterAliasResponse:
        return registry_pb2.SetAdapterAliasResponse(alias=await self._shelf.set_alias(request))

    async def DeleteAdapter(
        self, request: registry_pb2.DeleteAdapterRequest, context: Any
    ) -> registry_pb2.DeleteAdapterResponse:
        return await self._shelf.delete(request)
