"""From sources to spooled rows: each file's form is found, its rows are parsed, and all of it is told.

Law of this room: sources are read in order; segments, and the notes of each,
are numbered in that order, whoever writes them.
"""

from __future__ import annotations

import pathlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

from qlorad.v1 import datasets_pb2
from services.common.artifacts import sha256_file
from services.common.frames.v1 import ingest_pb2
from services.datasets.documents import kind_of
from services.datasets.forms import CHAT, NAMES, PAPER, TEXT, Form
from services.datasets.worker import findings, forms, language, mate, stretches
from services.datasets.worker.documents.apart import Reader, UnreadableDocument
from services.datasets.worker.findings import Noted, Notes, Tally
from services.datasets.worker.found import INFO, Problem, Record, Unreadable, clip
from services.datasets.worker.parents import Parent
from services.datasets.worker.parse import ENOUGH_ERRORS, Parser, Place, notes_path
from services.datasets.worker.repairs import Repairs
from services.datasets.worker.sources import Source, open_source
from services.datasets.worker.split import SIDES, named
from services.datasets.worker.spool import Segment, Spool
from services.datasets.worker.steps import Pipeline

_PEEK = 100
_PEEK_BYTES = 4 << 20
_TABLES = ("csv", "tsv", "parquet", "arrow")

Tell = Callable[[str, int, int], None]


