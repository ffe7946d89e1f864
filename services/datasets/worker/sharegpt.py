"""ShareGPT rows: turns of from and value, with tools and calls as its later users have them.

Law of this room: pure. A call stands as JSON in the value of a turn of its own;
one that follows the model's words belongs to the same message. Names of
speakers become roles; those that tell more (which model) are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from services.datasets.forms import MODELS
from services.datasets.worker import chat
from services.datasets.worker.found import clip
from services.datasets.worker.plain import Plain
from services.datasets.worker.row import Row

_CALL = "function_call"
SPEAKERS = {
    "human": "ROLE_USER",
    "user": "ROLE_USER",
    "gpt": "ROLE_ASSISTANT",
    "chatgpt": "ROLE_ASSISTANT",
    "assistant": "ROLE_ASSISTANT",
    **dict.fromkeys(MODELS, "ROLE_ASSISTANT"),
    "system": "ROLE_SYSTEM",
    "tool": "ROLE_TOOL",
    "observation": "ROLE_TOOL",
    "function_response": "ROLE_TOOL",
    _CALL: _CALL,
}
_KNOWN = frozenset({"from", "value", "name", "tool_call_id"})


def conversation(row: Row) -> Plain:
    """The conversation of a ShareGPT row."""
    into: Plain = {}
    column = row.named("conversations")
    given = row.take("conversations")
    system = row.text("system", needed=False)
    values = None
    if given is None:
        row.missing(column, "a list of turns")
    elif (values := row.listed(given, column)) == []:
        row.wrong("missing_field", "there is no turn", "at least one question and one answer", column)
    if values:
        into["messages"] = turns(values, "messages", column, row, system)
    chat.tools(row, into)
    return into


def turns(values: Sequence[Any], path: str, column: str, row: Row, system: str = "") -> list[Plain]:
    """Messages of turns; problems name the turn as the file counts it, metadata the message."""
    made: list[Plain] = []
    if system:
        made.append({"role": "ROLE_SYSTEM", "parts": [{"text": system}]})
    said = False  # whether the turn before was the model's words, which a call may follow
    for n, value in enumerate(values):
        at = f"{column}[{n}]"
        who = value.get("from") if isinstance(value, dict) else None
        if not isinstance(value, dict):
            row.wrong("wrong_type", f"is {clip(value)}", "an object with from and value", at)
            continue
        speaker = who.lower() if isinstance(who, str) else ""
        role = SPEAKERS.get(speaker, "")
        if not role:
            row.wrong("unknown_role", f"the turn is from {clip(who)}", f"one of {', '.join(SPEAKERS)}", f"{at}.from")
        prefix = ""
        if role == _CALL and said:
            prefix = f"{_CALL}."
        else:
            made.append({"role": "ROLE_ASSISTANT" if role == _CALL else role} if role else {})
        message, where = made[-1], f"{path}[{len(made) - 1}]."
        if role == _CALL:
            calls = _calls(value.get("value"), where, f"{at}.value", row)
            if calls:
                message["tool_calls"] = calls
        else:
            _words(value.get("value"), f"{at}.value", message, row)
        said = role == "ROLE_ASSISTANT"
        if speaker in MODELS:
            row.keep(where, "from", speaker, quiet=True)
        for name in ("name", "tool_call_id"):
            text = value.get(name)
            if isinstance(text, str) and not prefix:
                if text:
                    message[name] = text
            elif text is not None:
                row.wrong("wrong_type", f"is {clip(text)}", "a string, in the message's first turn", f"{at}.{name}")
        if not value.keys() <= _KNOWN:
            for key in [k for k in value if k not in _KNOWN]:
                row.keep(where + prefix, key, value[key])
    return made


def _words(value: Any, at: str, into: Plain, row: Row) -> None:
    if type(value) is str:
        if value:
            into["parts"] = [{"text": value}]
    elif value is not None:
        row.wrong("wrong_type", f"is {clip(value)}", "a string", at)


def _calls(value: Any, where: str, at: str, row: Row) -> list[Plain]:
    if isinstance(value, str):
        value = row.parsed(value, at, '{"name", "arguments"} as JSON, or a list of them')
        if value is None:
            return []
    values = value if isinstance(value, list) else [value]
    if not values:
        row.wrong("missing_field", "there is no call", '{"name", "arguments"} as JSON', at)
    return [chat.call(c, f"{where}tool_calls[{j}]", row) for j, c in enumerate(values)]
