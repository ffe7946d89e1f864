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
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from qlorad.v1 import datasets_pb2, errors_pb2
from services.common.frames.v1 import ingest_pb2
from services.datasets.forms import NAMES
from services.datasets.worker import duplicates, findings, grouping, language, near, rules, short
from services.datasets.worker.bound import Bench, Refused
from services.datasets.worker.documents.apart import UnreadableDocument
from services.datasets.worker.findings import Noted, Notes, Tally
from services.datasets.worker.found import ERROR, INFO, WARNING, Problem, Unreadable, clip
from services.datasets.worker.mate import finding_counts
from services.datasets.worker.quality import Figures, score
from services.datasets.worker.reading import Reading
from services.datasets.worker.shelve import Totals, distribute
from services.datasets.worker.split import SIDES
from services.datasets.worker.spool import Spool

_SECONDS_BETWEEN = 0.2
_SIMILARITY = 0.8
_WHOLE = -1
"""The number of the file in findings about the dataset as a whole."""

Array = npt.NDArray[Any]
Tell = Callable[[str, int, int], None]


def _left_out(name: str) -> Problem:
    told = f"{clip(name)} was not read: it is of another kind than the files that were, or names no split"
    return Problem("left_out", told, "name the files to read, by patterns", "", INFO)


class Ingest:
    """One run over the sources of an order."""

    def __init__(self, order: ingest_pb2.IngestOrder, tell: Tell) -> None:
        self._order = order
        self._request = order.request
        self._scratch = pathlib.Path(order.scratch)
        self._validate = order.validate_only
        self._refuse = not self._validate and order.request.on_row_error != datasets_pb2.ON_ROW_ERROR_SKIP
        self._tell = tell
        self._told_at = 0.0
        self._stage, self._since = "", time.monotonic()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._names = [s.filename for s in order.sources]
        self._reading = Reading(order, self._refuse, self._progress)
        self._whole = [_left_out(name) for name in order.left_out]
        """Found about the dataset as a whole."""
        self._unread_documents = 0
        self._later: dict[pathlib.Path, Tally] = {}
        """Notes of what was found after reading."""

    def run(self) -> ingest_pb2.IngestDone:
        """All of it; Refused where the request's rules say so."""
        self._enter("parse")
        try:
            for number, source in enumerate(self._order.sources):
                try:
                    self._reading.read(number, source)
                except UnreadableDocument as e:  # the others are told too
                    self._reading.refuse(number, e)
                    self._unread_documents += 1
                except Unreadable as e:
                    if not self._is_noted(e):
                        self._reading.refuse(number, e)
                    if not self._validate:
                        raise self._refusal() from None
        finally:
            self._reading.close()
        self._judge([])
        self._enter("duplicates")
        spool = self._reading.spool()
        keep, repeated = np.ones(spool.rows, bool), duplicates.repeated(spool, self._scratch)
        self._note_rows(spool, repeated, self._exact())
        if not self._request.keep_duplicates:
            keep[repeated] = False
        groups, nearly, dropped = self._near(spool, keep)
        self._enter("split")
        sides = grouping.sides(spool, grouping.bound(spool, groups), self._request.split)
        if isinstance(sides, Problem):
            self._judge([sides])
            sides = np.zeros(spool.rows, np.uint8)
        elif self._request.split.keep_source and (groups is not None or self._request.keep_duplicates):
            self._note_rows(spool, grouping.straddling(spool, keep, groups, sides), self._straddles())
        self._enter("write")
        payload = None if self._validate else pathlib.Path(self._order.payload)
        self._note_rows(spool, *short.outputs(spool, keep))
        said = language.sample(spool)
        with ThreadPoolExecutor(1) as beside:  # which has time while the disk works
            languages = beside.submit(language.mix, said, int(np.count_nonzero(keep)))
            totals = distribute(spool, keep, sides, payload, self._asked(), self._progress)
        self._enter("describe")
        stats = self._stats(totals, languages.result(), len(repeated), nearly, dropped)
        self._judge_whole(stats)
        self._write_findings(payload or self._scratch)
        return self._done(stats)

    def _is_noted(self, error: Unreadable) -> bool:
        """Whether the reader noted it where it happened."""
        noted = [n for tally in self._reading.tallies[-1:] for n in tally.errors[-1:]]
        return any(n[3] == error.problem.rule and n[1] == error.line for n in noted)

    def _asked(self) -> dict[str, bool]:
        asked = self._request.split
        by_share = {"validation": asked.validation_fraction > 0, "test": asked.test_fraction > 0}
        return {name: by_share.get(name, False) or name in self._reading.sides for name in SIDES}

    # Judging

    def _tallies(self) -> list[Tally]:
        whole = Tally([_whole(p) for p in self._whole if p.severity == ERROR])
        for problem in self._whole:
            whole.counts[problem.rule, problem.severity] += 1
        return [whole, *self._reading.tallies, *self._later.values()]

    def _judge(self, errors: list[Problem]) -> None:
        self._whole += errors
        if not self._validate and (errors or (self._refuse and any(t.error_count for t in self._tallies()))):
            raise self._refusal()

    def _judge_whole(self, stats: datasets_pb2.DatasetStats) -> None:
        rows = sum(stats.rows.values())
        said = rules.check_all(rows, stats.skipped_rows, stats.output_words, stats.below_score_papers)
        if not rows and self._reading.left:
            left = ", ".join(f"{n} {rule}" for rule, n in sorted(self._reading.left.items()))
            hint = "give prose headings, or take whole sections as texts (ROW_FORMAT_TEXT)"
            said = [Problem("no_rows", f"no item was found in the documents; left out: {left}", hint)]
        for name, column in self._request.columns.items():
            if column not in self._reading.parser.counts.columns_met and rows + stats.skipped_rows:
                told = f"no row has {clip(column)}, which was to be {name}"
                said.append(Problem("unknown_column", told, "a column that the rows have", column))
        self._whole += [p for p in said if p.severity != ERROR]
        self._judge([p for p in said if p.severity == ERROR])
        for tally in self._tallies():
            for (rule, _), n in tally.counts.items():
                stats.findings[rule] += n

    def _refusal(self) -> Refused:
        tallies = self._tallies()
        count = sum(t.error_count for t in tallies)
        noted = itertools.chain.from_iterable(t.errors for t in tallies)
        shown = [findings.finding(n, self._names) for n in itertools.islice(noted, findings.SHOWN)]
        more = f"; {count - len(shown)} more" if count > len(shown) else ""
        refusal = ingest_pb2.WorkerRefusal(reason=errors_pb2.REASON_INVALID_REQUEST, findings=finding_counts(tallies))
        for finding in shown:
            place = f"{finding.file}:{finding.line}" if finding.line else finding.file or "rows"
            field = f"{place} {finding.field}".strip()
            refusal.violations.add(field=field, given=f"{finding.message} [{finding.rule}]", accepted=finding.hint)
        told = "; ".join(f"{v.field}: {v.given}; accepted: {v.accepted}" for v in refusal.violations[:5])
        refusal.message = f"{count} error{'s' if count != 1 else ''} in the rows: {told}{more}"
        return Refused(refusal)

    # Duplicates

    def _exact(self) -> Problem:
        told = "it was kept as asked" if self._request.keep_duplicates else "it was left out"
        return Problem("exact_duplicate", "the content of an earlier row", told, "", WARNING)

    def _straddles(self) -> Problem:
        told = "equal or nearly equal to a row of another split, so what is measured on it is too good"
        return Problem("straddles", told, "leave it out of one of them, or split anew by fractions", "", WARNING)

    def _note_rows(self, spool: Spool, places: Array, problem: Problem) -> None:
        """Notes a problem of many rows, in order."""
        path = self._scratch / f"{problem.rule}.notes"
        notes = Notes(path)
        self._later[path] = notes.tally
        for block in spool.blocks() if len(places) else ():
            begin, end = np.searchsorted(places, [block.first, block.first + len(block.entries)])
            for entry in block.entries[places[begin:end] - block.first]:
                notes.add(problem, int(entry["file"]), int(entry["line"]), int(entry["row"]) + block.rows_before)
        notes.close()

    def _near(self, spool: Spool, keep: Array) -> tuple[Array | None, int, int]:
        """The first row of each row's near group, how many rows are in groups of several, and how many were dropped."""
        wanted = grouping.wanted(self._request)
        if wanted == datasets_pb2.NEAR_DUPLICATES_IGNORE or not spool.rows:
            return None, 0, 0
        self._enter("near duplicates")
        similarity = self._request.near_duplicate_similarity or _SIMILARITY
        groups = near.groups(spool, keep, similarity, self._scratch, self._progress)
        later = np.flatnonzero(keep & (groups != np.arange(spool.rows)))
        drop = wanted == datasets_pb2.NEAR_DUPLICATES_DROP
        told = f"nearly equal (similarity {similarity:g} or more) to an earlier row"
        stay = "where the source has them" if self._request.split.keep_source else "on one side of a split"
        hint = "it was left out" if drop else f"both stay {stay}; near_duplicates DROP leaves it out"
        self._note_rows(spool, later, Problem("near_duplicate", told, hint, "", WARNING))
        nearly = len(later) + len(np.unique(groups[later]))
        if drop:
            keep[later] = False
        return groups, nearly, len(later) if drop else 0

    # Telling

    def _stats(
        self, totals: Totals, languages: Mapping[str, int], repeated: int, nearly: int, dropped: int
    ) -> datasets_pb2.DatasetStats:
        parser = self._reading.parser
        stats = datasets_pb2.DatasetStats(
            rows=totals.rows,
            skipped_rows=parser.counts.skipped,
            below_score_papers=parser.counts.below_score,
            duplicate_rows=0 if self._request.keep_duplicates else repeated,
            characters=totals.characters,
            output_words=totals.words,
            forms={NAMES[datasets_pb2.RowFormat.ValueType(f)]: n for f, n in totals.forms.items()},
            near_duplicate_rows=nearly,
            near_dropped_rows=dropped,
            repaired=parser.repairs.applied,
            dropped_by_step=parser.pipeline.dropped,
            changed_by_step=parser.pipeline.changed,
            row_characters=totals.histogram,
            languages=languages,
            document_items=self._reading.items,
            left_out_blocks=self._reading.left,
            skipped_documents=self._unread_documents,
        )
        met: Counter[str] = Counter()
        for counted in finding_counts(self._tallies()):
            met[counted.rule] += counted.count
        is_looked_for = grouping.wanted(self._request) != datasets_pb2.NEAR_DUPLICATES_IGNORE
        figures = Figures(
            read=parser.counts.records - parser.counts.below_score,
            skipped=parser.counts.skipped,
            repeated=repeated,
            near=nearly if is_looked_for else None,
            kept=totals.kept,
            words=totals.words,
            findings=met,
        )
        stats.quality.CopyFrom(score(figures))
        return stats

    def _write_findings(self, folder: pathlib.Path) -> None:
        streams = [[_whole(p) for p in self._whole], *self._reading.notes()]
        streams += [findings.read(path) for path in self._later]
        findings.write(folder / "findings.jsonl", self._names, streams)

    def _done(self, stats: datasets_pb2.DatasetStats) -> ingest_pb2.IngestDone:
        self._enter("")
        lineage = self._reading.lineage
        lineage.steps.extend(self._reading.parser.pipeline.applied)
        lineage.repairs.extend(sorted(self._reading.parser.repairs.names))
        if self._request.HasField("min_score"):
            lineage.min_score = self._request.min_score
        found = {f.format for f in lineage.files}
        done = ingest_pb2.IngestDone(
            stats=stats,
            lineage=lineage,
            stage_seconds=self._seconds,
            peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            finding_counts=finding_counts(self._tallies()),
        )
        if len(found) == 1:
            done.format = found.pop()
        return done

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


def _whole(problem: Problem) -> Noted:
    p = problem
    return (_WHOLE, 0, 0, p.rule, int(p.severity), p.field, p.message, p.hint, p.repair)


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
