"""Chat rows: messages, tools and tool calls as the contract holds them.

Law of this room: pure. Gives the plain form (the contract's JSON, as data: see
plain.py). Takes the form that OpenAI's chat API made common, its older
functions too; fields of a message, part, call or tool that the contract does
not know go to the metadata under their place, as in "messages[0].weight", and
are named.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from services.datasets import repairs
from services.datasets.forms import CHAT
from services.datasets.worker.found import INFO, Problem, clip
from services.datasets.worker.plain import ROLES, Plain
from services.datasets.worker.row import Row
from services.datasets.worker.strict_json import StrictJson

_KNOWN_MESSAGE = frozenset({"role", "content", "tool_calls", "tool_call_id", "name"})
_ROLE_HINT = "one of system, user, assistant, tool"


def conversation(row: Row) -> Plain:
    """The conversation of a chat row."""
    into: Plain = {}
    column = row.named("messages")
    given = row.take("messages")
    values = None
    if given is None:
        row.missing(column, "a list of messages")
    elif (values := row.listed(given, column)) == []:
        row.wrong("missing_field", "there is no message", "at least one question and one answer", column)
    if values:
        into["messages"] = messages(values, "messages", row)
    tools(row, into)
    return into


def messages(values: Sequence[Any], path: str, row: Row) -> list[Plain]:
    """Messages in order."""
    return [_message(m, f"{path}[{i}]", row) for i, m in enumerate(values)]


def tools(row: Row, into: Plain) -> None:
    """The tools on offer, or functions as they were called before."""
    given = row.take("tools")
    if given is None and "tools" not in row.given and isinstance(row.rest.get("functions"), list):
        given = row.rest.pop("functions")
        _legacy(row, "functions", "tools")
    if given is None or given == "":
        return
    values = row.listed(given, row.named("tools"))
    if values:
        into["tools"] = [_tool(t, f"tools[{i}]", row) for i, t in enumerate(values)]


def _legacy(row: Row, place: str, now: str) -> None:
    told = f"an older form of {now}"
    row.problems.append(Problem("legacy_function_call", told, f"it was read as {now}", place, INFO))


def _message(value: Any, where: str, row: Row) -> Plain:
    into: Plain = {}
    if not isinstance(value, dict):
        row.wrong("wrong_type", f"is {clip(value)}", "an object with role and content", where)
        return into
    role = value.get("role")
    if isinstance(role, str) and role in ROLES:
        into["role"] = ROLES[role]
    elif role == "function":
        into["role"] = ROLES["tool"]
        _legacy(row, f"{where}.role", "the role tool")
    else:
        hint = _ROLE_HINT + ("; ShareGPT's from/value are another form" if "from" in value else "")
        repair = repairs.ROLE_NAMES if repairs.role_of(role) and row.form == CHAT else ""
        row.problems.append(Problem("unknown_role", f"the role is {clip(role)}", hint, f"{where}.role", repair=repair))
    content = value.get("content")
    if type(content) is str:
        if content:
            into["parts"] = [{"text": content}]
    elif content is not None:
        _content(content, f"{where}.content", into, row)
    calls = value.get("tool_calls")
    if calls is not None and not isinstance(calls, list):
        row.wrong("wrong_type", f"is {clip(calls)}", "a list of calls", f"{where}.tool_calls")
    elif calls:
        into["tool_calls"] = [call(c, f"{where}.tool_calls[{i}]", row) for i, c in enumerate(calls)]
    for name in ("tool_call_id", "name"):
        text = value.get(name)
        if isinstance(text, str):
            if text:
                into[name] = text
        elif text is not None:
            row.wrong("wrong_type", f"is {clip(text)}", "a string", f"{where}.{name}")
    if not value.keys() <= _KNOWN_MESSAGE:
        _others(value, where, into, row)
    return into


def _others(value: dict[str, Any], where: str, into: Plain, row: Row) -> None:
    for key in [k for k in value if k not in _KNOWN_MESSAGE]:
        if key == "function_call" and value[key] is not None and not value.get("tool_calls"):
            into["tool_calls"] = [call(value[key], f"{where}.tool_calls[0]", row)]
            _legacy(row, f"{where}.function_call", "tool_calls")
        else:
            row.keep(f"{where}.", key, value[key])


def _content(value: Any, where: str, into: Plain, row: Row) -> None:
    parts: list[Plain] = []
    for i, part in enumerate(value if isinstance(value, list) else [value]):
        place = f"{where}[{i}]" if isinstance(value, list) else where
        if isinstance(part, str):
            parts.append({"text": part})
        elif isinstance(part, dict) and part.get("type", "text") != "text":
            told = f"content of type {clip(part['type'])}"
            row.wrong("unsupported_content", told, "text alone", place)
        elif isinstance(part, dict) and isinstance(part.get("text"), str):
            parts.append({"text": part["text"]})
            for key in [k for k in part if k not in ("type", "text")]:
                row.keep(f"{where}[{i}].", key, part[key])
        else:
            hint = 'a string, or a list of {"type": "text", "text": …}'
            row.wrong("wrong_type", f"is {clip(part)}", hint, place)
    if parts:
        into["parts"] = parts


def call(value: Any, where: str, row: Row) -> Plain:
    """A tool call, whether its function lies in an object of its own or not."""
    function = value.get("function") if isinstance(value, dict) and "function" in value else value
    if not isinstance(value, dict) or not isinstance(function, dict):
        hint = '{"id", "type": "function", "function": {"name", "arguments"}}'
        row.wrong("wrong_type", f"is {clip(value)}", hint, where)
        return {}
    _kind(value, where, row)
    into: Plain = {"name": _name(function, where, row)}
    ident = value.get("id")
    if isinstance(ident, str):
        if ident:
            into["id"] = ident
    elif ident is not None:
        row.wrong("wrong_type", f"is {clip(ident)}", "a string", f"{where}.id")
    into["arguments_json"] = object_text(function.get("arguments"), f"{where}.arguments", row)
    _keep_others(value, function, {"id"}, {"name", "arguments"}, where, row)
    return into


def _tool(value: Any, where: str, row: Row) -> Plain:
    function = value.get("function") if isinstance(value, dict) and "function" in value else value
    if not isinstance(value, dict) or not isinstance(function, dict):
        hint = '{"type": "function", "function": {"name", "description", "parameters"}}'
        row.wrong("wrong_type", f"is {clip(value)}", hint, where)
        return {}
    _kind(value, where, row)
    into: Plain = {"name": _name(function, where, row)}
    told = function.get("description")
    if isinstance(told, str):
        if told:
            into["description"] = told
    elif told is not None:
        row.wrong("wrong_type", f"is {clip(told)}", "a string", f"{where}.description")
    if function.get("parameters") is not None:
        into["parameters_json"] = object_text(function["parameters"], f"{where}.parameters", row)
    _keep_others(value, function, set(), {"name", "description", "parameters"}, where, row)
    return into


def _keep_others(
    value: dict[str, Any], function: dict[str, Any], outer: set[str], inner: set[str], where: str, row: Row
) -> None:
    nested = function is not value
    known = {"type", "function"} | outer if nested else {"type"} | outer | inner
    for key in [k for k in value if k not in known]:
        row.keep(f"{where}.", key, value[key])
    if nested:
        for key in [k for k in function if k not in inner]:
            row.keep(f"{where}.function/", key, function[key])


def _kind(value: dict[str, Any], where: str, row: Row) -> None:
    if value.get("type", "function") not in ("function", None):
        row.wrong("wrong_type", f"is {clip(value['type'])}", "'function'", f"{where}.type")


def _name(function: dict[str, Any], where: str, row: Row) -> str:
    name = function.get("name")
    if isinstance(name, str) and name:
        return name
    row.wrong("missing_field", f"the name is {clip(name)}", "the function's name", f"{where}.name")
    return ""


def object_text(value: Any, where: str, row: Row) -> str:
    """A JSON object as text; text that is one already stays as it is."""
    if value is None:
        return "{}"
    inner = value
    if isinstance(value, str):
        stripped = value.strip()
        try:
            inner, end, problem = StrictJson().decode(stripped)
        except (ValueError, RecursionError):
            inner, end, problem = None, 0, None
        if problem is not None:
            row.wrong(problem.rule, problem.message, problem.hint, where)
            return ""
        if end != len(stripped):
            inner = None
    if not isinstance(inner, dict):
        row.wrong("wrong_type", f"is {clip(value)}", "a JSON object, or its text", where)
        return ""
    if not _finite(inner):
        row.wrong("number_too_large", "holds a number beyond what a double holds", "write it as text", where)
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, dict):
        return all(map(_finite, value.values()))
    return all(map(_finite, value)) if isinstance(value, list) else True
