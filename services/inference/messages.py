"""What a caller may ask for: requests checked field by field.

Law of this room: pure. Every violation of a request is found, and all are told
at once; what passes here is well formed, so that nothing malformed, empty or
over-long ever reaches a tokenizer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from qlorad.v1 import inference_pb2, messages_pb2
from services.common import generation, names
from services.common.errors import Violation, invalid, not_found, show
from services.common.generation import Options
from services.inference import preset
from services.inference.limits import MAX_PRIORITY
from services.inference.turns import check_conversation

BASE = "base"
MAX_INPUT_BYTES = 4 << 20
MAX_BATCH = 256
COMPARED = (2, 16)
MAX_TOLD = 500_000
"""Tokens that one answer tells, each with what could stand in its place: at 32 bytes, what a client takes."""
BYTES_A_TOKEN = 512
"""No vocabulary that we know has longer ones: a prompt of more bytes for each token of the context cannot fit."""
ADAPTER_RULE = "'adapters/ID', 'adapters/sha256:HEX', 'base', or empty for the default"
COMPARED_RULE = "'adapters/ID', 'adapters/sha256:HEX', or 'base'"

Presets = Mapping[str, inference_pb2.Preset]


@dataclass(frozen=True, slots=True)
class Ask:
    """A prompt that is well formed. Says nothing of whether its names exist or its tokens fit."""

    adapter: str = ""
    """As given: empty, "base", or "adapters/…"."""
    model: str = ""
    """As given: empty or "models/…"."""
    request_id: str = ""
    prompt: str = ""
    conversation: messages_pb2.Conversation | None = None
    priority: int = 0
    options: Options = field(default_factory=Options)
    """What the request says; what it does not say is absent."""
    inherited: Options = field(default_factory=Options)
    """What its preset says; bent to the model that answers."""


class _Named(Protocol):
    """What every request that an engine answers has."""

    adapter: str
    model: str


class _Input(Protocol):
    """A request with one of two kinds of input."""

    prompt: str

    @property
    def conversation(self) -> messages_pb2.Conversation: ...


def generate_ask(
    request: inference_pb2.GenerateRequest, context_tokens: int, fresh_id: str, highest: int = MAX_PRIORITY
) -> Ask:
    """A raw request, or INVALID_ARGUMENT with all violations.

    `context_tokens`: the longest loaded; 0 = none. `highest`: the priority that its key may ask for.
    """
    context = _bound(request.adapter, context_tokens)
    wrong = [*_check_names(request), *_check_call(request.request_id, request.priority, highest)]
    wrong += generation.check(request.options, context)
    wrong += _check_prompt("prompt", request.prompt, context)
    _refuse(wrong)
    return Ask(
        request.adapter,
        request.model,
        request.request_id or fresh_id,
        request.prompt,
        priority=request.priority,
        options=request.options,
    )


def chat_ask(
    request: inference_pb2.ChatRequest,
    context_tokens: int,
    fresh_id: str,
    presets: Presets,
    highest: int = MAX_PRIORITY,
) -> Ask:
    """A chat request in the words of its preset, or INVALID_ARGUMENT with all violations."""
    context = _bound(request.adapter, context_tokens)
    wrong = [*_check_names(request), *_check_call(request.request_id, request.priority, highest)]
    wrong += generation.check(request.options, context)
    wrong += _check_talk("conversation", request.conversation, context)
    wrong += _check_preset(request.preset, request.conversation)
    _refuse(wrong)
    told = find_preset(request.preset, presets)
    return Ask(
        request.adapter,
        request.model,
        request.request_id or fresh_id,
        conversation=_worded(request.conversation, told, context),
        priority=request.priority,
        options=request.options,
        inherited=told.options if told is not None else Options(),
    )


def batch_asks(
    request: inference_pb2.GenerateBatchRequest, context_tokens: int, fresh_id: str, highest: int = MAX_PRIORITY
) -> list[Ask]:
    """Every prompt of a batch; each has the batch's id."""
    wrong = list(_check_call(request.request_id, request.priority, highest))
    if not 1 <= len(request.items) <= MAX_BATCH:
        wrong.append(Violation("items", f"{len(request.items)} prompts", f"1 to {MAX_BATCH}"))
    whole = sum(item.ByteSize() for item in request.items)
    if whole > MAX_INPUT_BYTES:
        wrong.append(Violation("items", f"{whole} bytes", f"at most {MAX_INPUT_BYTES} bytes in all"))
    asks = []
    for number, item in enumerate(request.items[:MAX_BATCH]):
        at, context = f"items[{number}].", _bound(item.adapter, context_tokens)
        wrong += [*_check_names(item, at), *_check_input(item, item.WhichOneof("input"), context, at)]
        wrong += generation.check(item.options, context, f"{at}options")
        asks.append(
            Ask(
                item.adapter,
                item.model,
                request.request_id or fresh_id,
                item.prompt,
                _conversation(item),
                request.priority,
                item.options,
            )
        )
    _refuse(wrong)
    return asks


