"""Rows of one file, one after the other: read, mended, stepped through, judged, spooled.

Law of this room: a row is either spooled or counted, and every problem of it is
noted. Nothing here is kept of rows gone by but counts.
"""

from __future__ import annotations

import itertools
import pathlib
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from services.common.prompt import example as canonical
from services.datasets.forms import PAPER, Form
from services.datasets.worker import fast, forms, glance, papers, rules
from services.datasets.worker.findings import Notes
from services.datasets.worker.found import ERROR, Problem, Record
from services.datasets.worker.jsonl import JsonLines
from services.datasets.worker.limits import MAX_ROW_BYTES, too_long
from services.datasets.worker.plain import Plain, body_of, weigh
from services.datasets.worker.repairs import Repairs
from services.datasets.worker.spool import Segment
from services.datasets.worker.steps import Pipeline, StepFailed

ENOUGH_ERRORS = 1000
_LANGUAGE = "language"
_METADATA = re.compile(r"metadata\.(.+)", re.DOTALL)


@dataclass(slots=True)
class Counts:
    """What has been counted so far."""

    records: int = 0
    skipped: int = 0
    """Left out because of an error."""
    stepped_out: int = 0
    """Left out by a step."""
    below_score: int = 0
    """Papers left out because of their score."""
    columns_met: set[str] = field(default_factory=set)


def notes_path(scratch: pathlib.Path, segment: int) -> pathlib.Path:
    """Where the notes of a segment lie."""
    return scratch / f"{segment:06d}.notes"


@dataclass(frozen=True, slots=True)
class Place:
    """Which file is read, and what its rows are."""

    file: int
    name: str
    side: int
    form: Form
    columns: Mapping[str, str]
    is_ours: bool = False
    """Rows of a sealed dataset: plain examples already."""


