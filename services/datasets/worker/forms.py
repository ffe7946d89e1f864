"""From a row to a plain example, in every form.

Law of this room: pure. Nothing of a row is lost: what the form does not know
becomes metadata under its own name. All problems of a row are found at once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from services.datasets.forms import (
    CANONICAL,
    CHAT,
    COMPLETION,
    FORMS,
    INFILL,
    INSTRUCTION,
    NAMES,
    PREFERENCE,
    SHAREGPT,
    TEXT,
    Form,
)
from services.datasets.worker import canonical, chat, preference, sharegpt
from services.datasets.worker.found import WARNING, Problem, clip
from services.datasets.worker.plain import Plain
from services.datasets.worker.row import Row
from services.datasets.worker.sniff import Sniffed, form_of, sniff, unknown_form

__all__ = ["Sniffed", "example_of", "form_of", "of_body", "sniff", "unknown_form"]

_EXACT = 1 << 53


def of_body(example: Plain) -> Form:
    """The form that carries a canonical example's body whole."""
    if "chat" in example:
        return CHAT
    if "completion" in example:
        return COMPLETION if example["completion"].get("prompt") else TEXT
    return PREFERENCE if "preference" in example else INFILL


def example_of(given: Mapping[str, Any], form: Form, columns: Mapping[str, str]) -> tuple[Plain, list[Problem]]:
    """The plain example of a row and every problem with it; with an ERROR among them the example is void."""
    row = Row(given, form, columns)
    example = _READ[form](row)
    problems = row.problems
    if row.rest:
        example["metadata"] = plain_metadata(row.rest, problems)
    if problems:
        _seems(row)
    return example, problems


def plain_metadata(given: Mapping[str, Any], problems: list[Problem]) -> dict[str, Any]:
    """Fields of a row as metadata can hold them."""
    return {key: _plain(value, key, problems) for key, value in given.items()}


def _instruction(row: Row) -> Plain:
    instruction, output = row.text("instruction"), row.text("output")
    given, system = row.text("input", needed=False), row.text("system", needed=False)
    user: Plain = {"role": "ROLE_USER"}
    # Two parts, so that an export finds instruction and input again.
    parts = [{"text": instruction}] if instruction else []
    if given:
        parts.append({"text": "\n\n" + given if instruction else given})
    if parts:
        user["parts"] = parts
    answer: Plain = {"role": "ROLE_ASSISTANT"}
    if output:
        answer["parts"] = [{"text": output}]
    messages = [user, answer]
    before = row.take("history")
    if before:
        messages[:0] = _history(before, row)
    if system:
        messages.insert(0, {"role": "ROLE_SYSTEM", "parts": [{"text": system}]})
    return {"chat": {"messages": messages}}


def _history(value: Any, row: Row) -> list[Plain]:
    column = row.named("history")
    hint = "a list of [question, answer]"
    made: list[Plain] = []
    for i, pair in enumerate(row.listed(value, column, hint) or ()):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(t, str) for t in pair):
            row.wrong("wrong_type", f"is {clip(pair)}", "[question, answer], both text", f"{column}[{i}]")
            continue
        for role, text in zip(("ROLE_USER", "ROLE_ASSISTANT"), pair, strict=True):
            made.append({"role": role, "parts": [{"text": text}]} if text else {"role": role})
    return made


def _completion(row: Row) -> Plain:
    prompt, completion = row.text("prompt"), row.text("completion")
    body = {"prompt": prompt} if prompt else {}
    if completion:
        body["completion"] = completion
    return {"completion": body}


def _text(row: Row) -> Plain:
    text = row.text("text")
    return {"completion": {"completion": text} if text else {}}


def _infill(row: Row) -> Plain:
    return {"infill": {name: text for name in FORMS[INFILL] if (text := row.text(name))}}


def _canonical(row: Row) -> Plain:
    metadata = row.given.get("metadata")
    return canonical.example(row, _plain(metadata, "metadata", row.problems))


_READ: Mapping[Form, Callable[[Row], Plain]] = {
    INSTRUCTION: _instruction,
    CHAT: lambda row: {"chat": chat.conversation(row)},
    COMPLETION: _completion,
    TEXT: _text,
    SHAREGPT: lambda row: {"chat": sharegpt.conversation(row)},
    PREFERENCE: lambda row: {"preference": preference.preference(row)},
    INFILL: _infill,
    CANONICAL: _canonical,
}


def _seems(row: Row) -> None:
    """Where fields are missing, says of which other form the row seems to be."""
    for i, problem in enumerate(row.problems):
        if problem.rule in ("missing_field", "unknown_role", "not_canonical"):
            form = form_of(row.given, {})
            if form and form != row.form:
                told = f"{problem.message}; the row seems to be of the {NAMES[form]} form"
                row.problems[i] = dataclasses.replace(problem, message=told)
            return


def _plain(value: Any, path: str, problems: list[Problem]) -> Any:
    """The value as a Struct can hold it; numbers that it would round are kept as text."""
    if type(value) is str:
        return value
    if isinstance(value, dict):
        return {k: _plain(v, f"{path}.{k}", problems) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v, f"{path}[{i}]", problems) for i, v in enumerate(value)]
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > _EXACT:
        problems.append(
            Problem("number_as_text", f"{clip(value)} is beyond 2^53", "it was kept as text", path, WARNING)
        )
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        problems.append(Problem("number_too_large", f"the number is beyond what a double holds ({value})", "", path))
        return 0.0
    is_whole = isinstance(value, float) and value.is_integer() and abs(value) <= _EXACT
    return int(value) if is_whole and (value or math.copysign(1.0, value) > 0) else value  # -0.0 stays what it is
