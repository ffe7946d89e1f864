"""A second process for large files: takes stretches, writes segments and notes, reports.

Law of this room: as the ingest worker's, whose order it works on; it ends when
that does.
"""

from __future__ import annotations

import json
import pathlib

from services.common.frames.v1 import ingest_pb2
from services.datasets.worker import language
from services.datasets.worker.bound import Bench
from services.datasets.worker.findings import Notes, Tally
from services.datasets.worker.jsonl import JsonLines
from services.datasets.worker.parse import Parser, Place, notes_path
from services.datasets.worker.repairs import Repairs
from services.datasets.worker.spool import Segment
from services.datasets.worker.steps import Pipeline
from services.datasets.worker.stretches import Opened


def parse(order: ingest_pb2.StretchOrder) -> ingest_pb2.StretchReport:
    """What becomes of a stretch."""
    request, scratch, path = order.request, pathlib.Path(order.scratch), pathlib.Path(order.path)
    parser = Parser(
        request.split.stratify_by,
        Repairs(request.repairs),
        Pipeline.load(request.steps),
        language.of,
        order.stop_at_errors,
        request.min_score if request.HasField("min_score") else None,
    )
    place = Place(order.file, order.filename, order.side, order.format, dict(request.columns))
    lines = Opened(path, order.begin, order.end)
    segment, notes = Segment(scratch, order.segment), Notes(notes_path(scratch, order.segment))
    try:
        for _ in parser.run(place, [], JsonLines(lines, order.lines_before), segment, notes):
            pass
    finally:
        lines.close()
        segment.close()
        notes.close()
    return ingest_pb2.StretchReport(
        records=parser.counts.records,
        skipped=parser.counts.skipped,
        stepped_out=parser.counts.stepped_out,
        below_score=parser.counts.below_score,
        columns_met=parser.counts.columns_met,
        repaired=parser.repairs.applied,
        dropped_by_step=parser.pipeline.dropped,
        changed_by_step=parser.pipeline.changed,
        finding_counts=finding_counts([notes.tally]),
        first_errors_json=json.dumps(notes.tally.errors).encode(),
    )


def finding_counts(tallies: list[Tally]) -> list[ingest_pb2.FindingCount]:
    """Findings of several tallies, by rule and severity."""
    total = Tally()
    for tally in tallies:
        total.counts.update(tally.counts)
    return [
        ingest_pb2.FindingCount(rule=rule, severity=severity, count=n)  # type: ignore[arg-type]
        for (rule, severity), n in sorted(total.counts.items())
    ]


def main() -> None:
    bench = Bench.open(is_watched=False)
    body: bytes | None = bench.order
    while body is not None:
        order = ingest_pb2.StretchOrder.FromString(body)
        with bench.refusing(lambda refusal: bench.send(ingest_pb2.StretchReport(refusal=refusal))):
            bench.send(parse(order))
        body = bench.line.receive()


if __name__ == "__main__":
    main()
