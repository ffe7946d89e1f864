"""What reading a file can meet: a row, or a named problem.

Law of this room: pure. Every problem has a stable rule name, says what was
found, and what to do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from qlorad.v1 import datasets_pb2

INFO = datasets_pb2.SEVERITY_INFO
WARNING = datasets_pb2.SEVERITY_WARNING
ERROR = datasets_pb2.SEVERITY_ERROR


@dataclass(frozen=True, slots=True)
class Problem:
    """Something seen in a row, or in a file as a whole."""

    rule: str
    message: str
    hint: str
    field: str = ""
    severity: datasets_pb2.Severity.ValueType = ERROR
    repair: str = ""
    """The repair that mends it, where there is one."""

    def at(self, file: str, line: int, row: int = 0) -> datasets_pb2.Finding:
        """The problem as a finding of a place; line and row 0 = the whole file."""
        hint = self.hint if not self.repair else f"{self.hint}{'; ' * bool(self.hint)}the repair {self.repair} does it"
        return datasets_pb2.Finding(
            file=file,
            line=line,
            row=row,
            field=self.field,
            rule=self.rule,
            severity=self.severity,
            message=self.message,
            hint=hint,
        )


class Record(NamedTuple):
    """One row as its file gave it, or why it could not be read. A tuple: a million of them are made."""

    line: int
    row: dict[str, Any] | None
    problem: Problem | None = None
    spoiled: Any = None
    """The value, where it could be parsed and a problem stands against it all the same."""
    spans: tuple[dict[str, Any], ...] = ()
    """Of an item of a document: where it stands, as plain qlorad.v1.DocumentSpan."""


@dataclass(eq=False)
class Unreadable(Exception):
    """A file that cannot be read on; what came before it is no dataset either.

    Not frozen: Python itself sets the traceback on an exception.
    """

    problem: Problem
    line: int = 0

    def __str__(self) -> str:
        return self.problem.message


def clip(value: object, limit: int = 60) -> str:
    """A value as a finding shows it: quoted and cut."""
    text = repr(value if not isinstance(value, str) else value[: limit + 1])
    return text if len(text) <= limit else text[: limit - 1] + "…"
