"""From a row to a canonical example: instruction, chat, completion and text form.

Law of this room: pure. Nothing of a row is lost: what the form does not know
becomes metadata under its own name. All problems of a row are found at once.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qlorad.v1 import datasets_pb2
from services.datasets.forms import FORMS, NAMES, OPTIONAL, Form
from services.datasets.worker import chat
from services.datasets.worker.found import WARNING, Problem, clip
from services.datasets.worker.plain import Plain

_EXACT = 1 << 53


def sniff(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> tuple[Form, str]:
    """The form that most of some rows have, and the evidence; 0 where none is known."""
    found = Counter(form for row in rows if (form := form_of(row, columns)))
    if not found:
        return datasets_pb2.ROW_FORMAT_UNSPECIFIED, ""
    form, count = found.most_common(1)[0]
    fields = ", ".join(columns.get(f, f) for f in FORMS[form] if f not in OPTIONAL)
    return form, f"{count} of the first {len(rows)} have the fields {fields}"


def form_of(keys: Iterable[str], columns: Mapping[str, str]) -> Form:
    """The form whose fields are all there, under their own or their given names; 0 for none."""
    there = set(keys)
    for form, fields in FORMS.items():
        if all(columns.get(f, f) in there for f in fields if f not in OPTIONAL):
            return form
    return datasets_pb2.ROW_FORMAT_UNSPECIFIED


def of_body(example: Plain) -> Form:
    """The form that carries a canonical example's body whole."""
    if "chat" in example:
        return datasets_pb2.ROW_FORMAT_CHAT
    if "completion" in example:
        told = example["completion"].get("prompt")
        return datasets_pb2.ROW_FORMAT_COMPLETION if told else datasets_pb2.ROW_FORMAT_TEXT
    return datasets_pb2.ROW_FORMAT_PREFERENCE if "preference" in example else datasets_pb2.ROW_FORMAT_INFILL


def unknown_form(keys: Iterable[str]) -> Problem:
    """The problem of rows that are of no known form."""
    forms = "; ".join("+".join(f for f in fields if f not in OPTIONAL) for fields in FORMS.values())
    return Problem(
        "unknown_format",
        f"the fields are {', '.join(clip(k) for k in list(keys)[:12]) or 'none'}",
        f"fields of one of the forms ({forms}), or 'columns' that say which field is which",
    )


def example_of(row: Mapping[str, Any], form: Form, columns: Mapping[str, str]) -> tuple[Plain, list[Problem]]:
    """The plain example of a row and every problem with it; with an ERROR among them the example is void."""
    rest = dict(row)
    fields = {f: rest.pop(columns.get(f, f)) for f in FORMS[form] if columns.get(f, f) in rest}
    problems: list[Problem] = []
    if form == datasets_pb2.ROW_FORMAT_CHAT:
        example = {"chat": chat.conversation(fields, rest, problems)}
    else:
        texts = _texts(form, fields, columns, problems)
        if form == datasets_pb2.ROW_FORMAT_INSTRUCTION:
            example = {"chat": {"messages": _instruction(texts)}}
        elif form == datasets_pb2.ROW_FORMAT_COMPLETION:
            example = {"completion": {k: texts[k] for k in ("prompt", "completion") if texts[k]}}
        else:
            example = {"completion": {"completion": texts["text"]} if texts["text"] else {}}
    if rest:
        example["metadata"] = {key: _plain(value, key, problems) for key, value in rest.items()}
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


def _instruction(texts: Mapping[str, str]) -> list[Plain]:
    instruction, given, system = texts["instruction"], texts["input"], texts["system"]
    user: Plain = {"role": "ROLE_USER"}
    # Two parts, so that an export finds instruction and input again.
    parts = [{"text": instruction}] if instruction else []
    if given:
        parts.append({"text": "\n\n" + given if instruction else given})
    if parts:
        user["parts"] = parts
    answer: Plain = {"role": "ROLE_ASSISTANT"}
    if texts["output"]:
        answer["parts"] = [{"text": texts["output"]}]
    return [{"role": "ROLE_SYSTEM", "parts": [{"text": system}]}, user, answer] if system else [user, answer]


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
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) <= _EXACT else value
