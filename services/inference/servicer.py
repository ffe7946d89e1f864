"""The door: InferenceService between the wire and the core.

Law of this room: translate, call one method, translate back.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from qlorad.v1 import inference_pb2, inference_pb2_grpc
from services.inference import messages
from services.inference.answering import Answering
from services.inference.changes import Changes
from services.inference.metrics import Metrics
from services.inference.residency import Residency


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """InferenceService."""

    def __init__(self, residency: Residency, changes: Changes, answering: Answering, metrics: Metrics) -> None:
        self._residency = residency
        self._changes = changes
        self._answering = answering
        self._metrics = metrics

    async def LoadModel(self, request: inference_pb2.LoadModelRequest, context: Any) -> inference_pb2.LoadModelResponse:
        with self._metrics.refused():
            return await self._changes.load_model(request)

    async def UnloadModel(
        self, request: inference_pb2.UnloadModelRequest, context: Any
    ) -> inference_pb2.UnloadModelResponse:
        with self._metrics.refused():
            return await self._changes.unload_model(request)

    async def ListLoadedModels(
        self, request: inference_pb2.ListLoadedModelsRequest, context: Any
    ) -> inference_pb2.ListLoadedModelsResponse:
        return inference_pb2.ListLoadedModelsResponse(models=self._residency.models())

    async def LoadAdapter(
        self, request: inference_pb2.LoadAdapterRequest, context: Any
    ) -> inference_pb2.LoadAdapterResponse:
        with self._metrics.refused():
            return await self._changes.load_adapter(request)

    async def UnloadAdapter(
        self, request: inference_pb2.UnloadAdapterRequest, context: Any
    ) -> inference_pb2.UnloadAdapterResponse:
        with self._metrics.refused():
            return await self._changes.unload_adapter(request)

    async def SwitchAdapter(
        self, request: inference_pb2.SwitchAdapterRequest, context: Any
    ) -> inference_pb2.SwitchAdapterResponse:
        with self._metrics.refused():
            return await self._changes.switch_adapter(request)

    async def ListAdapters(
        self, request: inference_pb2.ListAdaptersRequest, context: Any
    ) -> inference_pb2.ListAdaptersResponse:
        return inference_pb2.ListAdaptersResponse(adapters=await self._residency.adapters())

    async def WatchAdapters(
        self, request: inference_pb2.WatchAdaptersRequest, context: Any
    ) -> AsyncIterator[inference_pb2.WatchAdaptersResponse]:
        there = await self._residency.adapters()
        async with aclosing(self._residency.watching.watch(there)) as said:
            async for message in said:
                yield message

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: Any
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        with self._metrics.refused():
            longest = self._answering.context_tokens()
            ask = messages.generate_ask(request, longest, secrets.randbits(64), secrets.token_hex(8))
            async with aclosing(self._answering.answer(ask)) as events:
                async for event in events:
                    yield inference_pb2.GenerateResponse(**{_field(event): event})  # type: ignore[arg-type]

    async def Chat(self, request: inference_pb2.ChatRequest, context: Any) -> AsyncIterator[inference_pb2.ChatResponse]:
        with self._metrics.refused():
            longest = self._answering.context_tokens()
            ask = messages.chat_ask(request, longest, secrets.randbits(64), secrets.token_hex(8))
            async with aclosing(self._answering.answer(ask)) as events:
                async for event in events:
                    yield inference_pb2.ChatResponse(**{_field(event): event})  # type: ignore[arg-type]


def _field(event: inference_pb2.Started | inference_pb2.Delta | inference_pb2.Finish) -> str:
    return event.DESCRIPTOR.name.lower()
