"""Examples in plain form: the canonical JSON of qlorad.v1.Example, as data.

Law of this room: pure. A million rows pass through here, so rows are dicts and
lists and no messages; fields without a value are left out, as ProtoJSON does.
A plain example and the message of its line say the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import orjson

Plain: TypeAlias = dict[str, Any]

ROLES: Mapping[str, str] = {
    "system": "ROLE_SYSTEM",
    "user": "ROLE_USER",
    "assistant": "ROLE_ASSISTANT",
    "tool": "ROLE_TOOL",
}
BODIES = ("chat", "completion", "preference", "infill")


def text_of(message: Plain) -> str:
    """The text of a message: its parts, joined by nothing."""
    parts = message.get("parts")
    if not parts:
        return ""
    return parts[0]["text"] if len(parts) == 1 else "".join(p["text"] for p in parts)


def body_of(example: Plain) -> str:
    """Which body an example has; empty for none."""
    return next((name for name in BODIES if name in example), "")


def conversations(example: Plain) -> Iterator[tuple[str, Sequence[Plain]]]:
    """Every list of messages in an example, with the path to it."""
    if "chat" in example:
        yield "messages", example["chat"].get("messages", ())
    elif "preference" in example:
        told = example["preference"]
        yield "prompt", told.get("prompt", {}).get("messages", ())
        yield "chosen", told.get("chosen", ())
        yield "rejected", told.get("rejected", ())


def texts(example: Plain) -> Iterator[tuple[str, str]]:
    """Every text of an example with its place; metadata does not count."""
    for path, messages in conversations(example):
        for i, message in enumerate(messages):
            text = text_of(message)
            if text:
                yield f"{path}[{i}].content", text
            for j, call in enumerate(message.get("tool_calls", ())):
                yield f"{path}[{i}].tool_calls[{j}].arguments", call.get("arguments_json", "")
    for body in ("completion", "infill"):
        yield from example.get(body, {}).items()


def weigh(example: Plain) -> tuple[bytes, int, int]:
    """Hash of the content, number of characters, and words of what it teaches.

    The hash has 16 bytes and is equal for equal content; metadata, origin, and
    how a text is cut into parts do not count.
    """
    said: list[str] = []
    if "chat" in example:
        chat = example["chat"]
        shape, taught = _weigh_messages(chat.get("messages", ()), said)
        if "tools" in chat:
            shape.append(_line(chat["tools"]))
    elif "preference" in example:
        told = example["preference"]
        prompt = told.get("prompt", {})
        before, _ = _weigh_messages(prompt.get("messages", ()), said)
        better, taught = _weigh_messages(told.get("chosen", ()), said)
        worse, _ = _weigh_messages(told.get("rejected", ()), said)
        shape = ["preference", *before, "chosen", *better, "rejected", *worse, _line(prompt.get("tools"))]
    else:
        name = body_of(example)
        body = example.get(name, {})
        said += body.values()
        shape = [name, *body]
        taught = words(body.get("middle" if name == "infill" else "completion", ""))
    content = hash_of("\0".join(said).encode(), "\0".join(shape).encode())
    return content, sum(map(len, said)), taught


def hash_of(said: bytes, shape: bytes) -> bytes:
    """The hash of texts, joined by NUL, which no text holds, and of what is said around them."""
    return hashlib.blake2b(said + b"\0\0" + shape, digest_size=16).digest()


def _line(value: Any) -> str:
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS).decode()


def _weigh_messages(messages: Sequence[Plain], said: list[str]) -> tuple[list[str], int]:
    """What is around the texts of messages, and words of what they teach; their texts go to `said`."""
    shape: list[str] = []
    taught = 0
    for message in messages:
        role, parts = message.get("role", ""), message.get("parts")
        text = "" if not parts else parts[0]["text"] if len(parts) == 1 else "".join([p["text"] for p in parts])
        said.append(text)
        shape.append(role)
        if role == "ROLE_ASSISTANT":
            taught += words(text)
        if len(message) > 2 or (parts is None and len(message) > 1):
            rest = {k: v for k, v in message.items() if k not in ("role", "parts", "tool_calls")}
            calls = message.get("tool_calls", ())
            shape.append(_line([rest, [{k: v for k, v in c.items() if k != "arguments_json"} for c in calls]]))
            for call in calls:
                arguments = call.get("arguments_json", "")
                said.append(arguments)
                taught += words(arguments)
    return shape, taught


def words(text: str) -> int:
    """Runs of characters between blanks, those of ASCII."""
    return len(text.encode().split())
