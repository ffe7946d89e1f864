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
from collections.abc import AsyncGenerator, Mapping

from google.protobuf import json_format

from qlorad.v1 import artifacts_pb2, datasets_pb2, errors_pb2
from services.common import facts, idempotency
from services.common.errors import Fault, already_exists, wrong_state
from services.common.frames.v1 import ingest_pb2
from services.common.shelf import Shelf, Staged
from services.common.store import Store
from services.datasets.catalog import DATASETS, proto
from services.datasets.checks import upload_id
from services.datasets.metrics import Metrics
from services.datasets.runs import Run, Runs, Tell
from services.datasets.uploads import Uploads
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
        self, shelf: Shelf, store: Store, uploads: Uploads, workers: Workers, turn: asyncio.Semaphore, metrics: Metrics
    ) -> None:
        self._shelf = shelf
        self._store = store
        self._uploads = uploads
        self._workers = workers
        self._metrics = metrics
        self.runs: Runs[datasets_pb2.Dataset] = Runs(turn)

    async def sweep(self) -> None:
        """Throws away what runs of a killed daemon had staged; their intents stay for whoever asks again."""
        staged = await self._store.run(lambda db: [str(r["staged"]) for r in db.execute("SELECT staged FROM ingests")])
        for folder in staged:
            await asyncio.to_thread(self._drop, self._staged(folder))

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
        sources = [await self._source(f"uploads[{i}]", name) for i, name in enumerate(request.uploads)]
        await self._check_alias(request, body)
        staged = await asyncio.to_thread(self._shelf.stage)
        try:
            await self._store.run(lambda db: _intend(db, request.request_id, body, staged.folder.name))
            await asyncio.to_thread(_scratch(staged).mkdir)
            try:
                done = await self._parse(request, sources, staged, tell)
            except Fault:
                # Nothing of it was published, so nothing is left to finish.
                await self._store.run(lambda db: _forget(db, request.request_id))
                raise
            # From here on it goes to its end, whoever is leaving.
            return await asyncio.shield(
                asyncio.ensure_future(self._publish(request, body, sources, staged, done, tell))
            )
        finally:
            await asyncio.shield(asyncio.ensure_future(asyncio.to_thread(self._drop, staged)))

    async def _source(self, field: str, name: str) -> datasets_pb2.Upload:
        upload = await self._uploads.get(upload_id(field, name))
        if not upload.complete:
            told = f"incomplete ({upload.committed_bytes} of {upload.size_bytes} bytes)"
            raise wrong_state(name, told, ["complete"])
        return upload

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
        request: datasets_pb2.CreateDatasetRequest,
        sources: list[datasets_pb2.Upload],
        staged: Staged,
        tell: Tell,
    ) -> ingest_pb2.IngestDone:
        order = ingest_pb2.IngestOrder(payload=str(staged.payload), scratch=str(_scratch(staged)), request=request)
        for source in sources:
            path = self._uploads.path(source.name.removeprefix("uploads/"))
            order.sources.add(path=str(path), filename=source.filename)
        async with contextlib.aclosing(self._workers.reports("ingest", order)) as frames:
            async for frame in frames:
                report = ingest_pb2.IngestReport.FromString(frame)
                if report.WhichOneof("report") == "progress":
                    tell(report.progress.stage, report.progress.done, report.progress.total)
                elif report.WhichOneof("report") == "refusal":
                    self._count(report.refusal.findings)
                    raise fault_of(report.refusal)
                else:
                    self._count(report.done.stats.findings)
                    return report.done
        raise AssertionError("reports end with a result or a fault")

    def _count(self, findings: Mapping[str, int]) -> None:
        for rule, number in findings.items():
            self._metrics.findings.labels(rule).inc(number)

    async def _publish(
        self,
        request: datasets_pb2.CreateDatasetRequest,
        body: bytes,
        sources: list[datasets_pb2.Upload],
        staged: Staged,
        done: ingest_pb2.IngestDone,
        tell: Tell,
    ) -> datasets_pb2.Dataset:
        tell("seal", 0, 0)
        told = facts.DatasetFacts(
            format=datasets_pb2.RowFormat.Name(done.format),
            stats=json_format.MessageToDict(done.stats, preserving_proto_field_name=True),
            split=json_format.MessageToDict(request.split, preserving_proto_field_name=True),
            source_sha256=tuple(s.sha256 for s in sources),
        )
        story = {
            "dataset_id": request.dataset_id,
            "request_id": request.request_id,
            "sources": [{"filename": s.filename, "sha256": s.sha256, "size_bytes": s.size_bytes} for s in sources],
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


def _scratch(staged: Staged) -> pathlib.Path:
    return staged.folder.with_name(staged.folder.name + ".scratch")


def _intend(db: sqlite3.Connection, request_id: str, body: bytes, staged: str) -> None:
    db.execute("INSERT OR REPLACE INTO ingests (request_id, body, staged) VALUES (?, ?, ?)", (request_id, body, staged))


def _forget(db: sqlite3.Connection, request_id: str) -> None:
    db.execute("DELETE FROM ingests WHERE request_id = ?", (request_id,))


def _taken(request: datasets_pb2.CreateDatasetRequest) -> Fault:
    return already_exists(f"{DATASETS}/{request.dataset_id}", "choose another dataset_id, or set move_alias")