class Parser:
    """Takes records, gives spooled rows and notes."""

    def __init__(
        self,
        stratify_by: str,
        repairs: Repairs,
        pipeline: Pipeline,
        languages: Callable[[Plain], str],
        stop_at_errors: bool,
        min_score: float | None = None,
    ) -> None:
        self.counts = Counts()
        self._min_score = min_score
        self.repairs = repairs
        self.pipeline = pipeline
        self._stratify_by = stratify_by
        self._languages = languages
        self._stop = stop_at_errors

    def run(
        self, place: Place, first: Sequence[Record], rest: Iterable[Record], segment: Segment, notes: Notes
    ) -> Iterator[None]:
        """Spools every record. Yields now and then, for whoever tells progress."""
        row = 0
        read = fast.READERS.get(place.form) if self._is_plain(place) else None
        if read is not None and isinstance(rest, JsonLines):
            for row, record in enumerate(first, 1):
                self._row(place, record, row, segment, notes)
            while (batch := rest.batch())[1]:
                row = self._batch(read, place, rest, batch, row, segment, notes)
                yield
                if self._is_enough(notes):
                    return
            return
        for row, record in enumerate(itertools.chain(first, rest), 1):
            self._row(place, record, row, segment, notes)
            if not row & 0xFF:
                yield
                if self._is_enough(notes):
                    return

    def _is_plain(self, place: Place) -> bool:
        """Whether a row is only read and judged."""
        is_changed = self.pipeline or self.repairs.names or self._stratify_by
        return not (is_changed or place.columns or place.is_ours)

    def _is_enough(self, notes: Notes) -> bool:
        return self._stop and notes.tally.error_count >= ENOUGH_ERRORS

    def _batch(
        self,
        read: fast.Read,
        place: Place,
        lines: JsonLines,
        batch: tuple[int, list[bytes | None]],
        row: int,
        segment: Segment,
        notes: Notes,
    ) -> int:
        """Spools some lines: runs of common ones together, the others one by one. The number of the last row."""
        number, raw = batch
        found = fast.read(read, place.name, number, raw)
        begin = 0
        for at, quick in enumerate(found):
            if quick is not None:
                continue
            row = self._run(found[begin:at], place, number + begin, row, segment)
            begin = at + 1
            record = lines.record(number + at, raw[at])
            if record is not None:
                row += 1
                self._row(place, record, row, segment, notes)
        return self._run(found[begin:], place, number + begin, row, segment)

    def _run(self, rows: Sequence[fast.Quick | None], place: Place, line: int, row: int, segment: Segment) -> int:
        if rows:
            segment.add_all(rows, line, row + 1, place.file, place.side, place.form)
            self.counts.records += len(rows)
        return row + len(rows)

    def _row(self, place: Place, record: Record, row: int, segment: Segment, notes: Notes) -> None:
        self.counts.records += 1
        at, data, problem = record.line, record.row, record.problem
        if problem is not None:
            data = self.repairs.mend_value(record.spoiled, problem)
            if data is None:
                self._leave_out([problem], place, at, row, notes)
                return
        assert data is not None
        if place.columns:
            self.counts.columns_met.update(c for c in place.columns.values() if c in data)
        problems: list[Problem] = []
        if place.form == PAPER:
            self._paper(place, data, record, row, segment, notes)
            return
        if place.is_ours:
            example = data
        else:
            if self.repairs.names:
                data = self.repairs.mend_row(data, place.form, place.columns)
            example, problems = forms.example_of(data, place.form, place.columns)
        self._example(place, example, problems, record, row, segment, notes)

    def _paper(
        self, place: Place, data: Mapping[str, Any], record: Record, row: int, segment: Segment, notes: Notes
    ) -> None:
        """Several examples of one row, which is left out as a whole or not at all where it is read."""
        at = record.line
        made = papers.read(data, place.columns, self._min_score)
        if any(p.severity == ERROR for p in made.problems):
            self._leave_out(made.problems, place, at, row, notes)
            return
        if made.is_below:
            self.counts.below_score += 1
            return
        for problem in made.problems:
            notes.add(problem, place.file, at, row)
        self.counts.records += len(made.examples) - 1
        for example in made.examples:
            self._example(place, example, [], record, row, segment, notes)

    def _example(
        self,
        place: Place,
        example: Plain,
        problems: list[Problem],
        record: Record,
        row: int,
        segment: Segment,
        notes: Notes,
    ) -> None:
        """Mends, steps through, judges and spools an example."""
        at = record.line
        if self.repairs.names:
            example, problems = self.repairs.mend(example, problems)
        if any(p.severity == ERROR for p in problems):
            self._leave_out(problems, place, at, row, notes)
            return
        form = forms.of_body(example) if place.is_ours else place.form
        checked = place.form
        if self.pipeline:
            try:
                stepped = self.pipeline.apply(example)
            except StepFailed as e:
                self._leave_out([*problems, e.problem], place, at, row, notes)
                return
            if stepped is None:
                self.counts.stepped_out += 1
                for problem in problems:
                    notes.add(problem, place.file, at, row)
                return
            if stepped is not example:  # its fields may not be where the form has them
                checked = forms.of_body(stepped)
                form = form if body_of(stepped) == body_of(example) else checked
                example = stepped
        problems += rules.check(example, checked)
        problems += glance.look(example)
        if problems:
            if any(p.severity == ERROR for p in problems):
                self._leave_out(problems, place, at, row, notes)
                return
            for problem in problems:
                notes.add(problem, place.file, at, row)
        if record.spans:
            example["origin"] = {"file": place.name, "line": str(at), "spans": list(record.spans)}
        self._spool(place, example, form, at, row, segment, notes)

    def _leave_out(self, problems: Iterable[Problem], place: Place, at: int, row: int, notes: Notes) -> None:
        for problem in problems:
            notes.add(problem, place.file, at, row)
        self.counts.skipped += 1

    def _spool(
        self, place: Place, example: Plain, form: Form, at: int, row: int, segment: Segment, notes: Notes
    ) -> None:
        content, characters, taught = weigh(example)
        if "origin" not in example:  # a row of a parent keeps its own
            example["origin"] = {"file": place.name, "line": str(at)} if at else {"file": place.name}
        line = canonical.line_of(example)
        if len(line) > 2 * MAX_ROW_BYTES:
            self._leave_out([too_long("canonical row")], place, at, row, notes)
            return
        stratum = zlib.crc32(self._kind(place, example).encode()) if self._stratify_by else 0
        segment.add(line, content, at, row, (characters, taught), place.file, stratum, place.side, form)
        if place.form == PAPER or (place.is_ours and papers.is_of_paper(example)):
            segment.bind(papers.key_of(example["origin"]))

    def _kind(self, place: Place, example: Plain) -> str:
        """What the row counts as, for a stratified split."""
        if self._stratify_by == "source":
            return place.name
        if self._stratify_by == "form":
            return body_of(example) if place.is_ours else str(place.form)
        if self._stratify_by == _LANGUAGE:
            return self._languages(example)
        key = _METADATA.fullmatch(self._stratify_by)
        value: Any = example.get("metadata", {}).get(key[1]) if key else None
        return canonical.line_of({"value": value}).decode()
