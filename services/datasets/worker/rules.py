"""What an example must be to be trained on, and a dataset to be worth it.

Law of this room: pure; one function a rule. A rule never mends, it tells.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qlorad.v1 import datasets_pb2
from services.datasets import repairs
from services.datasets.forms import INSTRUCTION, TEXT, Form
from services.datasets.worker.found import ERROR, WARNING, Problem
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
        if form != INSTRUCTION:
            return [*order(messages), *_turns(messages)]
        # One question, one answer: most rows of the world, and most of them are fine.
        question, answer = text_of(messages[-2]), text_of(messages[-1])
        if question and answer and not question.isspace() and not answer.isspace() and len(messages) < 4:
            return []
        return [*_prompt(question), *_output(answer, "output"), *_history(messages)]
    if "completion" in example:
        field = "text" if form == TEXT else "completion"
        return list(_output(example["completion"].get("completion", ""), field))
    if "infill" in example:
        return list(_output(example["infill"].get("middle", ""), "middle"))
    return list(dict.fromkeys(_preference(example["preference"])))


def _history(messages: Sequence[Plain]) -> Iterator[Problem]:
    begin = 1 if messages[0].get("role") == _SYSTEM else 0
    for i, message in enumerate(messages[begin:-2]):
        if i % 2:
            yield from _output(text_of(message), f"history[{i // 2}][1]")
        elif not text_of(message).strip():
            yield Problem("empty_turn", "the user says nothing", "write the turn", f"history[{i // 2}][0]", WARNING)


def _preference(told: Plain) -> Iterator[Problem]:
    chosen, rejected = list(told.get("chosen", ())), list(told.get("rejected", ()))
    prompt = list(told.get("prompt", {}).get("messages", ()))
    for field, answer in (("chosen", chosen), ("rejected", rejected)):
        if told.get("plain"):
            yield from _output(text_of(answer[0]), field)
        elif not answer:
            yield Problem("empty_output", "there is no answer", "at least one turn of the assistant", field)
        else:
            turns = prompt + answer
            places = [f"prompt[{i}]" for i in range(len(prompt))] + [f"{field}[{i}]" for i in range(len(answer))]
            yield from order(turns, places, field, ERROR)
            yield from _turns(turns, places)
    if not prompt:
        yield Problem("empty_instruction", "there is no prompt", "what both answers answer", "prompt")
    elif told.get("plain") and not text_of(prompt[0]).strip():
        yield Problem("empty_turn", "the prompt is empty", "write the prompt", "prompt", WARNING)
    if chosen and [_without_cuts(m) for m in chosen] == [_without_cuts(m) for m in rejected]:
        hint = "leave the row out: there is nothing to prefer"
        yield Problem("same_answers", "chosen and rejected are equal", hint, "rejected")


def _without_cuts(message: Plain) -> Plain:
    return {**message, "parts": text_of(message)}


def _output(text: str, field: str) -> Iterator[Problem]:
    if not text.strip():
        yield Problem("empty_output", "there is nothing to learn", "write the output, or leave the row out", field)


def _prompt(question: str) -> Iterator[Problem]:
    if not question.strip():
        hint = "write the instruction, or use text form for plain text"
        yield Problem("empty_instruction", "instruction and input are empty", hint, "instruction")


def order(
    messages: Sequence[Plain],
    places: Sequence[str] = (),
    whole: str = "messages",
    unanswered: datasets_pb2.Severity.ValueType = WARNING,
) -> Iterator[Problem]:
    """Who may follow whom; `places` names each message where that is not messages[i], `whole` all of them."""
    before = _BEGIN
    for i, message in enumerate(messages):
        role = message.get("role", "")
        if not role:
            return
        if role not in _MAY_FOLLOW[before]:
            told = f"{_SPOKEN[role]} " + (f"follows {_SPOKEN[before]}" if before else "begins")
            hint = f"here only {' or '.join(_SPOKEN[r] for r in _MAY_FOLLOW[before])}"
            joins = whole == "messages" and can_join(messages[i - 1] if i else {}, message)
            repair = repairs.JOIN_TURNS if joins else ""
            yield Problem("role_order", told, hint, f"{_at(i, places)}.role", repair=repair)
            return
        if role == _TOOL and before == _ASSISTANT and not messages[i - 1].get("tool_calls"):
            hint = "give the assistant's turn its tool_calls"
            yield Problem("role_order", "a tool answers a turn that called none", hint, f"{_at(i, places)}.role")
            return
        before = role
    if not any(m.get("role") == _ASSISTANT for m in messages):
        hint = "add the answer that is to be learned"
        yield Problem("no_assistant_turn", "no turn of the assistant, so nothing to learn", hint, whole)
    elif before != _ASSISTANT:
        told = f"ends with a turn of {_SPOKEN[before]}, which is not trained"
        repair = repairs.TRAILING_TURN if whole == "messages" and before == _USER else ""
        yield Problem("ends_without_answer", told, "add the answer, or cut the last turn", whole, unanswered, repair)


def can_join(before: Plain, message: Plain) -> bool:
    """Whether two turns are of one speaker and nothing but text, so that they can be one."""
    role = message.get("role")
    is_text = not before.get("tool_calls") and not message.get("tool_calls")
    return role in (_USER, _ASSISTANT) and role == before.get("role") and is_text and _name(before) == _name(message)


def _name(message: Plain) -> Plain:
    return {k: v for k, v in message.items() if k not in ("role", "parts")}


def _at(i: int, places: Sequence[str]) -> str:
    return places[i] if places else f"messages[{i}]"


def _turns(messages: Sequence[Plain], places: Sequence[str] = ()) -> Iterator[Problem]:
    called: set[str] = set()
    for i, message in enumerate(messages):
        role, calls = message.get("role", ""), message.get("tool_calls", ())
        answered = message.get("tool_call_id", "")
        if role == _ASSISTANT:
            if not calls and not text_of(message).strip():
                yield from _output("", f"{_at(i, places)}.content")
            called = {call["id"] for call in calls if call.get("id")} if calls else set()
        elif role == _USER and not text_of(message).strip():
            repair = "" if places else repairs.EMPTY_TURNS
            told, place = "the user says nothing", f"{_at(i, places)}.content"
            yield Problem("empty_turn", told, "write the turn", place, WARNING, repair)
        elif role == _TOOL and answered and called and answered not in called:
            hint = f"one of {', '.join(sorted(called))}"
            told = f"answers {answered!r}, which no call has"
            yield Problem("unknown_tool_call", told, hint, f"{_at(i, places)}.tool_call_id")
        if calls and role != _ASSISTANT:
            hint = "only the assistant calls tools"
            yield Problem("role_order", "tool_calls in another's turn", hint, f"{_at(i, places)}.tool_calls")


def check_all(rows: int, skipped: int, output_words: int, below: int = 0) -> list[Problem]:
    """What is to be said of the dataset as a whole."""
    if rows == 0:
        left = [f"{skipped} with errors"] * bool(skipped) + [f"{below} papers below min_score"] * bool(below)
        told = f"no row is left ({', '.join(left)})" if left else "there is no row"
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
