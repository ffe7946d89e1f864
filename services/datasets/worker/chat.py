"""Chat rows: messages, tools and tool calls as the contract holds them.

Law of this room: pure. Gives the plain form (the contract's JSON, as data: see
plain.py). Takes the form that OpenAI's chat API made common;
fields of a message, call or tool that the contract does not know go to the
metadata under their place, as in "messages[0].weight", and are named.
"""

from __future__ import annotations

import json
from typing import Any

from services.datasets.worker.found import WARNING, Problem, clip
from services.datasets.worker.plain import ROLES, Plain
from services.datasets.worker.strict_json import StrictJson

_KNOWN_MESSAGE = frozenset({"role", "content", "tool_calls", "tool_call_id", "name"})
_ROLE_HINT = "one of system, user, assistant, tool"


def conversation(fields: dict[str, Any], rest: dict[str, Any], problems: list[Problem]) -> Plain:
    """A conversation of messages and tools; unknown fields go to `rest`."""
    into: Plain = {}
    messages = _listed("messages", fields.get("messages"), problems)
    if messages is not None and not messages:
        problems.append(
            Problem("missing_field", "there is no message", "at least one question and one answer", "messages")
        )
    if messages:
        into["messages"] = [_message(m, f"messages[{i}]", rest, problems) for i, m in enumerate(messages)]
    if fields.get("tools") not in (None, ""):
        tools = _listed("tools", fields["tools"], problems)
        if tools:
            into["tools"] = [_tool(t, f"tools[{i}]", rest, problems) for i, t in enumerate(tools)]
    return into


def _listed(name: str, value: Any, problems: list[Problem]) -> list[Any] | None:
    if isinstance(value, str):  # a CSV field that holds JSON
        try:
            value, _, problem = StrictJson().decode(value.strip())
        except (ValueError, RecursionError):
            problems.append(Problem("broken_json", f"is not JSON: {clip(value)}", "a JSON list", name))
            return None
        if problem is not None:
            problems.append(problem)
            return None
    if isinstance(value, list):
        return value
    if value is None:
        problems.append(Problem("missing_field", "chat form needs it; it is missing", "a list of messages", name))
    else:
        problems.append(Problem("wrong_type", f"is {clip(value)}", "a list", name))
    return None


def _message(value: Any, where: str, rest: dict[str, Any], problems: list[Problem]) -> Plain:
    into: Plain = {}
    if not isinstance(value, dict):
        problems.append(Problem("wrong_type", f"is {clip(value)}", "an object with role and content", where))
        return into
    role = value.get("role")
    if not isinstance(role, str) or role not in ROLES:
        hint = _ROLE_HINT + ("; ShareGPT's from/value are another form" if "from" in value else "")
        problems.append(Problem("unknown_role", f"the role is {clip(role)}", hint, f"{where}.role"))
    else:
        into["role"] = ROLES[role]
    content = value.get("content")
    if type(content) is str:
        if content:
            into["parts"] = [{"text": content}]
    elif content is not None:
        _content(content, f"{where}.content", into, problems)
    calls = value.get("tool_calls")
    if calls is not None and not isinstance(calls, list):
        problems.append(Problem("wrong_type", f"is {clip(calls)}", "a list of calls", f"{where}.tool_calls"))
    elif calls:
        into["tool_calls"] = [_call(c, f"{where}.tool_calls[{i}]", rest, problems) for i, c in enumerate(calls)]
    for name in ("tool_call_id", "name"):
        text = value.get(name)
        if isinstance(text, str):
            if text:
                into[name] = text
        elif text is not None:
            problems.append(Problem("wrong_type", f"is {clip(text)}", "a string", f"{where}.{name}"))
    if not value.keys() <= _KNOWN_MESSAGE:
        _keep(value, _KNOWN_MESSAGE, where, "", rest, problems)
    return into


