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


def content_hash(example: Plain) -> bytes:
    """16 bytes that are equal for equal content; metadata, origin, and how a text is cut into parts do not count."""
    if "chat" in example:
        chat = example["chat"]
        said = orjson.dumps([_said(chat.get("messages", ())), chat.get("tools")], option=orjson.OPT_SORT_KEYS)
    elif "preference" in example:
        told = example["preference"]
        prompt = told.get("prompt", {})
        said = orjson.dumps(
            [
                _said(prompt.get("messages", ())),
                _said(told.get("chosen", ())),
                _said(told.get("rejected", ())),
                prompt.get("tools"),
            ],
            option=orjson.OPT_SORT_KEYS,
        )
    else:
        body = body_of(example)
        said = orjson.dumps([body, example.get(body)], option=orjson.OPT_SORT_KEYS)
    return hashlib.blake2b(said, digest_size=16).digest()


def _said(messages: Sequence[Plain]) -> list[Any]:
    said: list[Any] = []
    for message in messages:
        said += (message.get("role"), text_of(message))
        if len(message) > 2:
            said.append({k: v for k, v in message.items() if k not in ("role", "parts")})
    return said


def words(text: str) -> int:
    """Runs of characters between blanks, as str.split counts them, without making them where that is safe."""
    if text.isascii() and "  " not in text and "\n" not in text and "\t" not in text and "\r" not in text:
        inner = text.strip()
        return inner.count(" ") + 1 if inner else 0
    return len(text.split())


def size_of(example: Plain) -> tuple[int, int]:
    """Characters of an example, and words of what it teaches."""
    if "completion" in example:
        body = example["completion"]
        learnt = body.get("completion", "")
        return len(body.get("prompt", "")) + len(learnt), words(learnt)
    if "infill" in example:
        body = example["infill"]
        return sum(map(len, body.values())), words(body.get("middle", ""))
    characters = taught = 0
    for path, messages in conversations(example):
        for message in messages:
            text = text_of(message)
            characters += len(text)
            is_taught = message.get("role") == "ROLE_ASSISTANT" and path != "rejected"
            if is_taught:
                taught += words(text)
            for call in message.get("tool_calls", ()):
                characters += len(call.get("arguments_json", ""))
                if is_taught:
                    taught += words(call.get("arguments_json", ""))
    return characters, taught