class Reading:
    """What was read so far."""

    def __init__(self, order: ingest_pb2.IngestOrder, stop_at_errors: bool, tell: Tell) -> None:
        request = order.request
        self._order = order
        self._request = request
        self._scratch = pathlib.Path(order.scratch)
        self._tell = tell
        self._stop = stop_at_errors
        self._rows_before: list[int] = []
        """For each segment: records of its file before it."""
        self.lineage = datasets_pb2.DatasetLineage()
        self.tallies: list[Tally] = []
        self.sides = {SIDES[0]}
        """That sources name."""
        self.items: Counter[str] = Counter()
        """Of documents, by rule."""
        self.left: Counter[str] = Counter()
        """Blocks of documents that are in no item, by rule."""
        self._reader = Reader()
        self.parser = Parser(
            request.split.stratify_by,
            Repairs(request.repairs),
            Pipeline.load(request.steps, "plan." if order.validate_only else ""),
            language.of,
            stop_at_errors,
            request.min_score if request.HasField("min_score") else None,
        )

    def read(self, number: int, told: ingest_pb2.IngestSource) -> None:
        """Spools a source. Unreadable is noted, and raised where errors end the run."""
        if told.sealed:
            self._parent(number, told)
            return
        if kind_of(told.filename):
            self._document(number, told)
            return
        with open_source(pathlib.Path(told.path), told.filename, self._order.max_unpacked_bytes) as source:
            self._file(number, told, source)

    def refuse(self, number: int, error: Unreadable) -> None:
        """Notes why a source cannot be read on."""
        notes = self._open(0)
        notes.add(error.problem, number, error.line, 0)
        notes.close()

    def close(self) -> None:
        """Ends what reads documents."""
        self._reader.close()

    def spool(self) -> Spool:
        """All rows that were spooled."""
        return Spool(self._scratch, self._rows_before)

    def notes(self) -> list[Iterator[Noted]]:
        """The notes of each segment, in order."""
        return [findings.read(notes_path(self._scratch, n), before) for n, before in enumerate(self._rows_before)]

    def _side(self, number: int, told: ingest_pb2.IngestSource, notes: Notes) -> int:
        if not self._request.split.keep_source:
            return 0
        side, problem = named(told.split)
        if problem is not None:
            notes.add(problem, number, 0, 0)
        self.sides.add(SIDES[side])
        return side

    def _parent(self, number: int, told: ingest_pb2.IngestSource) -> None:
        form = datasets_pb2.ROW_FORMAT_CANONICAL
        notes = self._open(0)
        place = Place(number, told.filename, self._side(number, told, notes), form, {}, is_ours=True)
        rows = Parent(pathlib.Path(told.path), told.split)
        self._parse(place, [], rows, notes, None, len(rows))

    def _document(self, number: int, told: ingest_pb2.IngestSource) -> None:
        """Spools the items of a document; what is said of it lies in a segment before them."""
        path, form = pathlib.Path(told.path), self._request.format or CHAT
        if form not in (CHAT, TEXT):
            accepted = "chat or text; --format of an export writes any other form"
            raise UnreadableDocument(Problem("document_form", f"documents do not become {NAMES[form]} rows", accepted))
        if self._request.HasField("min_score"):
            told_so = "min_score is for papers, but this is a document"
            raise UnreadableDocument(Problem("not_papers", told_so, "papers alone, or no min_score"))
        read = self._reader.read(path, told.filename, form == TEXT)
        self._tell("documents", number + 1, len(self._order.sources))
        notes = self._open(0)
        place = Place(number, told.filename, self._side(number, told, notes), form, {})
        for line, problem in read.findings:
            notes.add(problem, number, line, 0)
        notes.close()
        self.items.update(read.items)
        self.left.update(read.left)
        self.lineage.files.add(
            file=told.filename,
            sha256=told.sha256 or sha256_file(path),
            size_bytes=told.size_bytes or path.stat().st_size,
            format=form,
            container=read.kind,
            items=len(read.records),
            url=told.url,
        )
        self._parse(place, [], read.records, self._open(0), None, len(read.records))

    def _file(self, number: int, told: ingest_pb2.IngestSource, source: Source) -> None:
        path = pathlib.Path(told.path)
        size = path.stat().st_size
        notes = self._open(0)
        form, columns, first = self._settle(number, source, notes, told.text_column)
        place = Place(number, told.filename, self._side(number, told, notes), form, columns)
        self.lineage.files.add(
            file=told.filename,
            sha256=told.sha256 or sha256_file(path),
            size_bytes=told.size_bytes or size,
            format=form,
            container=source.container,
            url=told.url,
        )
        if form and stretches.worth_it(source.container, size):
            notes.close()
            self._in_stretches(place, path, size)
        else:
            self._parse(place, first, source.records, notes, source.position, size)

    def _open(self, rows_before: int) -> Notes:
        """Notes of a segment, which holds no row as long as nobody spools one."""
        number = len(self._rows_before)
        notes = Notes(notes_path(self._scratch, number))
        Segment(self._scratch, number).close()
        self._rows_before.append(rows_before)
        self.tallies.append(notes.tally)
        return notes

    def _parse(
        self,
        place: Place,
        first: Sequence[Record],
        rest: Iterable[Record],
        notes: Notes,
        position: Callable[[], int] | None,
        total: int,
    ) -> None:
        segment = Segment(self._scratch, len(self._rows_before) - 1)
        try:
            for _ in self.parser.run(place, first, rest, segment, notes):
                self._tell("parse", position() if position else segment.rows, total)
        except Unreadable as e:
            notes.add(e.problem, place.file, e.line, 0)
            if self._stop:
                raise
        finally:
            segment.close()
            notes.close()

    def _in_stretches(self, place: Place, path: pathlib.Path, size: int) -> None:
        done, errors = 0, sum(t.error_count for t in self.tallies)
        lengths: dict[int, int] = {}
        request = datasets_pb2.CreateDatasetRequest()
        request.CopyFrom(self._request)
        request.columns.update(place.columns)  # those that were sniffed too

        def orders() -> Iterator[ingest_pb2.StretchOrder]:
            # A byte order mark is no part of the first line.
            begin = 3 if path.open("rb").read(3) == b"\xef\xbb\xbf" else 0
            for number, stretch in enumerate(stretches.cut(path, begin), len(self._rows_before)):
                lengths[number] = stretch.end - stretch.begin
                yield ingest_pb2.StretchOrder(
                    path=str(path),
                    begin=stretch.begin,
                    end=stretch.end,
                    lines_before=stretch.lines_before,
                    file=place.file,
                    filename=place.name,
                    side=place.side,
                    format=place.form,
                    scratch=str(self._scratch),
                    segment=number,
                    stop_at_errors=self._stop,
                    request=request,
                )

        def told(order: ingest_pb2.StretchOrder, report: ingest_pb2.StretchReport) -> bool:
            nonlocal done, errors
            done += lengths[order.segment]
            errors += stretches.tally_of(report).error_count
            self._tell("parse", done, size)
            return self._stop and errors >= ENOUGH_ERRORS

        before = 0
        for report in stretches.parse_all(orders(), mate.parse, told):
            self._rows_before.append(before)
            before += report.records
            self.tallies.append(stretches.tally_of(report))
            counts = self.parser.counts
            counts.records += report.records
            counts.skipped += report.skipped
            counts.stepped_out += report.stepped_out
            counts.below_score += report.below_score
            counts.columns_met.update(report.columns_met)
            self.parser.repairs.applied.update(report.repaired)
            self.parser.pipeline.dropped.update(report.dropped_by_step)
            self.parser.pipeline.changed.update(report.changed_by_step)

    def _settle(
        self, number: int, source: Source, notes: Notes, text_column: str
    ) -> tuple[Form, dict[str, str], list[Record]]:
        """Finds form and field names of rows by the first ones, says it with its evidence, and gives them back."""
        first = _peeked(source.records)
        readable = [r.row for r in first if r.row is not None]
        columns = dict(self._request.columns)
        keys = list(readable[0]) if readable else None
        if keys is not None and source.container.partition(".")[0] in _TABLES:
            missing = [c for c in columns.values() if c not in keys]
            if missing:
                hint = f"columns of the file: {', '.join(clip(k) for k in keys)}"
                told = f"there is no column {', '.join(map(clip, missing))}"
                raise Unreadable(Problem("unknown_column", told, hint, missing[0]))
        said = list(source.said)
        sniffed = forms.sniff(readable, columns, self._request.format)
        if text_column and not sniffed.evidence and self._request.format in (0, TEXT) and "text" not in columns:
            sniffed = forms.sniff(readable, {**columns, "text": text_column}, self._request.format)
        if self._request.HasField("min_score") and sniffed.form != PAPER and readable:
            named = f"are {NAMES[sniffed.form]}" if sniffed.form else "fit no form"
            told = f"min_score is for papers, but the rows {named}"
            raise Unreadable(Problem("not_papers", told, "papers alone, or no min_score"))
        evidence = f": {sniffed.evidence}" if sniffed.evidence else ""
        if self._request.format:
            told = f"read as {source.container} with {NAMES[sniffed.form]} rows, as asked{evidence}"
            said.append(Problem("format", told, "", "", INFO))
        elif readable:
            if not sniffed.form:
                raise Unreadable(forms.unknown_form(keys or []))
            told = f"read as {source.container} with {NAMES[sniffed.form]} rows{evidence}"
            said.append(Problem("format", told, "name the format if this is wrong", "", INFO))
        for problem in said:
            notes.add(problem, number, 0, 0)
        return sniffed.form, dict(sniffed.columns), first


def _peeked(records: Iterator[Record]) -> list[Record]:
    """The first records, as many as show what they are; large ones need not be many."""
    first: list[Record] = []
    size = 0
    for record in records:
        first.append(record)
        size += len(str(record.row))
        if len(first) == _PEEK or size > _PEEK_BYTES:
            break
    return first
