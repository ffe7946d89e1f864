"""From a row to a canonical example: instruction, chat, completion and text form.

Law of this room: pure. Nothing of a row is lost: what the form does not know
becomes metadata under its own name. All problems of a row are found at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from google.protobuf import struct_pb2

from qlorad.v1 import datasets_pb2, messages_pb2
from services.datasets.forms import FORMS, NAMES, OPTIONAL, Form
from services.datasets.worker import chat
from services.datasets.worker.found import WARNING, Problem, clip

_EXACT = 1 << 53


def sniff(keys: Iterable[str], columns: Mapping[str, str]) -> Form | None:
    """The form whose fields are all there, under their own or their given names."""
    there = set(keys)
    for form, fields in FORMS.items():
        if all(columns.get(f, f) in there for f in fields if f not in OPTIONAL):
            return form
    return None


def unknown_form(keys: Iterable[str]) -> Problem:
    """The problem of rows that are of no known form."""
    forms = "; ".join("+".join(f for f in fields if f not in OPTIONAL) for fields in FORMS.values())
    return Problem(
        "unknown_format",
        f"the fields are {', '.join(clip(k) for k in list(keys)[:12]) or 'none'}",
        f"fields of one of the forms ({forms}), or 'columns' that say which field is which",
    )


def example_of(
    row: Mapping[str, Any], form: Form, columns: Mapping[str, str]
) -> tuple[datasets_pb2.Example, list[Problem]]:
    """The example of a row and every problem with it; with an ERROR among them the example is void."""
    rest = dict(row)
    fields = {f: rest.pop(columns.get(f, f)) for f in FORMS[form] if columns.get(f, f) in rest}
    problems: list[Problem] = []
    example = datasets_pb2.Example()
    if form == datasets_pb2.ROW_FORMAT_CHAT:
        chat.fill(fields, example.chat, rest, problems)
    else:
        texts = _texts(form, fields, columns, problems)
        if form == datasets_pb2.ROW_FORMAT_INSTRUCTION:
            _instruction(texts, example.chat)
        elif form == datasets_pb2.ROW_FORMAT_COMPLETION:
            example.completion.prompt = texts["prompt"]
            example.completion.completion = texts["completion"]
        else:
            example.completion.completion = texts["text"]
    _metadata(rest, example.metadata, problems)
    return example, problems


def _texts(
    form: Form, fields: Mapping[str, Any], columns: Mapping[str, str], problems: list[Problem]
) -> dict[str, str]:
    found = {}
    for name in FORMS[form]:
        value, column = fields.get(name), columns.get(name, name)
        if value is None and name not in OPTIONAL:
            told = "is null" if name in fields else "is missing"
            problems.append(Problem("missing_field", f"{NAMES[form]} form needs it; it {told}", "a string", column))
        elif value is not None and not isinstance(value, str):
            problems.append(Problem("wrong_type", f"is {clip(value)}", "a string", column))
        found[name] = value if isinstance(value, str) else ""
    return found


def _instruction(texts: Mapping[str, str], body: messages_pb2.Conversation) -> None:
    if texts["system"]:
        body.messages.add(role=messages_pb2.ROLE_SYSTEM).parts.add(text=texts["system"])
    user = body.messages.add(role=messages_pb2.ROLE_USER)
    # Two parts, so that an export finds instruction and input again.
    if texts["instruction"]:
        user.parts.add(text=texts["instruction"])
    if texts["input"]:
        user.parts.add(text="\n\n" + texts["input"] if texts["instruction"] else texts["input"])
    body.messages.add(role=messages_pb2.ROLE_ASSISTANT).parts.add(text=texts["output"])


def _metadata(rest: Mapping[str, Any], into: struct_pb2.Struct, problems: list[Problem]) -> None:
    if rest:
        into.update({key: _plain(value, key, problems) for key, value in rest.items()})


def _plain(value: Any, path: str, problems: list[Problem]) -> Any:
    """The value as a Struct can hold it; numbers that it would round are kept as text."""
    if isinstance(value, dict):
        return {k: _plain(v, f"{path}.{k}", problems) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v, f"{path}[{i}]", problems) for i, v in enumerate(value)]
    if isinstance(value, int) and abs(value) > _EXACT:
        problems.append(
            Problem("number_as_text", f"{clip(value)} is beyond 2^53", "it was kept as text", path, WARNING)
        )
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        problems.append(Problem("number_too_large", f"the number is beyond what a double holds ({value})", "", path))
        return 0.0
    return value
