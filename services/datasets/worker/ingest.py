"""The ingest worker: sources in, shards and findings out.

Law of this room: it parses what strangers sent, so it is bounded, writes only
in the folders of its order, seals nothing, and ends when the daemon does. It
passes over each file once; what it knows of rows gone by lies on disk.
"""

from __future__ import annotations

import itertools
import pathlib
import resource
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from qlorad.v1 import datasets_pb2, errors_pb2
from services.common.artifacts import sha256_file
from services.common.frames.v1 import ingest_pb2
from services.datasets.forms import NAMES
from services.datasets.worker import duplicates, findings, forms, language, near, rules, split
from services.datasets.worker.bound import Bench, Refused
from services.datasets.worker.chunks import Chunks
from services.datasets.worker.findings import Noted, Notes
from services.datasets.worker.found import ERROR, INFO, WARNING, Problem, Record, Unreadable, clip
from services.datasets.worker.parents import Parent
from services.datasets.worker.parse import Counts, Parser, Place
from services.datasets.worker.quality import Figures, score
from services.datasets.worker.repairs import Repairs
from services.datasets.worker.shelve import Totals, distribute
from services.datasets.worker.sources import Source, open_source
from services.datasets.worker.spool import Segment, Spool
from services.datasets.worker.steps import Pipeline

_PEEK = 100
_SECONDS_BETWEEN = 0.2
_SIMILARITY = 0.8
_SIDE = {name: n for n, name in enumerate(split.SIDES)}
_WHOLE = -1
"""The number of the file in findings about the dataset as a whole."""

Tell = Callable[[str, int, int], None]


