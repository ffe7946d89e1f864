"""A row while it is read: what is left of it, and what is wrong with it.

Law of this room: a field is taken once; what nobody took is metadata.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from services.datasets.forms import NAMES, Form
from services.datasets.worker.found import WARNING, Problem, clip
from services.datasets.worker.strict_json import StrictJson


class Row:
    """One row, read field by field."""

    __slots__ = ("columns", "form", "given", "problems", "rest")

    def __init__(self, given: Mapping[str, Any], form: Form, columns: Mapping[str, str]) -> None:
        self.given = given
        self.form = form
        self.columns = columns
        self.rest: dict[str, Any] = dict(given)
        self.problems: list[Problem] = []

    def wrong(self, rule: str, told: str, hint: str, place: str) -> None:
        """Notes an error."""
        self.problems.append(Problem(rule, told, hint, place))

    def problems_of(self, place: str) -> list[Problem]:
        """What is wrong with a field so far."""
        return [p for p in self.problems if p.field == place]

    def named(self, field: str) -> str:
        """What the file calls a field."""
        return self.columns.get(field, field)

    def take(self, field: str) -> Any:
        """The value of a field; None where there is none."""
        return self.rest.pop(self.columns.get(field, field), None)

    def text(self, field: str, needed: bool = True) -> str:
        """A field that must be text."""
        column = self.columns.get(field, field)
        value = self.rest.pop(column, None)
        if type(value) is str:
            return value
        if value is not None:
            self.wrong("wrong_type", f"is {clip(value)}", "a string", column)
        elif needed:
            self.missing(column, "a string")
        return ""

    def missing(self, column: str, hint: str) -> None:
        """Notes that a field is not there."""
        told = "is null" if column in self.given else "is missing"
        self.wrong("missing_field", f"{NAMES[self.form]} form needs it; it {told}", hint, column)

    def listed(self, value: Any, place: str, hint: str = "a list") -> list[Any] | None:
        """A list, or the text of one as CSV fields hold it; None, and a problem, for all else."""
        if isinstance(value, str):
            value = self.parsed(value, place, "a JSON list")
            if value is None:
                return None
        if isinstance(value, list):
            return value
        self.wrong("wrong_type", f"is {clip(value)}", hint, place)
        return None

    def parsed(self, text: str, place: str, hint: str) -> Any:
        """The value of a text that is JSON; None, and a problem, for all else."""
        stripped = text.strip()
        try:
            value, end, problem = StrictJson().decode(stripped)
        except (ValueError, RecursionError):
            value, end, problem = None, -1, None
        if problem is not None:
            self.wrong(problem.rule, problem.message, problem.hint, place)
            return None
        if value is None or end != len(stripped):
            self.wrong("broken_json", f"is not JSON: {clip(text)}", hint, place)
            return None
        return value

    def keep(self, place: str, key: str, value: Any, quiet: bool = False) -> None:
        """Keeps a field of a message, part, call or tool that training does not see, as metadata under its place."""
        where = place + key
        if where in self.rest:
            self.wrong("twin_key", f"the row has a field {clip(where)} of its own", "rename one", where)
            return
        self.rest[where] = value
        if value is not None and not quiet:  # tables have every field in every row
            told = f"{clip(key)} is no field that training sees"
            self.problems.append(
                Problem("unknown_message_field", told, "it was kept as metadata", where, severity=WARNING)
            )
