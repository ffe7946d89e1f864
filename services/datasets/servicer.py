"""The door of qlorad-datasets: checks the request, calls one method, answers.

Law of this room: no decision and no I/O of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from qlorad.v1 import datasets_pb2, datasets_pb2_grpc
from services.common.brought import Listing
from services.datasets import checks
from services.datasets.catalog import Catalog
from services.datasets.ingest import Ingests
from services.datasets.ledgers import Ledgers
from services.datasets.uploads import Uploads


class DatasetServicer(datasets_pb2_grpc.DatasetServiceServicer):
    """qlorad.v1.DatasetService."""

    def __init__(
        self,
        uploads: Uploads,
        catalog: Catalog,
        ingests: Ingests,
        ledgers: Ledgers,
        steps: Listing[datasets_pb2.StepKind],
    ) -> None:
        self._uploads = uploads
        self._catalog = catalog
        self._ingests = ingests
        self._ledgers = ledgers
        self._steps = steps

    async def StartUpload(
        self, request: datasets_pb2.StartUploadRequest, context: Any
    ) -> datasets_pb2.StartUploadResponse:
        checks.start_upload(request)
        return datasets_pb2.StartUploadResponse(upload=await self._uploads.start(request))

    async def WriteUpload(
        self, request_iterator: AsyncIterator[datasets_pb2.WriteUploadRequest], context: Any
    ) -> datasets_pb2.WriteUploadResponse:
        return datasets_pb2.WriteUploadResponse(upload=await self._uploads.write(request_iterator))

    async def GetUpload(self, request: datasets_pb2.GetUploadRequest, context: Any) -> datasets_pb2.GetUploadResponse:
        upload = await self._uploads.get(checks.upload_id("name", request.name))
        return datasets_pb2.GetUploadResponse(upload=upload)

    async def CreateDataset(
        self, request: datasets_pb2.CreateDatasetRequest, context: Any
    ) -> AsyncGenerator[datasets_pb2.CreateDatasetResponse, None]:
        checks.create_dataset(request)
        async with contextlib.aclosing(self._ingests.create(request)) as updates:
            async for update in updates:
                if isinstance(update, datasets_pb2.Dataset):
                    yield datasets_pb2.CreateDatasetResponse(dataset=update)
                else:
                    yield datasets_pb2.CreateDatasetResponse(progress=update)

    async def ValidateDataset(
        self, request: datasets_pb2.ValidateDatasetRequest, context: Any
    ) -> AsyncGenerator[datasets_pb2.ValidateDatasetResponse, None]:
        checks.validate_dataset(request)
        async with contextlib.aclosing(self._ingests.validate(request)) as updates:
            async for update in updates:
                yield update

    async def ListSteps(self, request: datasets_pb2.ListStepsRequest, context: Any) -> datasets_pb2.ListStepsResponse:
        return datasets_pb2.ListStepsResponse(steps=await self._steps.list())

    async def GetDataset(
        self, request: datasets_pb2.GetDatasetRequest, context: Any
    ) -> datasets_pb2.GetDatasetResponse:
        return datasets_pb2.GetDatasetResponse(dataset=await self._catalog.get(request.name))

    async def ListDatasets(
        self, request: datasets_pb2.ListDatasetsRequest, context: Any
    ) -> datasets_pb2.ListDatasetsResponse:
        page, token = await self._catalog.page(request.page_size, request.page_token)
        return datasets_pb2.ListDatasetsResponse(datasets=page, next_page_token=token)

    async def DeleteDataset(
        self, request: datasets_pb2.DeleteDatasetRequest, context: Any
    ) -> datasets_pb2.DeleteDatasetResponse:
        checks.delete_dataset(request)
        return await self._catalog.delete(request)

    async def ExportDataset(
        self, request: datasets_pb2.ExportDatasetRequest, context: Any
    ) -> AsyncGenerator[datasets_pb2.ExportDatasetResponse, None]:
        checks.export_dataset(request)
        async with contextlib.aclosing(self._catalog.export(request)) as pieces:
            async for piece in pieces:
                yield piece

    async def ListFindings(
        self, request: datasets_pb2.ListFindingsRequest, context: Any
    ) -> AsyncGenerator[datasets_pb2.ListFindingsResponse, None]:
        checks.list_findings(request)
        async with contextlib.aclosing(self._catalog.findings(request.name, request.min_severity)) as found:
            async for some in found:
                yield datasets_pb2.ListFindingsResponse(findings=some)

    async def BuildLedger(
        self, request: datasets_pb2.BuildLedgerRequest, context: Any
    ) -> AsyncGenerator[datasets_pb2.BuildLedgerResponse, None]:
        checks.build_ledger(request)
        async with contextlib.aclosing(self._ledgers.build(request)) as updates:
            async for update in updates:
                if isinstance(update, datasets_pb2.Ledger):
                    yield datasets_pb2.BuildLedgerResponse(ledger=update)
                elif isinstance(update, datasets_pb2.StageProgress):
                    yield datasets_pb2.BuildLedgerResponse(progress=update)

    async def MeasureDataset(
        self, request: datasets_pb2.MeasureDatasetRequest, context: Any
    ) -> AsyncGenerator[datasets_pb2.MeasureDatasetResponse, None]:
        checks.measure_dataset(request)
        async with contextlib.aclosing(self._ledgers.measure(request)) as updates:
            async for update in updates:
                if isinstance(update, datasets_pb2.DatasetMeasure):
                    yield datasets_pb2.MeasureDatasetResponse(measure=update)
                elif isinstance(update, datasets_pb2.StageProgress):
                    yield datasets_pb2.MeasureDatasetResponse(progress=update)

    async def ReadLedger(
        self, request: datasets_pb2.ReadLedgerRequest, context: Any
    ) -> AsyncGenerator[datasets_pb2.ReadLedgerResponse, None]:
        checks.read_ledger(request)
        async with contextlib.aclosing(self._ledgers.read(request)) as batches:
            async for batch in batches:
                yield batch