def compare_asks(
    request: inference_pb2.CompareRequest,
    context_tokens: int,
    fresh_id: str,
    fresh_seed: int,
    presets: Presets,
    highest: int = MAX_PRIORITY,
) -> list[Ask]:
    """The same prompt for each adapter; all draw by one seed."""
    context = min((_bound(adapter, context_tokens) for adapter in request.adapters), default=context_tokens)
    wrong = list(_check_call(request.request_id, request.priority, highest))
    few, many = COMPARED
    if not few <= len(request.adapters) <= many:
        wrong.append(Violation("adapters", f"{len(request.adapters)}", f"{few} to {many}"))
    seen: set[str] = set()
    for number, adapter in enumerate(request.adapters):
        if adapter != BASE and names.check_name("adapter", adapter, "adapters"):
            wrong.append(Violation(f"adapters[{number}]", show(adapter), COMPARED_RULE))
        elif adapter in seen:
            wrong.append(Violation(f"adapters[{number}]", show(adapter), "no adapter twice"))
        seen.add(adapter)
    if request.model:
        wrong += names.check_name("model", request.model, "models")
    kind = request.WhichOneof("input")
    wrong += _check_input(request, kind, context)
    if request.preset and kind == "prompt":
        wrong.append(Violation("preset", show(request.preset), "a preset only with a conversation"))
    elif request.preset:
        wrong += _check_preset(request.preset, request.conversation)
    wrong += generation.check(request.options, context)
    _refuse(wrong)
    told = find_preset(request.preset, presets)
    inherited = generation.resolved(told.options if told is not None else Options(), Options(seed=fresh_seed))
    ask = Ask(
        model=request.model,
        request_id=request.request_id or fresh_id,
        prompt=request.prompt,
        conversation=_worded(request.conversation, told, context) if kind == "conversation" else None,
        priority=request.priority,
        options=request.options,
        inherited=inherited,
    )
    return [dataclasses.replace(ask, adapter=adapter) for adapter in request.adapters]


def score_ask(
    request: inference_pb2.ScoreRequest, context_tokens: int, fresh_id: str, highest: int = MAX_PRIORITY
) -> Ask:
    """What is to be scored, or INVALID_ARGUMENT with all violations."""
    context = _bound(request.adapter, context_tokens)
    wrong = [*_check_names(request), *_check_call(request.request_id, request.priority, highest)]
    if request.alternatives > generation.MAX_ALTERNATIVES:
        wrong.append(Violation("alternatives", str(request.alternatives), f"at most {generation.MAX_ALTERNATIVES}"))
    kind = request.WhichOneof("input")
    if kind == "conversation":
        wrong += _check_talk("conversation", request.conversation, context, waits=False)
        if not any(turn.role == messages_pb2.ROLE_ASSISTANT for turn in request.conversation.messages):
            wrong.append(Violation("conversation.messages", "no turn of the assistant", "at least one"))
    else:
        wrong += _check_input(request, kind, context)
    _refuse(wrong)
    return Ask(
        request.adapter,
        request.model,
        request.request_id or fresh_id,
        request.prompt,
        _conversation(request),
        request.priority,
    )


def render_ask(request: inference_pb2.RenderRequest, context_tokens: int, presets: Presets) -> Ask:
    """What is to be shown, or INVALID_ARGUMENT with all violations."""
    context = _bound(request.adapter, context_tokens)
    wrong = [*_check_names(request), *_check_talk("conversation", request.conversation, context)]
    wrong += _check_preset(request.preset, request.conversation)
    _refuse(wrong)
    told = find_preset(request.preset, presets)
    worded = _worded(request.conversation, told, context)
    return Ask(request.adapter, request.model, conversation=worded)


def tokenize_ask(request: inference_pb2.TokenizeRequest) -> Ask:
    """What is to be cut, or INVALID_ARGUMENT with all violations. It may be longer than a context."""
    wrong = names.check_name("model", request.model, "models") if request.model else []
    wrong += _check_prompt("text", request.text, 0)
    _refuse(wrong)
    return Ask(BASE, request.model, prompt=request.text)


def find_preset(name: str, presets: Presets) -> inference_pb2.Preset | None:
    """The preset of a name, None for no name; NOT_FOUND with the nearest."""
    if name and name not in presets:
        raise not_found(name, presets)
    return presets[name] if name else None


