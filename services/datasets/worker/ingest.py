"""The ingest worker: uploads in, shards and findings out.

Law of this room: it parses what strangers sent, so it is bounded, writes only
in the folders of its order, seals nothing, and ends when the daemon does. It
passes over each file once; of rows gone by it keeps 16 bytes.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import pathlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import BinaryIO

from google.protobuf import json_format

from qlorad.v1 import datasets_pb2, errors_pb2
from services.common.frames.v1 import ingest_pb2
from services.common.prompt import example as canonical
from services.common.shards import ShardWriter
from services.datasets.forms import NAMES, Form
from services.datasets.worker import forms, rules, split
from services.datasets.worker.bound import Bench, Refused
from services.datasets.worker.found import ERROR, INFO, WARNING, Problem, Record, Unreadable, clip
from services.datasets.worker.records import MAX_ROW_BYTES, open_records, too_long

SHOWN = 20
ENOUGH_ERRORS = 1000
_PEEK = 100
_SECONDS_BETWEEN = 0.2
_OUTPUT_FIELD = {
    datasets_pb2.ROW_FORMAT_CHAT: "messages",
    datasets_pb2.ROW_FORMAT_INSTRUCTION: "output",
    datasets_pb2.ROW_FORMAT_COMPLETION: "completion",
    datasets_pb2.ROW_FORMAT_TEXT: "text",
}


class Findings:
    """What was found: every finding on disk, the first errors and the counts in memory."""

    def __init__(self, path: pathlib.Path) -> None:
        self._file = path.open("wb")
        self.errors: list[datasets_pb2.Finding] = []
        self.error_count = 0
        self.rules: Counter[str] = Counter()

    def add(self, finding: datasets_pb2.Finding) -> None:
        """Writes a finding down."""
        self.rules[finding.rule] += 1
        if finding.severity == ERROR:
            self.error_count += 1
            if len(self.errors) < SHOWN:
                self.errors.append(finding)
        self._file.write(line_of(finding))

    def close(self) -> None:
        """Ends the file."""
        self._file.close()


def line_of(finding: datasets_pb2.Finding) -> bytes:
    """A finding as a line of findings.jsonl."""
    plain = json_format.MessageToDict(finding, preserving_proto_field_name=True)
    return json.dumps(plain, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


class Ingest:
    """One run over the uploads of an order."""

    def __init__(self, order: ingest_pb2.IngestOrder, tell: Callable[[str, int, int], None]) -> None:
        self._order = order
        self._request = order.request
        self._payload = pathlib.Path(order.payload)
        self._scratch = pathlib.Path(order.scratch)
        self._tell = tell
        self._told_at = 0.0
        self._form: Form = order.request.format
        self._columns: Mapping[str, str] = dict(order.request.columns)
        self._columns_met: set[str] = set()
        self._groups: set[bytes] = set()
        self._totals = rules.Totals()
        self._findings = Findings(self._scratch / "findings.jsonl")
        self._refuse = order.request.on_row_error != datasets_pb2.ON_ROW_ERROR_SKIP
        self._sizes = [pathlib.Path(s.path).stat().st_size for s in order.sources]

    def run(self) -> ingest_pb2.IngestDone:
        """All of it; Refused where the request's rules say so."""
        spool_path = self._scratch / "spool"
        with spool_path.open("wb") as spool:
            for number, source in enumerate(self._order.sources):
                self._read(number, source, spool)
        said = self._whole()
        self._findings.close()
        self._judge([p for p in said if p.severity == ERROR])
        cut = split.cut(self._groups, self._request.split)
        if isinstance(cut, Problem):
            raise self._refusal([cut.at("", 0)])
        rows = self._distribute(spool_path, cut)
        self._write_findings(said)
        stats = datasets_pb2.DatasetStats(
            rows=rows,
            skipped_rows=self._totals.skipped,
            duplicate_rows=self._totals.duplicates,
            findings=self._findings.rules,
            characters=self._totals.characters,
        )
        return ingest_pb2.IngestDone(format=self._form, stats=stats)

    # Reading

    def _read(self, number: int, source: ingest_pb2.IngestSource, spool: BinaryIO) -> None:
        name, before, total = source.filename, sum(self._sizes[:number]), sum(self._sizes)
        with open(source.path, "rb") as f:
            try:
                container, said, records = open_records(f, name)
                records = self._settle(container, name, said, records)
                for record in records:
                    self._row(record, name, spool)
                    self._progress("parse", before + f.tell(), total)
                    if self._refuse and self._findings.error_count >= ENOUGH_ERRORS:
                        break
            except Unreadable as e:
                self._findings.add(e.problem.at(name, e.line))
                raise self._refusal(self._findings.errors) from None

    def _settle(self, container: str, name: str, said: list[Problem], records: Iterator[Record]) -> Iterator[Record]:
        """Finds the form of rows by the first ones, says it, and gives all of them back."""
        first = list(itertools.islice(records, _PEEK)) if not self._form else list(itertools.islice(records, 1))
        keys = next((list(r.row) for r in first if r.row is not None), None)
        if keys is not None and container in ("csv", "tsv"):
            missing = [c for c in self._columns.values() if c not in keys]
            if missing:
                hint = f"columns of the file: {', '.join(clip(k) for k in keys)}"
                told = f"there is no column {', '.join(map(clip, missing))}"
                raise Unreadable(Problem("unknown_column", told, hint, missing[0]))
        how = "as asked" if self._request.format else "as its fields say"
        if not self._form and keys is None and len(first) == _PEEK:
            raise self._refusal([r.problem.at(name, r.line) for r in first[:SHOWN] if r.problem is not None])
        if not self._form and keys is not None:
            form = next((f for r in first if r.row is not None and (f := forms.sniff(r.row, self._columns))), None)
            if form is None:
                raise Unreadable(forms.unknown_form(keys))
            self._form = form
        if self._form:
            told = f"read as {container.upper()} with rows of {NAMES[self._form]} form, {how}"
            said.append(Problem("format", told, "name the format if this is wrong", "", INFO))
        for problem in said:
            self._findings.add(problem.at(name, 0))
        return itertools.chain(first, records)

    def _row(self, record: Record, name: str, spool: BinaryIO) -> None:
        if record.row is None:
            assert record.problem is not None
            self._findings.add(record.problem.at(name, record.line))
            self._totals.skipped += 1
            return
        if self._columns:
            self._columns_met.update(c for c in self._columns.values() if c in record.row)
        example, problems = forms.example_of(record.row, self._form, self._columns)
        if not any(p.severity == ERROR for p in problems):
            problems += rules.check(example, _OUTPUT_FIELD[self._form])
        for problem in problems:
            self._findings.add(problem.at(name, record.line))
        if any(p.severity == ERROR for p in problems):
            self._totals.skipped += 1
            return
        content = split.content_hash(example)
        if content in self._groups:
            told = "it was kept as asked" if self._request.keep_duplicates else "it was left out"
            self._findings.add(
                Problem("exact_duplicate", "the content of an earlier row", told, "", WARNING).at(name, record.line)
            )
            if not self._request.keep_duplicates:
                self._totals.duplicates += 1
                return
        self._groups.add(content)
        example.origin.file, example.origin.line = name, record.line
        self._spool(example, content, name, spool)

    def _spool(self, example: datasets_pb2.Example, content: bytes, name: str, spool: BinaryIO) -> None:
        line = canonical.dumps(example)
        if len(line) > 2 * MAX_ROW_BYTES:
            self._findings.add(too_long("canonical row").at(name, example.origin.line))
            self._totals.skipped += 1
            return
        spool.write(content + line + b"\n")
        characters, words = rules.size_of(example)
        self._totals.rows += 1
        self._totals.characters += characters
        self._totals.output_words += words

    # Judging

    def _whole(self) -> list[Problem]:
        said = rules.check_all(self._totals)
        for canonical_name, column in self._columns.items():
            if column not in self._columns_met and self._totals.rows + self._totals.skipped:
                told = f"no row has {clip(column)}, which was to be {canonical_name}"
                said.append(Problem("unknown_column", told, "a column that the rows have", column))
        for problem in said:
            self._findings.rules[problem.rule] += 1
        return said

    def _judge(self, errors: list[Problem]) -> None:
        if errors and not (self._refuse and self._findings.error_count):
            raise self._refusal([*(p.at("", 0) for p in errors), *self._findings.errors])
        if self._refuse and self._findings.error_count:
            raise self._refusal(self._findings.errors)

    def _refusal(self, shown: list[datasets_pb2.Finding]) -> Refused:
        count = max(self._findings.error_count, len(shown))
        more = f"; {count - len(shown)} more" if count > len(shown) else ""
        refusal = ingest_pb2.WorkerRefusal(
            reason=errors_pb2.REASON_INVALID_REQUEST, findings=self._findings.rules, resource=""
        )
        for finding in shown:
            place = f"{finding.file}:{finding.line}" if finding.line else finding.file or "rows"
            field = f"{place} {finding.field}".strip()
            refusal.violations.add(field=field, given=f"{finding.message} [{finding.rule}]", accepted=finding.hint)
        told = "; ".join(f"{v.field}: {v.given}; accepted: {v.accepted}" for v in refusal.violations[:5])
        refusal.message = f"{count} error{'s' if count != 1 else ''} in the rows: {told}{more}"
        return Refused(refusal)

    # Writing

    def _distribute(self, spool_path: pathlib.Path, cut: split.Cut) -> dict[str, int]:
        asked = self._request.split
        sides = [
            "train",
            *(["validation"] if asked.validation_fraction else []),
            *(["test"] if asked.test_fraction else []),
        ]
        done = 0
        with contextlib.ExitStack() as stack, spool_path.open("rb") as spool:
            writers = {side: stack.enter_context(ShardWriter(self._payload, side)) for side in sides}
            while content := spool.read(16):
                writers[cut.side(content)].add(spool.readline().removesuffix(b"\n"))
                done += 1
                self._progress("split", done, self._totals.rows)
        return {side: writer.rows for side, writer in writers.items()}

    def _write_findings(self, said: list[Problem]) -> None:
        with (
            (self._payload / "findings.jsonl").open("wb") as out,
            (self._scratch / "findings.jsonl").open("rb") as rows,
        ):
            for problem in said:
                out.write(line_of(problem.at("", 0)))
            while piece := rows.read(1 << 20):
                out.write(piece)

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
