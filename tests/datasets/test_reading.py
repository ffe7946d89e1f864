"""The many ways in which files have one thing, and what is said of rows that have it wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest

from services.datasets.forms import CANONICAL, CHAT, COMPLETION, INFILL, INSTRUCTION, PREFERENCE, SHAREGPT, TEXT
from services.datasets.worker import forms, rules
from services.datasets.worker.found import ERROR
from services.datasets.worker.plain import Plain

U, A = "ROLE_USER", "ROLE_ASSISTANT"


def said(role: str, text: str) -> Plain:
    return {"role": role, "parts": [{"text": text}]}


def spoken(*turns: str) -> list[Plain]:
    return [said((U, A)[i % 2], t) for i, t in enumerate(turns)]


def openai(*turns: str) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(turns)]


def turn(who: str, text: str) -> dict[str, Any]:
    return {"from": who, "value": text}


def pref(prompt: list[Plain], chosen: str, rejected: str, **more: Any) -> Plain:
    answers = {"chosen": [said(A, chosen)], "rejected": [said(A, rejected)]}
    return {"preference": {"prompt": {"messages": prompt}, **answers, **more}}


@pytest.mark.parametrize(
    ("row", "form", "example"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, PREFERENCE, pref(spoken("q"), "a", "b", plain=True)),
        (
            {"system": "s", "question": "q", "chosen": "a", "rejected": "b"},
            PREFERENCE,
            pref([said("ROLE_SYSTEM", "s"), *spoken("q")], "a", "b"),
        ),
        (  # UltraFeedback: whole conversations, and the prompt besides
            {"prompt": "q", "chosen": openai("q", "a"), "rejected": openai("q", "b"), "score_chosen": 8},
            PREFERENCE,
            {**pref(spoken("q"), "a", "b"), "metadata": {"score_chosen": 8}},
        ),
        (
            {"chosen": openai("q", "w", "r", "a"), "rejected": openai("q", "w", "r", "b")},
            PREFERENCE,
            pref(spoken("q", "w", "r"), "a", "b"),
        ),
        (  # HH-RLHF: dialogues as texts
            {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
            PREFERENCE,
            pref(spoken("q"), "a", "b"),
        ),
        (  # answers without their prompt
            {"prompt": "q", "chosen": openai("", "a")[1:], "rejected": openai("", "b")[1:]},
            PREFERENCE,
            pref(spoken("q"), "a", "b"),
        ),
        (
            {"prompt": openai("q"), "chosen": openai("q", "a"), "rejected": openai("q", "b")},
            PREFERENCE,
            pref(spoken("q"), "a", "b"),
        ),
        (
            {"conversations": [turn("human", "q")], "chosen": turn("gpt", "a"), "rejected": "b"},
            PREFERENCE,
            pref(spoken("q"), "a", "b"),
        ),
        (  # a CSV field that holds JSON
            {"prompt": "q", "chosen": json.dumps(openai("q", "a")), "rejected": json.dumps(openai("q", "b"))},
            PREFERENCE,
            pref(spoken("q"), "a", "b"),
        ),
        (  # an answer that happens to be JSON stays a text
            {"prompt": "q", "chosen": '[{"a": 1}]', "rejected": "[]"},
            PREFERENCE,
            pref(spoken("q"), '[{"a": 1}]', "[]", plain=True),
        ),
        (
            {"system": "s", "conversations": [{"from": "user", "value": "q"}, {"from": "bing", "value": "a"}]},
            SHAREGPT,
            {
                "chat": {"messages": [said("ROLE_SYSTEM", "s"), *spoken("q", "a")]},
                "metadata": {"messages[2].from": "bing"},
            },
        ),
        (
            {"conversations": [{"from": "Human", "value": "q"}, {"from": "chatgpt", "value": "a"}], "tools": ""},
            SHAREGPT,
            {"chat": {"messages": spoken("q", "a")}},
        ),
        (  # the model's words and its call are one message
            {
                "conversations": [
                    {"from": "human", "value": "q"},
                    {"from": "gpt", "value": "w"},
                    {"from": "function_call", "value": {"name": "f", "arguments": '{"a":1}'}},
                    {"from": "tool", "value": "r"},
                    {"from": "assistant", "value": "a"},
                ],
                "tools": [{"name": "f", "description": "d"}],
            },
            SHAREGPT,
            {
                "chat": {
                    "messages": [
                        said(U, "q"),
                        {**said(A, "w"), "tool_calls": [{"name": "f", "arguments_json": '{"a":1}'}]},
                        said("ROLE_TOOL", "r"),
                        said(A, "a"),
                    ],
                    "tools": [{"name": "f", "description": "d"}],
                }
            },
        ),
        (  # OpenAI's functions, before there were tools
            {
                "messages": [
                    *openai("q"),
                    {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
                    {"role": "function", "name": "f", "content": "r"},
                    {"role": "assistant", "content": [{"type": "text", "text": "a", "cache": True}]},
                ],
                "functions": [{"name": "f", "parameters": {}}],
            },
            CHAT,
            {
                "chat": {
                    "messages": [
                        said(U, "q"),
                        {"role": A, "tool_calls": [{"name": "f", "arguments_json": "{}"}]},
                        {**said("ROLE_TOOL", "r"), "name": "f"},
                        said(A, "a"),
                    ],
                    "tools": [{"name": "f", "parameters_json": "{}"}],
                },
                "metadata": {"messages[3].content[0].cache": True},
            },
        ),
        (
            {"instruction": "q", "output": "a", "history": '[["x", "y"]]'},
            INSTRUCTION,
            {"chat": {"messages": spoken("x", "y", "q", "a")}},
        ),
        (  # another writer of ProtoJSON: its own names, no arguments
            {"chat": {"messages": [{"role": 2, "parts": [{"text": "q"}]}, {"role": A, "toolCalls": [{"name": "f"}]}]}},
            CANONICAL,
            {"chat": {"messages": [said(U, "q"), {"role": A, "tool_calls": [{"name": "f", "arguments_json": "{}"}]}]}},
        ),
    ],
)  # fmt: skip
def test_the_ways_in_which_files_have_it(row: dict[str, Any], form: Any, example: Plain) -> None:
    assert forms.form_of(row, {}) == form
    found, problems = forms.example_of(row, form, {})
    assert found == example
    assert not [p for p in [*problems, *rules.check(found, form)] if p.severity == ERROR]


CALLED, HUGE = "messages[1].tool_calls[0]", {"a": float("inf")}
ONE = {"chat": {"messages": spoken("q", "a")}}


@pytest.mark.parametrize(
    ("row", "form", "expected"),
    [
        ({"prompt": "q", "chosen": "a"}, PREFERENCE, [("missing_field", "rejected")]),
        ({"chosen": "a", "rejected": "b"}, PREFERENCE, [("missing_field", "prompt")]),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, PREFERENCE, [("same_answers", "rejected")]),
        ({"prompt": "q", "chosen": " ", "rejected": "a"}, PREFERENCE, [("empty_output", "chosen")]),
        ({"prompt": "", "chosen": "a", "rejected": "b"}, PREFERENCE, [("empty_turn", "prompt")]),
        ({"prompt": "q", "chosen": 3, "rejected": "b"}, PREFERENCE, [("wrong_type", "chosen")]),
        (
            {"prompt": "z", "chosen": openai("q", "a"), "rejected": openai("q", "b")},
            PREFERENCE,
            [("prompt_differs", "prompt")],
        ),
        (
            {"prompt": openai("q"), "chosen": openai("q", "a", "r"), "rejected": openai("q", "b")},
            PREFERENCE,
            [("ends_without_answer", "chosen")],
        ),
        (
            {"prompt": openai("q", "w"), "chosen": openai("", "a")[1:], "rejected": openai("", "b")[1:]},
            PREFERENCE,
            [("role_order", "chosen[0].role"), ("role_order", "rejected[0].role")],
        ),
        ({"prefix": "a", "middle": "", "suffix": "b"}, INFILL, [("empty_output", "middle")]),
        ({"prefix": None, "middle": "a", "suffix": 1}, INFILL, [("missing_field", "prefix"), ("wrong_type", "suffix")]),
        ({"conversations": []}, SHAREGPT, [("missing_field", "conversations")]),
        (
            {"conversations": [{"from": "alien", "value": 3}, "x"], "tools": "none"},
            SHAREGPT,
            [
                ("unknown_role", "conversations[0].from"),
                ("wrong_type", "conversations[0].value"),
                ("wrong_type", "conversations[1]"),
                ("broken_json", "tools"),
            ],
        ),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "f()"}]},
            SHAREGPT,
            [("broken_json", "conversations[1].value")],
        ),
        ({"instruction": "q", "output": "a", "history": [["x"]]}, INSTRUCTION, [("wrong_type", "history[0]")]),
        ({"instruction": "q", "output": "a", "history": [["x", ""]]}, INSTRUCTION, [("empty_output", "history[0][1]")]),
        ({"metadata": {"a": 1}}, CANONICAL, [("missing_field", "")]),
        ({**ONE, "more": 1}, CANONICAL, [("not_canonical", "")]),
        ({"chat": {"messages": [{"role": "user"}]}}, CANONICAL, [("not_canonical", "")]),
        (
            {"chat": {"messages": [{"parts": [{}]}]}},
            CANONICAL,
            [("unknown_role", "messages[0].role"), ("wrong_type", "messages[0].parts")],
        ),
        ({**ONE, "metadata": [1]}, CANONICAL, [("wrong_type", "metadata")]),
        (
            {"chat": {"messages": [*spoken("q"), {"role": A, "tool_calls": [{"arguments_json": "[]"}]}]}},
            CANONICAL,
            [("missing_field", f"{CALLED}.name"), ("wrong_type", f"{CALLED}.arguments_json")],
        ),
        (pref(spoken("q", "w"), "a", "b", plain=True), CANONICAL, [("wrong_type", "preference.plain")]),
        (
            {"messages": [*openai("q"), {"role": "assistant", "tool_calls": [{"name": "f", "arguments": HUGE}]}]},
            CHAT,
            [("number_too_large", f"{CALLED}.arguments")],
        ),
        (
            {"messages": [{"role": "user", "content": "q", "w": 1}, *openai("", "a")[1:]], "messages[0].w": 2},
            CHAT,
            [("twin_key", "messages[0].w")],
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_row_is_told_by_rule_and_place(
    row: dict[str, Any], form: Any, expected: list[tuple[str, str]]
) -> None:
    example, problems = forms.example_of(row, form, {})
    if not any(p.severity == ERROR for p in problems):
        problems += rules.check(example, form)
    assert [(p.rule, p.field) for p in problems] == expected


@pytest.mark.parametrize(
    ("row", "columns", "form"),
    [
        ({"messages": [], "tools": []}, {}, CHAT),
        ({"instruction": "a", "output": "b"}, {}, INSTRUCTION),
        ({"question": "a", "answer": "b"}, {"instruction": "question", "output": "answer"}, INSTRUCTION),
        ({"prompt": "a", "completion": "b", "text": "c"}, {}, COMPLETION),
        ({"text": "a"}, {}, TEXT),
        ({"body": "a"}, {"text": "body"}, TEXT),
        ({"role": "user", "content": "a"}, {}, None),
        ({"instruction": "a"}, {}, None),
        ({}, {}, None),
        ({"prompt": "a", "chosen": [], "rejected": [], "messages": []}, {}, PREFERENCE),
        ({"conversations": [{"from": "human"}]}, {}, SHAREGPT),
        ({"conversations": [{"role": "user"}]}, {}, CHAT),
        ({"messages": '[{"from": "human"}]'}, {}, SHAREGPT),
        ({"prompt": "a", "response": "b", "system": "c"}, {}, COMPLETION),
        ({"completion": {"completion": "a"}}, {}, CANONICAL),
        ({"chat": {}, "metadata": {}, "origin": {}}, {}, CANONICAL),
        ({"chat": {}, "id": 1}, {}, None),
    ],
)
def test_forms_are_sniffed_by_fields_and_what_lies_in_them(
    row: dict[str, Any], columns: dict[str, str], form: Any
) -> None:
    assert forms.sniff([row], columns).form == (form or 0) == forms.form_of(row, columns)
    if form:
        told = forms.sniff([row], columns, form)
        assert told == forms.sniff([row], columns)
