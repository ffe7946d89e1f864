"""Conversations in and answers out: plain Python to protos and back. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

from qlorad import errors
from qlorad._wire_core import adapter_choice, optional_name
from qlorad.v1 import inference_pb2, messages_pb2

Turn = Mapping[str, str] | messages_pb2.Message
Event = inference_pb2.Started | inference_pb2.Delta | inference_pb2.Finish
Told = tuple[int, Event | inference_pb2.Failure]
"""An event of one of several prompts, with its number."""

_ROLES = {
    "system": messages_pb2.ROLE_SYSTEM,
    "user": messages_pb2.ROLE_USER,
    "assistant": messages_pb2.ROLE_ASSISTANT,
    "tool": messages_pb2.ROLE_TOOL,
}


@dataclass(slots=True)
class Answer:
    """A whole answer."""

    text: str = ""
    ids: list[int] = field(default_factory=list)
    started: inference_pb2.Started = field(default_factory=inference_pb2.Started)
    finish: inference_pb2.Finish = field(default_factory=inference_pb2.Finish)
    log_probabilities: list[inference_pb2.TokenLogProbability] = field(default_factory=list)
    """One for each id, where they were asked for."""
    failed: inference_pb2.Failure | None = None
    """Of one of several prompts: why it has no end; the text is what came before."""

    def add(self, event: Event | inference_pb2.Failure) -> None:
        """Takes the next event of the stream."""
        if isinstance(event, inference_pb2.Delta):
            self.text += event.text
            self.ids.extend(event.ids)
            self.log_probabilities.extend(event.log_probabilities)
        elif isinstance(event, inference_pb2.Started):
            self.started = event
        elif isinstance(event, inference_pb2.Failure):
            self.failed = event
        else:
            self.finish = event


def message(role: str, content: str) -> messages_pb2.Message:
    """One turn of text."""
    if role not in _ROLES:
        raise errors.invalid("role", role, ", ".join(_ROLES))
    return messages_pb2.Message(role=_ROLES[role], parts=[messages_pb2.Part(text=content)])


def conversation(given: str | Sequence[Turn] | messages_pb2.Conversation) -> messages_pb2.Conversation:
    """A conversation from one user message, from turns, or as it is."""
    if isinstance(given, messages_pb2.Conversation):
        return given
    turns: Sequence[Turn] = [{"role": "user", "content": given}] if isinstance(given, str) else given
    return messages_pb2.Conversation(messages=[_turn(turn) for turn in turns])


def _turn(turn: Turn) -> messages_pb2.Message:
    if isinstance(turn, messages_pb2.Message):
        return turn
    if set(turn) != {"role", "content"}:
        raise errors.invalid("messages", dict(turn), "{'role': …, 'content': …}, or a qlorad.v1.Message")
    return message(turn["role"], turn["content"])


class Options(TypedDict, total=False):
    """How to choose tokens. What is left out, or None, is left to the preset, the adapter, the daemon."""

    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    seed: int | None
    stop: Sequence[str]
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    log_probabilities: int | None
    ignore_end: bool


def options(given: Options | Mapping[str, Any]) -> inference_pb2.GenerationOptions:
    """Options; what is None stays absent."""
    known = inference_pb2.GenerationOptions.DESCRIPTOR.fields_by_name
    for name in given:
        if name not in known:
            raise errors.invalid("options", name, ", ".join(known))
    said = {name: value for name, value in given.items() if value is not None}
    try:
        return inference_pb2.GenerationOptions(**said)  # type: ignore[arg-type]
    except (TypeError, ValueError) as e:
        raise errors.invalid("options", dict(said), f"values that their fields can hold: {e}") from None


def batch_item(given: str | Mapping[str, Any] | inference_pb2.BatchItem) -> inference_pb2.BatchItem:
    """One prompt of a batch: a text, or {"prompt" or "messages", "adapter", "model", "options"}, or a proto."""
    if isinstance(given, inference_pb2.BatchItem):
        return given
    told: dict[str, Any] = {"prompt": given} if isinstance(given, str) else dict(given)
    accepted = "a text, or a mapping with one of prompt or messages, and any of adapter, model, options"
    one_input = ("prompt" in told) != ("messages" in told)
    if not one_input or set(told) - {"prompt", "messages", "adapter", "model", "options"}:
        raise errors.invalid("items", given, accepted)
    if not isinstance(told.get("prompt", ""), str) or not isinstance(told.get("options", {}), Mapping):
        raise errors.invalid("items", given, accepted)
    item = inference_pb2.BatchItem(
        adapter=adapter_choice(str(told.get("adapter", ""))),
        model=optional_name("models", str(told.get("model", ""))),
        options=options(told.get("options", {})),
    )
    if "prompt" in told:
        item.prompt = told["prompt"]
    else:
        item.conversation.CopyFrom(conversation(told["messages"]))
    return item


def event_of(reply: inference_pb2.GenerateResponse | inference_pb2.ChatResponse) -> Event:
    """What a message of a stream holds."""
    kind = reply.WhichOneof("event")
    if kind == "started":
        return reply.started
    return reply.finish if kind == "finish" else reply.delta


def told_of(reply: inference_pb2.GenerateBatchResponse | inference_pb2.CompareResponse) -> Told:
    """What a message of a stream of several holds."""
    kind = reply.WhichOneof("event")
    if kind == "started":
        return reply.index, reply.started
    if kind == "failed":
        return reply.index, reply.failed
    return reply.index, reply.finish if kind == "finish" else reply.delta
