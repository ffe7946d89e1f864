"""Forms and rules: a row becomes an example that has all of it, and comes back the same; wrong rows are told why."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given

from services.common.prompt import example as canonical
from services.datasets.forms import CHAT, COMPLETION, FORMS, INSTRUCTION, TEXT
from services.datasets.losses import CannotCarry
from services.datasets.worker import forms, rules
from services.datasets.worker.found import ERROR
from services.datasets.worker.plain import Plain
from services.datasets.writing import write
from tests.datasets.examples import any_row


def made(row: dict[str, Any], form: Any, **columns: str) -> tuple[Plain, list[str]]:
    example, problems = forms.example_of(row, form, columns)
    if not any(p.severity == ERROR for p in problems):
        problems += rules.check(example, form)
    return example, [p.rule for p in problems]


def sealed(example: Plain) -> Plain:
    """The example as it comes back from the shelf; the contract's message of it says the same."""
    line = canonical.line_of(example)
    assert canonical.dumps(canonical.loads(line)) == line
    return json.loads(line)


def refused(example: Plain, form: Any) -> str:
    """The place that an export names."""
    try:
        _, losses = write(example, form)
    except CannotCarry as e:
        return e.field
    assert losses.first_grave is not None
    return losses.first_grave.place


@given(any_row)
def test_what_is_read_in_a_form_is_written_the_same(pair: tuple[Any, dict[str, Any]]) -> None:
    form, row = pair
    assert forms.form_of(row, {}) == form
    example, problems = made(row, form)
    assert not set(problems) - {"unknown_message_field"}
    assert sealed(example) == example
    assert write(example, form) == (row, [])


@given(any_row)
def test_renamed_columns_read_alike(pair: tuple[Any, dict[str, Any]]) -> None:
    form, row = pair
    columns = {name: f"c{i}" for i, name in enumerate(FORMS[form]) if name in row}
    renamed = {columns.get(k, k): v for k, v in row.items()}
    assert forms.sniff([renamed], columns).form == form
    assert made(renamed, form, **columns)[0] == made(row, form)[0]


def test_instruction_and_input_are_one_turn_in_two_parts() -> None:
    example, _ = made({"instruction": "Add.", "input": "1 2", "output": "3", "id": 7}, INSTRUCTION)
    assert example == {
        "chat": {
            "messages": [
                {"role": "ROLE_USER", "parts": [{"text": "Add."}, {"text": "\n\n1 2"}]},
                {"role": "ROLE_ASSISTANT", "parts": [{"text": "3"}]},
            ]
        },
        "metadata": {"id": 7},
    }


def test_numbers_that_a_double_would_round_are_kept_as_text() -> None:
    example, problems = made({"text": "x", "id": 2**60 + 1, "in": {"n": [-(2**60)]}}, TEXT)
    assert problems == ["number_as_text", "number_as_text"]
    assert example["metadata"]["id"] == str(2**60 + 1)
    assert made({"text": "x", "n": float("inf")}, TEXT)[1] == ["number_too_large"]


def chat(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


TOOL_CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
ASKS = {"role": "assistant", "tool_calls": [TOOL_CALL]}


@pytest.mark.parametrize(
    ("form", "row", "expected"),
    [
        (INSTRUCTION, {"instruction": "a", "output": " \n"}, ["empty_output"]),
        (INSTRUCTION, {"instruction": "", "output": "x"}, ["empty_instruction"]),
        (INSTRUCTION, {"instruction": None, "output": 3}, ["missing_field", "wrong_type"]),
        (INSTRUCTION, {"output": "x", "input": ["y"]}, ["missing_field", "wrong_type"]),
        (COMPLETION, {"prompt": "", "completion": "x"}, []),
        (COMPLETION, {"prompt": "a", "completion": ""}, ["empty_output"]),
        (COMPLETION, {"completion": "x"}, ["missing_field"]),
        (TEXT, {"text": ""}, ["empty_output"]),
        (CHAT, chat(("user", "a"), ("assistant", "b")), []),
        (CHAT, chat(("assistant", "a"), ("user", "b")), ["role_order"]),
        (CHAT, chat(("user", "a"), ("user", "b"), ("assistant", "c")), ["role_order"]),
        (CHAT, chat(("user", "a"), ("assistant", "b"), ("assistant", "c")), ["role_order"]),
        (CHAT, chat(("system", "s"), ("system", "s"), ("user", "a"), ("assistant", "b")), ["role_order"]),
        (CHAT, chat(("user", "a"), ("system", "s"), ("assistant", "b")), ["role_order"]),
        (CHAT, chat(("user", "a"), ("assistant", "b"), ("tool", "c"), ("assistant", "d")), ["role_order"]),
        (CHAT, chat(("user", "a")), ["no_assistant_turn"]),
        (CHAT, chat(("user", "a"), ("assistant", " ")), ["empty_output"]),
        (CHAT, chat(("user", ""), ("assistant", "b"), ("user", "c")), ["ends_without_answer", "empty_turn"]),
        (CHAT, chat(("human", "a"), ("gpt", "b")), ["unknown_role", "unknown_role"]),
        (CHAT, {"messages": []}, ["missing_field"]),
        (CHAT, {"messages": "not json"}, ["broken_json"]),
        (CHAT, {"messages": {"role": "user"}}, ["wrong_type"]),
        (CHAT, {"messages": ["hi", 3]}, ["wrong_type", "wrong_type"]),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, ["unsupported_content"]),
        (CHAT, {"messages": [{"role": "user", "content": 3}]}, ["wrong_type"]),
        (CHAT, {"messages": json.dumps(chat(("user", "a"), ("assistant", "b"))["messages"])}, []),
        (CHAT, {**chat(("user", "a"), ("assistant", "b")), "tools": [{"type": "w"}]}, ["wrong_type", "missing_field"]),
        (CHAT, {"messages": [{"role": "user", "content": "a"}, ASKS]}, []),
        (
            CHAT,
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    ASKS,
                    {"role": "tool", "tool_call_id": "c2", "content": "r"},
                    {"role": "assistant", "content": "b"},
                ]
            },
            ["unknown_tool_call"],
        ),
        (
            CHAT,
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "tool_calls": [{"function": {"name": "", "arguments": "[1]"}}]},
                ]
            },
            ["missing_field", "wrong_type"],
        ),
    ],
)  # fmt: skip
def test_rows_are_told_all_that_is_wrong(form: Any, row: dict[str, Any], expected: list[str]) -> None:
    assert made(row, form)[1] == expected


@pytest.mark.parametrize(
    ("row", "form", "target", "field"),
    [
        ({"prompt": "a", "completion": "b"}, COMPLETION, TEXT, "prompt"),
        ({"prompt": "a", "completion": "b"}, COMPLETION, CHAT, "completion"),
        ({"prompt": "a", "completion": "b"}, COMPLETION, INSTRUCTION, "completion"),
        (chat(("user", "a"), ("assistant", "b")), CHAT, COMPLETION, "messages"),
        (chat(("user", "a"), ("assistant", "b"), ("user", "c")), CHAT, INSTRUCTION, "messages"),
        (chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")), CHAT, COMPLETION, "messages"),
        ({"messages": [{"role": "user", "content": "a"}, ASKS]}, CHAT, INSTRUCTION, "messages[1].tool_calls"),
        ({"text": "a", "prompt": "b"}, TEXT, COMPLETION, "metadata.prompt"),
    ],
)
def test_what_a_form_cannot_carry_is_named(row: dict[str, Any], form: Any, target: Any, field: str) -> None:
    assert refused(made(row, form)[0], target) == field
