"""Named, safe repairs of rows, applied only where they were asked for.

Law of this room: a repair changes what its name says and nothing else, finds
nothing to do a second time, and is told and counted for every row. Texts are
mended, metadata is not. Where metadata belongs to single turns, turns stay.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from services.datasets import repairs
from services.datasets.forms import CHAT, Form
from services.datasets.repairs import REPAIRS
from services.datasets.worker import rules
from services.datasets.worker.characters import BLANKS, TEXT_REPAIRS
from services.datasets.worker.found import ERROR, INFO, Problem
from services.datasets.worker.plain import Plain, text_of
from services.datasets.worker.strict_json import MAX_DEPTH, StrictJson, depth, odd_text

_ALL = "all"
_SURROGATE = re.compile("[\ud800-\udfff]")
_VALUE_REPAIRS: Mapping[str, Callable[[str], str]] = {
    repairs.NUL_CHARACTERS: lambda text: text.replace("\0", ""),
    repairs.LONE_SURROGATES: lambda text: _SURROGATE.sub("", text),
}
_TURN = re.compile(r"(?:messages|prompt|chosen|rejected)\[\d+\]\.")
_USER, _ASSISTANT = "ROLE_USER", "ROLE_ASSISTANT"


class Repairs:
    """The repairs that were asked for, and how many rows each was applied to."""

    def __init__(self, names: Iterable[str]) -> None:
        asked = frozenset(names)
        self.names = frozenset(REPAIRS) if _ALL in asked else asked
        self.applied: Counter[str] = Counter()
        self._done: list[str] = []
        """What was done to the row that is being read."""

    def mend_value(self, value: Any, problem: Problem) -> dict[str, Any] | None:
        """The row of a value that was parsed but is spoiled; None where no repair mends it."""
        self._done = []
        if problem.repair not in self.names or not isinstance(value, dict):
            return None
        done = []
        for name, mended in _VALUE_REPAIRS.items():
            if name in self.names and (changed := _each_text(value, mended)) != value:
                value = changed
                done.append(name)
        if value is None or odd_text(value) is not None or depth(value) > MAX_DEPTH:
            return None
        self._done = done
        return value

    def mend_row(self, row: dict[str, Any], form: Form, columns: Mapping[str, str]) -> dict[str, Any]:
        """The row as its form can read it."""
        column = columns.get("messages", "messages")
        messages = _parsed(row.get(column))
        if repairs.ROLE_NAMES not in self.names or form != CHAT or not isinstance(messages, list):
            return row
        renamed = [_with_known_role(m) for m in messages]
        if renamed == messages:
            return row
        self._done.append(repairs.ROLE_NAMES)
        return {**row, column: renamed}

    def mend(self, example: Plain, problems: list[Problem]) -> tuple[Plain, list[Problem]]:
        """The example mended, and what is to be told of it; one with errors is void and stays as it is."""
        if not any(p.severity == ERROR for p in problems):
            example = self._texts(example)
            example = self._turns(example)
        done, self._done = self._done, []
        for name in done:
            self.applied[name] += 1
            problems = [*problems, Problem("repaired", f"{name}: {REPAIRS[name]}", "", "", INFO)]
        return example, problems

    def _texts(self, example: Plain) -> Plain:
        asked = {name: mended for name, mended in TEXT_REPAIRS.items() if name in self.names}
        before = None
        while example is not before:  # one may bring to light what another one mends; each makes the text shorter
            before = example
            for name, mended in asked.items():
                example = self._changed(name, example, _with_texts(example, mended))
        if repairs.BLANKS in self.names:
            example = self._changed(repairs.BLANKS, example, _with_messages(example, _stripped))
        return example

    def _turns(self, example: Plain) -> Plain:
        if "chat" not in example or any(_TURN.match(key) for key in example.get("metadata", ())):
            return example
        joins = repairs.JOIN_TURNS in self.names
        for name, turned in (
            (repairs.EMPTY_TURNS, lambda messages: _without_empty(messages, joins)),
            (repairs.JOIN_TURNS, _joined),
            (repairs.TRAILING_TURN, _without_trailing),
        ):
            if name in self.names:
                messages = turned(example["chat"].get("messages", []))
                changed = {**example, "chat": {**example["chat"], "messages": messages}}
                if messages:
                    example = self._changed(name, example, changed)
        return example

    def _changed(self, name: str, before: Plain, after: Plain) -> Plain:
        if after == before:
            return before
        if name not in self._done:
            self._done.append(name)
        return after


def _each_text(value: Any, mended: Callable[[str], str]) -> Any:
    """The value with every string in it mended, keys too; None where two keys would become one."""
    if isinstance(value, str):
        return mended(value)
    if isinstance(value, list):
        return [_each_text(v, mended) for v in value]
    if isinstance(value, dict):
        made = {mended(k): _each_text(v, mended) for k, v in value.items()}
        return made if len(made) == len(value) else None
    return value


def _parsed(value: Any) -> Any:
    """A list that a field of a table holds as text, else the value as it is."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError, RecursionError):
            found, end, problem = StrictJson().decode(value.strip())
            if problem is None and end == len(value.strip()):
                return found
    return value