def check_fit(ask: Ask, context_tokens: int) -> None:
    """INVALID_ARGUMENT if a request cannot fit what answers, which the door may not have known."""
    wrong = generation.check(ask.options, context_tokens)
    if ask.conversation is not None:
        wrong += _check_size("conversation", ask.conversation.ByteSize(), context_tokens)
    else:
        wrong += _check_size("prompt", len(ask.prompt.encode()), context_tokens)
    _refuse(wrong)


def check_told(field: str, tokens: int, alternatives: int = 0) -> None:
    """INVALID_ARGUMENT if an answer that tells each token, and so many alternatives to it, would be too large."""
    if tokens > MAX_TOLD:
        raise invalid([Violation(field, f"{tokens} tokens", f"at most {MAX_TOLD} tokens in one answer")])
    if tokens * (1 + alternatives) > MAX_TOLD:
        fits = f"at most {MAX_TOLD // tokens - 1} for so many tokens, or {MAX_TOLD // (1 + alternatives)} tokens"
        raise invalid([Violation("alternatives", f"{alternatives} for each of {tokens} tokens", fits)])


def check_switch(adapter: str) -> list[Violation]:
    """Violations of a name for the default."""
    if adapter == BASE or not names.check_name("adapter", adapter, "adapters"):
        return []
    return [Violation("adapter", show(adapter), COMPARED_RULE)]


def _bound(adapter: str, longest: int) -> int:
    """The context that a request can be held against at the door: an adapter may bring a base of its own; 0 = none."""
    return 0 if adapter.startswith("adapters/") else longest


def _refuse(wrong: list[Violation]) -> None:
    if wrong:
        raise invalid(wrong)


def _check_names(request: _Named, at: str = "") -> Iterator[Violation]:
    if request.adapter not in ("", BASE) and names.check_name("adapter", request.adapter, "adapters"):
        yield Violation(f"{at}adapter", show(request.adapter), ADAPTER_RULE)
    if request.model:
        yield from names.check_name(f"{at}model", request.model, "models")


def _check_call(request_id: str, priority: int, highest: int) -> Iterator[Violation]:
    if request_id:
        yield from names.check_request_id(request_id)
    if not -MAX_PRIORITY <= priority <= highest:
        whose = " for this key; its max_priority in --limits-file says so" if highest < MAX_PRIORITY else ""
        yield Violation("priority", str(priority), f"-{MAX_PRIORITY} to {highest}{whose}")


def _check_input(request: _Input, kind: str | None, context_tokens: int, at: str = "") -> list[Violation]:
    if kind == "conversation":
        return _check_talk(f"{at}conversation", request.conversation, context_tokens)
    return _check_prompt(f"{at}prompt", request.prompt, context_tokens)


def _check_prompt(name: str, text: str, context_tokens: int) -> list[Violation]:
    if not text:
        return [Violation(name, "nothing", "a text of at least one character")]
    return _check_size(name, len(text.encode()), context_tokens)


def _check_talk(
    name: str, conversation: messages_pb2.Conversation, context_tokens: int, waits: bool = True
) -> list[Violation]:
    wrong = check_conversation(conversation, name, waits)
    return wrong + _check_size(name, conversation.ByteSize(), context_tokens)


def _check_size(name: str, size: int, context_tokens: int) -> list[Violation]:
    fits = context_tokens * BYTES_A_TOKEN
    if context_tokens and fits < size <= MAX_INPUT_BYTES:
        return [Violation(name, f"{size} bytes", f"at most {fits} bytes (the context is {context_tokens} tokens)")]
    return [Violation(name, f"{size} bytes", f"at most {MAX_INPUT_BYTES} bytes")] if size > MAX_INPUT_BYTES else []


def _check_preset(name: str, conversation: messages_pb2.Conversation) -> list[Violation]:
    if not name:
        return []
    wrong = names.check_name("preset", name, "presets")
    if conversation.messages and not preset.asks(conversation):
        wrong.append(Violation("conversation.messages", "no turn of the user", "one for the preset's words"))
    return wrong


def _conversation(request: inference_pb2.BatchItem | inference_pb2.ScoreRequest) -> messages_pb2.Conversation | None:
    return request.conversation if request.WhichOneof("input") == "conversation" else None


def _worded(
    conversation: messages_pb2.Conversation, told: inference_pb2.Preset | None, context_tokens: int
) -> messages_pb2.Conversation:
    """The conversation in the preset's words, which may make it too long."""
    if told is None:
        return conversation
    worded = preset.applied(told, conversation)
    _refuse(_check_size("conversation", worded.ByteSize(), context_tokens))
    return worded
