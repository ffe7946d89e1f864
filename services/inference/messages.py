"""What a caller may ask for: requests checked field by field.

Law of this room: pure. Every violation of a request is found, and all are told
at once; what passes here is filled in to the last field.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

from qlorad.v1 import inference_pb2, messages_pb2
from services.common import names
from services.common.errors import Violation, invalid, show

BASE = "base"
DEFAULT_MAX_TOKENS = 128
MAX_TEMPERATURE = 2.0
MAX_STOPS = 8
MAX_STOP_CHARACTERS = 64
MAX_INPUT_BYTES = 4 << 20
ADAPTER_RULE = "'adapters/ID', 'adapters/sha256:HEX', 'base', or empty for the default"


@dataclass(frozen=True, slots=True)
class Ask:
    """A request that is well formed. Says nothing of whether its names exist or its prompt fits."""

    adapter: str
    """As given: empty, "base", or "adapters/…"."""
    model: str
    """As given: empty or "models/…"."""
    request_id: str
    options: inference_pb2.GenerationOptions
    """Every field filled."""
    prompt: str = ""
    conversation: messages_pb2.Conversation | None = None


def generate_ask(request: inference_pb2.GenerateRequest, context_tokens: int, fresh_seed: int, fresh_id: str) -> Ask:
    """A raw request, or INVALID_ARGUMENT with all violations. `context_tokens` 0 = not known yet."""
    wrong = _check_common(request, context_tokens)
    if not request.prompt:
        wrong.append(Violation("prompt", "nothing", "a text of at least one character"))
    wrong += _check_size("prompt", len(request.prompt.encode()))
    if wrong:
        raise invalid(wrong)
    options = filled(request.options, fresh_seed)
    return Ask(request.adapter, request.model, request.request_id or fresh_id, options, prompt=request.prompt)


def chat_ask(request: inference_pb2.ChatRequest, context_tokens: int, fresh_seed: int, fresh_id: str) -> Ask:
    """A chat request, or INVALID_ARGUMENT with all violations. `context_tokens` 0 = not known yet."""
    wrong = _check_common(request, context_tokens)
    wrong += check_conversation(request.conversation)
    wrong += _check_size("conversation", request.conversation.ByteSize())
    if wrong:
        raise invalid(wrong)
    options = filled(request.options, fresh_seed)
    conversation = messages_pb2.Conversation()
    conversation.CopyFrom(request.conversation)
    return Ask(request.adapter, request.model, request.request_id or fresh_id, options, conversation=conversation)


def filled(options: inference_pb2.GenerationOptions, fresh_seed: int) -> inference_pb2.GenerationOptions:
    """The options with every absent field at its default."""
    full = inference_pb2.GenerationOptions(
        max_tokens=DEFAULT_MAX_TOKENS, temperature=0.0, top_p=1.0, top_k=0, seed=fresh_seed
    )
    full.MergeFrom(options)
    return full


def _check_size(field: str, size: int) -> list[Violation]:
    limit = f"at most {MAX_INPUT_BYTES} bytes"
    return [Violation(field, f"{size} bytes", limit)] if size > MAX_INPUT_BYTES else []


def _check_common(
    request: inference_pb2.GenerateRequest | inference_pb2.ChatRequest, context_tokens: int
) -> list[Violation]:
    wrong: list[Violation] = []
    if request.adapter not in ("", BASE) and names.check_name("adapter", request.adapter, "adapters"):
        wrong.append(Violation("adapter", show(request.adapter), ADAPTER_RULE))
    if request.model:
        wrong += names.check_name("model", request.model, "models")
    if request.request_id:
        wrong += names.check_request_id(request.request_id)
    return wrong + check_options(request.options, context_tokens)


def check_options(options: inference_pb2.GenerationOptions, context_tokens: int) -> list[Violation]:
    """Violations of the options; none if they are fine."""
    wrong: list[Violation] = []

    def refuse(field: str, given: object, accepted: str) -> None:
        wrong.append(Violation(f"options.{field}", show(given), accepted))

    longest = context_tokens or (1 << 31)
    if options.HasField("max_tokens") and not 1 <= options.max_tokens <= longest:
        refuse("max_tokens", options.max_tokens, f"1 to {longest} (the context)")
    temperature, top_p = options.temperature, options.top_p
    if not (math.isfinite(temperature) and 0.0 <= temperature <= MAX_TEMPERATURE):
        refuse("temperature", temperature, f"0 to {MAX_TEMPERATURE:g}")
    if options.HasField("top_p") and not (math.isfinite(top_p) and 0.0 < top_p <= 1.0):
        refuse("top_p", top_p, "above 0, at most 1")
    if len(options.stop) > MAX_STOPS:
        refuse("stop", f"{len(options.stop)} strings", f"at most {MAX_STOPS}")
    for number, stop in enumerate(options.stop):
        if not 1 <= len(stop) <= MAX_STOP_CHARACTERS:
            refuse(f"stop[{number}]", f"{len(stop)} characters", f"1 to {MAX_STOP_CHARACTERS} characters")
    return wrong


def check_switch(adapter: str) -> list[Violation]:
    """Violations of a name for the default."""
    if adapter == BASE or not names.check_name("adapter", adapter, "adapters"):
        return []
    return [Violation("adapter", show(adapter), "'adapters/ID', 'adapters/sha256:HEX', or 'base'")]


def check_conversation(conversation: messages_pb2.Conversation) -> list[Violation]:
    """Violations of a conversation that waits for the assistant's turn.

    Says nothing of what the model's template thinks of it.
    """
    wrong: list[Violation] = []
    turns = conversation.messages
    if not turns:
        return [Violation("conversation.messages", "none", "at least one turn")]
    for number, turn in enumerate(turns):
        wrong += _check_turn(f"conversation.messages[{number}]", number, turn)
    if turns[-1].role == messages_pb2.ROLE_ASSISTANT:
        last = f"conversation.messages[{len(turns) - 1}].role"
        wrong.append(Violation(last, "ROLE_ASSISTANT", "a last turn of the user, the system or a tool"))
    for number, tool in enumerate(conversation.tools):
        if not tool.name:
            wrong.append(Violation(f"conversation.tools[{number}].name", "nothing", "the tool's name"))
        wrong += _check_object(f"conversation.tools[{number}].parameters_json", tool.parameters_json, may_be_empty=True)
    return wrong


def _check_turn(field: str, number: int, turn: messages_pb2.Message) -> list[Violation]:
    wrong: list[Violation] = []
    spoken = "ROLE_SYSTEM, ROLE_USER, ROLE_ASSISTANT, ROLE_TOOL"
    if turn.role == messages_pb2.ROLE_UNSPECIFIED or turn.role not in messages_pb2.Role.values():
        wrong.append(Violation(f"{field}.role", str(turn.role), spoken))
    if turn.role == messages_pb2.ROLE_SYSTEM and number > 0:
        wrong.append(Violation(f"{field}.role", "ROLE_SYSTEM", "a system turn only as the first"))
    if turn.tool_calls and turn.role != messages_pb2.ROLE_ASSISTANT:
        wrong.append(Violation(f"{field}.tool_calls", f"{len(turn.tool_calls)} calls", "calls only of the assistant"))
    if not any(part.text for part in turn.parts) and not turn.tool_calls and turn.role != messages_pb2.ROLE_TOOL:
        wrong.append(Violation(f"{field}.parts", "no text", "a text of at least one character"))
    for index, call in enumerate(turn.tool_calls):
        if not call.name:
            wrong.append(Violation(f"{field}.tool_calls[{index}].name", "nothing", "the tool's name"))
        wrong += _check_object(f"{field}.tool_calls[{index}].arguments_json", call.arguments_json, may_be_empty=False)
    return wrong


def _check_object(field: str, text: str, may_be_empty: bool) -> list[Violation]:
    if (may_be_empty and not text) or _is_object(text):
        return []
    return [Violation(field, show(text), "a JSON object")]


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