class Ingest:
    """One run over the sources of an order."""

    def __init__(self, order: ingest_pb2.IngestOrder, tell: Tell) -> None:
        request = order.request
        self._order = order
        self._request = request
        self._payload = pathlib.Path(order.payload)
        self._scratch = pathlib.Path(order.scratch)
        self._tell = tell
        self._told_at = 0.0
        self._names = [s.filename for s in order.sources]
        self._stage = ""
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._since = time.monotonic()
        self._validate = order.validate_only
        self._refuse = not self._validate and request.on_row_error != datasets_pb2.ON_ROW_ERROR_SKIP
        self._asked = self._sides_asked()
        self._lineage = datasets_pb2.DatasetLineage()
        self._counts = Counts()
        self._segments: list[int] = []
        self._stretches: list[tuple[pathlib.Path, int]] = []
        """Notes of each segment, and how many rows of its file came before."""
        self._notes = Notes(self._scratch / "whole.notes")
        self._kept: list[Notes] = [self._notes]
        self._parser = Parser(
            request.split.stratify_by,
            Repairs(request.repairs),
            Pipeline.load(request.steps),
            language.of,
            self._counts,
            self._refuse,
        )

    def _sides_asked(self) -> dict[str, bool]:
        asked = self._request.split
        return {
            "train": True,
            "validation": asked.validation_fraction > 0,
            "test": asked.test_fraction > 0,
        }

    def run(self) -> ingest_pb2.IngestDone:
        """All of it; Refused where the request's rules say so."""
        self._enter("parse")
        for number, source in enumerate(self._order.sources):
            self._read(number, source)
        self._lineage.steps.extend(self._parser.pipeline.applied)
        self._lineage.repairs.extend(sorted(self._parser.repairs.names))
        spool = Spool(self._scratch, self._segments)
        self._judge([])
        self._enter("duplicates")
        repeated = duplicates.repeated(spool, self._scratch)
        self._note_rows(spool, repeated, "exact.notes", self._exact_problem())
        keep = np.ones(spool.rows, bool)
        if not self._request.keep_duplicates:
            keep[repeated] = False
        groups, nearly, dropped = self._near(spool, keep, repeated)
        self._enter("split")
        sides = self._sides(spool, keep, groups)
        self._enter("write")
        totals = distribute(spool, keep, sides, None if self._validate else self._payload, self._asked, self._progress)
        stats = self._stats(spool, totals, len(repeated), nearly, dropped)
        self._whole(stats)
        self._write_findings()
        return self._done(stats)

    # Reading

    def _read(self, number: int, told: ingest_pb2.IngestSource) -> None:
        path = pathlib.Path(told.path)
        notes = self._open_notes(0)
        try:
            if told.sealed:
                self._parent(number, told, notes)
            else:
                with open_source(path, told.filename, self._order.max_unpacked_bytes) as source:
                    self._file(number, told, source, notes)
        except Unreadable as e:
            notes.add(e.problem, number, e.line, 0)
            if not self._validate:
                raise self._refusal() from None
        finally:
            notes.close()

    def _open_notes(self, rows_before: int) -> Notes:
        path = self._scratch / f"{len(self._stretches):06d}.notes"
        self._stretches.append((path, rows_before))
        notes = Notes(path)
        self._kept.append(notes)
        return notes

    def _parent(self, number: int, told: ingest_pb2.IngestSource, notes: Notes) -> None:
        side = _SIDE.get(told.split, 0) if self._request.split.keep_source else 0
        place = Place(number, told.filename, side, datasets_pb2.ROW_FORMAT_CANONICAL, {}, is_ours=True)
        self._asked[told.split] = self._asked.get(told.split, False) or side > 0
        rows = Parent(pathlib.Path(told.path), told.split)
        self._spool(place, rows, notes, None, len(rows))

    def _file(self, number: int, told: ingest_pb2.IngestSource, source: Source, notes: Notes) -> None:
        path = pathlib.Path(told.path)
        size = path.stat().st_size
        form, first = self._settle(number, source, notes)
        side = 0
        if self._request.split.keep_source:
            side = _SIDE.get(told.split or "train", 0)
            self._asked[split.SIDES[side]] = True
        place = Place(number, told.filename, side, form, dict(self._request.columns))
        self._lineage.files.add(
            file=told.filename,
            sha256=told.sha256 or sha256_file(path),
            size_bytes=size,
            format=form,
            container=source.container,
        )
        chunks = Chunks.of(path, source.container, self._order, place) if form else None
        if chunks is not None:
            self._in_chunks(chunks, size)
        else:
            self._spool(place, itertools.chain(first, source.records), notes, source.position, size)

    def _spool(
        self, place: Place, records: Iterable[Record], notes: Notes, position: Callable[[], int] | None, total: int
    ) -> None:
        self._segments.append(len(self._segments))
        segment = Segment(self._scratch, self._segments[-1])
        try:
            for _ in self._parser.run(place, records, segment, notes):
                self._progress("parse", position() if position else segment.rows, total)
        finally:
            segment.close()

    def _in_chunks(self, chunks: Chunks, size: int) -> None:
        """A large file by several processes; each stretch has a segment and notes of its own."""
        raise AssertionError

    def _settle(self, number: int, source: Source, notes: Notes) -> tuple[forms.Form, list[Record]]:
        """Finds the form of rows by the first ones, says it with its evidence, and gives them back."""
        first = list(itertools.islice(source.records, _PEEK))
        readable = [r.row for r in first if r.row is not None]
        columns = dict(self._request.columns)
        keys = list(readable[0]) if readable else None
        if keys is not None and source.container.partition(".")[0] in ("csv", "tsv", "parquet", "arrow"):
            missing = [c for c in columns.values() if c not in keys]
            if missing:
                hint = f"columns of the file: {', '.join(clip(k) for k in keys)}"
                told = f"there is no column {', '.join(map(clip, missing))}"
                raise Unreadable(Problem("unknown_column", told, hint, missing[0]))
        said = list(source.said)
        form = self._request.format
        if form:
            told = f"read as {source.container} with {NAMES[form]} rows, as asked"
            said.append(Problem("format", told, "", "", INFO))
        elif readable:
            form, evidence = forms.sniff(readable, columns)
            if not form:
                raise Unreadable(forms.unknown_form(keys or []))
            told = f"read as {source.container} with {NAMES[form]} rows: {evidence}"
            said.append(Problem("format", told, "name the format if this is wrong", "", INFO))
        for problem in said:
            notes.add(problem, number, 0, 0)
        return form, first

    # Judging

    def _error_count(self) -> int:
        return sum(n.error_count for n in self._kept)

    def _judge(self, errors: list[Problem]) -> None:
        for problem in errors:
            self._notes.add(problem, _WHOLE, 0, 0)
        if not self._validate and (errors or (self._refuse and self._error_count())):
            raise self._refusal()

    def _refusal(self) -> Refused:
        count = self._error_count()
        noted = itertools.chain.from_iterable(n.errors for n in self._kept)
        shown = [findings.finding(n, self._names) for n in itertools.islice(noted, findings.SHOWN)]
        more = f"; {count - len(shown)} more" if count > len(shown) else ""
        refusal = ingest_pb2.WorkerRefusal(reason=errors_pb2.REASON_INVALID_REQUEST, findings=self._finding_counts())
        for finding in shown:
            place = f"{finding.file}:{finding.line}" if finding.line else finding.file or "rows"
            field = f"{place} {finding.field}".strip()
            refusal.violations.add(field=field, given=f"{finding.message} [{finding.rule}]", accepted=finding.hint)
        told = "; ".join(f"{v.field}: {v.given}; accepted: {v.accepted}" for v in refusal.violations[:5])
        refusal.message = f"{count} error{'s' if count != 1 else ''} in the rows: {told}{more}"
        return Refused(refusal)

    def _exact_problem(self) -> Problem:
        told = "it was kept as asked" if self._request.keep_duplicates else "it was left out"
        return Problem("exact_duplicate", "the content of an earlier row", told, "", WARNING)

    def _note_rows(self, spool: Spool, places: np.ndarray, name: str, problem: Problem) -> None:
        """Notes a problem of many rows, in order."""
        if not len(places):
            return
        path = self._scratch / name
        notes = Notes(path)
        self._kept.append(notes)
        self._stretches.append((path, 0))
        for block in spool.blocks():
            begin, end = np.searchsorted(places, [block.first, block.first + len(block.entries)])
            for entry in block.entries[places[begin:end] - block.first]:
                notes.add(problem, int(entry["file"]), int(entry["line"]), int(entry["row"]))
        notes.close()

    def _near(self, spool: Spool, keep: np.ndarray, repeated: np.ndarray) -> tuple[np.ndarray | None, int, int]:
        """The first row of each row's near group, how many rows are in groups of several, and how many were dropped."""
        wanted = self._request.near_duplicates
        asked = self._request.split
        if wanted == datasets_pb2.NEAR_DUPLICATES_UNSPECIFIED:
            splits = asked.validation_fraction or asked.test_fraction
            wanted = datasets_pb2.NEAR_DUPLICATES_TOGETHER if splits else datasets_pb2.NEAR_DUPLICATES_IGNORE
        if wanted == datasets_pb2.NEAR_DUPLICATES_IGNORE or not spool.rows:
            return None, 0, 0
        self._enter("near duplicates")
        similarity = self._request.near_duplicate_similarity or _SIMILARITY
        groups = near.groups(spool, keep, similarity, self._scratch, self._progress)
        later = np.flatnonzero(keep & (groups != np.arange(spool.rows)))
        drop = wanted == datasets_pb2.NEAR_DUPLICATES_DROP
        told = f"nearly equal (similarity {similarity:g} or more) to an earlier row"
        hint = "it was left out" if drop else "both stay on one side of a split; near_duplicates DROP leaves it out"
        self._note_rows(spool, later, "near.notes", Problem("near_duplicate", told, hint, "", WARNING))
        nearly = len(later) + len(np.unique(groups[later]))
        if drop:
            keep[later] = False
        return groups, nearly, len(later) if drop else 0

    def _sides(self, spool: Spool, keep: np.ndarray, groups: np.ndarray | None) -> np.ndarray:
        """The side of every row."""
        asked = self._request.split
        sides = np.zeros(spool.rows, np.uint8)
        if asked.keep_source:
            for block in spool.blocks():
                sides[block.first : block.first + len(block.entries)] = block.entries["side"]
            return sides
        if not (asked.validation_fraction or asked.test_fraction) or not spool.rows:
            return sides
        contents, strata = np.empty(spool.rows, np.uint64), np.empty(spool.rows, np.uint16)
        for block in spool.blocks():
            here = slice(block.first, block.first + len(block.entries))
            contents[here], strata[here] = block.entries["content"][:, 0], block.entries["stratum"]
        if groups is not None:
            # A group is known by the lowest of its contents, whatever the order of rows.
            order = np.lexsort((contents, groups))
            heads = np.flatnonzero(np.r_[True, groups[order][1:] != groups[order][:-1]])
            lowest = order[heads]
            sizes = np.diff(np.r_[heads, len(order)])
            contents[order], strata[order] = np.repeat(contents[lowest], sizes), np.repeat(strata[lowest], sizes)
        different, first, back = np.unique(contents, return_index=True, return_inverse=True)
        found = split.sides(different, strata[first], asked)
        if isinstance(found, Problem):
            self._judge([found])
            return sides
        return found[back]

    # Telling

    def _stats(
        self, spool: Spool, totals: Totals, repeated: int, nearly: int, dropped: int
    ) -> datasets_pb2.DatasetStats:
        stats = datasets_pb2.DatasetStats(
            rows=totals.rows,
            skipped_rows=self._counts.skipped,
            duplicate_rows=0 if self._request.keep_duplicates else repeated,
            characters=totals.characters,
            output_words=totals.words,
            forms={NAMES[datasets_pb2.RowFormat.ValueType(f)]: n for f, n in totals.forms.items()},
            near_duplicate_rows=nearly,
            near_dropped_rows=dropped,
            repaired=self._parser.repairs.applied,
            dropped_by_step=self._parser.pipeline.dropped,
            changed_by_step=self._parser.pipeline.changed,
            row_characters=totals.histogram,
            languages=language.mix(spool, totals.kept),
        )
        figures = Figures(
            read=spool.rows + self._counts.skipped + self._counts.stepped_out,
            skipped=self._counts.skipped,
            repeated=repeated,
            near=nearly,
            kept=totals.kept,
            words=totals.words,
            findings={rule: n for notes in self._kept for (rule, _), n in notes.counts.items()},
        )
        stats.quality.CopyFrom(score(figures))
        return stats

    def _whole(self, stats: datasets_pb2.DatasetStats) -> None:
        """What is to be said of the dataset as a whole."""
        rows = sum(stats.rows.values())
        said = rules.check_all(rows, stats.skipped_rows, stats.output_words)
        for name, column in self._request.columns.items():
            if column not in self._counts.columns_met and rows + stats.skipped_rows:
                told = f"no row has {clip(column)}, which was to be {name}"
                said.append(Problem("unknown_column", told, "a column that the rows have", column))
        errors = [p for p in said if p.severity == ERROR]
        for problem in said:
            if problem.severity != ERROR:
                self._notes.add(problem, _WHOLE, 0, 0)
        self._judge(errors)
        for notes in self._kept:
            for (rule, _), n in notes.counts.items():
                stats.findings[rule] += n

    def _write_findings(self) -> None:
        self._notes.close()
        streams: list[Iterator[Noted]] = [findings.read(self._scratch / "whole.notes")]
        streams += [findings.read(path, before) for path, before in self._stretches]
        into = self._scratch if self._validate else self._payload
        findings.write(into / "findings.jsonl", self._names, streams)

    def _done(self, stats: datasets_pb2.DatasetStats) -> ingest_pb2.IngestDone:
        self._enter("")
        found: set[Any] = {f.format for f in self._lineage.files}
        return ingest_pb2.IngestDone(
            format=found.pop() if len(found) == 1 else 0,
            stats=stats,
            lineage=self._lineage,
            stage_seconds=self._seconds,
            peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            finding_counts=self._finding_counts(),
        )

    def _finding_counts(self) -> list[ingest_pb2.FindingCount]:
        counts: Counter[tuple[str, int]] = Counter()
        for notes in self._kept:
            counts.update(notes.counts)
        return [
            ingest_pb2.FindingCount(rule=rule, severity=severity, count=n)  # type: ignore[arg-type]
            for (rule, severity), n in sorted(counts.items())
        ]

    def _enter(self, stage: str) -> None:
        now = time.monotonic()
        if self._stage:
            self._seconds[self._stage] += now - self._since
        self._stage, self._since = stage, now

    def _progress(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._told_at >= _SECONDS_BETWEEN:
            self._told_at = now
            self._tell(stage, done, total)


def main() -> None:
    bench = Bench.open()
    order = ingest_pb2.IngestOrder.FromString(bench.order)

    def tell(stage: str, done: int, total: int) -> None:
        progress = datasets_pb2.StageProgress(stage=stage, done=done, total=total)
        bench.send(ingest_pb2.IngestReport(progress=progress))

    with bench.refusing(lambda refusal: bench.send(ingest_pb2.IngestReport(refusal=refusal))):
        bench.send(ingest_pb2.IngestReport(done=Ingest(order, tell).run()))


if __name__ == "__main__":
    main()
