"""The forms of rows, and canonical examples written back in each of them.

Law of this room: pure. A form carries an example wholly or refuses it naming
the field; what was read in a form and is written in it reads the same again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, TypeAlias

from google.protobuf import json_format

from qlorad.v1 import datasets_pb2, messages_pb2

Form: TypeAlias = "datasets_pb2.RowFormat.ValueType"

# In the order in which they are sniffed.
FORMS: Mapping[Form, tuple[str, ...]] = {
    datasets_pb2.ROW_FORMAT_CHAT: ("messages", "tools"),
    datasets_pb2.ROW_FORMAT_INSTRUCTION: ("instruction", "output", "input", "system"),
    datasets_pb2.ROW_FORMAT_COMPLETION: ("prompt", "completion"),
    datasets_pb2.ROW_FORMAT_TEXT: ("text",),
}
OPTIONAL = frozenset({"tools", "input", "system"})
NAMES: Mapping[Form, str] = {
    datasets_pb2.ROW_FORMAT_UNSPECIFIED: "canonical",
    datasets_pb2.ROW_FORMAT_CHAT: "chat",
    datasets_pb2.ROW_FORMAT_INSTRUCTION: "instruction",
    datasets_pb2.ROW_FORMAT_COMPLETION: "completion",
    datasets_pb2.ROW_FORMAT_TEXT: "text",
}
ROLES: Mapping[str, messages_pb2.Role.ValueType] = {
    "system": messages_pb2.ROLE_SYSTEM,
    "user": messages_pb2.ROLE_USER,
    "assistant": messages_pb2.ROLE_ASSISTANT,
    "tool": messages_pb2.ROLE_TOOL,
}
_ROLE_NAMES = {number: name for name, number in ROLES.items()}

# Where chat rows keep fields of a message, call or tool that the contract does
# not know: in the metadata, under the place they came from.
NESTED = re.compile(r"(messages|tools)\[(\d+)\](?:\.tool_calls\[(\d+)\])?\.(.+)", re.DOTALL)


class CannotCarry(Exception):
    """An example that a form has no place for."""

    def __init__(self, field: str, why: str) -> None:
        super().__init__(f"{field}: {why}")
        self.field = field
        self.why = why


def write(example: datasets_pb2.Example, form: Form) -> str:
    """The example as one line of JSON in the form, without a newline; CannotCarry names the field."""
    row = _ROWS[form](example)
    for key, value in _whole(json_format.MessageToDict(example.metadata)).items():
        nested = NESTED.fullmatch(key) if form == datasets_pb2.ROW_FORMAT_CHAT else None
        if nested is None or not _restore(row, nested, value):
            if key in row or key in FORMS[form]:
                raise CannotCarry(f"metadata.{key}", f"the {NAMES[form]} form has a field of that name")
            row[key] = value
    return json.dumps(row, ensure_ascii=False, allow_nan=False)


def _whole(value: Any) -> Any:
    """Whole numbers as such: a Struct holds every number as a double."""
    if isinstance(value, dict):
        return {k: _whole(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_whole(v) for v in value]
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) <= 1 << 53 else value


def _restore(row: dict[str, Any], place: re.Match[str], value: object) -> bool:
    try:
        target = row[place[1]][int(place[2])]
        if place[3] is not None:
            target = target["tool_calls"][int(place[3])]
    except (KeyError, IndexError):
        return False
    *path, last = place[4].split("/")
    for name in path:
        target = target.get(name)
        if not isinstance(target, dict):
            return False
    if last in target:
        return False
    target[last] = value
    return True


def _text(message: messages_pb2.Message) -> str:
    return "".join(part.text for part in message.parts)


def _instruction(example: datasets_pb2.Example) -> dict[str, Any]:
    if example.WhichOneof("body") != "chat":
        raise CannotCarry("completion", "the instruction form has no prompt without a chat template")
    if example.chat.tools:
        raise CannotCarry("tools", "the instruction form has no tools")
    turns = list(example.chat.messages)
    system = turns.pop(0) if turns and turns[0].role == messages_pb2.ROLE_SYSTEM else None
    if [t.role for t in turns] != [messages_pb2.ROLE_USER, messages_pb2.ROLE_ASSISTANT]:
        raise CannotCarry("messages", "the instruction form has one user turn and one answer")
    for i, turn in enumerate(example.chat.messages):
        if turn.tool_calls:
            raise CannotCarry(f"messages[{i}].tool_calls", "the instruction form has no tool calls")
        if turn.name or turn.tool_call_id:
            raise CannotCarry(f"messages[{i}].name", "the instruction form has no names")
    user, answer = turns
    row: dict[str, Any] = {"instruction": user.parts[0].text if user.parts else "", "input": ""}
    if len(user.parts) == 2 and user.parts[1].text.startswith("\n\n"):
        row["input"] = user.parts[1].text.removeprefix("\n\n")
    elif len(user.parts) > 1:
        row["instruction"] = _text(user)
    row["output"] = _text(answer)
    if system is not None:
        row["system"] = _text(system)
    return row


def _chat(example: datasets_pb2.Example) -> dict[str, Any]:
    if example.WhichOneof("body") != "chat":
        raise CannotCarry("completion", "the chat form has roles; a prompt and its completion have none")
    row: dict[str, Any] = {"messages": [_message(m) for m in example.chat.messages]}
    if example.chat.tools:
        row["tools"] = [_tool(t) for t in example.chat.tools]
    return row


def _message(message: messages_pb2.Message) -> dict[str, Any]:
    made: dict[str, Any] = {"role": _ROLE_NAMES[message.role]}
    if len(message.parts) > 1:
        made["content"] = [{"type": "text", "text": part.text} for part in message.parts]
    elif message.parts or not message.tool_calls:
        made["content"] = _text(message)
    else:
        made["content"] = None
    if message.tool_calls:
        made["tool_calls"] = [_call(c) for c in message.tool_calls]
    if message.tool_call_id:
        made["tool_call_id"] = message.tool_call_id
    if message.name:
        made["name"] = message.name
    return made


def _call(call: messages_pb2.ToolCall) -> dict[str, Any]:
    made: dict[str, Any] = {"id": call.id} if call.id else {}
    return {**made, "type": "function", "function": {"name": call.name, "arguments": call.arguments_json}}


def _tool(tool: messages_pb2.Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name}
    if tool.description:
        function["description"] = tool.description
    if tool.parameters_json:
        function["parameters"] = json.loads(tool.parameters_json)
    return {"type": "function", "function": function}


def _completion(example: datasets_pb2.Example) -> dict[str, Any]:
    if example.WhichOneof("body") != "completion":
        raise CannotCarry("messages", "the completion form has no roles")
    return {"prompt": example.completion.prompt, "completion": example.completion.completion}


def _plain_text(example: datasets_pb2.Example) -> dict[str, Any]:
    if example.WhichOneof("body") != "completion":
        raise CannotCarry("messages", "the text form has no roles")
    if example.completion.prompt:
        raise CannotCarry("prompt", "the text form trains every token; a prompt is not trained")
    return {"text": example.completion.completion}


_ROWS = {
    datasets_pb2.ROW_FORMAT_INSTRUCTION: _instruction,
    datasets_pb2.ROW_FORMAT_CHAT: _chat,
    datasets_pb2.ROW_FORMAT_COMPLETION: _completion,
    datasets_pb2.ROW_FORMAT_TEXT: _plain_text,
}
