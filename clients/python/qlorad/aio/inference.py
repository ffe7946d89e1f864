"""Answers: load a base and adapters, stream what they say."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING

from qlorad._connection import new_request_id
from qlorad._messages import Answer, Event, Turn, conversation, event_of, options
from qlorad._wire_core import adapter_choice, enum_value, full_name, optional_name
from qlorad.aio._wire import Wire
from qlorad.v1 import inference_pb2 as pb
from qlorad.v1 import messages_pb2
from qlorad.v1.inference_pb2_grpc import InferenceServiceStub

if TYPE_CHECKING:
    from qlorad.v1.inference_pb2_grpc import InferenceServiceAsyncStub


class Inference:
    """InferenceService."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    @property
    def _stub(self) -> InferenceServiceAsyncStub:
        return InferenceServiceStub(self._wire.channel)

    async def load_model(self, model: str, *, precision: str | int = 0, request_id: str = "") -> pb.LoadedModel:
        """Brings a base into memory."""
        request = pb.LoadModelRequest(
            model=full_name("models", model),
            precision=enum_value(pb.Precision, "PRECISION_", "precision", precision),
            request_id=request_id or new_request_id(),
        )
        return (await self._wire.call(self._stub.LoadModel, request)).model

    async def unload_model(self, model: str = "", *, request_id: str = "") -> int:
        """Frees a base (the loaded one, if none is named) with its adapters; returns the bytes given back."""
        request = pb.UnloadModelRequest(model=optional_name("models", model), request_id=request_id or new_request_id())
        return (await self._wire.call(self._stub.UnloadModel, request)).freed_bytes

    async def loaded_models(self) -> Sequence[pb.LoadedModel]:
        """Bases in memory."""
        return (await self._wire.call(self._stub.ListLoadedModels, pb.ListLoadedModelsRequest())).models

    async def load_adapter(self, adapter: str, *, request_id: str = "") -> pb.LoadedAdapter:
        """Brings an adapter into memory and proves it."""
        request = pb.LoadAdapterRequest(
            adapter=full_name("adapters", adapter), request_id=request_id or new_request_id()
        )
        return (await self._wire.call(self._stub.LoadAdapter, request)).adapter

    async def unload_adapter(self, adapter: str, *, request_id: str = "") -> int:
        """Frees an adapter; returns the bytes of its tensors."""
        request = pb.UnloadAdapterRequest(
            adapter=full_name("adapters", adapter), request_id=request_id or new_request_id()
        )
        return (await self._wire.call(self._stub.UnloadAdapter, request)).freed_bytes

    async def loaded_adapters(self) -> Sequence[pb.LoadedAdapter]:
        """Adapters in memory, oldest first."""
        return (await self._wire.call(self._stub.ListAdapters, pb.ListAdaptersRequest())).adapters

    async def switch_adapter(self, adapter: str, *, request_id: str = "") -> pb.SwitchAdapterResponse:
        """Sets the adapter ("base" = none) that answers where a request names none."""
        request = pb.SwitchAdapterRequest(
            adapter=adapter_choice(adapter) or "base", request_id=request_id or new_request_id()
        )
        return await self._wire.call(self._stub.SwitchAdapter, request)

    async def generate(
        self,
        prompt: str,
        *,
        adapter: str = "",
        model: str = "",
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
        stop: Sequence[str] = (),
        request_id: str = "",
    ) -> AsyncIterator[Event]:
        """Continues a raw prompt: Started, then Deltas, then one Finish."""
        request = pb.GenerateRequest(
            adapter=adapter_choice(adapter),
            prompt=prompt,
            options=options(max_tokens, temperature, top_p, top_k, seed, stop),
            request_id=request_id or new_request_id(),
            model=optional_name("models", model),
        )
        async for message in self._wire.stream(self._stub.Generate, request):
            yield event_of(message)

    async def chat(
        self,
        messages: str | Sequence[Turn] | messages_pb2.Conversation,
        *,
        adapter: str = "",
        model: str = "",
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
        stop: Sequence[str] = (),
        request_id: str = "",
    ) -> AsyncIterator[Event]:
        """Answers a conversation: Started, then Deltas, then one Finish.

        `messages` is one user message, turns as {"role", "content"} or protos, or a whole Conversation.
        """
        request = pb.ChatRequest(
            adapter=adapter_choice(adapter),
            conversation=conversation(messages),
            options=options(max_tokens, temperature, top_p, top_k, seed, stop),
            request_id=request_id or new_request_id(),
            model=optional_name("models", model),
        )
        async for message in self._wire.stream(self._stub.Chat, request):
            yield event_of(message)

    async def answer(self, events: AsyncIterator[Event]) -> Answer:
        """A stream of generate or chat, gathered: its text, what answered, how it ended."""
        gathered = Answer()
        async for event in events:
            gathered.add(event)
        return gathered
