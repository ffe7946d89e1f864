"""Conversations as callers send them: turn by turn.

Law of this room: pure; says nothing of what a model's template thinks of them.
"""

from __future__ import annotations

import json

from qlorad.v1 import messages_pb2
from services.common.errors import Violation, show


def check_conversation(
    conversation: messages_pb2.Conversation, field: str = "conversation", waits: bool = True
) -> list[Violation]:
    """Violations of a conversation; with `waits` of one that waits for the assistant's turn."""
    wrong: list[Violation] = []
    turns = conversation.messages
    if not turns:
        return [Violation(f"{field}.messages", "none", "at least one turn")]
    for number, turn in enumerate(turns):
        wrong += _check_turn(f"{field}.messages[{number}]", number, turn)
    if waits and turns[-1].role == messages_pb2.ROLE_ASSISTANT:
        last = f"{field}.messages[{len(turns) - 1}].role"
        wrong.append(Violation(last, "ROLE_ASSISTANT", "a last turn of the user, the system or a tool"))
    for number, tool in enumerate(conversation.tools):
        if not tool.name:
            wrong.append(Violation(f"{field}.tools[{number}].name", "nothing", "the tool's name"))
        wrong += _check_object(f"{field}.tools[{number}].parameters_json", tool.parameters_json, may_be_empty=True)
    return wrong


def _check_turn(field: str, number: int, turn: messages_pb2.Message) -> list[Violation]:
    wrong: list[Violation] = []
    spoken = "ROLE_SYSTEM, ROLE_USER, ROLE_ASSISTANT, ROLE_TOOL"
    if turn.role == messages_pb2.ROLE_UNSPECIFIED or turn.role not in messages_pb2.Role.values():
        wrong.append(Violation(f"{field}.role", str(turn.role), spoken))
    if turn.role == messages_pb2.ROLE_SYSTEM and number > 0:
        wrong.append(Violation(f"{field}.role", "ROLE_SYSTEM", "a system turn only as the first"))
    if turn.tool_calls and turn.role != messages_pb2.ROLE_ASSISTANT:
        wrong.append(Violation(f"{field}.tool_calls", f"{len(turn.tool_calls)} calls", "calls only of the assistant"))
    if not any(part.text for part in turn.parts) and not turn.tool_calls and turn.role != messages_pb2.ROLE_TOOL:
        wrong.append(Violation(f"{field}.parts", "no text", "a text of at least one character"))
    for index, call in enumerate(turn.tool_calls):
        if not call.name:
            wrong.append(Violation(f"{field}.tool_calls[{index}].name", "nothing", "the tool's name"))
        wrong += _check_object(f"{field}.tool_calls[{index}].arguments_json", call.arguments_json, may_be_empty=False)
    return wrong


def _check_object(field: str, text: str, may_be_empty: bool) -> list[Violation]:
    if (may_be_empty and not text) or _is_object(text):
        return []
    return [Violation(field, show(text), "a JSON object")]


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
