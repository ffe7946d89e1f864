"""Conversations in and answers out: plain Python to protos and back. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from qlorad import errors
from qlorad.v1 import inference_pb2, messages_pb2

Turn = Mapping[str, str] | messages_pb2.Message
Event = inference_pb2.Started | inference_pb2.Delta | inference_pb2.Finish

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

    def add(self, event: Event) -> None:
        """Takes the next event of the stream."""
        if isinstance(event, inference_pb2.Delta):
            self.text += event.text
            self.ids.extend(event.ids)
        elif isinstance(event, inference_pb2.Started):
            self.started = event
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


def options(
    max_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    seed: int | None,
    stop: Sequence[str],
) -> inference_pb2.GenerationOptions:
    """Options; what is None stays absent."""
    return inference_pb2.GenerationOptions(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, stop=list(stop)
    )


def event_of(reply: inference_pb2.GenerateResponse | inference_pb2.ChatResponse) -> Event:
    """What a message of a stream holds."""
    kind = reply.WhichOneof("event")
    if kind == "started":
        return reply.started
    return reply.finish if kind == "finish" else reply.delta
