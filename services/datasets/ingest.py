"""From complete uploads to a sealed dataset with a name: the run behind CreateDataset.

Law of this room: an intent is noted before anything is staged, and the answer
after everything is sealed, so a kill at any line leaves nothing half-made
visible, and the same request_id finishes what was begun.
"""

from __future__ import annotations

import asyncio
import contextlib
import pathlib
import shutil
import sqlite3
import tempfile
from collections.abc import AsyncGenerator

from google.protobuf import json_format

from qlorad.v1 import artifacts_pb2, datasets_pb2, errors_pb2
from services.common import facts, idempotency
from services.common.errors import Fault, already_exists
from services.common.frames.v1 import ingest_pb2
from services.common.shelf import Shelf, Staged
from services.common.store import Store
from services.datasets.catalog import DATASETS, proto, read_findings
from services.datasets.inputs import Given, Inputs
from services.datasets.metrics import Metrics
from services.datasets.runs import Run, Runs, Tell
from services.datasets.workers import Workers, fault_of

MIGRATION = """
CREATE TABLE ingests (
  request_id TEXT PRIMARY KEY,
  body BLOB NOT NULL,
  staged TEXT NOT NULL
) WITHOUT ROWID
"""
_METHOD = "CreateDataset"


class Ingests:
    """Every running CreateDataset."""

    def __init__(
        self,
        shelf: Shelf,
        store: Store,
        inputs: Inputs,
        workers: Workers,
        turn: asyncio.Semaphore,
        metrics: Metrics,
        validations: pathlib.Path,
        max_unpacked_bytes: int,
    ) -> None:
        self._shelf = shelf
        self._store = store
        self._inputs = inputs
        self._validations = validations
        self._max_unpacked_bytes = max_unpacked_bytes
        self._workers = workers
        self._metrics = metrics
        self.runs: Runs[datasets_pb2.Dataset] = Runs(turn)
        self.checks: Runs[ingest_pb2.IngestDone] = Runs(turn)

    async def sweep(self) -> None:
        """Throws away what runs of a killed daemon had staged; their intents stay for whoever asks again."""
        staged = await self._store.run(lambda db: [str(r["staged"]) for r in db.execute("SELECT staged FROM ingests")])
        for folder in staged:
            await asyncio.to_thread(self._drop, self._staged(folder))
        await asyncio.to_thread(shutil.rmtree, self._validations, True)

    def _staged(self, name: str) -> Staged:
        return Staged(self._shelf.root / "staging" / name)

    def _drop(self, staged: Staged) -> None:
        self._shelf.drop(staged)
        shutil.rmtree(_scratch(staged), ignore_errors=True)

    async def create(
        self, request: datasets_pb2.CreateDatasetRequest
    ) -> AsyncGenerator[datasets_pb2.StageProgress | datasets_pb2.Dataset, None]:
        """Progress, then the dataset. The same request_id attaches, or gets the noted answer."""
        body = idempotency.body_of(request)
        noted = await self._store.run(lambda db: idempotency.recall(db, _METHOD, request.request_id, body))
        if noted is not None:
            yield datasets_pb2.Dataset.FromString(noted)
            return
        run = self.runs.get(request.request_id) or self._begin(request, body)
        if run.body != body:
            raise Fault(
                errors_pb2.REASON_REQUEST_ID_REUSED,
                f"request_id {request.request_id!r} runs for another {_METHOD}; accepted: a new id, or the same body",
                resource=f"requests/{request.request_id}",
            )
        async with contextlib.aclosing(run.watch()) as updates:
            async for update in updates:
                yield update

    def _begin(self, request: datasets_pb2.CreateDatasetRequest, body: bytes) -> Run[datasets_pb2.Dataset]:
        return self.runs.begin(request.request_id, body, lambda tell: self._make(request, body, tell))

    async def _make(self, request: datasets_pb2.CreateDatasetRequest, body: bytes, tell: Tell) -> datasets_pb2.Dataset:
        # Another caller's run may have ended since this one looked.
        noted = await self._store.run(lambda db: idempotency.recall(db, _METHOD, request.request_id, body))
        if noted is not None:
            return datasets_pb2.Dataset.FromString(noted)
        await self._check_alias(request, body)
        async with self._inputs.gathered(request, tell) as given:
            staged = await asyncio.to_thread(self._shelf.stage)
            try:
                await self._store.run(lambda db: _intend(db, request.request_id, body, staged.folder.name))
                await asyncio.to_thread(_scratch(staged).mkdir)
                try:
                    order = ingest_pb2.IngestOrder(payload=str(staged.payload), scratch=str(_scratch(staged)))
                    done = await self._parse(order, request, given, tell)
                except Fault:
                    # Nothing of it was published, so nothing is left to finish.
                    await self._store.run(lambda db: _forget(db, request.request_id))
                    raise
                # From here on it goes to its end, whoever is leaving.
                work = self._publish(request, body, given, staged, done, tell)
                return await asyncio.shield(asyncio.ensure_future(work))
            finally:
                await asyncio.shield(asyncio.ensure_future(asyncio.to_thread(self._drop, staged)))

    async def validate(
        self, request: datasets_pb2.ValidateDatasetRequest
    ) -> AsyncGenerator[datasets_pb2.ValidateDatasetResponse, None]:
        """Progress, findings, the report: everything that CreateDataset would do but sealing."""
        plan = request.plan
        folder = await asyncio.to_thread(self._folder)
        try:
            done: ingest_pb2.IngestDone | None = None
            run: Run[ingest_pb2.IngestDone] = self.checks.begin(
                folder.name, b"", lambda tell: self._look(plan, folder, tell)
            )
            try:
                async for update in run.watch():
                    if isinstance(update, ingest_pb2.IngestDone):
                        done = update
                    else:
                        yield datasets_pb2.ValidateDatasetResponse(progress=update)
            finally:
                run.cancel()
                await run.ended()
            assert done is not None
            async for some in read_findings(folder / "findings.jsonl", request.min_severity):
                yield datasets_pb2.ValidateDatasetResponse(findings=datasets_pb2.Findings(findings=some))
            yield datasets_pb2.ValidateDatasetResponse(report=_report(done))
        finally:
            await asyncio.shield(asyncio.ensure_future(asyncio.to_thread(shutil.rmtree, folder, True)))

    def _folder(self) -> pathlib.Path:
        self._validations.mkdir(parents=True, exist_ok=True)
        return pathlib.Path(tempfile.mkdtemp(dir=self._validations))

    async def _look(
        self, plan: datasets_pb2.CreateDatasetRequest, folder: pathlib.Path, tell: Tell
    ) -> ingest_pb2.IngestDone:
        async with self._inputs.gathered(plan, tell) as given:
            order = ingest_pb2.IngestOrder(scratch=str(folder), validate_only=True)
            done = await self._parse(order, plan, given, tell)
            given.complete(done.lineage)
            return done

    async def _check_alias(self, request: datasets_pb2.CreateDatasetRequest, body: bytes) -> None:
        """ALREADY_EXISTS before any work; a run that was begun with this id decides at its end."""
        if request.move_alias:
            return
        begun = await self._store.run(
            lambda db: db.execute(
                "SELECT 1 FROM ingests WHERE request_id = ? AND body = ?", (request.request_id, body)
            ).fetchone()
        )
        if begun is None and await asyncio.to_thread(self._shelf.alias, DATASETS, request.dataset_id) is not None:
            raise _taken(request)

    async def _parse(
        self,
        order: ingest_pb2.IngestOrder,
        request: datasets_pb2.CreateDatasetRequest,
        given: Given,
        tell: Tell,
    ) -> ingest_pb2.IngestDone:
        order.request.CopyFrom(request)
        order.sources.extend(given.sources)
        order.left_out.extend(given.left_out)
        order.max_unpacked_bytes = self._max_unpacked_bytes
        async with contextlib.aclosing(self._workers.reports("ingest", order)) as frames:
            async for frame in frames:
                report = ingest_pb2.IngestReport.FromString(frame)
                if report.WhichOneof("report") == "progress":
                    tell(report.progress.stage, report.progress.done, report.progress.total)
                elif report.WhichOneof("report") == "refusal":
                    self._metrics.count_refused(report.refusal.findings)
                    raise fault_of(report.refusal)
                else:
                    self._metrics.count_run(report.done)
                    return report.done
        raise AssertionError("reports end with a result or a fault")

    async def _publish(
        self,
        request: datasets_pb2.CreateDatasetRequest,
        body: bytes,
        given: Given,
        staged: Staged,
        done: ingest_pb2.IngestDone,
        tell: Tell,
    ) -> datasets_pb2.Dataset:
        tell("seal", 0, 0)
        given.complete(done.lineage)
        told = facts.DatasetFacts(
            format=datasets_pb2.RowFormat.Name(done.format),
            stats=json_format.MessageToDict(done.stats, preserving_proto_field_name=True),
            split=json_format.MessageToDict(request.split, preserving_proto_field_name=True),
            source_sha256=tuple(f.sha256 for f in done.lineage.files),
            lineage=json_format.MessageToDict(done.lineage, preserving_proto_field_name=True),
        )
        story = {
            "dataset_id": request.dataset_id,
            "request_id": request.request_id,
            "lineage": told.lineage,
            "columns": dict(request.columns),
        }

        def publish() -> datasets_pb2.Dataset:
            sealed = self._shelf.seal(
                staged,
                artifacts_pb2.ARTIFACT_KIND_DATASET,
                facts.to_facts(told),
                provenance=(f"ingest-{request.dataset_id}", story),
            )
            self._name(request, sealed.digest)
            return proto(sealed, f"{DATASETS}/{request.dataset_id}")

        dataset = await asyncio.to_thread(publish)

        def note(db: sqlite3.Connection) -> None:
            _forget(db, request.request_id)
            idempotency.note(db, _METHOD, request.request_id, body, dataset.SerializeToString())

        await self._store.run(note)
        self._metrics.count_rows(done.format, done.stats)
        return dataset

    def _name(self, request: datasets_pb2.CreateDatasetRequest, digest: str) -> None:
        expected = None if request.move_alias else 0
        now = self._shelf.alias(DATASETS, request.dataset_id)
        if now is not None and now.digest == digest:
            return  # named by the run that was killed, or moved to where it is
        try:
            self._shelf.set_alias(DATASETS, request.dataset_id, digest, expected)
        except Fault as e:
            if e.reason != errors_pb2.REASON_STALE_GENERATION:
                raise
            raise _taken(request) from None


def _report(done: ingest_pb2.IngestDone) -> datasets_pb2.ValidationReport:
    severities = {name.removeprefix("SEVERITY_").lower(): 0 for name in datasets_pb2.Severity.keys()[1:]}
    for counted in done.finding_counts:
        severities[datasets_pb2.Severity.Name(counted.severity).removeprefix("SEVERITY_").lower()] += counted.count
    return datasets_pb2.ValidationReport(
        passes=not severities["error"], stats=done.stats, lineage=done.lineage, severities=severities
    )


def _scratch(staged: Staged) -> pathlib.Path:
    return staged.folder.with_name(staged.folder.name + ".scratch")


def _intend(db: sqlite3.Connection, request_id: str, body: bytes, staged: str) -> None:
    db.execute("INSERT OR REPLACE INTO ingests (request_id, body, staged) VALUES (?, ?, ?)", (request_id, body, staged))


def _forget(db: sqlite3.Connection, request_id: str) -> None:
    db.execute("DELETE FROM ingests WHERE request_id = ?", (request_id,))


def _taken(request: datasets_pb2.CreateDatasetRequest) -> Fault:
    return already_exists(f"{DATASETS}/{request.dataset_id}", "choose another dataset_id, or set move_alias")
