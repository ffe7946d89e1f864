"""What of an example becomes text: the part of it that rows are made of.

Law of this room: pure. A line is read straight into what templates see, without
a message in between, since a ledger reads millions; a line that is written in
any other way than the canonical one takes the slow road and gives the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from qlorad.v1 import datasets_pb2, messages_pb2
from services.common.prompt.example import ROLES, ExampleError, Talk, as_template_sees, call_seen, loads, tool_seen


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation, as templates see it."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None


@dataclass(frozen=True, slots=True)
class Text:
    """A prompt and what completes it."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Gap:
    """A text with a gap."""

    prefix: str
    middle: str
    suffix: str


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to one prompt; no training row is made of it yet."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row came from."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


Body = Chat | Text | Gap | Pair | None
_ROLES = {messages_pb2.Role.Name(number): name for number, name in ROLES.items()}
_REST = frozenset({"metadata", "origin"})
_MESSAGE = frozenset({"role", "parts", "tool_calls", "tool_call_id", "name"})
_PLAIN_MESSAGE = frozenset({"role", "parts"})
_KNOWN: Mapping[str, frozenset[str]] = {
    "chat": frozenset({"messages", "tools"}),
    "completion": frozenset({"prompt", "completion"}),
    "infill": frozenset({"prefix", "middle", "suffix"}),
    "part": frozenset({"text"}),
    "call": frozenset({"id", "name", "arguments_json"}),
    "tool": frozenset({"name", "description", "parameters_json"}),
    "origin": frozenset({"file", "line", "spans"}),
}


def body_of(example: datasets_pb2.Example, parts: bool = False) -> Body:
    """The body of an example, None where it has none; ExampleError naming what no template could be shown."""
    match example.WhichOneof("body"):
        case "chat":
            return Chat(*as_template_sees(example.chat, parts))
        case "completion":
            return Text(example.completion.prompt, example.completion.completion)
        case "infill":
            return Gap(example.infill.prefix, example.infill.middle, example.infill.suffix)
        case "preference":
            return Pair()
    return None


def read(line: bytes, parts: bool = False) -> tuple[Place, Body | ExampleError]:
    """Place and body of a line. ExampleError is raised where the line is no example at all, and
    given back where it is one that no template could be shown."""
    try:
        plain = orjson.loads(line)
        origin = plain.get("origin", {})
        _only(origin, "origin")
        place = Place(_text(origin, "file"), int(origin.get("line", 0)))
        return place, _body(plain, parts)
    except (KeyError, TypeError, ValueError, AttributeError):
        pass
    except ExampleError as e:
        return place, e
    example = loads(line)
    place = Place(example.origin.file, example.origin.line)
    try:
        return place, body_of(example, parts)
    except ExampleError as e:
        return place, e


def _body(plain: dict[str, Any], parts: bool) -> Body:
    """Raises what Python raises on anything that is not as `dumps` writes it."""
    (kind,) = plain.keys() - _REST
    inside = plain[kind]
    if kind == "chat":
        _only(inside, "chat")
        return Chat(*_talk(inside, parts))
    if kind == "completion":
        _only(inside, "completion")
        return Text(_text(inside, "prompt"), _text(inside, "completion"))
    if kind == "infill":
        _only(inside, "infill")
        return Gap(_text(inside, "prefix"), _text(inside, "middle"), _text(inside, "suffix"))
    raise KeyError(kind)


def _talk(chat: Mapping[str, Any], parts: bool) -> Talk:
    messages = [_message(i, m, parts) for i, m in enumerate(chat.get("messages", ()))]
    tools = []
    for i, t in enumerate(chat.get("tools", ())):
        _only(t, "tool")
        tools.append(tool_seen(i, _text(t, "name"), _text(t, "description"), _text(t, "parameters_json")))
    return messages, tools or None


def _message(index: int, message: dict[str, Any], parts: bool) -> dict[str, Any]:
    texts = []
    for part in message.get("parts", ()):
        _only(part, "part")
        texts.append(_text(part, "text"))
    seen: dict[str, Any] = {"role": _ROLES[message["role"]], "content": texts[0] if len(texts) == 1 else "".join(texts)}
    if parts:
        seen["parts"] = texts
    if message.keys() <= _PLAIN_MESSAGE:
        return seen
    if not message.keys() <= _MESSAGE:
        raise KeyError(index)
    calls = []
    for n, call in enumerate(message.get("tool_calls", ())):
        _only(call, "call")
        where = f"messages[{index}].tool_calls[{n}]"
        told = (_text(call, "id"), _text(call, "name"), _text(call, "arguments_json"))
        calls.append(call_seen(where, index + 1, *told))
    if calls:
        seen["tool_calls"] = calls
    for name in ("tool_call_id", "name"):
        if value := _text(message, name):
            seen[name] = value
    return seen


def _only(inside: dict[str, Any], kind: str) -> None:
    if not inside.keys() <= _KNOWN[kind]:
        raise KeyError(kind)


def _text(inside: dict[str, Any], name: str) -> str:
    value = inside.get(name, "")
    if type(value) is not str:
        raise TypeError(name)
    return value
