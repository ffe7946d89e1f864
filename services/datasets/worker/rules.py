"""What an example must be to be trained on, and a dataset to be worth it.

Law of this room: pure; one function a rule. A rule never mends, it tells.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qlorad.v1 import datasets_pb2, messages_pb2
from services.datasets.worker.found import WARNING, Problem

FEW_ROWS = 500
SHORT_OUTPUT_WORDS = 50

_SYSTEM = messages_pb2.ROLE_SYSTEM
_USER = messages_pb2.ROLE_USER
_ASSISTANT = messages_pb2.ROLE_ASSISTANT
_TOOL = messages_pb2.ROLE_TOOL
_SPOKEN = {_SYSTEM: "system", _USER: "user", _ASSISTANT: "assistant", _TOOL: "tool"}
_BEGIN = messages_pb2.ROLE_UNSPECIFIED
_MAY_FOLLOW = {
    _BEGIN: (_SYSTEM, _USER),
    _SYSTEM: (_USER,),
    _USER: (_ASSISTANT,),
    _ASSISTANT: (_USER, _TOOL),
    _TOOL: (_TOOL, _ASSISTANT),
}


def check(example: datasets_pb2.Example, output_field: str) -> list[Problem]:
    """Every rule that an example breaks. `output_field` names the output of forms without messages."""
    if example.WhichOneof("body") == "completion":
        return list(_output(example.completion.completion, output_field))
    messages = example.chat.messages
    if output_field != "messages":  # instruction form: one question, one answer
        return [*_prompt(messages[-2]), *_output(_text(messages[-1]), output_field)]
    return [*_order(messages), *_turns(messages)]


def _text(message: messages_pb2.Message) -> str:
    return "".join(part.text for part in message.parts)


def _output(text: str, field: str) -> Iterator[Problem]:
    if not text.strip():
        yield Problem("empty_output", "there is nothing to learn", "write the output, or leave the row out", field)


def _prompt(user: messages_pb2.Message) -> Iterator[Problem]:
    if not _text(user).strip():
        hint = "write the instruction, or use text form for plain text"
        yield Problem("empty_instruction", "instruction and input are empty", hint, "instruction")


def _order(messages: Sequence[messages_pb2.Message]) -> Iterator[Problem]:
    before = _BEGIN
    for i, message in enumerate(messages):
        where = f"messages[{i}].role"
        if message.role == 0:
            return
        if message.role not in _MAY_FOLLOW[before]:
            told = f"{_SPOKEN[message.role]} " + (f"follows {_SPOKEN[before]}" if before else "begins")
            may = " or ".join(_SPOKEN[r] for r in _MAY_FOLLOW[before])
            yield Problem("role_order", told, f"here only {may}; join turns of one speaker", where)
            return
        if message.role == _TOOL and before == _ASSISTANT and not messages[i - 1].tool_calls:
            hint = "give the assistant's turn its tool_calls"
            yield Problem("role_order", "a tool answers a turn that called none", hint, where)
            return
        before = message.role
    if not any(m.role == _ASSISTANT for m in messages):
        hint = "add the answer that is to be learned"
        yield Problem("no_assistant_turn", "no turn of the assistant, so nothing to learn", hint, "messages")
    elif before != _ASSISTANT:
        told = f"ends with a turn of {_SPOKEN[before]}, which is not trained"
        yield Problem("ends_without_answer", told, "add the answer, or cut the last turn", "messages", WARNING)


def _turns(messages: Sequence[messages_pb2.Message]) -> Iterator[Problem]:
    called: set[str] = set()
    for i, message in enumerate(messages):
        if message.role == _ASSISTANT:
            if not message.tool_calls:
                yield from _output(_text(message), f"messages[{i}].content")
            called = {call.id for call in message.tool_calls if call.id}
        elif message.role == _USER and not _text(message).strip():
            yield Problem("empty_turn", "the user says nothing", "write the turn", f"messages[{i}].content", WARNING)
        elif message.role == _TOOL and message.tool_call_id and called and message.tool_call_id not in called:
            told = f"answers {message.tool_call_id!r}, which no call has"
            hint = f"one of {', '.join(sorted(called))}"
            yield Problem("unknown_tool_call", told, hint, f"messages[{i}].tool_call_id")
        if message.tool_calls and message.role != _ASSISTANT:
            hint = "only the assistant calls tools"
            yield Problem("role_order", "tool_calls in another's turn", hint, f"messages[{i}].tool_calls")


def size_of(example: datasets_pb2.Example) -> tuple[int, int]:
    """Characters of an example, and words of what it teaches."""
    if example.WhichOneof("body") == "completion":
        body = example.completion
        return len(body.prompt) + len(body.completion), len(body.completion.split())
    characters = words = 0
    for message in example.chat.messages:
        text = _text(message)
        characters += len(text) + sum(len(c.arguments_json) for c in message.tool_calls)
        if message.role == _ASSISTANT:
            words += len(text.split()) + sum(len(c.arguments_json.split()) for c in message.tool_calls)
    return characters, words


@dataclass(slots=True)
class Totals:
    """What has been counted so far."""

    rows: int = 0
    """Kept."""
    skipped: int = 0
    duplicates: int = 0
    characters: int = 0
    output_words: int = 0


def check_all(totals: Totals) -> list[Problem]:
    """What is to be said of the dataset as a whole."""
    if totals.rows == 0:
        told = f"no row is left ({totals.skipped} with errors)" if totals.skipped else "there is no row"
        return [Problem("no_rows", told, "send rows that pass")]
    said = []
    if totals.rows < FEW_ROWS:
        hint = f"{FEW_ROWS} rows or more teach better"
        said.append(Problem("few_rows", f"{totals.rows} rows", hint, severity=WARNING))
    average = totals.output_words / totals.rows
    if average < SHORT_OUTPUT_WORDS:
        told = f"outputs have {average:.1f} words on average"
        hint = f"fine for short answers; for prose {SHORT_OUTPUT_WORDS} or more teach better"
        said.append(Problem("short_outputs", told, hint, severity=WARNING))
    return said
