"""Answers: load a base and adapters, stream what they say.

Made from aio/inference.py by clients/python/unasync.py; change that file.
"""

# ruff: noqa: UP028

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Unpack

from qlorad import errors
from qlorad._connection import new_request_id
from qlorad._messages import Answer, Event, Options, Told, Turn, batch_item, conversation, event_of, options, told_of
from qlorad._wire import Wire
from qlorad._wire_core import adapter_choice, enum_value, full_name, optional_name
from qlorad.v1 import inference_pb2 as pb
from qlorad.v1 import messages_pb2
from qlorad.v1.inference_pb2_grpc import InferenceServiceStub


class Inference:
    """InferenceService."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    @property
    def _stub(self) -> InferenceServiceStub:
        return InferenceServiceStub(self._wire.channel)

    def load_model(
        self, model: str, *, precision: str | int = 0, pin: bool = False, request_id: str = ""
    ) -> pb.LoadedModel:
        """Brings a base into memory; with `pin` it does not make room for others."""
        request = pb.LoadModelRequest(
            model=full_name("models", model),
            precision=enum_value(pb.Precision, "PRECISION_", "precision", precision),
            request_id=request_id or new_request_id(),
            pin=pin,
        )
        return (self._wire.call(self._stub.LoadModel, request)).model

    def unload_model(self, model: str = "", *, request_id: str = "") -> int:
        """Frees a base (the loaded one, if none is named) with its adapters; returns the bytes given back."""
        request = pb.UnloadModelRequest(model=optional_name("models", model), request_id=request_id or new_request_id())
        return (self._wire.call(self._stub.UnloadModel, request)).freed_bytes

    def loaded_models(self) -> Sequence[pb.LoadedModel]:
        """Bases in memory."""
        return (self._wire.call(self._stub.ListLoadedModels, pb.ListLoadedModelsRequest())).models

    def load_adapter(self, adapter: str, *, pin: bool = False, request_id: str = "") -> pb.LoadedAdapter:
        """Brings an adapter into memory and proves it; with `pin` it does not make room for others."""
        request = pb.LoadAdapterRequest(
            adapter=full_name("adapters", adapter), request_id=request_id or new_request_id(), pin=pin
        )
        return (self._wire.call(self._stub.LoadAdapter, request)).adapter

    def unload_adapter(self, adapter: str, *, request_id: str = "") -> int:
        """Frees an adapter; returns the bytes of its tensors."""
        request = pb.UnloadAdapterRequest(
            adapter=full_name("adapters", adapter), request_id=request_id or new_request_id()
        )
        return (self._wire.call(self._stub.UnloadAdapter, request)).freed_bytes

    def loaded_adapters(self) -> Sequence[pb.LoadedAdapter]:
        """Adapters in memory, oldest first."""
        return (self._wire.call(self._stub.ListAdapters, pb.ListAdaptersRequest())).adapters

    def switch_adapter(self, adapter: str, *, request_id: str = "") -> pb.SwitchAdapterResponse:
        """Sets the adapter ("base" = none) that answers where a request names none."""
        request = pb.SwitchAdapterRequest(
            adapter=adapter_choice(adapter) or "base", request_id=request_id or new_request_id()
        )
        return self._wire.call(self._stub.SwitchAdapter, request)

    def watch_adapters(self) -> Iterator[pb.WatchAdaptersResponse]:
        """Every adapter first, then each change as it comes; ends when the daemon drains."""
        for message in self._wire.stream(self._stub.WatchAdapters, pb.WatchAdaptersRequest()):
            yield message

    def generate(
        self,
        prompt: str,
        *,
        adapter: str = "",
        model: str = "",
        priority: int = 0,
        request_id: str = "",
        **how: Unpack[Options],
    ) -> Iterator[Event]:
        """Continues a raw prompt: Started, then Deltas, then one Finish."""
        request = pb.GenerateRequest(
            adapter=adapter_choice(adapter),
            prompt=prompt,
            options=options(how),
            request_id=request_id or new_request_id(),
            model=optional_name("models", model),
            priority=priority,
        )
        for message in self._wire.stream(self._stub.Generate, request):
            yield event_of(message)

    def chat(
        self,
        messages: str | Sequence[Turn] | messages_pb2.Conversation,
        *,
        adapter: str = "",
        model: str = "",
        preset: str = "",
        priority: int = 0,
        request_id: str = "",
        **how: Unpack[Options],
    ) -> Iterator[Event]:
        """Answers a conversation: Started, then Deltas, then one Finish.

        `messages` is one user message, turns as {"role", "content"} or protos, or a whole Conversation.
        """
        request = pb.ChatRequest(
            adapter=adapter_choice(adapter),
            conversation=conversation(messages),
            options=options(how),
            request_id=request_id or new_request_id(),
            model=optional_name("models", model),
            preset=optional_name("presets", preset),
            priority=priority,
        )
        for message in self._wire.stream(self._stub.Chat, request):
            yield event_of(message)

    def generate_batch(
        self,
        items: Sequence[str | Mapping[str, Any] | pb.BatchItem],
        *,
        priority: int = 0,
        request_id: str = "",
    ) -> Iterator[Told]:
        """Answers several prompts in one batch: (number of the prompt, event) as they come.

        Each ends with one Finish, or one Failure of its own. An item is a raw text,
        or {"prompt" or "messages", "adapter", "model", "options"}, or a proto.
        """
        request = pb.GenerateBatchRequest(
            items=[batch_item(item) for item in items],
            request_id=request_id or new_request_id(),
            priority=priority,
        )
        for message in self._wire.stream(self._stub.GenerateBatch, request):
            yield told_of(message)

    def compare(
        self,
        messages: str | Sequence[Turn] | messages_pb2.Conversation,
        adapters: Sequence[str],
        *,
        raw: bool = False,
        model: str = "",
        preset: str = "",
        priority: int = 0,
        request_id: str = "",
        **how: Unpack[Options],
    ) -> Iterator[Told]:
        """Asks adapters ("base" = none) the same in one batch: (number of the adapter, event) as they come.

        With `raw`, `messages` is a text that is continued as it is.
        """
        request = pb.CompareRequest(
            adapters=[adapter_choice(name) for name in adapters],
            model=optional_name("models", model),
            options=options(how),
            request_id=request_id or new_request_id(),
            priority=priority,
            preset=optional_name("presets", preset),
        )
        if raw:
            if not isinstance(messages, str):
                raise errors.invalid("messages", type(messages).__name__, "one text where raw is set")
            request.prompt = messages
        else:
            request.conversation.CopyFrom(conversation(messages))
        for message in self._wire.stream(self._stub.Compare, request):
            yield told_of(message)

    def score(
        self,
        text: str = "",
        *,
        messages: Sequence[Turn] | messages_pb2.Conversation | None = None,
        adapter: str = "",
        model: str = "",
        alternatives: int = 0,
        priority: int = 0,
        request_id: str = "",
    ) -> pb.ScoreResponse:
        """How likely a raw text is, or the assistant's turns of a conversation."""
        request = pb.ScoreRequest(
            adapter=adapter_choice(adapter),
            model=optional_name("models", model),
            alternatives=alternatives,
            request_id=request_id or new_request_id(),
            priority=priority,
        )
        if messages is None:
            request.prompt = text
        else:
            request.conversation.CopyFrom(conversation(messages))
        return self._wire.call(self._stub.Score, request)

    def tokenize(self, text: str, *, model: str = "") -> Sequence[pb.TextToken]:
        """The tokens of a raw text, as generate would see them."""
        request = pb.TokenizeRequest(model=optional_name("models", model), text=text)
        return (self._wire.call(self._stub.Tokenize, request)).tokens

    def render(
        self,
        messages: str | Sequence[Turn] | messages_pb2.Conversation,
        *,
        adapter: str = "",
        model: str = "",
        preset: str = "",
    ) -> pb.RenderResponse:
        """What chat would send to the model, and its tokens."""
        request = pb.RenderRequest(
            adapter=adapter_choice(adapter),
            model=optional_name("models", model),
            conversation=conversation(messages),
            preset=optional_name("presets", preset),
        )
        return self._wire.call(self._stub.Render, request)

    def presets(self) -> Iterator[pb.Preset]:
        """Every preset, shipped ones first."""
        token = ""
        while True:
            page = self._wire.call(self._stub.ListPresets, pb.ListPresetsRequest(page_token=token))
            for preset in page.presets:
                yield preset
            token = page.next_page_token
            if not token:
                return

    def create_preset(
        self,
        name: str,
        template: str,
        *,
        description: str = "",
        system: str = "",
        request_id: str = "",
        **how: Unpack[Options],
    ) -> pb.Preset:
        """Keeps a task in words; {input} in the template is where the caller's text goes."""
        preset = pb.Preset(
            name=full_name("presets", name),
            description=description,
            system=system,
            template=template,
            options=options(how),
        )
        request = pb.CreatePresetRequest(preset=preset, request_id=request_id or new_request_id())
        return (self._wire.call(self._stub.CreatePreset, request)).preset

    def delete_preset(self, name: str, *, request_id: str = "") -> None:
        """Forgets a preset of one's own."""
        request = pb.DeletePresetRequest(name=full_name("presets", name), request_id=request_id or new_request_id())
        self._wire.call(self._stub.DeletePreset, request)

    def answer(self, events: Iterator[Event]) -> Answer:
        """A stream of generate or chat, gathered: its text, what answered, how it ended."""
        gathered = Answer()
        for event in events:
            gathered.add(event)
        return gathered

    def answers(self, told: Iterator[Told], count: int) -> list[Answer]:
        """A stream of generate_batch or compare over so many prompts, gathered. Does not raise for one that failed."""
        gathered = [Answer() for _ in range(count)]
        for index, event in told:
            gathered[index].add(event)
        return gathered
