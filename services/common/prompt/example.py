"""Canonical examples as lines, and conversations as chat templates expect them.

Law of this room: pure. One example has one line, on every machine: proto field
names, sorted keys, no blanks, UTF-8 as it is. What a template sees of a
conversation is decided here and nowhere else, so training and serving agree.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import orjson
from google.protobuf import json_format

from qlorad.v1 import datasets_pb2, messages_pb2

ROLES = {
    messages_pb2.ROLE_SYSTEM: "system",
    messages_pb2.ROLE_USER: "user",
    messages_pb2.ROLE_ASSISTANT: "assistant",
    messages_pb2.ROLE_TOOL: "tool",
}
Talk = tuple[list[dict[str, Any]], list[dict[str, Any]] | None]
"""Messages, and the tools on offer."""


@dataclass(eq=False)
class ExampleError(Exception):
    """Something in an example that no template could be shown.

    Not frozen: Python itself sets the traceback on an exception.
    """

    field: str
    """Where, as in "messages[2].tool_calls[0].arguments_json"."""
    message: str
    turn: int = 0
    """One-based turn; 0 = not in a turn."""

    def __str__(self) -> str:
        return f"{self.field}: {self.message}"


def dumps(example: datasets_pb2.Example) -> bytes:
    """The example as one line, without a newline.

    Equal examples give equal bytes. Raises ExampleError where metadata holds a
    number that JSON has no form for.
    """
    try:
        plain = json_format.MessageToDict(example, preserving_proto_field_name=True)
        if "metadata" in plain:
            plain["metadata"] = whole(plain["metadata"])
        return line_of(plain)
    except (json_format.Error, TypeError, ValueError) as e:
        raise ExampleError("metadata", f"{e}; accepted: finite numbers") from None


def line_of(plain: dict[str, Any]) -> bytes:
    """A canonical example in plain form (its JSON, as data) as one line, without a newline."""
    return orjson.dumps(plain, option=orjson.OPT_SORT_KEYS)


def whole(value: Any) -> Any:
    """Whole numbers as such: a Struct holds every number as a double."""
    if isinstance(value, dict):
        return {k: whole(v) for k, v in value.items()}
    if isinstance(value, list):
        return [whole(v) for v in value]
    exact = isinstance(value, float) and value.is_integer() and abs(value) <= 1 << 53
    return int(value) if exact and (value or math.copysign(1.0, value) > 0) else value  # -0.0 stays what it is


def loads(line: bytes) -> datasets_pb2.Example:
    """The example of a line; ExampleError if it is none."""
    example = datasets_pb2.Example()
    try:
        plain = orjson.loads(line)
        if not isinstance(plain, dict):
            raise json_format.ParseError(f"a JSON {type(plain).__name__}")
        json_format.ParseDict(plain, example)
    except (json_format.ParseError, ValueError, RecursionError) as e:
        raise ExampleError("example", f"not a canonical example: {e}") from None
    return example


def as_template_sees(conversation: messages_pb2.Conversation, parts: bool = False) -> Talk:
    """Messages and tools in the form that Hugging Face chat templates expect.

    Content is always a string, empty where a turn only calls tools. Arguments
    and parameters are objects, not text. Fields without a value are left out.
    Tools are None where none are on offer. With `parts` each message also tells
    the texts that its content is joined of, for templates of ours that ask.
    """
    messages = [_message(i, m, parts) for i, m in enumerate(conversation.messages)]
    tools = [tool_seen(i, t.name, t.description, t.parameters_json) for i, t in enumerate(conversation.tools)]
    return messages, tools or None


def text_of(message: messages_pb2.Message) -> str:
    """The text of a message: its parts, joined by nothing."""
    return "".join(part.text for part in message.parts)


def _message(index: int, message: messages_pb2.Message, parts: bool) -> dict[str, Any]:
    where = f"messages[{index}]"
    if message.role not in ROLES:
        raise ExampleError(f"{where}.role", f"unknown role {message.role}", index + 1)
    seen: dict[str, Any] = {"role": ROLES[message.role], "content": text_of(message)}
    if parts:
        seen["parts"] = [part.text for part in message.parts]
    if message.tool_calls:
        seen["tool_calls"] = [
            call_seen(f"{where}.tool_calls[{n}]", index + 1, call.id, call.name, call.arguments_json)
            for n, call in enumerate(message.tool_calls)
        ]
    if message.tool_call_id:
        seen["tool_call_id"] = message.tool_call_id
    if message.name:
        seen["name"] = message.name
    return seen


def call_seen(where: str, turn: int, ident: str, name: str, arguments_json: str) -> dict[str, Any]:
    """A tool call as templates see it."""
    arguments = _json_object(f"{where}.arguments_json", turn, arguments_json)
    named = {"id": ident} if ident else {}
    return {**named, "type": "function", "function": {"name": name, "arguments": arguments}}


def tool_seen(index: int, name: str, description: str, parameters_json: str) -> dict[str, Any]:
    """A tool as templates see it."""
    parameters = _json_object(f"tools[{index}].parameters_json", 0, parameters_json)
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": parameters or {"type": "object", "properties": {}},
        },
    }


def _json_object(where: str, turn: int, text: str) -> dict[str, Any]:
    if not text.strip():
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise ExampleError(where, f"not JSON ({e}); accepted: a JSON object", turn) from None
    if not isinstance(value, dict):
        raise ExampleError(where, f"a JSON {type(value).__name__}; accepted: a JSON object", turn)
    return value
