"""The most common rows, read quickly: those about which nothing needs to be said.

Law of this room: pure. A row that is read here is read the same by forms.py,
without a problem; every other row is None here, and forms.py tells what it is.
Keys stand in the order in which they are sealed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from qlorad.v1 import datasets_pb2
from services.datasets.forms import Form
from services.datasets.worker.plain import Plain

Read: TypeAlias = Callable[[dict[str, Any]], Plain | None]

_INSTRUCTION = frozenset({"instruction", "input", "output"})
_ANSWERS = {"user": "ROLE_USER", "assistant": "ROLE_ASSISTANT"}
_EXACT = 1 << 53


def instruction(row: dict[str, Any]) -> Plain | None:
    """{"instruction", "input", "output"} with texts, and plain values beside them."""
    question, answer, given = row.get("instruction"), row.get("output"), row.get("input", "")
    if type(question) is not str or type(answer) is not str or type(given) is not str:
        return None
    if not question or not answer:
        return None
    said = [{"text": question}, {"text": "\n\n" + given}] if given else [{"text": question}]
    example: Plain = {
        "chat": {
            "messages": [
                {"parts": said, "role": "ROLE_USER"},
                {"parts": [{"text": answer}], "role": "ROLE_ASSISTANT"},
            ]
        }
    }
    return example if len(row) == 2 + ("input" in row) else _with_metadata(example, row, _INSTRUCTION)


def chat(row: dict[str, Any]) -> Plain | None:
    """{"messages"} of texts by user and assistant in turn, perhaps after a system's."""
    told = row.get("messages")
    if type(told) is not list or not told or "tools" in row:
        return None
    messages = []
    expected = "user"
    for message in told:
        if type(message) is not dict or len(message) != 2:
            return None
        role, content = message.get("role"), message.get("content")
        if type(content) is not str or not content:
            return None
        if role == "system" and not messages:
            messages.append({"parts": [{"text": content}], "role": "ROLE_SYSTEM"})
            continue
        if role != expected:
            return None
        messages.append({"parts": [{"text": content}], "role": _ANSWERS[expected]})
        expected = "assistant" if expected == "user" else "user"
    if expected == "assistant" or messages[-1]["role"] != "ROLE_ASSISTANT":
        return None
    example: Plain = {"chat": {"messages": messages}}
    return example if len(row) == 1 else _with_metadata(example, row, ("messages",))


def _with_metadata(example: Plain, row: dict[str, Any], known: frozenset[str] | tuple[str, ...]) -> Plain | None:
    metadata = {}
    for key, value in row.items():
        if key in known:
            continue
        kind = type(value)
        if kind is int:
            if not -_EXACT <= value <= _EXACT:
                return None
        elif kind is not str and kind is not bool and value is not None:
            return None
        if key == "system" or key == "history":
            return None
        metadata[key] = value
    example["metadata"] = dict(sorted(metadata.items()))
    return example


READERS: Mapping[Form, Read] = {
    datasets_pb2.ROW_FORMAT_INSTRUCTION: instruction,
    datasets_pb2.ROW_FORMAT_CHAT: chat,
}