def _with_known_role(message: Any) -> Any:
    role = repairs.role_of(message.get("role")) if isinstance(message, dict) else None
    return message if role is None else {**message, "role": role}


def _with_texts(example: Plain, mended: Callable[[str], str]) -> Plain:
    """The example with its texts mended; one that holds nothing any more is left out, as everywhere."""
    example = _with_messages(example, lambda parts: [{**p, "text": mended(p["text"])} for p in parts])
    for body in ("completion", "infill"):
        if body in example:
            made = {name: mended(text) for name, text in example[body].items()}
            example = {**example, body: {name: text for name, text in made.items() if text}}
    return example


def _with_messages(example: Plain, changed: Callable[[list[Plain]], list[Plain]]) -> Plain:
    """The example with the parts of every message changed."""

    def each(messages: list[Plain]) -> list[Plain]:
        return [_with_parts(m, changed(m["parts"])) if "parts" in m else m for m in messages]

    if "chat" in example:
        return {**example, "chat": _conversation(example["chat"], each)}
    if "preference" in example:
        told = dict(example["preference"])
        if "prompt" in told:
            told["prompt"] = _conversation(told["prompt"], each)
        for answer in ("chosen", "rejected"):
            if answer in told:
                told[answer] = each(told[answer])
        return {**example, "preference": told}
    return example


def _conversation(chat: Plain, each: Callable[[list[Plain]], list[Plain]]) -> Plain:
    return {**chat, "messages": each(chat["messages"])} if "messages" in chat else chat


def _with_parts(message: Plain, parts: list[Plain]) -> Plain:
    said = [p for p in parts if p["text"]]
    if said:
        return {**message, "parts": said}
    return {name: value for name, value in message.items() if name != "parts"}


def _stripped(parts: list[Plain]) -> list[Plain]:
    """Without blanks at both ends; a text of blanks alone stays, since it would be empty."""
    if not "".join(p["text"] for p in parts).strip(BLANKS):
        return parts
    parts = [dict(p) for p in parts]
    while not parts[0]["text"].strip(BLANKS):
        del parts[0]
    while not parts[-1]["text"].strip(BLANKS):
        del parts[-1]
    parts[0]["text"] = parts[0]["text"].lstrip(BLANKS)
    parts[-1]["text"] = parts[-1]["text"].rstrip(BLANKS)
    return parts


def _without_empty(messages: list[Plain], joins: bool) -> list[Plain]:
    """Without turns that say and call nothing, where what is left is in order (once joined, if it will be)."""
    left = [m for m in messages if m.get("tool_calls") or m.get("role") == "ROLE_TOOL" or text_of(m).strip()]
    if len(left) == len(messages):
        return messages
    checked = _joined(left) if joins else left
    is_in_order = left and not any(p.severity == ERROR for p in rules.order(checked))
    return left if is_in_order else messages


def _joined(messages: list[Plain]) -> list[Plain]:
    made: list[Plain] = []
    for message in messages:
        before = made[-1] if made else {}
        if rules.can_join(before, message):
            parts, more = before.get("parts", []), message.get("parts", [])
            if parts and more:
                border = {**parts[-1], "text": f"{parts[-1]['text']}\n\n{more[0]['text']}"}
                parts, more = [*parts[:-1], border], more[1:]
            made[-1] = _with_parts(before, [*parts, *more])
        else:
            made.append(message)
    return made


def _without_trailing(messages: list[Plain]) -> list[Plain]:
    end = len(messages)
    while end and messages[end - 1].get("role") == _USER:
        end -= 1
    is_answered = any(m.get("role") == _ASSISTANT for m in messages[:end])
    return messages[:end] if is_answered else messages
