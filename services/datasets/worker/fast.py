"""The most common rows, read quickly: those about which nothing needs to be said.

Law of this room: pure. A row that is read here is read the same by forms.py,
without a problem, and no rule speaks against it but those that glance.py looks
for; every other row is None here, and forms.py tells what it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

from qlorad.v1 import datasets_pb2
from services.datasets.forms import Form
from services.datasets.worker.plain import Plain, words

_INSTRUCTION = frozenset({"instruction", "input", "output"})
_ANSWERS = {"user": "ROLE_USER", "assistant": "ROLE_ASSISTANT"}
_EXACT = 1 << 53
_MORE_THAN_METADATA = frozenset({"system", "history", "functions", "conversations", "conversation"})
_QUESTION_AND_ANSWER = b"ROLE_USER\0ROLE_ASSISTANT"


class Quick(NamedTuple):
    """A row that was read quickly."""

    example: Plain
    said: list[str]
    """Its texts, as plain.weigh joins them."""
    shape: bytes
    """What is around them, likewise."""
    words: int
    """Of what it teaches."""


Read: TypeAlias = Callable[[dict[str, Any]], Quick | None]
_quickly = tuple.__new__
"""Quick(…) without its own __new__."""


def instruction(row: dict[str, Any]) -> Quick | None:
    """{"instruction", "input", "output"} with texts, and plain values beside them."""
    question, answer, given = row.get("instruction"), row.get("output"), row.get("input", "")
    if type(question) is not str or type(answer) is not str or type(given) is not str:
        return None
    if not question or not answer or question[0] <= " " or answer[0] <= " " or answer[-1] <= " ":
        return None
    if given:
        if given[-1] <= " ":
            return None
        given = "\n\n" + given
        asked, whole = [{"text": question}, {"text": given}], question + given
    elif question[-1] <= " ":
        return None
    else:
        asked, whole = [{"text": question}], question
    example: Plain = {
        "chat": {
            "messages": [
                {"parts": asked, "role": "ROLE_USER"},
                {"parts": [{"text": answer}], "role": "ROLE_ASSISTANT"},
            ]
        }
    }
    if len(row) != 2 + ("input" in row) and not _add_metadata(example, row, _INSTRUCTION):
        return None
    return _quickly(Quick, (example, [whole, answer], _QUESTION_AND_ANSWER, words(answer)))


def chat(row: dict[str, Any]) -> Quick | None:
    """{"messages"} of texts by user and assistant in turn, perhaps after a system's."""
    told = row.get("messages")
    if type(told) is not list or not told or "tools" in row:
        return None
    messages: list[Any] = []
    said: list[str] = []
    shape: list[Any] = []
    taught = 0
    expected = "user"
    for message in told:
        if type(message) is not dict or len(message) != 2:
            return None
        role, content = message.get("role"), message.get("content")
        if type(content) is not str or not content or content[0] <= " " or content[-1] <= " ":
            return None
        if role == "system" and not messages:
            name = "ROLE_SYSTEM"
        elif role != expected:
            return None
        else:
            name = _ANSWERS[role]
            expected = "assistant" if expected == "user" else "user"
            if expected == "user":
                taught += words(content)
        messages.append({"parts": [{"text": content}], "role": name})
        said.append(content)
        shape.append(name)
    if shape[-1] != "ROLE_ASSISTANT":
        return None
    example: Plain = {"chat": {"messages": messages}}
    if len(row) != 1 and not _add_metadata(example, row, ("messages",)):
        return None
    return _quickly(Quick, (example, said, "\0".join(shape).encode(), taught))


def _add_metadata(example: Plain, row: dict[str, Any], known: frozenset[str] | tuple[str, ...]) -> bool:
    """Keeps what else the row has; False where that needs more than keeping."""
    metadata = {}
    for key, value in row.items():
        if key in known:
            continue
        kind = type(value)
        if kind is int:
            if not -_EXACT <= value <= _EXACT:
                return False
        elif kind is not str and kind is not bool and value is not None:
            return False
        if key in _MORE_THAN_METADATA:
            return False
        metadata[key] = value
    example["metadata"] = metadata
    return True


READERS: Mapping[Form, Read] = {
    datasets_pb2.ROW_FORMAT_INSTRUCTION: instruction,
    datasets_pb2.ROW_FORMAT_CHAT: chat,
}
