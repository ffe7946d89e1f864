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
from services.inference.answering import Answering, Event
from services.inference.changes import Changes
from services.inference.looking import Looking
from services.inference.metrics import Metrics
from services.inference.preset_book import PresetBook
from services.inference.residency import Residency


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """InferenceService."""

    def __init__(
        self,
        residency: Residency,
        changes: Changes,
        answering: Answering,
        looking: Looking,
        presets: PresetBook,
        metrics: Metrics,
    ) -> None:
        self._residency = residency
        self._changes = changes
        self._answering = answering
        self._looking = looking
        self._presets = presets
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
            longest, highest = self._answering.context_tokens(), self._answering.highest_priority()
            ask = messages.generate_ask(request, longest, _fresh_id(), highest)
            async with aclosing(self._answering.answer(ask)) as events:
                async for event in events:
                    yield inference_pb2.GenerateResponse(**{_field(event): event})  # type: ignore[arg-type]

    async def Chat(self, request: inference_pb2.ChatRequest, context: Any) -> AsyncIterator[inference_pb2.ChatResponse]:
        with self._metrics.refused():
            longest, highest = self._answering.context_tokens(), self._answering.highest_priority()
            ask = messages.chat_ask(request, longest, _fresh_id(), self._presets.all, highest)
            async with aclosing(self._answering.answer(ask)) as events:
                async for event in events:
                    yield inference_pb2.ChatResponse(**{_field(event): event})  # type: ignore[arg-type]

    async def GenerateBatch(
        self, request: inference_pb2.GenerateBatchRequest, context: Any
    ) -> AsyncIterator[inference_pb2.GenerateBatchResponse]:
        with self._metrics.refused():
            longest, highest = self._answering.context_tokens(), self._answering.highest_priority()
            asks = messages.batch_asks(request, longest, _fresh_id(), highest)
            async with aclosing(self._answering.several(asks)) as events:
                async for index, event in events:
                    told: dict[str, Any] = {"index": index, _field(event): event}
                    yield inference_pb2.GenerateBatchResponse(**told)

    async def Compare(
        self, request: inference_pb2.CompareRequest, context: Any
    ) -> AsyncIterator[inference_pb2.CompareResponse]:
        with self._metrics.refused():
            longest, highest = self._answering.context_tokens(), self._answering.highest_priority()
            seed = secrets.randbits(64)
            asks = messages.compare_asks(request, longest, _fresh_id(), seed, self._presets.all, highest)
            async with aclosing(self._answering.several(asks)) as events:
                async for index, event in events:
                    told: dict[str, Any] = {"index": index, _field(event): event}
                    yield inference_pb2.CompareResponse(**told)

    async def Score(self, request: inference_pb2.ScoreRequest, context: Any) -> inference_pb2.ScoreResponse:
        with self._metrics.refused():
            longest, highest = self._answering.context_tokens(), self._answering.highest_priority()
            ask = messages.score_ask(request, longest, _fresh_id(), highest)
            return await self._looking.score(ask, request.alternatives)

    async def Tokenize(self, request: inference_pb2.TokenizeRequest, context: Any) -> inference_pb2.TokenizeResponse:
        with self._metrics.refused():
            return await self._looking.tokenize(messages.tokenize_ask(request))

    async def Render(self, request: inference_pb2.RenderRequest, context: Any) -> inference_pb2.RenderResponse:
        with self._metrics.refused():
            longest = self._answering.context_tokens()
            return await self._looking.render(messages.render_ask(request, longest, self._presets.all))

    async def CreatePreset(
        self, request: inference_pb2.CreatePresetRequest, context: Any
    ) -> inference_pb2.CreatePresetResponse:
        with self._metrics.refused():
            return await self._presets.create(request)

    async def ListPresets(
        self, request: inference_pb2.ListPresetsRequest, context: Any
    ) -> inference_pb2.ListPresetsResponse:
        with self._metrics.refused():
            return self._presets.list(request)

    async def DeletePreset(
        self, request: inference_pb2.DeletePresetRequest, context: Any
    ) -> inference_pb2.DeletePresetResponse:
        with self._metrics.refused():
            return await self._presets.delete(request)


def _fresh_id() -> str:
    return secrets.token_hex(8)


def _field(event: Event | inference_pb2.Failure) -> str:
    """The field of a response that holds the event."""
    return "failed" if isinstance(event, inference_pb2.Failure) else event.DESCRIPTOR.name.lower()
