"""From every form to every other: nothing is lost, or exactly what the losses say."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings

from services.datasets.forms import (
    CANONICAL,
    CHAT,
    COMPLETION,
    FORMS,
    INSTRUCTION,
    NAMES,
    SHAREGPT,
    TEXT,
)
from services.datasets.losses import CannotCarry, Losses
from services.datasets.worker import forms, rules
from services.datasets.worker.found import ERROR
from services.datasets.worker.plain import Plain, conversations, text_of
from services.datasets.writing import write
from tests.contract.formats import EXAMPLES, PAGE, page, table
from tests.datasets.examples import MISLEADING, ROWS

TALKS = (CHAT, SHAREGPT, INSTRUCTION)


def read(row: dict[str, Any], form: Any) -> Plain:
    """The example of a row without errors."""
    example, problems = forms.example_of(row, form, {})
    assert not [p for p in problems if p.severity == ERROR], problems
    return example


def left(example: Plain, form: Any, losses: Losses) -> Plain:
    """What is left of an example in a form after the losses: told here once more, in other words."""
    lost = {loss.field for loss in losses}
    made = copy.deepcopy(example)
    if form != CANONICAL:
        made.pop("origin", None)
    metadata = {k: v for k, v in made.pop("metadata", {}).items() if f"metadata.{k}" not in lost}
    lost -= {f"metadata.{k}" for k in example.get("metadata", {})}
    if "rejected" in lost:
        told = made.pop("preference")
        asked = told.get("prompt", {})
        made["chat"] = {**asked, "messages": asked["messages"] + told["chosen"]}
    if "plain" in lost and "completion" in made:
        pair = made.pop("completion")
        made["chat"] = {"messages": [said("ROLE_USER", pair["prompt"]), said("ROLE_ASSISTANT", pair["completion"])]}
    if "gap" in lost:
        gap = made.pop("infill")
        made["completion"] = {
            "prompt": gap.get("prefix", ""),
            "completion": gap.get("middle", "") + gap.get("suffix", ""),
        }
    if "tools" in lost:
        next(c for c in (made.get("chat"), made.get("preference", {}).get("prompt")) if c)["tools"] = None
    for _, messages in conversations(made):
        for message in messages:
            for name in ("tool_calls", "name", "tool_call_id"):
                if name in lost:
                    message.pop(name, None)
    if form in (COMPLETION, TEXT) and "chat" in made:
        made["completion"] = dict(
            zip(("prompt", "completion"), map(text_of, made.pop("chat")["messages"]), strict=True)
        )
    if form == TEXT:
        pair = made["completion"]
        made["completion"] = {"completion": pair.get("prompt", "") + pair["completion"]}
    return tidy({**made, "metadata": metadata}, "parts" in lost)


def said(role: str, text: str) -> Plain:
    return {"role": role, "parts": [{"text": text}]}


def tidy(value: Plain, is_joined: bool) -> Plain:
    """Without empty fields, and perhaps with each message's text in one."""
    made = copy.deepcopy(value)
    for _, messages in conversations(made):
        for message in messages:
            if is_joined and "parts" in message:
                message["parts"] = [{"text": text_of(message)}] if text_of(message) else []
            for name in [n for n, v in message.items() if v == []]:
                del message[name]
    for body in ("chat", "completion", "infill"):
        if body in made:
            made[body] = {k: v for k, v in made[body].items() if v}
    asked = made.get("preference", {}).get("prompt", {})
    if asked.get("tools", 0) is None:
        del asked["tools"]
    return {k: v for k, v in made.items() if v or k != "metadata"}


def goes(example: Plain, form: Any) -> str:
    """Writes the example, reads it again and compares; how it went."""
    before = copy.deepcopy(example)
    try:
        row, losses = write(example, form)
    except CannotCarry as e:
        assert e.field and e.why
        return "refused"
    assert example == before
    again, problems = forms.example_of(json.loads(json.dumps(row, allow_nan=False)), form, {})
    problems += rules.check(again, form)
    assert not [p for p in problems if p.severity == ERROR], problems
    joined = any(loss.field == "parts" for loss in losses)
    assert tidy(again, joined) == left(example, form, losses)
    if not losses:
        assert again == {k: v for k, v in example.items() if k != "origin" or form == CANONICAL}
    return "lost" if losses.first_grave else "whole"


def every_pair(form: Any, row: dict[str, Any], more: dict[str, Any]) -> None:
    if form != CANONICAL:
        own = {k for k in more if k in FORMS[form]}
        row = {**{k: v for k, v in more.items() if k not in own}, **row}
    if any(p.rule == "twin_key" for p in forms.example_of(row, form, {})[1]):
        return  # refused by name: a field of the row and one of a message want the same place
    example = read(row, form)
    assert goes(example, form) == "whole" and goes(example, CANONICAL) == "whole"
    results = {target: goes(example, target) for target in FORMS}
    if "chat" in example:
        assert "refused" not in (results[CHAT], results[SHAREGPT])
        if not any(k in FORMS[CHAT] + FORMS[SHAREGPT] for k in example.get("metadata", {})):
            assert results[CHAT] == results[SHAREGPT] == "whole"  # tools and calls too
    else:
        assert results[INSTRUCTION] != "whole"


@pytest.mark.parametrize("form", list(ROWS), ids=NAMES.get)
def test_every_form_goes_into_every_other_and_back(form: Any) -> None:
    @settings(max_examples=125)
    @given(ROWS[form], MISLEADING)
    def run(row: dict[str, Any], more: dict[str, Any]) -> None:
        every_pair(form, row, more)

    run()


@pytest.mark.slow
@pytest.mark.parametrize("form", list(ROWS), ids=NAMES.get)
def test_a_thousand_of_every_form_go_into_every_other(form: Any) -> None:
    @settings(max_examples=1000)
    @given(ROWS[form], MISLEADING)
    def run(row: dict[str, Any], more: dict[str, Any]) -> None:
        every_pair(form, row, more)

    run()


def test_the_page_tells_what_the_code_does() -> None:
    assert page(PAGE.read_text()) == PAGE.read_text(), "run: python -m tests.contract.formats"
    assert len(EXAMPLES) == table().count("\n") - 1 == 15
    for example in EXAMPLES.values():
        assert read(example, CANONICAL) == example
        for form in FORMS:
            goes(example, form)