def _content(value: Any, where: str, into: Plain, problems: list[Problem]) -> None:
    parts = []
    for i, part in enumerate(value if isinstance(value, list) else [value]):
        text = part if isinstance(part, str) else None
        place = f"{where}[{i}]" if isinstance(value, list) else where
        if isinstance(part, dict) and part.get("type") == "text" and set(part) == {"type", "text"}:
            text = part["text"]
        if isinstance(text, str):
            parts.append({"text": text})
        elif isinstance(part, dict) and part.get("type", "text") != "text":
            told = f"content of type {clip(part['type'])}"
            problems.append(Problem("unsupported_content", told, "text alone", place))
        else:
            hint = 'a string, or a list of {"type": "text", "text": …}'
            problems.append(Problem("wrong_type", f"is {clip(part)}", hint, place))
    if parts:
        into["parts"] = parts


def _call(value: Any, where: str, rest: dict[str, Any], problems: list[Problem]) -> Plain:
    function = value.get("function") if isinstance(value, dict) and "function" in value else value
    if not isinstance(value, dict) or not isinstance(function, dict):
        hint = '{"id", "type": "function", "function": {"name", "arguments"}}'
        problems.append(Problem("wrong_type", f"is {clip(value)}", hint, where))
        return {}
    _kind(value, where, problems)
    into: Plain = {"name": _name(function, where, problems)}
    ident = value.get("id")
    if isinstance(ident, str):
        if ident:
            into["id"] = ident
    elif ident is not None:
        problems.append(Problem("wrong_type", f"is {clip(ident)}", "a string", f"{where}.id"))
    into["arguments_json"] = _object_text(function.get("arguments"), f"{where}.arguments", problems)
    nested = function is not value
    _keep(
        value, {"id", "type", "function"} if nested else {"id", "type", "name", "arguments"}, where, "", rest, problems
    )
    if nested:
        _keep(function, {"name", "arguments"}, where, "function/", rest, problems)
    return into


def _tool(value: Any, where: str, rest: dict[str, Any], problems: list[Problem]) -> Plain:
    function = value.get("function") if isinstance(value, dict) and "function" in value else value
    if not isinstance(value, dict) or not isinstance(function, dict):
        hint = '{"type": "function", "function": {"name", "description", "parameters"}}'
        problems.append(Problem("wrong_type", f"is {clip(value)}", hint, where))
        return {}
    _kind(value, where, problems)
    into: Plain = {"name": _name(function, where, problems)}
    told = function.get("description")
    if isinstance(told, str):
        if told:
            into["description"] = told
    elif told is not None:
        problems.append(Problem("wrong_type", f"is {clip(told)}", "a string", f"{where}.description"))
    if function.get("parameters") is not None:
        into["parameters_json"] = _object_text(function["parameters"], f"{where}.parameters", problems)
    nested = function is not value
    known = {"name", "description", "parameters"}
    _keep(value, {"type", "function"} if nested else {"type", *known}, where, "", rest, problems)
    if nested:
        _keep(function, known, where, "function/", rest, problems)
    return into


def _kind(value: dict[str, Any], where: str, problems: list[Problem]) -> None:
    if value.get("type", "function") != "function":
        problems.append(Problem("wrong_type", f"is {clip(value['type'])}", "'function'", f"{where}.type"))


def _name(function: dict[str, Any], where: str, problems: list[Problem]) -> str:
    name = function.get("name")
    if isinstance(name, str) and name:
        return name
    problems.append(Problem("missing_field", f"the name is {clip(name)}", "the function's name", f"{where}.name"))
    return ""


def _object_text(value: Any, where: str, problems: list[Problem]) -> str:
    """A JSON object as text; text that is one already stays as it is."""
    if value is None:
        return "{}"
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    if isinstance(value, str):
        try:
            inner, end, problem = StrictJson().decode(value.strip())
        except (ValueError, RecursionError):
            inner, end, problem = None, 0, None
        if problem is not None:
            problems.append(Problem(problem.rule, problem.message, problem.hint, where))
            return ""
        if isinstance(inner, dict) and end == len(value.strip()):
            return value
    problems.append(Problem("wrong_type", f"is {clip(value)}", "a JSON object, or its text", where))
    return ""


def _keep(
    value: dict[str, Any],
    known: frozenset[str] | set[str],
    where: str,
    inner: str,
    rest: dict[str, Any],
    problems: list[Problem],
) -> None:
    for key in [k for k in value if k not in known]:
        place = f"{where}.{inner}{key}"
        rest[place] = value[key]
        told = f"{clip(key)} is no field that training sees"
        problems.append(Problem("unknown_message_field", told, "it was kept as metadata", place, WARNING))
