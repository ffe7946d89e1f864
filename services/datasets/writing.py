"""Plain examples written as rows of each form.

Law of this room: pure, and honest. A form carries an example exactly, or the
losses name every field that it has no place for, or it refuses the example
whole (CannotCarry), naming why. What was read in a form and is written in it
reads the same again. It never invents: no template, no second answer, no gap.

Sealed rows alone come here: plain examples as the ingest worker made them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import orjson

from services.datasets.forms import (
    CANONICAL,
    CHAT,
    COMPLETION,
    FORMS,
    INFILL,
    INSTRUCTION,
    MODELS,
    NAMES,
    NESTED,
    PREFERENCE,
    SHAREGPT,
    TEXT,
    Form,
    is_messages,
)
from services.datasets.losses import PARTS, CannotCarry, Losses

Plain = dict[str, Any]
Row = dict[str, Any]

_SPOKEN = {"ROLE_SYSTEM": "system", "ROLE_USER": "user", "ROLE_ASSISTANT": "assistant", "ROLE_TOOL": "tool"}
_FROM = {"ROLE_SYSTEM": "system", "ROLE_USER": "human", "ROLE_ASSISTANT": "gpt", "ROLE_TOOL": "observation"}
_CALL = "function_call"


def write(example: Plain, form: Form) -> tuple[Row, Losses]:
    """The row of an example, and what it lost; CannotCarry where there is none."""
    losses = Losses()
    if form == CANONICAL or not form:
        return example, losses
    row = _ROWS[form](example, losses)
    metadata = example.get("metadata")
    if metadata:
        _add(row, metadata, form, losses)
    if form == SHAREGPT:
        _seal(row)
    return row, losses


# Metadata


def _add(row: Row, metadata: Plain, form: Form, losses: Losses) -> None:
    reserved = FORMS[form]
    for key, value in metadata.items():
        if key.endswith("]") or "]." not in key or not _restore(row, key, value, form):
            # Older names count where the field's own name is not there.
            is_older = key == "functions" and isinstance(value, list) and "tools" in reserved and "tools" not in row
            if key in row or key in reserved or is_older:
                losses.note(f"metadata.{key}", f"the {NAMES[form]} form has a field of that name")
            else:
                row[key] = value


def _restore(row: Row, key: str, value: Any, form: Form) -> bool:
    """Puts a field of a message, part, call or tool back into its place; False where that is not there."""
    place = NESTED.fullmatch(key)
    if place is None:
        return False
    table, index, inner, inner_index, function, last = place.groups()
    if form == SHAREGPT and table == "messages":
        return _restore_turn(row, int(index), inner, inner_index, function, last, value)
    target = row.get(table)
    if not isinstance(target, list) or int(index) >= len(target):
        return False
    target = target[int(index)]
    known = _KNOWN_TOOL if table == "tools" else _KNOWN_MESSAGE
    if inner:
        if table == "tools":
            return False
        target = target.get(inner)
        if not isinstance(target, list) or int(inner_index) >= len(target):
            return False
        target = target[int(inner_index)]
        known = _KNOWN_CALL if inner == "tool_calls" else _KNOWN_PART
    if function:
        if known not in (_KNOWN_TOOL, _KNOWN_CALL):
            return False
        target, known = target["function"], _KNOWN_FUNCTION
    elif last == _CALL and "tool_calls" in target and known is _KNOWN_MESSAGE:
        known = frozenset()
    if last in known or last in target or not isinstance(target, dict):
        return False
    target[last] = value
    return True


_KNOWN_MESSAGE = frozenset({"role", "content", "tool_calls", "tool_call_id", "name", _CALL})
_KNOWN_PART = frozenset({"type", "text"})
_KNOWN_CALL = frozenset({"id", "type", "function"})
_KNOWN_TOOL = frozenset({"type", "function"})
_KNOWN_FUNCTION = frozenset({"name", "arguments", "parameters", "description"})
_KNOWN_TURN = frozenset({"from", "value", "name", "tool_call_id"})
_KNOWN_FLAT_CALL = frozenset({"id", "type", "function", "name", "arguments"})


# Chat


def _chat(example: Plain, losses: Losses) -> Row:
    talk = _talk(example, CHAT, losses)
    row: Row = {"messages": [_message(m) for m in talk["messages"]]}
    if "tools" in talk:
        row["tools"] = [_tool(t) for t in talk["tools"]]
    return row


def _talk(example: Plain, form: Form, losses: Losses) -> Plain:
    """The example as a conversation."""
    if "chat" in example:
        chat: Plain = example["chat"]
        return chat
    name = NAMES[form]
    if "completion" in example:
        body = example["completion"]
        if not body.get("prompt"):
            raise CannotCarry("prompt", f"the {name} form needs a question; plain text has none")
        losses.note("plain", f"the {name} form has roles; a prompt and its completion have none", "completion")
        return {
            "messages": [
                {"role": "ROLE_USER", "parts": [{"text": body["prompt"]}]},
                {"role": "ROLE_ASSISTANT", **_parts(body.get("completion", ""))},
            ]
        }
    if "preference" in example:
        body = example["preference"]
        asked = body.get("prompt", {})
        losses.note("rejected", f"the {name} form has one answer")
        if body.get("plain"):
            losses.note("plain", f"the {name} form has roles; plain texts have none")
        before = asked.get("messages", [])
        if any(m["role"] == "ROLE_ASSISTANT" for m in before):
            losses.note("prompt", "answers in the prompt are not trained; as turns they are")
        return {**asked, "messages": [*before, *body.get("chosen", [])]}
    raise CannotCarry("infill", f"the {name} form has roles, and no gap to be filled")


def _parts(text: str) -> Plain:
    return {"parts": [{"text": text}]} if text else {}


def _text(message: Plain) -> str:
    parts = message.get("parts")
    if not parts:
        return ""
    return parts[0]["text"] if len(parts) == 1 else "".join([p["text"] for p in parts])


def _message(message: Plain) -> Row:
    made: Row = {"role": _SPOKEN[message["role"]]}
    parts = message.get("parts")
    if not parts:
        made["content"] = None if "tool_calls" in message else ""
    elif len(parts) == 1 and parts[0]["text"]:
        made["content"] = parts[0]["text"]
    else:
        made["content"] = [{"type": "text", "text": part["text"]} for part in parts]
    if "tool_calls" in message:
        made["tool_calls"] = [_call(c) for c in message["tool_calls"]]
    if "tool_call_id" in message:
        made["tool_call_id"] = message["tool_call_id"]
    if "name" in message:
        made["name"] = message["name"]
    return made


def _call(call: Plain) -> Row:
    made: Row = {"id": call["id"]} if "id" in call else {}
    function = {"name": call["name"], "arguments": call["arguments_json"]}
    return {**made, "type": "function", "function": function}


def _tool(tool: Plain) -> Row:
    function: Row = {"name": tool["name"]}
    if "description" in tool:
        function["description"] = tool["description"]
    if "parameters_json" in tool:
        function["parameters"] = _object(tool["parameters_json"])
    return {"type": "function", "function": function}


def _object(text: str) -> Any:
    """The object of a JSON text, where writing it gives the same text again; else the text."""
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return text
    return value if json.dumps(value, ensure_ascii=False) == text else text


# ShareGPT


def _sharegpt(example: Plain, losses: Losses) -> Row:
    talk = _talk(example, SHAREGPT, losses)
    turns: list[Row] = []
    for i, message in enumerate(talk["messages"]):
        parts = message.get("parts", ())
        text = _text(message)
        if len(parts) > 1 or (parts and not text):
            losses.note(PARTS, "a turn of the sharegpt form has one text", f"messages[{i}].content")
        more = {name: message[name] for name in ("name", "tool_call_id") if name in message}
        calls = message.get("tool_calls")
        if text or not calls:
            turns.append({"from": _FROM[message["role"]], "value": text, **more, _AT: i})
            more = {}
        if calls:
            turns.append({"from": _CALL, "value": [_flat_call(c) for c in calls], **more, _AT: i})
    row: Row = {"conversations": turns}
    if "tools" in talk:
        row["tools"] = [_tool(t) for t in talk["tools"]]
    return row


_AT = "\0"
"""Which message a turn is of; no row has a key with NUL. Taken off by _seal."""


def _flat_call(call: Plain) -> Row:
    made: Row = {"name": call["name"], "arguments": _object(call["arguments_json"])}
    if "id" in call:
        made["id"] = call["id"]
    return made


def _restore_turn(
    row: Row, index: int, inner: str | None, inner_index: str | None, function: str | None, last: str, value: Any
) -> bool:
    turns = [t for t in row["conversations"] if t[_AT] == index]
    if not turns or function:
        return False
    calls = turns[-1]["value"] if turns[-1]["from"] == _CALL else []
    if inner:
        if inner != "tool_calls" or int(inner_index or 0) >= len(calls):
            return False
        target, known = calls[int(inner_index or 0)], _KNOWN_FLAT_CALL
    elif last == "from" and value in MODELS and turns[0]["from"] == "gpt":
        turns[0]["from"] = value
        return True
    elif last.startswith(f"{_CALL}.") and len(turns) == 2:
        target, known, last = turns[1], _KNOWN_TURN, last.removeprefix(f"{_CALL}.")
    else:
        target, known = turns[0], _KNOWN_TURN
        if last.startswith(f"{_CALL}."):
            return False
    if last in known or last in target:
        return False
    target[last] = value
    return True


def _seal(row: Row) -> None:
    """Calls and tools as text, as readers of this form want them."""
    for turn in row["conversations"]:
        del turn[_AT]
        if turn["from"] == _CALL:
            calls = turn["value"]
            turn["value"] = json.dumps(calls[0] if len(calls) == 1 else calls, ensure_ascii=False)
    if "tools" in row:
        row["tools"] = json.dumps(row["tools"], ensure_ascii=False)


# Instruction


def _instruction(example: Plain, losses: Losses) -> Row:
    talk = _talk(example, INSTRUCTION, losses)
    messages = talk["messages"]
    if "tools" in talk:
        losses.note("tools", "the instruction form has no tools")
    row: Row = {"instruction": "", "input": "", "output": ""}
    begin = 1 if messages and messages[0]["role"] == "ROLE_SYSTEM" else 0
    turns = messages[begin:]
    pairs = ["ROLE_USER", "ROLE_ASSISTANT"] * (len(turns) // 2)
    if not turns or [t["role"] for t in turns] != pairs:
        raise CannotCarry("messages", "the instruction form has questions, each with one answer")
    for i, message in enumerate(messages):
        _without(message, f"messages[{i}]", losses)
    if begin:
        row["system"] = _joined(messages[0], "messages[0]", losses)
        if not row["system"]:
            del row["system"]
            losses.note("system", "the instruction form has no empty system turn")
    user, answer = turns[-2:]
    parts = user.get("parts", ())
    if len(parts) == 2 and parts[0]["text"] and parts[1]["text"].startswith("\n\n") and len(parts[1]["text"]) > 2:
        row["instruction"], row["input"] = parts[0]["text"], parts[1]["text"][2:]
    else:
        row["instruction"] = _joined(user, f"messages[{len(messages) - 2}]", losses)
    if not row["instruction"].strip() and not row["input"].strip():
        raise CannotCarry(f"messages[{len(messages) - 2}].content", "the instruction form needs an instruction")
    row["output"] = _joined(answer, f"messages[{len(messages) - 1}]", losses)
    if len(turns) > 2:
        asked = [_joined(t, f"messages[{begin + i}]", losses) for i, t in enumerate(turns[:-2])]
        row["history"] = [list(pair) for pair in zip(asked[::2], asked[1::2], strict=True)]
    return row


def _without(message: Plain, where: str, losses: Losses) -> None:
    """Notes what a message has beside its text."""
    if len(message) == 1 + ("parts" in message):
        return
    calls = message.get("tool_calls")
    if calls and not _text(message).strip():
        raise CannotCarry(f"{where}.tool_calls", "the form has no tool calls, and the turn says nothing else")
    if calls:
        losses.note("tool_calls", "the form has no tool calls", f"{where}.tool_calls")
    for name in ("name", "tool_call_id"):
        if name in message:
            losses.note(name, "the form has no names", f"{where}.{name}")


def _joined(message: Plain, where: str, losses: Losses) -> str:
    parts, text = message.get("parts", ()), _text(message)
    if len(parts) > 1 or (parts and not text):
        losses.note(PARTS, "a field of the form has one text", f"{where}.content")
    return text


# Texts


def _pair(example: Plain, form: Form, losses: Losses) -> tuple[str, str]:
    """The example as a prompt and what follows it."""
    name = NAMES[form]
    if "completion" in example:
        body = example["completion"]
        return body.get("prompt", ""), body.get("completion", "")
    if "infill" in example:
        body = example["infill"]
        losses.note("gap", f"the {name} form has no gap; the text stays in its order", "infill")
        return body.get("prefix", ""), body.get("middle", "") + body.get("suffix", "")
    if "preference" in example and example["preference"].get("plain"):
        losses.note("rejected", f"the {name} form has one answer")
        body = example["preference"]
        asked, answer = body["prompt"]["messages"][0], body["chosen"][0]
    else:
        talk = _talk(example, form, losses)
        if "tools" in talk:
            losses.note("tools", f"the {name} form has no tools")
        messages = talk["messages"]
        if form == TEXT or [m["role"] for m in messages] != ["ROLE_USER", "ROLE_ASSISTANT"]:
            raise CannotCarry("messages", f"the {name} form has no roles; turns become text by a model's template")
        asked, answer = messages
        losses.note("roles", f"the {name} form has no roles", "messages")
        for i, message in enumerate(messages):
            _without(message, f"messages[{i}]", losses)
    prompt = _joined(asked, "messages[0]", losses)
    return prompt, _joined(answer, "messages[1]", losses)


def _completion(example: Plain, losses: Losses) -> Row:
    prompt, completion = _pair(example, COMPLETION, losses)
    return {"prompt": prompt, "completion": completion}


def _plain_text(example: Plain, losses: Losses) -> Row:
    prompt, completion = _pair(example, TEXT, losses)
    if prompt and "infill" not in example:
        losses.note("prompt", "the text form trains every token; a prompt is not trained")
    return {"text": prompt + completion}


# Pairs and gaps


def _preference(example: Plain, losses: Losses) -> Row:
    body = example.get("preference")
    if body is None:
        raise CannotCarry("rejected", "the preference form needs a second, worse answer")
    asked = body.get("prompt", {})
    row: Row = {}
    if body.get("plain"):
        row["prompt"] = _joined(asked["messages"][0], "prompt[0]", losses)
        row["chosen"] = _joined(body["chosen"][0], "chosen[0]", losses)
        row["rejected"] = _joined(body["rejected"][0], "rejected[0]", losses)
        for path, message in (("prompt", asked["messages"][0]), ("chosen", body["chosen"][0])):
            _without(message, f"{path}[0]", losses)
        for path, text in row.items():
            if is_messages(text):
                raise CannotCarry(path, "the text is a list of messages, and would be read as one")
    else:
        row["prompt"] = [_message(m) for m in asked.get("messages", ())]
        row["chosen"] = [_message(m) for m in body.get("chosen", ())]
        row["rejected"] = [_message(m) for m in body.get("rejected", ())]
    if "tools" in asked:
        row["tools"] = [_tool(t) for t in asked["tools"]]
    return row


def _infill(example: Plain, losses: Losses) -> Row:
    body = example.get("infill")
    if body is None:
        raise CannotCarry("middle", "the infill form needs a gap; where it is, nothing tells")
    return {name: body.get(name, "") for name in ("prefix", "middle", "suffix")}


_ROWS: Mapping[Form, Callable[[Plain, Losses], Row]] = {
    INSTRUCTION: _instruction,
    CHAT: _chat,
    COMPLETION: _completion,
    TEXT: _plain_text,
    SHAREGPT: _sharegpt,
    PREFERENCE: _preference,
    INFILL: _infill,
}
