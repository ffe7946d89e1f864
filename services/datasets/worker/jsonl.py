"""JSON lines: a row each, or some hundred raw lines at a time for who reads them quickly.

Law of this room: memory is bounded by one row and one block; whatever is taken
by the row and by the batch, every line comes once and in order.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Protocol

from services.datasets.worker.found import Problem, Record, clip
from services.datasets.worker.limits import MAX_ROW_BYTES, not_utf8, too_long
from services.datasets.worker.packed import Damaged
from services.datasets.worker.strict_json import StrictJson, quick, too_deep

_BLOCK_BYTES = 1 << 17
_SPACE = " \t\r\n"
_HINT = "one JSON object a line, or a JSON array of objects"


class ReadsSome(Protocol):
    """A file, or a stretch of one, that gives what it has."""

    def read1(self, size: int, /) -> bytes: ...


class JsonLines:
    """The rows of a file of lines, as an iterator; blank lines are passed over."""

    def __init__(self, f: ReadsSome, lines_before: int = 0) -> None:
        self._blocks = _blocks(f)
        self._strict = StrictJson()
        self._number = lines_before
        """Of the last line that was taken."""
        self._lines: list[bytes | None] = []
        """Those still to be taken, the next one last."""

    def __iter__(self) -> JsonLines:
        return self

    def __next__(self) -> Record:
        while True:
            if not self._lines:
                first, lines = self.batch()
                if not lines:
                    raise StopIteration
                self._lines, self._number = lines[::-1], first - 1
            self._number += 1
            record = self.record(self._number, self._lines.pop())
            if record is not None:
                return record

    def batch(self) -> tuple[int, list[bytes | None]]:
        """The next lines and the number of the first; none at the end. None is a line above the limit."""
        try:
            lines = self._lines[::-1] or next(self._blocks, [])
        except Damaged as e:
            raise e.reached(self._number) from None
        first = self._number + 1
        self._number += len(lines)
        self._lines = []
        return first, lines

    def record(self, number: int, line: bytes | None) -> Record | None:
        """A line as a row, with every problem that it has; None for a blank one."""
        if line is None:
            return Record(number, None, too_long())
        row = quick(line)
        if row is not None:
            return Record(number, row, None)
        return _record(self._strict, number, line) if line.strip() else None


def _blocks(f: ReadsSome) -> Iterator[list[bytes | None]]:
    """Lines without their ends, some hundred together."""
    parts: list[bytes] = []
    held = 0
    while block := f.read1(_BLOCK_BYTES):
        *whole, rest = block.split(b"\n")
        if whole:
            parts.append(whole[0])
            first = _bounded(parts, held + len(whole[0]))
            yield [first, *(line if len(line) <= MAX_ROW_BYTES else None for line in whole[1:])]
            parts, held = [], 0
        held += len(rest)
        if held <= MAX_ROW_BYTES:
            parts.append(rest)
        else:
            parts = []  # too long already: only its length counts
    if held:
        yield [_bounded(parts, held)]


def _bounded(parts: list[bytes], size: int) -> bytes | None:
    return b"".join(parts) if size <= MAX_ROW_BYTES else None


def _record(strict: StrictJson, number: int, line: bytes) -> Record:
    try:
        text = line.decode().strip(_SPACE)
        value, end, problem = strict.decode(text)
    except UnicodeDecodeError as e:
        return Record(number, None, not_utf8(e))
    except RecursionError:
        return Record(number, None, too_deep())
    except ValueError as e:
        return Record(number, None, broken_json(e, _HINT))
    if problem is None and end != len(text):
        problem = Problem("broken_json", f"something follows the object at character {end}", "one JSON object a line")
    return record_of(number, value, problem)


def broken_json(error: ValueError, hint: str) -> Problem:
    """The problem of a text that is not JSON."""
    told = str(error)
    if isinstance(error, json.JSONDecodeError):
        told = f"{error.msg.removesuffix(' at')} at character {error.pos}"
    return Problem("broken_json", f"not JSON: {told}", hint)


def record_of(number: int, value: Any, problem: Problem | None) -> Record:
    """A parsed value as a record."""
    if problem is None and isinstance(value, dict):
        return Record(number, value, None)
    problem = problem or Problem("not_an_object", f"the row is {clip(value)}", "a JSON object with named fields")
    return Record(number, None, problem, value)
