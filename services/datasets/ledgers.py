"""Ledgers and measures: made and read by a worker, since tokenizers and arrays have no place here.

Law of this room: one run for one dataset, model and settings, whoever asks.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncGenerator

from qlorad.v1 import artifacts_pb2, datasets_pb2
from services.common import names
from services.common.errors import not_found
from services.common.frames.v1 import ingest_pb2
from services.common.shelf import Shelf
from services.datasets.catalog import DATASETS, Catalog
from services.datasets.runs import Runs, Tell
from services.datasets.workers import Workers, fault_of


class Ledgers:
    """Every ledger that is being made or read."""

    def __init__(self, shelf: Shelf, catalog: Catalog, workers: Workers, turn: asyncio.Semaphore) -> None:
        self._shelf = shelf
        self._catalog = catalog
        self._workers = workers
        self.runs: Runs[datasets_pb2.Ledger | datasets_pb2.DatasetMeasure] = Runs(turn)

    async def build(
        self, request: datasets_pb2.BuildLedgerRequest
    ) -> AsyncGenerator[datasets_pb2.StageProgress | datasets_pb2.Ledger | datasets_pb2.DatasetMeasure, None]:
        """Progress, then the ledger; attaches to a run for the same inputs."""
        dataset, model = await self._digests(request.dataset, request.model)
        work = ingest_pb2.LedgerBuild(
            dataset_digest=dataset,
            model_digest=model,
            max_length_tokens=request.max_length_tokens,
            over_length=request.over_length or datasets_pb2.OVER_LENGTH_ERROR,
            prompt_format=request.prompt_format,
        )
        order = ingest_pb2.LedgerOrder(store=str(self._shelf.root), build=work)
        async with contextlib.aclosing(self._run(order, dataset, model)) as updates:
            async for update in updates:
                yield update

    async def measure(
        self, request: datasets_pb2.MeasureDatasetRequest
    ) -> AsyncGenerator[datasets_pb2.StageProgress | datasets_pb2.Ledger | datasets_pb2.DatasetMeasure, None]:
        """Progress, then the measure; attaches to a run for the same inputs."""
        dataset, model = await self._digests(request.dataset, request.model)
        work = ingest_pb2.LedgerMeasure(
            dataset_digest=dataset,
            model_digest=model,
            prompt_format=request.prompt_format,
            max_length_tokens=sorted(set(request.max_length_tokens)),
        )
        order = ingest_pb2.LedgerOrder(store=str(self._shelf.root), measure=work)
        async with contextlib.aclosing(self._run(order, dataset, model)) as updates:
            async for update in updates:
                yield update

    async def _digests(self, dataset: str, model: str) -> tuple[str, str]:
        opened = await asyncio.to_thread(self._catalog.open, dataset, "dataset")
        ident = names.parse("model", model, "models")
        return opened.digest, (await asyncio.to_thread(self._shelf.open, "models", ident, False, "model")).digest

    def _run(
        self, order: ingest_pb2.LedgerOrder, *held: str
    ) -> AsyncGenerator[datasets_pb2.StageProgress | datasets_pb2.Ledger | datasets_pb2.DatasetMeasure, None]:
        body = order.SerializeToString(deterministic=True)
        key = hashlib.sha256(body).hexdigest()
        run = self.runs.get(key) or self.runs.begin(key, body, lambda tell: self._make(order, held, tell))
        return run.watch()

    async def _make(
        self, order: ingest_pb2.LedgerOrder, held: tuple[str, ...], tell: Tell
    ) -> datasets_pb2.Ledger | datasets_pb2.DatasetMeasure:
        pins = [await asyncio.to_thread(self._shelf.pin, digest, "ledger") for digest in held]
        try:
            async with contextlib.aclosing(self._workers.reports("ledger", order)) as frames:
                async for frame in frames:
                    report = ingest_pb2.LedgerReport.FromString(frame)
                    if report.WhichOneof("report") == "progress":
                        tell(report.progress.stage, report.progress.done, report.progress.total)
                    elif report.WhichOneof("report") == "refusal":
                        raise fault_of(report.refusal)
                    else:
                        return report.ledger if report.HasField("ledger") else report.measure
            raise AssertionError("reports end with a result or a fault")
        finally:
            for pin in pins:
                pin.release()

    async def read(
        self, request: datasets_pb2.ReadLedgerRequest
    ) -> AsyncGenerator[datasets_pb2.ReadLedgerResponse, None]:
        """Rows as the trainer reads them, some at a time."""
        sealed = await asyncio.to_thread(self._shelf.open, DATASETS, request.ledger, False, "ledger")
        if sealed.manifest.kind != artifacts_pb2.ARTIFACT_KIND_LEDGER:
            raise not_found(request.ledger)
        read = datasets_pb2.ReadLedgerRequest()
        read.CopyFrom(request)
        read.ledger = sealed.digest
        order = ingest_pb2.LedgerOrder(store=str(self._shelf.root), read=read)
        pin = await asyncio.to_thread(self._shelf.pin, sealed.digest, "reader")
        try:
            async with contextlib.aclosing(self._workers.reports("ledger", order)) as frames:
                async for frame in frames:
                    report = ingest_pb2.LedgerReport.FromString(frame)
                    if report.WhichOneof("report") == "refusal":
                        raise fault_of(report.refusal)
                    if report.WhichOneof("report") != "rows":
                        return
                    yield report.rows
        finally:
            pin.release()
