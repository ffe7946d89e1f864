"""Findings on their way to the shelf: every one on disk, the first errors and the counts in memory.

Law of this room: the sealed file is in order of file and line, whatever the
order in which things were found.
"""

from __future__ import annotations

import heapq
import pathlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import orjson

from qlorad.v1 import datasets_pb2
from services.datasets.worker.found import ERROR, Problem

SHOWN = 20

Noted = tuple[int, int, int, str, int, str, str, str, str]
"""File number, line, row, and the problem: rule, severity, field, message, hint, repair."""


@dataclass(slots=True)
class Tally:
    """What is known of findings without reading them again."""

    errors: list[Noted] = field(default_factory=list)
    """The first ones."""
    counts: Counter[tuple[str, int]] = field(default_factory=Counter)
    """By rule and severity."""

    @property
    def error_count(self) -> int:
        return sum(n for (_, severity), n in self.counts.items() if severity == ERROR)


class Notes:
    """Findings of one stretch of rows, being written in order."""

    def __init__(self, path: pathlib.Path) -> None:
        self._file = path.open("wb")
        self.tally = Tally()

    def add(self, problem: Problem, file: int, line: int, row: int) -> None:
        """Writes a finding down."""
        self.tally.counts[problem.rule, problem.severity] += 1
        p = problem
        noted = (file, line, row, p.rule, int(p.severity), p.field, p.message, p.hint, p.repair)
        if problem.severity == ERROR and len(self.tally.errors) < SHOWN:
            self.tally.errors.append(noted)
        self._file.write(orjson.dumps(noted) + b"\n")

    def close(self) -> None:
        """Ends the file."""
        self._file.close()


def read(path: pathlib.Path, rows_before: int = 0) -> Iterator[Noted]:
    """Findings of a stretch, in order; rows are numbered from its beginning."""
    with path.open("rb") as f:
        for line in f:
            file, at, row, *rest = orjson.loads(line)
            yield (file, at, row + rows_before if row else 0, *rest)


def finding(noted: Noted, names: Sequence[str]) -> datasets_pb2.Finding:
    """A finding as the contract tells it. File number -1 = no file."""
    file, line, row, rule, severity, field, message, hint, repair = noted
    problem = Problem(rule, message, hint, field, datasets_pb2.Severity.ValueType(severity), repair)
    return problem.at(names[file] if file >= 0 else "", line, row)


def write(path: pathlib.Path, names: Sequence[str], streams: Iterable[Iterable[Noted]]) -> None:
    """The sealed file, made of streams that are each in order of file and line."""
    severities: dict[int, str] = {v: n for n, v in datasets_pb2.Severity.items()}
    with path.open("wb", buffering=1 << 18) as out:
        for file, line, row, rule, severity, field, message, hint, repair in heapq.merge(
            *streams, key=lambda n: (n[0], n[1])
        ):
            if repair:
                hint = f"{hint}{'; ' * bool(hint)}the repair {repair} does it"
            told = {
                "file": names[file] if file >= 0 else "",
                "line": str(line) if line else "",
                "row": str(row) if row else "",
                "field": field,
                "rule": rule,
                "severity": severities[severity],
                "message": message,
                "hint": hint,
            }
            out.write(orjson.dumps({k: v for k, v in told.items() if v}) + b"\n")
