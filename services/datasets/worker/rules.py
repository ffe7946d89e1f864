"""What an example must be to be trained on, and a dataset to be worth it.

Law of this room: pure; one function a rule. A rule never mends, it tells.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qlorad.v1 import datasets_pb2
from services.datasets.forms import Form
from services.datasets.worker.found import WARNING, Problem
from services.datasets.worker.plain import Plain, text_of

FEW_ROWS = 500
SHORT_OUTPUT_WORDS = 50

_SYSTEM, _USER, _ASSISTANT, _TOOL = "ROLE_SYSTEM", "ROLE_USER", "ROLE_ASSISTANT", "ROLE_TOOL"
_SPOKEN = {_SYSTEM: "system", _USER: "user", _ASSISTANT: "assistant", _TOOL: "tool"}
_BEGIN = ""
_MAY_FOLLOW = {
    _BEGIN: (_SYSTEM, _USER),
    _SYSTEM: (_USER,),
    _USER: (_ASSISTANT,),
    _ASSISTANT: (_USER, _TOOL),
    _TOOL: (_TOOL, _ASSISTANT),
}


def check(example: Plain, form: Form) -> list[Problem]:
    """Every rule that an example breaks; the form says how its fields were named."""
    if "chat" in example:
        messages = example["chat"].get("messages", ())
        if form != datasets_pb2.ROW_FORMAT_INSTRUCTION:
            return [*_order(messages), *_turns(messages)]
        # One question, one answer: most rows of the world, and most of them are fine.
        question, answer = text_of(messages[-2]), text_of(messages[-1])
        if question and answer and not question.isspace() and not answer.isspace():
            return []
        return [*_prompt(question), *_output(answer, "output")]
    if "completion" in example:
        field = "text" if form == datasets_pb2.ROW_FORMAT_TEXT else "completion"
        return list(_output(example["completion"].get("completion", ""), field))
    return []


def _output(text: str, field: str) -> Iterator[Problem]:
    if not text.strip():
        yield Problem("empty_output", "there is nothing to learn", "write the output, or leave the row out", field)


def _prompt(question: str) -> Iterator[Problem]:
    if not question.strip():
        hint = "write the instruction, or use text form for plain text"
        yield Problem("empty_instruction", "instruction and input are empty", hint, "instruction")


def _order(messages: Sequence[Plain]) -> Iterator[Problem]:
    before = _BEGIN
    for i, message in enumerate(messages):
        where = f"messages[{i}].role"
        role = message.get("role", "")
        if not role:
            return
        if role not in _MAY_FOLLOW[before]:
            told = f"{_SPOKEN[role]} " + (f"follows {_SPOKEN[before]}" if before else "begins")
            may = " or ".join(_SPOKEN[r] for r in _MAY_FOLLOW[before])
            yield Problem("role_order", told, f"here only {may}; join turns of one speaker", where)
            return
        if role == _TOOL and before == _ASSISTANT and not messages[i - 1].get("tool_calls"):
            hint = "give the assistant's turn its tool_calls"
            yield Problem("role_order", "a tool answers a turn that called none", hint, where)
            return
        before = role
    if not any(m.get("role") == _ASSISTANT for m in messages):
        hint = "add the answer that is to be learned"
        yield Problem("no_assistant_turn", "no turn of the assistant, so nothing to learn", hint, "messages")
    elif before != _ASSISTANT:
        told = f"ends with a turn of {_SPOKEN[before]}, which is not trained"
        yield Problem("ends_without_answer", told, "add the answer, or cut the last turn", "messages", WARNING)


def _turns(messages: Sequence[Plain]) -> Iterator[Problem]:
    called: set[str] = set()
    for i, message in enumerate(messages):
        role, calls = message.get("role", ""), message.get("tool_calls", ())
        answered = message.get("tool_call_id", "")
        if role == _ASSISTANT:
            if not calls:
                yield from _output(text_of(message), f"messages[{i}].content")
            called = {call["id"] for call in calls if call.get("id")}
        elif role == _USER and not text_of(message).strip():
            yield Problem("empty_turn", "the user says nothing", "write the turn", f"messages[{i}].content", WARNING)
        elif role == _TOOL and answered and called and answered not in called:
            hint = f"one of {', '.join(sorted(called))}"
            told = f"answers {answered!r}, which no call has"
            yield Problem("unknown_tool_call", told, hint, f"messages[{i}].tool_call_id")
        if calls and role != _ASSISTANT:
            hint = "only the assistant calls tools"
            yield Problem("role_order", "tool_calls in another's turn", hint, f"messages[{i}].tool_calls")


def check_all(rows: int, skipped: int, output_words: int) -> list[Problem]:
    """What is to be said of the dataset as a whole."""
    if rows == 0:
        told = f"no row is left ({skipped} with errors)" if skipped else "there is no row"
        return [Problem("no_rows", told, "send rows that pass")]
    said = []
    if rows < FEW_ROWS:
        hint = f"{FEW_ROWS} rows or more teach better"
        said.append(Problem("few_rows", f"{rows} rows", hint, severity=WARNING))
    average = output_words / rows
    if average < SHORT_OUTPUT_WORDS:
        told = f"outputs have {average:.1f} words on average"
        hint = f"fine for short answers; for prose {SHORT_OUTPUT_WORDS} or more teach better"
        said.append(Problem("short_outputs", told, hint, severity=WARNING))
    return said
