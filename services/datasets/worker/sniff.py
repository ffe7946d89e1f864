"""Which form rows have, by their fields and what lies in them, with the evidence.

Law of this room: pure. A form's own field names win over those of ALIASES, and
the columns that a person gave win over both. Two rows that differ are two
votes; the majority is the file's form.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from qlorad.v1 import datasets_pb2
from services.datasets.forms import (
    ALIASES,
    CANONICAL,
    CHAT,
    FIELDS,
    PAPER,
    PREFERENCE,
    REQUIRED,
    SHAREGPT,
    TEXT,
    Form,
)
from services.datasets.worker.found import Problem, clip
from services.datasets.worker.plain import BODIES

_UNKNOWN = datasets_pb2.ROW_FORMAT_UNSPECIFIED
_EXAMPLE = frozenset({*BODIES, "metadata", "origin"})
_TURN = {CHAT: "role", SHAREGPT: "from"}


@dataclass(frozen=True, slots=True)
class Sniffed:
    """What was found of some rows."""

    form: Form
    """0 where none is known."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """The columns that were given, and those by which the rows name the form's fields."""
    evidence: str = ""


def sniff(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str], form: Form = _UNKNOWN) -> Sniffed:
    """The form that most of some rows have; of a form that is told only the names of its fields."""
    found: Counter[tuple[Form, int]] = Counter(one for row in rows if (one := _kind_of(row, columns, form)) is not None)
    if not found:
        return Sniffed(form, columns)
    (made, number), count = found.most_common(1)[0]
    names = dict(columns)
    if number >= 0:
        names |= {k: v for k, v in ALIASES[number][1].items() if k != v}
    told = [_told(f, names) for f in REQUIRED[made]] or ["of a qlorad.v1.Example"]
    told += [_told(f, names) for f in FIELDS[made] if f not in REQUIRED[made] and f in names]
    if made == PREFERENCE and "prompt" not in names:
        told += [f"{f} (as prompt)" for f in ("question", "conversations") if f in rows[0] and "prompt" not in rows[0]]
    evidence = f"{count} of the first {len(rows)} have the fields {', '.join(told)}"
    others = Counter(kind[0] for kind in found.elements() if kind != (made, number))
    if others:
        evidence += f"; {others.total()} seem to be of another form"
    return Sniffed(made, names, evidence)


def _told(name: str, names: Mapping[str, str]) -> str:
    return f"{names[name]} (as {name})" if names.get(name, name) != name else name


def form_of(row: Mapping[str, Any], columns: Mapping[str, str]) -> Form:
    """The form that a row has; 0 for none."""
    kind = _kind_of(row, columns, _UNKNOWN)
    return kind[0] if kind else _UNKNOWN


def _kind_of(row: Mapping[str, Any], columns: Mapping[str, str], told: Form) -> tuple[Form, int] | None:
    """The form of a row, and which of ALIASES names its fields (-1: it has the form's own names)."""
    for form, fields in REQUIRED.items():
        if told in (_UNKNOWN, form) and all(columns.get(f, f) in row for f in fields):
            if _fits(form, row, {f: columns.get(f, f) for f in fields}, bool(told)):
                return form, -1
    for number, (form, names) in enumerate(ALIASES):
        if told in (_UNKNOWN, form) and all(column in row for column in names.values()):
            if not any(f in columns for f in names) and _fits(form, row, names, bool(told)):
                return form, number
    return None


def _fits(form: Form, row: Mapping[str, Any], names: Mapping[str, str], is_told: bool) -> bool:
    """Whether what lies in the fields can be of the form."""
    if form == CANONICAL:
        return row.keys() <= _EXAMPLE and any(isinstance(row.get(body), dict) for body in BODIES)
    if form == PAPER:
        given = row[names["sections"]]
        return is_told or isinstance(given, list) or (isinstance(given, str) and given.lstrip().startswith("["))
    if form == TEXT and names["text"] != "text":
        return is_told or "role" not in row  # a message by itself is no text
    if form not in _TURN:
        return True
    column = next(iter(names.values()))
    turn = _first_turn(row[column])
    if turn is None:  # nothing to see in it; the name decides
        return column == REQUIRED[form][0]
    return _TURN[form] in turn or (column == REQUIRED[form][0] and not any(f in turn for f in _TURN.values()))


def _first_turn(value: Any) -> Mapping[str, Any] | None:
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = orjson.loads(value)
        except orjson.JSONDecodeError:
            return None
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return value[0]
    return None


def unknown_form(keys: Iterable[str]) -> Problem:
    """The problem of rows that are of no known form."""
    forms = "; ".join("+".join(fields) for fields in REQUIRED.values() if fields)
    return Problem(
        "unknown_format",
        f"the fields are {', '.join(clip(k) for k in list(keys)[:12]) or 'none'}",
        f"fields of one of the forms ({forms}), or 'columns' that say which field is which",
    )
